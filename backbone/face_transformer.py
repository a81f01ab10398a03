"""The Face Transformer (Zhong & Deng, arXiv 2103.14803) as timm models, which `backbone/timm_models.py` registers.

    timm.create_model("face_vit_p8s8_d6", img_size=56)   # RGB in [0, 1] (B, 3, 56, 56) → embeddings (B, 512)

All are timm's `VisionTransformer`, without bias of queries, keys and values, and with the class token after the final
LayerNorm as the embedding. Keyword arguments override any size or rate (`depth=4`, `proj_drop_rate=0.0`).
"""

from functools import partial

from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

FACE_TRANSFORMER = {
    "patch_size": 8,
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
        sizes = {"kernel_size": stride + stride // 2, "stride": stride, "padding": stride // 2}
        self.proj = nn.Conv2d(plain.in_channels, plain.out_channels, **sizes).to(plain.weight)


CONFIG = {"fixed_input_size": True, "num_classes": 0, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
LARGE, SMALL = ({"input_size": (3, size, size), **CONFIG} for size in (112, 56))
TINY = {"embed_dim": 128, "depth": 4, "num_heads": 4, "pos_drop_rate": 0.0, "proj_drop_rate": 0.0}
# By name, the network, its arguments and timm's configuration.
MODELS = {
    # ViT-P8S8 of the papers' main tables: 19,106,304 parameters.
    "face_vit_p8s8_d6": (VisionTransformer, FACE_TRANSFORMER, LARGE),
    "face_vit_p8s8_d12": (VisionTransformer, FACE_TRANSFORMER | {"depth": 12}, LARGE),
    "face_vit_p8s8_d18": (VisionTransformer, FACE_TRANSFORMER | {"depth": 18}, LARGE),
    # ViT-P12S8.
    "face_vit_p12s8_d6": (VisionTransformer, FACE_TRANSFORMER | {"embed_layer": OverlappingPatchEmbed}, LARGE),
    # For CPUs and small sets.
    "face_vit_tiny": (VisionTransformer, FACE_TRANSFORMER | TINY, SMALL),
}
