"""What the machine makes of a model: its device, attention, dropout and last block."""

from typing import TypeVar

from torch import nn

from backbone.dropout import replace_dropout
from backbone.last_block import replace_last_block
from util.runtime.hardware import Hardware

ModelType = TypeVar("ModelType", bound=nn.Module)


def to_device(model: ModelType, hardware: Hardware) -> ModelType:
    """Move a model to the device and choose its attention (timm's `fused_attn`), dropout and last block."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = hardware.fused_attention
    replace_dropout(model, hardware.fast_dropout)
    replace_last_block(model, hardware.cls_only_last_block)
    return model.to(hardware.device)
