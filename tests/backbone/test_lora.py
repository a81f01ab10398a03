import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn

from backbone import lora
from backbone.recognizer import Architecture, build_recognizer
from util.runtime.errors import RunError, UsageError
from util.runtime.files import load_tensors, save_tensors

IMAGES = torch.rand(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def backbone(make_recognizer):
    return make_recognizer(dtype=torch.float64).backbone.eval()


def randomise(backbone: nn.Module) -> None:
    """Give every adapter an update that matters."""
    torch.manual_seed(2)
    for layer in lora.adapted_layers(backbone).values():
        nn.init.normal_(layer.lora_A, std=0.3)
        nn.init.normal_(layer.lora_B, std=0.3)


@pytest.mark.parametrize(("place", "per_block"), [("ffn", ["mlp.fc1", "mlp.fc2"]), ("attention", ["attn.qkv"])])
def test_adapters_are_put_on_the_named_layers_and_change_nothing_at_first(backbone, place, per_block):
    before = backbone(IMAGES)
    lora.add_adapters(backbone, 4, place)
    assert list(lora.adapted_layers(backbone)) == [f"blocks.{i}.{name}" for i in range(2) for name in per_block]
    assert torch.equal(backbone(IMAGES), before)


def test_an_adapted_layer_computes_its_formula():
    torch.manual_seed(0)
    layer = lora.LoRALinear(nn.Linear(5, 7, dtype=torch.float64), 3)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 5, dtype=torch.float64)
    W, b, A, B = (p.detach().numpy() for p in (layer.weight, layer.bias, layer.lora_A, layer.lora_B))
    expected = x.numpy() @ W.T + b + x.numpy() @ (B @ A).T / 3
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12)


def test_merging_equals_the_unmerged_model(backbone):
    lora.add_adapters(backbone, 4)
    randomise(backbone)
    unmerged = backbone(IMAGES)
    lora.merge_adapters(backbone)
    assert not lora.adapted_layers(backbone)
    assert not any("lora" in name for name in backbone.state_dict())
    assert (backbone(IMAGES) - unmerged).abs().max() < 1e-6


def test_only_adapters_get_gradients_and_only_they_change(backbone):
    lora.add_adapters(backbone, 4)
    randomise(backbone)
    before = copy.deepcopy(backbone.state_dict())
    optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    backbone(IMAGES).square().sum().backward()
    assert {name for name, p in backbone.named_parameters() if p.grad is not None} == set(lora.adapter_tensors(backbone))
    optimizer.step()
    changed = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(lora.adapter_tensors(backbone))


def test_size_at_the_papers_setting():
    model = build_recognizer(Architecture("face_vit_p8s8_d6", 100, 112))
    total = model.num_parameters()
    model.requires_grad_(False)
    lora.add_adapters(model.backbone, 8)
    assert total == 19_157_504
    assert model.num_trainable() == 245_760
    assert round(100 * model.num_trainable() / total, 2) == 1.28


def test_saved_adapters_rebuild_the_merged_model_bit_for_bit_and_leaving_one_off_undoes_it(make_recognizer, tmp_path):
    trained = make_recognizer().backbone
    states = [copy.deepcopy(trained.state_dict())]
    for task in (1, 2):
        lora.add_adapters(trained, 4)
        randomise(trained)
        save_tensors(tmp_path / f"{task}.safetensors", lora.adapter_tensors(trained), {"task": str(task)})
        lora.merge_adapters(trained)
        states.append(copy.deepcopy(trained.state_dict()))
    for count, expected in enumerate(states):
        rebuilt = make_recognizer().backbone
        for task in range(1, count + 1):
            lora.apply_adapters(rebuilt, load_tensors(tmp_path / f"{task}.safetensors"))
        assert all(torch.equal(value, expected[name]) for name, value in rebuilt.state_dict().items())


@pytest.mark.parametrize(("grouping", "count"), [("block", 2), ("module", 4), ("matrix", 8)])
def test_group_norms_and_their_gradient_against_independent_arithmetic(backbone, grouping, count):
    lora.add_adapters(backbone, 4)
    randomise(backbone)
    groups = lora.adapter_groups(backbone, grouping)
    assert len(groups) == count
    assert {id(p) for group in groups.values() for p in group} == {id(p) for p in backbone.parameters() if p.requires_grad}

    def penalty() -> float:
        entries = [np.concatenate([p.detach().numpy().ravel() for p in group]) for group in groups.values()]
        return sum(float(np.sqrt((e**2).sum())) for e in entries)

    total = lora.group_norms(groups).sum()
    assert total.item() == pytest.approx(penalty(), abs=1e-9)
    total.backward()
    step = 1e-6
    for parameter in [p for group in groups.values() for p in group]:
        entry, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for position in (0, len(entry) // 2):
            value = entry[position].item()
            entry[position] = value + step
            above = penalty()
            entry[position] = value - step
            below = penalty()
            entry[position] = value
            assert gradient[position].item() == pytest.approx((above - below) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("grouping", lora.GROUPINGS)
def test_group_norms_have_a_finite_gradient_at_zero(backbone, grouping):
    lora.add_adapters(backbone, 4)
    groups = lora.adapter_groups(backbone, grouping)
    parameters = [p for group in groups.values() for p in group]
    for parameter in parameters:
        nn.init.zeros_(parameter)
    lora.group_norms(groups).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in parameters)


def test_relative_updates_against_numpy(backbone):
    lora.add_adapters(backbone, 4)
    randomise(backbone)
    layers = lora.adapted_layers(backbone)
    for block, share in lora.relative_updates(backbone, "block").items():
        own = [layer for name, layer in layers.items() if name.startswith(block + ".")]
        updates = [(layer.lora_B @ layer.lora_A).detach().numpy() / 4 for layer in own]
        weights = [layer.weight.detach().numpy() for layer in own]
        expected = np.sqrt(sum((u**2).sum() for u in updates) / sum((w**2).sum() for w in weights))
        assert share == pytest.approx(expected)


def of_timm(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    options = {"model_options": options} if options else {}
    backbone = build_recognizer(Architecture(name, 4, 32, **options)).backbone.double().eval()
    for parameter in backbone.parameters():
        if parameter.ndim == 1:  # some start at zero, and hide what is before them
            nn.init.uniform_(parameter, 0.5, 1)
    return backbone


SMALL_NEXT = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)}
SMALL_SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 4, "patch_size": 1}


@pytest.mark.parametrize(
    ("make", "place", "expected", "groups"),
    [
        (lambda: of_timm("vit_tiny_patch16_224", depth=2), "attention", {"blocks.0.attn.qkv"}, 2),
        (lambda: of_timm("convnext_atto", **SMALL_NEXT), "auto", {"stages.2.blocks.1.mlp.fc1"}, 5),
        (lambda: of_timm("swin_tiny_patch4_window7_224", **SMALL_SWIN), "ffn", {"layers.3.blocks.0.mlp.fc2"}, 4),
        (lambda: of_timm("resnet18"), "auto", {"layer1.0.conv1", "layer2.0.downsample.0"}, 8),
        (lambda: of_timm("resnet18"), "layer4.*.conv2", {"layer4.0.conv2", "layer4.1.conv2"}, 2),
        (lambda: of_timm("efficientnet_lite0"), "conv", {"blocks.0.0.conv_pw", "blocks.1.0.conv_pwl"}, 16),
        (lambda: of_timm("iresnet18"), "all", {"layer1.0.conv1", "layer4.1.conv2"}, 8),
        (lambda: of_timm("iresnet18"), "fc", {"fc"}, 1),
    ],
)
def test_layers_of_any_network_can_be_adapted_and_merged(make, place, expected, groups):
    backbone = make()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before, state = backbone(images), {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    lora.add_adapters(backbone, 4, place)
    names = lora.adapted_layers(backbone)
    assert expected <= set(names)
    assert not any("rel_pos" in name for name in names)
    assert all(getattr(layer, "groups", 1) == 1 for layer in names.values())
    assert torch.equal(backbone(images), before)
    assert len(lora.adapter_groups(backbone)) == groups == len(lora.relative_updates(backbone))
    randomise(backbone)
    unmerged = backbone(images)
    assert not torch.allclose(unmerged, before, rtol=1e-3)
    lora.merge_adapters(backbone)
    torch.testing.assert_close(backbone(images), unmerged, rtol=1e-6, atol=1e-6)
    assert backbone.state_dict().keys() == state.keys()
    moved = {name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, state[name])}
    assert moved == {f"{name}.weight" for name in names}


def test_an_mlp_of_relative_positions_is_no_feed_forward_network():
    backbone = timm.create_model("vit_relpos_small_patch16_224", num_classes=0, img_size=32, depth=1)
    lora.add_adapters(backbone, 4, "ffn")
    assert list(lora.adapted_layers(backbone)) == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]


@pytest.mark.parametrize("how", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}, {"bias": False}])
def test_an_adapted_convolution_computes_its_formula_and_the_gradient_of_it(how):
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3, dtype=torch.float64, **how)
    layer = lora.LoRAConv2d(plain, 2)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    update = np.einsum("or,rikl->oikl", layer.lora_B.detach().numpy(), layer.lora_A.detach().numpy()) / 2
    whole = torch.from_numpy(layer.weight.detach().numpy() + update)
    options = {name: getattr(plain, name) for name in ("stride", "padding", "dilation")}
    expected = nn.functional.conv2d(x, whole, plain.bias, **options)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)

    def of(lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"lora_A": lora_A, "lora_B": lora_B}, (x,)).square().sum()

    assert torch.autograd.gradcheck(of, (layer.lora_A, layer.lora_B))  # by finite differences


def test_what_cannot_be_adapted_is_refused(backbone):
    with pytest.raises(UsageError, match=r"no layers to adapt: ResNet has .*'ffn'"):
        lora.add_adapters(timm.create_model("resnet18", num_classes=0), 8, "ffn")
    with pytest.raises(UsageError, match=r"names like patch_embed.proj, blocks.0"):
        lora.add_adapters(backbone, 8, "layer*")
    with pytest.raises(UsageError, match="rank 33 is out of range"):
        lora.add_adapters(backbone, 33)


def test_adapters_of_another_model_are_refused_and_change_nothing(backbone, make_recognizer, tmp_path):
    other = make_recognizer(embed_dim=64).backbone
    lora.add_adapters(other, 4)
    randomise(other)
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(UsageError, match=r"does not fit this model at blocks.0.mlp.fc1"):
        lora.apply_adapters(backbone, lora.adapter_tensors(other))
    lonely = {"blocks.0.mlp.fc1.lora_A": torch.zeros(4, 32), "blocks.0.mlp.fc2.lora_A": torch.zeros(4, 128)}
    with pytest.raises(UsageError, match=r"does not fit this model at blocks.0.mlp.fc1"):
        lora.apply_adapters(backbone, lonely)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not json")
    with pytest.raises(RunError, match="not a readable safetensors file"):
        load_tensors(tmp_path / "damaged.safetensors")
    with pytest.raises(UsageError, match="no file"):
        load_tensors(tmp_path / "absent.safetensors")
