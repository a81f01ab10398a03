"""The Face Transformer (Zhong & Deng, arXiv 2103.14803) as timm models; importing this module registers them.

    timm.create_model("face_vit_p8s8_d6", img_size=56)   # RGB in [0, 1] (B, 3, 56, 56) → embeddings (B, 512)

All are timm's `VisionTransformer` with other sizes: the class token after the final LayerNorm is the embedding;
queries, keys and values have no bias; LayerNorm's epsilon is 1e-5. Dropout follows the embedding, the attention's
projection, the GELU and the second MLP layer. Keyword arguments override any size or rate (`depth=4`,
`proj_drop_rate=0.0`).
"""

from functools import partial

from timm.layers import PatchEmbed, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

PATCH_SIZE = 8
FACE_TRANSFORMER = {
    "patch_size": PATCH_SIZE,
    "embed_dim": 512,
    "depth": 6,
    "num_heads": 8,
    "mlp_ratio": 4.0,
    "qkv_bias": False,
    "global_pool": "token",
    "pos_drop_rate": 0.1,
    "proj_drop_rate": 0.1,
    "norm_layer": partial(nn.LayerNorm, eps=1e-5),
}


class OverlappingPatchEmbed(PatchEmbed):
    """Patches that reach half a stride into their upper and left neighbours: 12×12 every 8 pixels, padding 4.

    `patch_size` is the stride, so the grid and the number of tokens are those of the plain embedding.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        plain, stride = self.proj, self.patch_size[0]
        self.proj = nn.Conv2d(
            plain.in_channels,
            plain.out_channels,
            kernel_size=stride + stride // 2,
            stride=stride,
            padding=stride // 2,
            bias=plain.bias is not None,
            device=plain.weight.device,
            dtype=plain.weight.dtype,
        )


def _cfg(image_size: int = 112) -> dict:
    return {
        "input_size": (3, image_size, image_size),
        "fixed_input_size": True,
        "num_classes": 0,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "crop_pct": 1.0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs(
    {
        "face_vit_p8s8_d6": _cfg(),
        "face_vit_p8s8_d12": _cfg(),
        "face_vit_p8s8_d18": _cfg(),
        "face_vit_p12s8_d6": _cfg(),
        "face_vit_tiny": _cfg(56),
    }
)


def _create(name: str, pretrained: bool, sizes: dict, arguments: dict) -> VisionTransformer:
    """Raises ValueError for an image size that the patches do not tile: timm would cut the border off in silence."""
    arguments = FACE_TRANSFORMER | sizes | arguments
    image_size, patch_size = arguments.get("img_size"), to_2tuple(arguments["patch_size"])
    if image_size and any(side % patch for side, patch in zip(to_2tuple(image_size), patch_size, strict=True)):
        raise ValueError(f"the image size must be a multiple of {patch_size[0]}, not {image_size}")
    return build_model_with_cfg(
        VisionTransformer, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **arguments
    )


@register_model
def face_vit_p8s8_d6(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT-P8S8 of the papers' main tables: 19,106,304 parameters."""
    return _create("face_vit_p8s8_d6", pretrained, {}, kwargs)


@register_model
def face_vit_p8s8_d12(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT-P8S8 of 12 blocks (scalability study)."""
    return _create("face_vit_p8s8_d12", pretrained, {"depth": 12}, kwargs)


@register_model
def face_vit_p8s8_d18(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT-P8S8 of 18 blocks (scalability study)."""
    return _create("face_vit_p8s8_d18", pretrained, {"depth": 18}, kwargs)


@register_model
def face_vit_p12s8_d6(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT-P12S8: overlapping 12×12 patches, stride 8."""
    return _create("face_vit_p12s8_d6", pretrained, {"embed_layer": OverlappingPatchEmbed}, kwargs)


@register_model
def face_vit_tiny(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """For CPUs and small sets: 56×56 images, dim 128, 4 blocks, 4 heads, no dropout."""
    sizes = {"embed_dim": 128, "depth": 4, "num_heads": 4, "pos_drop_rate": 0.0, "proj_drop_rate": 0.0}
    return _create("face_vit_tiny", pretrained, sizes, kwargs)
