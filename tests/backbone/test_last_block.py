import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import Block

import backbone.timm_models  # noqa: F401  registers the models
from backbone.last_block import ClassTokenBlock, replace_last_block
from backbone.lora import add_adapters

SIZES = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 4}


def face_transformer(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("face_vit_tiny", **SIZES | options).double()


def plain_vit(**options) -> torch.nn.Module:
    """timm's own, with all that a block can have besides."""
    options = {"qkv_bias": True, "qk_norm": True, "init_values": 0.3, "reg_tokens": 2, "num_classes": 0} | options
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SIZES | {"patch_size": 8} | options).double()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("place", [None, "ffn", "attention"])
@pytest.mark.parametrize("make", [face_transformer, plain_vit])
def test_the_embedding_and_all_gradients_stay_the_same(make, place, fused):
    full = make()
    if place is not None:
        add_adapters(full, 3, place)
        for name, parameter in full.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter)
    for block in full.blocks:
        block.attn.fused_attn = fused
    lean = copy.deepcopy(full)
    replace_last_block(lean)
    assert type(lean.blocks[-1]) is ClassTokenBlock
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    embeddings = full(images), lean(images)
    torch.testing.assert_close(*embeddings, rtol=1e-9, atol=1e-12)
    weights = torch.randn_like(embeddings[0])
    for embedding in embeddings:
        (embedding * weights).sum().backward()
    for (name, a), b in zip(full.named_parameters(), lean.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-12, msg=name)


def test_the_other_tokens_are_left_out():
    lean = face_transformer()
    replace_last_block(lean)
    tokens = []
    for part in (lean.blocks[-1].mlp, lean.blocks[-1].attn.proj, lean.norm):
        part.register_forward_hook(lambda module, inputs, output: tokens.append(inputs[0].shape[1]))
    lean(torch.rand(2, 3, 32, 32, dtype=torch.float64))
    assert tokens == [1, 1, 1]


@pytest.mark.parametrize("rate", ["proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_dropout_works_in_training(rate):
    """Of dropout's many results the mean is that of the full block: within five standard errors."""
    full = face_transformer(**{rate: 0.3}).train()
    lean = copy.deepcopy(full)
    replace_last_block(lean)
    image = torch.rand(1, 3, 32, 32, dtype=torch.float64).expand(4000, -1, -1, -1)
    with torch.no_grad():
        a, b = full(image), lean(image)
    error = ((a.var(0) + b.var(0)) / len(image)).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()
    assert (b.var(0) / a.var(0)).mean().item() == pytest.approx(1, abs=0.15)


def test_models_whose_embedding_needs_all_tokens_are_left_alone():
    for options in ({"global_pool": "avg"}, {"global_pool": "map"}, {"scale_attn_norm": True}):
        model = plain_vit(**options)
        replace_last_block(model)
        assert type(model.blocks[-1]) is Block, options
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", depth=2)  # two tokens make its embedding
    replace_last_block(distilled)
    assert type(distilled.blocks[-1]) is Block


def test_the_state_dict_stays_and_a_second_replacement_changes_nothing():
    model = face_transformer().eval()
    names = [name for name, _ in model.named_parameters()]
    replace_last_block(model)
    last = model.blocks[-1]
    assert [type(block) for block in model.blocks] == [Block, ClassTokenBlock]
    assert not any(module.training for module in model.modules())
    replace_last_block(model)
    assert model.blocks[-1] is last
    assert [name for name, _ in model.named_parameters()] == names
    assert type(copy.deepcopy(model).blocks[-1]) is ClassTokenBlock
