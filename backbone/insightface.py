"""The networks of insightface's `arcface_torch` as timm models, with its names of all tensors.

    timm.create_model("iresnet50")   # RGB in [-1, 1] (B, 3, 112, 112) → embeddings (B, 512)

Its `backbone.pth` files fit as they are (--weights), and come back so. `iresnet*` are the residual networks of ArcFace
(arXiv 1801.07698), `arcface_vit_*` the vision transformers `vit_t`, `vit_s`, `vit_b` and `vit_l`.
"""

import math

import torch
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SIZE, DIM = 112, 512


class IBasicBlock(nn.Module):
    """BN, 3×3, BN, PReLU, 3×3 with the stride, BN, beside the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return y + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """Images (B, 3, 112, 112), or of another `img_size`, → embeddings (B, 512). There is no classifier to size."""

    def __init__(
        self,
        layers: tuple[int, ...],
        img_size: int | tuple[int, int] = SIZE,
        drop_rate: float = 0.0,
        num_classes: int = 0,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = DIM
        self.conv1 = nn.Conv2d(in_chans, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        width = 64
        for stage, (depth, channels) in enumerate(zip(layers, (64, 128, 256, 512), strict=True), start=1):
            blocks = [IBasicBlock(width if i == 0 else channels, channels, 2 if i == 0 else 1) for i in range(depth)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            width = channels
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(drop_rate)
        self.fc = nn.Linear(width * math.ceil(to_2tuple(img_size)[0] / 16) ** 2, DIM)
        self.features = nn.BatchNorm1d(DIM)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.features(self.fc(self.dropout(self.bn2(x).flatten(1))))

    def group_matcher(self, coarse: bool = False) -> dict:
        return {"stem": r"^conv1|^bn1|^prelu", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


class ArcFaceViT(VisionTransformer):
    """timm's, without a class token; the embedding is computed from all patch tokens side by side.

    While arcface_torch trains it, a tenth of the tokens are masked; here all are seen.
    """

    def __init__(self, num_classes: int = 0, **kwargs) -> None:
        super().__init__(num_classes=0, **kwargs)
        width = self.embed_dim
        self.feature = nn.Sequential(
            nn.Linear(width * self.patch_embed.num_patches, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, DIM, bias=False),
            nn.BatchNorm1d(DIM, eps=2e-5),
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.num_features = self.head_hidden_size = DIM

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.feature(x.flatten(1))


CONFIG = {"input_size": (3, SIZE, SIZE), "fixed_input_size": True, "num_classes": 0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
VIT = {
    "patch_size": 9,
    "num_heads": 8,
    "qkv_bias": False,
    "class_token": False,
    "global_pool": "",
    "act_layer": nn.ReLU6,
    "norm_layer": nn.LayerNorm,
}
# By name, the network, its arguments and timm's configuration.
MODELS = {
    "iresnet18": (IResNet, {"layers": (2, 2, 2, 2)}, CONFIG),
    "iresnet34": (IResNet, {"layers": (3, 4, 6, 3)}, CONFIG),
    "iresnet50": (IResNet, {"layers": (3, 4, 14, 3)}, CONFIG),
    "iresnet100": (IResNet, {"layers": (3, 13, 30, 3)}, CONFIG),
    "iresnet200": (IResNet, {"layers": (6, 26, 60, 6)}, CONFIG),
    "arcface_vit_t": (ArcFaceViT, VIT | {"embed_dim": 256, "depth": 12}, CONFIG),
    "arcface_vit_s": (ArcFaceViT, VIT | {"embed_dim": 512, "depth": 12}, CONFIG),
    "arcface_vit_b": (ArcFaceViT, VIT | {"embed_dim": 512, "depth": 24}, CONFIG),
    "arcface_vit_l": (ArcFaceViT, VIT | {"embed_dim": 768, "depth": 24}, CONFIG),
}
