"""A face recognizer: a timm backbone that embeds images, and a margin head that turns embeddings into logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from backbone.dropout import replace_dropout
from backbone.heads import HEADS
from backbone.onnx_graph import OnnxBackbone
from util.runtime.distributed import sharded, single_process
from util.runtime.errors import UsageError
from util.runtime.hardware import Hardware, plain_attention


@dataclass
class Architecture:
    """All that is needed to build an untrained recognizer; stored in every checkpoint."""

    model: str  # timm's name, or that of an ONNX file
    num_classes: int
    image_size: int  # pixels
    head: str = "cosface"
    # Of timm.create_model: depth, drop rates; num_classes: the dimensions of the model's own projection, its embedding.
    model_options: dict = field(default_factory=dict)
    head_options: dict = field(default_factory=dict)  # scale, margin
    # Where it is not timm's configuration of the model: mean, std; and bgr, crop_pct.
    pixels: dict = field(default_factory=dict)
    graph: Tensor | None = None  # of an ONNX model (`backbone/onnx_graph.py`)

    @property
    def crop_pct(self) -> float:
        return self.pixels.get("crop_pct", 1.0)


class Recognizer(nn.Module):
    """backbone(images) → embeddings (B, dim); head(embeddings) → label-free logits (B, classes)."""

    def __init__(self, architecture: Architecture, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.architecture, self.backbone, self.head = architecture, backbone, head
        config = backbone.pretrained_cfg | architecture.pixels
        mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        self.bgr = config.get("bgr", False)
        self.register_buffer("pixel_scale", 1 / (255 * std), persistent=False)
        self.register_buffer("pixel_shift", -mean / std, persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """images uint8 (B, 3, H, W), RGB → what the backbone takes, scaled and shifted as it expects."""
        images = images.flip(1) if self.bgr else images
        return torch.addcmul(self.pixel_shift, images.to(self.pixel_scale.dtype), self.pixel_scale)

    def embed(self, images: Tensor) -> Tensor:
        """images uint8 (B, 3, H, W) → embeddings (B, dim), not of unit length."""
        (embeddings,) = sharded(lambda part: (self.backbone(self.normalize(part)),), images)
        return embeddings

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.embed(images))

    @property
    def convolutional(self) -> bool:
        """Whether there are convolutions that patches are not cut by."""
        convolutions = (module for module in self.backbone.modules() if isinstance(module, nn.Conv2d))
        return any(module.stride != module.kernel_size for module in convolutions)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def num_trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.trained().values())


def with_rows(model: Recognizer, classes: Sequence[int]) -> Recognizer:
    """The model with the head's rows of these classes alone. The backbone is shared."""
    if [*classes] == [*range(len(model.head.weight))]:
        return model
    architecture = replace(model.architecture, num_classes=len(classes))
    head = HEADS[architecture.head](model.head.weight.shape[1], len(classes), **architecture.head_options)
    head.load_state_dict({name: rows[[*classes]] for name, rows in model.head.state_dict().items()})  # all are rows
    return Recognizer(architecture, model.backbone, head).eval()


def to_device(model: Recognizer, hardware: Hardware) -> Recognizer:
    """Move a model to the device, with the attention, dropout, last block and memory format that are fastest there.

    In place and for good: layers are replaced in the model that is given, which is returned.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = hardware.fused_attention
    if hardware.fast_dropout:
        replace_dropout(model)
    if hardware.cls_only_last_block:
        from backbone.last_block import replace_last_block  # imports timm

        replace_last_block(model)
    if model.convolutional:
        model.to(memory_format=torch.channels_last)  # in bfloat16 they are twice as fast and more
    return model.to(hardware.device)


def training_flops(model: Recognizer, images: int) -> int:
    """About how many FLOPs training on so many images takes: a forward pass, and twice as much backward.

    Counted are matrix products, convolutions and attention. Of a convolutional network none: compiling takes minutes there,
    and has crashed (torch 2.14.1).
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports what torch.compile needs

    if model.convolutional:
        return 0
    size = model.architecture.image_size
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=model.head.weight.device)
    # On the CPU still, which NCCL does not serve; the counter does not know every shape of fused attention.
    with single_process(), plain_attention(model), FlopCounterMode(display=False) as counter, torch.no_grad():
        weights = {name: weight.detach() for name, weight in model.backbone.named_parameters()}  # nor weights as inputs
        was_training = model.training
        model.eval()  # batch norms train on more images than one
        torch.func.functional_call(model.backbone, weights, (model.normalize(image),))
        model.train(was_training)
    return 3 * images * counter.get_total_flops()


def build_recognizer(architecture: Architecture, pretrained: bool = False) -> Recognizer:
    """Build with fresh weights, or with timm's published ones (`pretrained`, which needs a network)."""
    a = architecture
    if a.head not in HEADS:
        raise UsageError(f"unknown head {a.head!r}; choose from {', '.join(HEADS)}")
    backbone = build_backbone(a, pretrained)
    dim = a.model_options.get("num_classes") or getattr(backbone, "head_hidden_size", backbone.num_features)
    return Recognizer(a, backbone, HEADS[a.head](dim, a.num_classes, **a.head_options))


def build_backbone(architecture: Architecture, pretrained: bool = False) -> nn.Module:
    from backbone.timm_models import timm

    a = architecture
    if a.graph is not None:
        with torch.device("cpu"):  # whatever the caller's: the graph is tried
            return OnnxBackbone(a.graph, a.image_size)
    if not timm.is_model(a.model):
        raise UsageError(f"unknown model {a.model!r}; timm.list_models() names them all")
    message = f"cannot build {a.model} for {a.image_size}×{a.image_size} images"
    options = {"num_classes": 0} | a.model_options
    try:
        try:
            backbone = timm.create_model(a.model, pretrained, img_size=a.image_size, **options)
        except TypeError as error:  # most convolutional networks take images of any size
            if "img_size" not in str(error):
                raise
            backbone = timm.create_model(a.model, pretrained, **options)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        problem = (str(error).splitlines() or ["its patches do not fit"])[0]  # timm asserts that without a word
        raise UsageError(f"{message}: {problem}") from None
    patches, own = getattr(backbone, "patch_embed", None), backbone.pretrained_cfg["input_size"][-1] == a.image_size
    if isinstance(patches, timm.layers.PatchEmbed) and not patches.dynamic_img_pad and not own:
        side = math.lcm(*patches.patch_size)
        if a.image_size % side:  # timm would cut a border off and say nothing
            raise UsageError(f"{message}: the size is no multiple of the patches' {side}")
    return backbone
