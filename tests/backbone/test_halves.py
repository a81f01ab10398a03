import copy

import pytest
import timm
import torch
from torch import nn

from backbone.halves import half_depth, lower_half, mid_features, replace_lower_half, upper_half
from backbone.recognizer import Architecture, build_recognizer
from util.runtime.errors import UsageError


def face_vit(depth: int = 4) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "num_heads": 2, "depth": depth}
    return build_recognizer(Architecture("face_vit_tiny", 4, 32, "cosface", sizes)).backbone.eval()


def plain_vit(**options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=0, **options).eval()


BACKBONES = {
    "face_vit": face_vit,
    "vit": plain_vit,
    "vit with registers": lambda: plain_vit(reg_tokens=2),
    "vit with a norm before the blocks": lambda: plain_vit(pre_norm=True),
    "vit with mean pooling": lambda: plain_vit(global_pool="avg"),
    # Fails: without prefix tokens forward_intermediates returns the spatial tokens alone, and the pair that mid_features
    # takes apart is two images of the batch.
    "vit without a class token": lambda: plain_vit(global_pool="avg", class_token=False),
}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("training", [False, True])
def test_the_halves_in_turn_are_the_whole(images, kind, training):
    backbone = BACKBONES[kind]().train(training)
    with torch.no_grad():
        expected = backbone(images)
        for depth in range(1, len(backbone.blocks)):
            found = upper_half(backbone, mid_features(backbone, images, depth), depth)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_mid_features_are_what_leaves_the_block(count):
    backbone, seen = plain_vit(), []
    backbone.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.rand(count, 3, 32, 32)
    backbone(images)
    found = mid_features(backbone, images, 2)
    assert found.shape == (count, 5, 192)
    torch.testing.assert_close(found, seen[0], rtol=0, atol=1e-6)


def test_the_gradient_passes_both_halves(images):
    backbone = face_vit()
    upper_half(backbone, mid_features(backbone, images, 2), 2).sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize(("depth", "lower"), [(2, 1), (3, 1), (4, 2), (5, 2)])
def test_an_odd_block_belongs_to_the_upper_half(depth, lower):
    backbone = face_vit(depth)
    assert half_depth(backbone) == lower
    assert len(lower_half(backbone).blocks) == lower
    assert len(backbone.blocks) == depth


@pytest.mark.parametrize("make", [face_vit, plain_vit])
def test_a_lower_half_computes_the_mid_features_with_parameters_of_its_own(images, make):
    backbone = make()
    depth = half_depth(backbone)
    half = lower_half(backbone)
    with torch.no_grad():
        expected = mid_features(backbone, images, depth)
        torch.testing.assert_close(mid_features(half, images, depth), expected, rtol=0, atol=1e-6)
        for parameter in half.parameters():
            parameter.add_(1)
        torch.testing.assert_close(mid_features(backbone, images, depth), expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", [face_vit, plain_vit])
def test_the_lower_half_has_all_parameters_below_the_middle_and_none_above(make):
    backbone = make()
    first = ("cls_token", "pos_embed", "patch_embed.", *(f"blocks.{i}." for i in range(half_depth(backbone))))
    assert set(lower_half(backbone).state_dict()) == {n for n, _ in backbone.named_parameters() if n.startswith(first)}


@pytest.mark.parametrize("make", [face_vit, plain_vit])
def test_putting_the_lower_half_back_restores_the_embeddings(images, make):
    backbone = make()
    kept = copy.deepcopy(lower_half(backbone).state_dict())
    with torch.no_grad():
        expected = backbone(images)
        for name in kept:
            backbone.get_parameter(name).add_(torch.randn_like(kept[name]))
        assert not torch.allclose(backbone(images), expected, atol=0.1)
        replace_lower_half(backbone, kept, "deposit")
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
    before = copy.deepcopy(backbone.state_dict())
    tensors = spoil({name: torch.full_like(tensor, 7.0) for name, tensor in lower_half(backbone).state_dict().items()})
    with pytest.raises(UsageError, match=r"some/file.safetensors"):
        replace_lower_half(backbone, tensors, "some/file.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_a_backbone_that_cannot_be_halved_is_refused():
    with pytest.raises(UsageError, match="two blocks"):
        half_depth(face_vit(depth=1))
    with pytest.raises(UsageError, match="Linear"):
        half_depth(nn.Linear(2, 2))
