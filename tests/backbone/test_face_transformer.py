import numpy as np
import pytest
import timm
import torch
from torch import nn

from backbone import face_transformer
from backbone.heads import CosFace
from backbone.recognizer import Architecture, build_recognizer
from util.runtime.errors import UsageError

NAMES = ["face_vit_p8s8_d6", "face_vit_p8s8_d12", "face_vit_p8s8_d18", "face_vit_p12s8_d6", "face_vit_tiny"]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_count_of_the_paper():
    backbone = timm.create_model("face_vit_p8s8_d6")
    assert count(backbone) + count(CosFace(backbone.num_features, 100)) == 19_157_504


@pytest.mark.parametrize(("name", "depth"), list(zip(NAMES, (6, 12, 18, 6, 4), strict=True)))
def test_sizes(name, depth):
    with torch.device("meta"):
        model = timm.create_model(name)
    tiny = name == "face_vit_tiny"
    assert len(model.blocks) == depth
    assert model.num_features == (128 if tiny else 512)
    assert model.blocks[0].attn.num_heads == (4 if tiny else 8)
    assert model.blocks[0].mlp.fc1.out_features == 4 * model.num_features
    assert model.pos_embed.shape[1] == (50 if tiny else 197)
    assert model.patch_embed.img_size == ((56, 56) if tiny else (112, 112))
    assert all(norm.eps == 1e-5 for norm in model.modules() if isinstance(norm, nn.LayerNorm))
    assert not any("qkv.bias" in key for key in model.state_dict())
    assert model.pretrained_cfg["mean"] == (0, 0, 0) and model.pretrained_cfg["std"] == (1, 1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_override_the_defaults(name):
    model = timm.create_model(name, num_classes=0, img_size=56, depth=1, embed_dim=64, num_heads=2, proj_drop_rate=0.3)
    assert model(torch.rand(2, 3, 56, 56)).shape == (2, 64)
    assert len(model.blocks) == 1
    assert model.blocks[0].mlp.drop1.p == 0.3
    assert timm.create_model(name, img_size=64, depth=0).pos_embed.shape[1] == 65


UNTILED = {(name, 100): 8 for name in NAMES} | {("vit_tiny_patch16_224", 56): 16, ("vit_tiny_patch16_224", 15): 16}


@pytest.mark.parametrize(("name", "size"), UNTILED)
def test_an_image_size_that_patches_do_not_tile_is_refused(name, size):
    """timm would cut the border off and say nothing."""
    with torch.device("meta"), pytest.raises(UsageError) as error:
        build_recognizer(Architecture(name, 3, size))
    problem = f"the size is no multiple of the patches' {UNTILED[name, size]}"
    assert str(error.value) == f"cannot build {name} for {size}×{size} images: {problem}"


def test_patches_that_are_not_square_are_tiled_both_ways():
    options = {"patch_size": (16, 12), "depth": 1}
    with pytest.raises(UsageError, match="the size is no multiple of the patches' 48"):
        build_recognizer(Architecture("vit_tiny_patch16_224", 3, 64, model_options=options))
    assert build_recognizer(Architecture("vit_tiny_patch16_224", 3, 48, model_options=options))


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("vit_tiny_patch16_224", 56, {"dynamic_img_pad": True, "dynamic_img_size": True, "depth": 1}),
        ("vit_small_r26_s32_224", 72, {"depth": 1}),  # its convolutions pad
        ("efficientvit_m0", 72, {}),
        ("mobilevit_xxs", 67, {}),
    ],
)
def test_no_pixel_is_lost_at_a_size_that_is_taken(name, size, options):
    model = build_recognizer(Architecture(name, 3, size, model_options=options)).eval()
    images = torch.rand(1, 3, size, size, requires_grad=True)
    model.backbone(images).square().sum().backward()
    assert images.grad.abs().sum((0, 1))[-1].any() and images.grad.abs().sum((0, 1))[:, -1].any()


def test_a_hybrid_that_timm_refuses_is_refused_in_words():
    with pytest.raises(UsageError, match="for 72×72 images: its patches do not fit"):
        build_recognizer(Architecture("vit_tiny_r_s16_p8_224", 3, 72))


@pytest.mark.parametrize("name", ["face_vit_p8s8_d6", "face_vit_p12s8_d6"])
def test_dropout_follows_embedding_projection_gelu_and_second_mlp_layer(name):
    model = timm.create_model(name, img_size=16, embed_dim=32, num_heads=2, depth=2).train()
    before, last = {}, [None, None]

    def record(module_name):
        def hook(module, inputs, output):
            if isinstance(module, nn.Dropout) and module.p > 0:
                assert module.p == 0.1
                follows = last[0] if inputs[0] is last[1] else None
                before[module_name] = follows if follows is not None else inputs[0]
            last[:] = module_name, output

        return hook

    for module_name, module in model.named_modules():
        if not list(module.children()) and not isinstance(module, nn.Identity):
            module.register_forward_hook(record(module_name))
    images = torch.rand(3, 3, 16, 16)
    model(images)

    tokens = torch.cat([model.cls_token.expand(3, -1, -1), model.patch_embed(images)], dim=1) + model.pos_embed
    torch.testing.assert_close(before.pop("pos_drop"), tokens)
    assert before == {
        f"blocks.{i}.{dropout}": f"blocks.{i}.{layer}"
        for i in range(2)
        for dropout, layer in (("attn.proj_drop", "attn.proj"), ("mlp.drop1", "mlp.act"), ("mlp.drop2", "mlp.fc2"))
    }
    assert all(isinstance(block.mlp.act, nn.GELU) and block.mlp.act.approximate == "none" for block in model.blocks)


def test_tiny_model_has_no_dropout():
    model = timm.create_model("face_vit_tiny").train()
    images = torch.rand(2, 3, 56, 56)
    assert torch.equal(model(images), model(images))


def test_overlapping_patches_against_numpy():
    embed = face_transformer.OverlappingPatchEmbed(img_size=24, patch_size=8, in_chans=3, embed_dim=5)
    images = torch.rand(2, 3, 24, 24)
    weight, bias = embed.proj.weight.detach().numpy(), embed.proj.bias.detach().numpy()
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)))
    expected = [
        np.tensordot(padded[:, :, y : y + 12, x : x + 12], weight, axes=([1, 2, 3], [1, 2, 3])) + bias
        for y in (0, 8, 16)
        for x in (0, 8, 16)
    ]
    np.testing.assert_allclose(embed(images).detach().numpy(), np.stack(expected, axis=1), atol=1e-5)
