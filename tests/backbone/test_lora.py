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


def test_any_timm_vit_can_be_adapted():
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2)
    lora.add_adapters(backbone, 8, "attention")
    assert list(lora.adapted_layers(backbone)) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]


def test_what_cannot_be_adapted_is_refused(backbone):
    with pytest.raises(UsageError, match="no layers to adapt: ResNet has"):
        lora.add_adapters(timm.create_model("resnet18", num_classes=0), 8)
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
