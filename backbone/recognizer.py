"""A face recognizer: a timm backbone that embeds images, and a margin head that turns embeddings into logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import timm
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backbone import face_transformer  # noqa: F401  registers the Face Transformers with timm
from backbone.dropout import replace_dropout
from backbone.heads import HEADS
from backbone.last_block import replace_last_block
from util.runtime.distributed import alone, sharded
from util.runtime.errors import UsageError
from util.runtime.hardware import Hardware


@dataclass
class Architecture:
    """All that is needed to build an untrained recognizer; stored in every checkpoint."""

    model: str  # timm's name
    num_classes: int
    image_size: int  # pixels
    head: str = "cosface"
    model_options: dict = field(default_factory=dict)  # of timm.create_model: depth, drop rates
    head_options: dict = field(default_factory=dict)  # scale, margin


class Recognizer(nn.Module):
    """backbone(images) → embeddings (B, dim); head(embeddings) → label-free logits (B, classes)."""

    def __init__(self, architecture: Architecture, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.architecture, self.backbone, self.head = architecture, backbone, head
        config = backbone.pretrained_cfg
        mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        self.register_buffer("pixel_scale", 1 / (255 * std), persistent=False)
        self.register_buffer("pixel_shift", -mean / std, persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """images uint8 (B, 3, H, W) → what the backbone takes, scaled and shifted as it expects."""
        return torch.addcmul(self.pixel_shift, images.to(self.pixel_scale.dtype), self.pixel_scale)

    def embed(self, images: Tensor) -> Tensor:
        """images uint8 (B, 3, H, W) → embeddings (B, dim), not of unit length."""
        (embeddings,) = sharded(lambda part: (self.backbone(self.normalize(part)),), images)
        return embeddings

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.embed(images))

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def num_trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def with_rows(model: Recognizer, classes: Sequence[int]) -> Recognizer:
    """The model with the head's rows of these classes alone. The backbone is shared."""
    if [*classes] == [*range(len(model.head.weight))]:
        return model
    architecture = replace(model.architecture, num_classes=len(classes))
    head = HEADS[architecture.head](model.head.weight.shape[1], len(classes), **architecture.head_options)
    head.load_state_dict({name: rows[[*classes]] for name, rows in model.head.state_dict().items()})  # all are rows
    return Recognizer(architecture, model.backbone, head).eval()


def to_device(model: Recognizer, hardware: Hardware) -> Recognizer:
    """Move a model to the device, with the attention, dropout and last block that are fastest there."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = hardware.fused_attention
    if hardware.fast_dropout:
        replace_dropout(model)
    if hardware.cls_only_last_block:
        replace_last_block(model)
    return model.to(hardware.device)


def forward_flops(model: Recognizer) -> int:
    """Floating-point operations of one image's forward pass: matrix products, convolutions and attention."""
    size = model.architecture.image_size
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=model.head.weight.device)
    with alone(), FlopCounterMode(display=False) as counter, torch.no_grad():  # on the CPU still, which NCCL does not serve
        model(image)
    return counter.get_total_flops()


def default_image_size(model: str) -> int:
    """The input size, in pixels, in timm's configuration of `model`."""
    _check_model_name(model)
    return timm.get_pretrained_cfg(model).input_size[-1]


def build_recognizer(architecture: Architecture, pretrained: bool = False) -> Recognizer:
    """Build with fresh weights, or with timm's published ones (`pretrained`, which needs a network)."""
    a = architecture
    _check_model_name(a.model)
    if a.head not in HEADS:
        raise UsageError(f"unknown head {a.head!r}; choose from {', '.join(HEADS)}")
    told = f"cannot build {a.model} for {a.image_size}×{a.image_size} images"
    try:
        backbone = timm.create_model(a.model, pretrained, num_classes=0, img_size=a.image_size, **a.model_options)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        problem = (str(error).splitlines() or ["its patches do not fit"])[0]  # timm asserts that without a word
        raise UsageError(f"{told}: {problem}") from None
    patches = getattr(backbone, "patch_embed", None)
    if isinstance(patches, PatchEmbed) and not patches.dynamic_img_pad and a.image_size % math.lcm(*patches.patch_size):
        # timm would cut a border off and say nothing.
        raise UsageError(f"{told}: the size is no multiple of the patches' {math.lcm(*patches.patch_size)}")
    return Recognizer(a, backbone, HEADS[a.head](backbone.num_features, a.num_classes, **a.head_options))


def _check_model_name(model: str) -> None:
    if not timm.is_model(model):
        raise UsageError(f"unknown model {model!r}; timm.list_models() names them all")


def misfits(state: dict, expected: dict[str, Tensor]) -> str:
    """What keeps `state` from being loaded where `expected` is the state dict; empty if nothing does."""
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is unexpected" for key in state if key not in expected]
    for key, ours in expected.items():
        value = state.get(key, ours)
        if not torch.is_tensor(value) or value.is_floating_point() != ours.is_floating_point():
            problems.append(f"{key} is no {'float' if ours.is_floating_point() else 'integer'} tensor")
        elif value.shape != ours.shape:
            problems.append(f"{key} has shape {tuple(value.shape)}, not {tuple(ours.shape)}")
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
