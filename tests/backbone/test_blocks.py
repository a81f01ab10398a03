import copy

import pytest
import torch
from torch import nn

from backbone.blocks import Halves, as_map, block_names, block_outputs, replace_lower_half, summary
from backbone.recognizer import Architecture, build_recognizer
from util.runtime.errors import UsageError

SIZE = 32


def face_vit(depth: int = 4) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "num_heads": 2, "depth": depth}
    return build_recognizer(Architecture("face_vit_tiny", 4, SIZE, "cosface", sizes)).backbone.eval()


def of_timm(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return build_recognizer(Architecture(name, 4, SIZE, model_options=options)).backbone.eval()


def plain_vit(**options) -> nn.Module:
    return of_timm("vit_tiny_patch16_224", depth=4, **options)


SMALL_SWIN = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 1, 1), "window_size": 4, "patch_size": 1}
# Each with the block after which it is cut, and how many prefix tokens its blocks have.
BACKBONES = {
    "face_vit": (face_vit, "blocks.1", 1),
    "vit": (plain_vit, "blocks.1", 1),
    "vit with registers": (lambda: plain_vit(reg_tokens=2), "blocks.1", 3),
    "vit with a norm before the blocks": (lambda: plain_vit(pre_norm=True), "blocks.1", 1),
    "vit with mean pooling": (lambda: plain_vit(global_pool="avg"), "blocks.1", 1),
    "vit without a class token": (lambda: plain_vit(global_pool="avg", class_token=False), "blocks.1", 0),
    "eva": (lambda: of_timm("eva02_tiny_patch14_224", depth=4, patch_size=16), "blocks.1", 1),
    "cait": (lambda: of_timm("cait_xxs24_224", depth=2), "blocks.1", 0),
    "swin": (lambda: of_timm("swin_tiny_patch4_window7_224", **SMALL_SWIN), "layers.1.blocks.0", 0),
    "convnext": (lambda: of_timm("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 8, 16, 16)), "stages.1.blocks.0", 0),
    "resnet": (lambda: of_timm("resnet18"), "layer2.1", 0),
    "efficientnet": (lambda: of_timm("efficientnet_lite0"), "blocks.3.2", 0),
    "iresnet": (lambda: of_timm("iresnet18"), "layer2.1", 0),
}
KINDS = pytest.mark.parametrize("kind", BACKBONES)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@KINDS
@torch.no_grad()
def test_the_halves_in_turn_are_the_whole(images, kind):
    make, cut, _ = BACKBONES[kind]
    backbone = make()
    halves = Halves(backbone, SIZE)
    assert halves.names[-1] == cut
    mid = halves.mid(backbone, images)
    torch.testing.assert_close(halves.upper(backbone, torch.zeros_like(images), mid), backbone(images), rtol=1e-4, atol=1e-5)
    other = halves.upper(backbone, images, mid.flip(0))
    torch.testing.assert_close(other, backbone(images.flip(0)), rtol=1e-4, atol=1e-5)


@KINDS
@torch.no_grad()
def test_a_lower_half_hands_on_the_same_and_has_no_weights_of_the_upper(images, kind):
    backbone = BACKBONES[kind][0]()
    halves = Halves(backbone, SIZE)
    half, expected = halves.lower_half(backbone), halves.mid(backbone, images)
    torch.testing.assert_close(halves.mid(half, images), expected, rtol=0, atol=0)
    for parameter in half.parameters():  # its own
        parameter.add_(1)
    torch.testing.assert_close(halves.mid(backbone, images), expected, rtol=0, atol=0)
    above = {name for name, _ in backbone.named_parameters()} - {name for name, _ in half.named_parameters()}
    assert above
    for name in above:
        backbone.get_parameter(name).add_(1)
    torch.testing.assert_close(halves.mid(backbone, images), expected, rtol=0, atol=0)


@KINDS
@torch.no_grad()
def test_the_outputs_are_what_leaves_the_blocks(images, kind):
    make, _, prefix = BACKBONES[kind]
    backbone, seen = make(), []
    names = block_names(backbone)[:2]
    hooks = [backbone.get_submodule(n).register_forward_hook(lambda m, i, output: seen.append(output)) for n in names]
    expected = backbone(images)
    [hook.remove() for hook in hooks]
    for found, output in zip(block_outputs(backbone, images, names), seen, strict=True):
        torch.testing.assert_close(found, output, rtol=0, atol=1e-6)
        features = as_map(backbone, found)
        assert features.shape[0] == 3
        assert features.shape[2] == features.shape[3]
        assert features[0].numel() == output[0].numel() - prefix * features.shape[1]
        assert summary(backbone, found).shape == features.shape[:2]
        if found.ndim == 4:
            torch.testing.assert_close(summary(backbone, found), features.mean(dim=(2, 3)))
    torch.testing.assert_close(backbone(images), expected, rtol=0, atol=0)  # all is back in its place


def test_the_gradient_passes_both_halves(images):
    backbone = face_vit()
    halves = Halves(backbone, SIZE)
    halves.upper(backbone, images, halves.mid(backbone, images)).sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize(("depth", "lower"), [(2, 1), (3, 1), (4, 2), (5, 2)])
def test_an_odd_block_belongs_to_the_upper_half(depth, lower):
    backbone = face_vit(depth)
    halves = Halves(backbone, SIZE)
    assert halves.names == [f"blocks.{i}" for i in range(lower)]
    first = ("cls_token", "pos_embed", "patch_embed.", *(f"blocks.{i}." for i in range(lower)))
    expected = {name for name, _ in backbone.named_parameters() if name.startswith(first)}
    assert set(halves.lower_half(backbone).state_dict()) == expected


@pytest.mark.parametrize("make", [face_vit, plain_vit, BACKBONES["resnet"][0]])
@torch.no_grad()
def test_putting_the_lower_half_back_restores_the_embeddings(images, make):
    backbone = make()
    kept = copy.deepcopy(Halves(backbone, SIZE).lower_half(backbone).state_dict())
    expected = backbone(images)
    for name in kept:
        if name in dict(backbone.named_parameters()):
            backbone.get_parameter(name).add_(torch.randn_like(kept[name]))
    assert not torch.allclose(backbone(images), expected, atol=0.1)
    replace_lower_half(backbone, SIZE, kept, "deposit")
    torch.testing.assert_close(backbone(images), expected, rtol=0, atol=0)


def without(name: str):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: tensors | {"cls_token": torch.zeros(1, 1, 31)},
        lambda tensors: tensors | {"norm.weight": torch.zeros(32)},
        lambda tensors: tensors | {"blocks.2.norm1.weight": torch.zeros(32)},
        lambda tensors: {},
        without("blocks.1.mlp.fc1.weight"),
        without("pos_embed"),
    ],
)
def test_what_is_no_lower_half_of_the_model_is_refused_and_changes_nothing(spoil):
    backbone = face_vit()
    before, lower = copy.deepcopy(backbone.state_dict()), Halves(backbone, SIZE).lower_half(backbone).state_dict()
    tensors = spoil({name: torch.full_like(tensor, 7.0) for name, tensor in lower.items()})
    with pytest.raises(UsageError, match=r"some/file.safetensors"):
        replace_lower_half(backbone, SIZE, tensors, "some/file.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize(("name", "told"), [("densenet121", "DenseNet"), ("mvitv2_tiny", "more than one tensor")])
def test_a_network_that_hands_on_more_than_one_tensor_is_refused(name, told):
    with pytest.raises(UsageError, match=told):
        Halves(of_timm(name), SIZE)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(UsageError, match="Linear cannot be cut in halves"):
        Halves(nn.Linear(2, 2), SIZE)
    assert block_names(nn.Linear(2, 2)) == []
