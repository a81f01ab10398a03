"""A face recogniser: a timm backbone that embeds images, and a margin head that turns embeddings into logits."""

from dataclasses import asdict, dataclass, field

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backbone import face_transformer  # noqa: F401  registers the Face Transformers with timm
from backbone.heads import HEADS
from util.runtime.distributed import sharded
from util.runtime.errors import UsageError


@dataclass
class Architecture:
    """All that is needed to build an untrained recogniser; stored in every checkpoint.

    `model` is a timm name, `image_size` in pixels, `model_options` extra keyword arguments of timm's `create_model`
    (depth, drop rates, …), `head_options` those of the head (scale, margin).
    """

    model: str
    num_classes: int
    image_size: int
    head: str = "cosface"
    model_options: dict = field(default_factory=dict)
    head_options: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self)


class Recognizer(nn.Module):
    """backbone(images) → embedding (B, dim); head(embedding, labels) → logits (B, classes)."""

    def __init__(self, architecture: Architecture, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.architecture = architecture
        self.backbone = backbone
        self.head = head
        # A plain timm ViT says in its configuration how its pixels are scaled; the Face Transformers take [0, 1].
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

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, classes): with `labels` (B,) the training logits, without them the label-free ones."""
        return self.head(self.embed(images), labels)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def num_trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def forward_flops(model: Recognizer) -> int:
    """Floating-point operations of one image's forward pass: matrix products, convolutions and attention."""
    size = model.architecture.image_size
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=model.head.weight.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops()


def default_image_size(model: str) -> int:
    """The input size, in pixels, that timm's configuration of `model` names."""
    _check_model_name(model)
    config = timm.get_pretrained_cfg(model)
    return config.input_size[-1]


def build_recognizer(architecture: Architecture, pretrained: bool = False) -> Recognizer:
    """Build with fresh weights, or with timm's published ones (`pretrained`, needs a network).

    Raises UsageError for an unknown model or head, or an image size the model cannot take.
    """
    a = architecture
    _check_model_name(a.model)
    if a.head not in HEADS:
        raise UsageError(f"unknown head {a.head!r}; choose from {', '.join(HEADS)}")
    try:
        backbone = timm.create_model(
            a.model, pretrained=pretrained, num_classes=0, img_size=a.image_size, **a.model_options
        )
    except (TypeError, AssertionError, ValueError) as error:
        raise UsageError(f"cannot build {a.model} for {a.image_size}×{a.image_size} images: {error}") from None
    except (OSError, RuntimeError) as error:
        raise UsageError(f"cannot build {a.model}: {str(error).splitlines()[0]}") from None
    head = HEADS[a.head](backbone.num_features, a.num_classes, **a.head_options)
    return Recognizer(architecture, backbone, head)


def _check_model_name(model: str) -> None:
    if not timm.is_model(model):
        near = timm.list_models(f"*{model.split('_')[0]}*")[:5]
        raise UsageError(f"unknown model {model!r}; timm has e.g. {', '.join(near) or 'no model of a similar name'}")
