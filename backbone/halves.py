"""Any plain timm vision transformer as two halves: lower (image → mid features) and upper (mid features → embedding)."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from backbone.recognizer import misfits
from util.runtime.errors import UsageError


def half_depth(backbone: nn.Module) -> int:
    """Blocks of the lower half."""
    blocks = getattr(backbone, "blocks", ())
    if len(blocks) < 2 or not hasattr(backbone, "forward_intermediates"):
        raise UsageError(f"{type(backbone).__name__} cannot be halved: a plain timm ViT of at least two blocks can")
    return len(blocks) // 2


def lower_half(backbone: nn.Module) -> nn.Module:
    """A copy of the lower half alone: patch embedding, class token, position embedding and the first blocks."""
    half = copy.deepcopy(backbone)
    half.blocks = half.blocks[: half_depth(backbone)]
    for name in ("norm", "fc_norm", "attn_pool", "head"):
        if isinstance(getattr(half, name, None), nn.Module):
            setattr(half, name, nn.Identity())
    return half


def replace_lower_half(backbone: nn.Module, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Load the state dict of a lower half, which must fit exactly."""
    if problems := misfits(tensors, lower_half(backbone).state_dict()):
        raise UsageError(f"{source} is no lower half of this model: {problems}; use the run's own checkpoint")
    backbone.load_state_dict(tensors, strict=False)


def mid_features(backbone: nn.Module, images: Tensor, depth: int) -> Tensor:
    """Images → tokens (B, tokens, dim) after the first `depth` blocks, prefix tokens first."""
    (mid,) = backbone.forward_intermediates(
        images, [depth - 1], return_prefix_tokens=True, stop_early=True, output_fmt="NLC", intermediates_only=True
    )
    # A pair where the model has prefix tokens (class, registers), the spatial ones alone where it has none.
    return torch.cat([mid[1], mid[0]], dim=1) if isinstance(mid, tuple) else mid


def stop_dropout_above(backbone: nn.Module, depth: int) -> None:
    """Put what is above the first `depth` blocks into evaluation mode."""
    for part in (*backbone.blocks[depth:], backbone.head_drop):
        part.eval()


def upper_half(backbone: nn.Module, tokens: Tensor, depth: int) -> Tensor:
    """Tokens (B, tokens, dim) after the first `depth` blocks → embeddings (B, dim)."""
    for block in backbone.blocks[depth:]:
        tokens = block(tokens)
    return backbone.forward_head(backbone.norm(tokens))
