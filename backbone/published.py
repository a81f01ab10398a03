"""Published Face Transformer checkpoints (bare state dicts of the GS-LoRA code) ↔ this project's models.

Only names and layouts differ, and one scale: the published attention multiplies q·k by dim^-0.5, timm's by
head_dim^-0.5, so the query rows of `qkv` are divided by (dim / 64)^½ on the way in and multiplied by it on the way out.

A file with adapters does not say whether W already contains (1/r) B A. The published training loop writes files in which
it does.
"""

import math

import torch
from torch import Tensor, nn

from backbone.lora import MATRICES, LoRALinear, layers_to_adapt
from backbone.recognizer import Architecture, Recognizer, build_recognizer
from util.runtime.errors import UsageError
from util.runtime.files import state_mismatch

State = dict[str, Tensor]

# Fixed by the published code; the tensors tell only heads × HEAD_DIM.
HEAD_DIM = 64
STRIDE = 8
# The side of a patch, by the number of values of a flattened one.
PATCH_SIDES = {3 * 8 * 8: 8, 3 * 12 * 12: 12}
# Parts of our names and of the published ones, to be replaced in this order.
NAMES = {
    "head.": "loss.",
    "backbone.norm.": "mlp_head.0.",
    "backbone.patch_embed.proj.": "patch_to_embedding.",
    "backbone.pos_embed": "pos_embedding",
    "backbone.blocks.": "transformer.layers.",
    "backbone.": "",
    ".norm1.": ".0.fn.norm.",
    ".attn.qkv.": ".0.fn.fn.to_qkv.",
    ".attn.proj.": ".0.fn.fn.to_out.0.",
    ".norm2.": ".1.fn.norm.",
    ".mlp.fc1.": ".1.fn.fn.net.0.",
    ".mlp.fc2.": ".1.fn.fn.net.3.",
}


def is_published(state_dict: dict) -> bool:
    starts = ("transformer.layers.", "patch_to_embedding.", "pos_embedding")
    return any(key.startswith(starts) for key in _without_prefix(state_dict))


def from_published(state_dict: dict, head: str | None = None) -> tuple[Architecture, State, State]:
    """A published state dict → the recognizer's architecture and state dict, and its adapters (for `apply_adapters`).

    No tensor tells which margin `head` it is; None stands for cosface, or for softmax where the head has a bias.
    Raises UsageError, naming keys, if any is missing, unexpected or of another shape.
    """
    state = _without_prefix(state_dict)
    architecture = _architecture(state, head)
    with torch.device("meta"):  # takes no memory, whatever sizes a file claims
        model = build_recognizer(architecture)
        for name, layer in layers_to_adapt(model.backbone, 1, "ffn").items():
            lora_A = _published_name(f"backbone.{name}.lora_A")
            if lora_A in state:
                model.backbone.set_submodule(name, LoRALinear(layer, _shape(state, lora_A, 2)[0]))
    ours = model.state_dict()
    if problems := state_mismatch(state, {_published_name(key): _to_published(key, tensor) for key, tensor in ours.items()}):
        raise UsageError(f"not a whole Face Transformer in the published layout: {problems}")
    converted = {key: _from_published(key, state[_published_name(key)]) for key in ours}
    adapters = {key.removeprefix("backbone."): converted.pop(key) for key in ours if key.endswith(MATRICES)}
    return architecture, converted, adapters


def to_published(model: Recognizer) -> State:
    """The inverse of `from_published`, on the CPU. Raises UsageError for a model that the layout cannot hold."""
    ours = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    state = {_published_name(key): _to_published(key, tensor) for key, tensor in ours.items()}
    from_published(state, model.architecture.head)
    width = model.backbone.num_features // model.backbone.blocks[0].attn.num_heads
    if width != HEAD_DIM:
        raise UsageError(f"the published layout has attention heads {HEAD_DIM} wide, this model {width}")
    return state


@torch.no_grad()
def initialize_as_published(backbone: nn.Module) -> None:
    """New weights as the published code starts: torch's defaults for every layer, N(0, 1) for class token and positions.

    Query rows are divided by (number of heads)^½, since the published attention multiplies q·k by dim^-0.5.
    """
    for module in backbone.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
            module.reset_parameters()
    for name, parameter in backbone.named_parameters():
        if name in ("cls_token", "pos_embed"):
            parameter.normal_()
    for block in backbone.blocks:
        rows = block.attn.qkv.weight.chunk(3)[0]
        rows /= block.attn.num_heads**0.5


def _without_prefix(state_dict: dict) -> dict:
    """Without the `module.` that a multi-GPU model puts before each key."""
    prefix = "module." if all(str(key).startswith("module.") for key in state_dict) else ""
    return {str(key).removeprefix(prefix): value for key, value in state_dict.items()}


def _published_name(name: str) -> str:
    for ours, published in NAMES.items():
        name = name.replace(ours, published)
    return name


def _architecture(state: dict, head: str | None) -> Architecture:
    """What a few tensors tell; whether the others agree is left to the comparison."""
    from backbone.timm_models import timm

    dim, values = _shape(state, "patch_to_embedding.weight", 2)
    if values not in PATCH_SIDES:
        raise UsageError(f"patches of {values} values, not of 8×8×3 or 12×12×3")
    if dim % HEAD_DIM:
        raise UsageError(f"embeddings of {dim} values, not of a multiple of {HEAD_DIM}")
    tokens = _shape(state, "pos_embedding", 3)[1]
    hidden = _shape(state, "transformer.layers.0.1.fn.fn.net.0.weight", 2)[0]
    # Distinct layers, not the largest index: a damaged key must not make us build a billion layers.
    depth = len({key.split(".")[2] for key in state if key.startswith("transformer.layers.")})
    patch = f"face_vit_p{PATCH_SIDES[values]}s{STRIDE}"
    return Architecture(
        model=f"{patch}_d{depth}" if timm.is_model(f"{patch}_d{depth}") else f"{patch}_d6",
        num_classes=_shape(state, "loss.weight", 2)[0],
        image_size=math.isqrt(max(1, tokens - 1)) * STRIDE,
        head=head or ("softmax" if "loss.bias" in state else "cosface"),
        model_options={"depth": depth, "embed_dim": dim, "mlp_ratio": hidden / dim, "num_heads": dim // HEAD_DIM},
    )


def _shape(state: dict, key: str, ndim: int) -> torch.Size:
    tensor = state.get(key)
    if not torch.is_tensor(tensor) or tensor.ndim != ndim or not tensor.numel():
        raise UsageError(f"{key} is missing, empty or no tensor of {ndim} dimensions")
    return tensor.shape


def _from_published(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("patch_embed.proj.weight"):
        side = PATCH_SIDES[tensor.shape[1]]
        if side == STRIDE:
            # Flattened as (row, column, channel); the overlapping patches, by nn.Unfold, as (channel, row, column).
            return tensor.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2).contiguous()
        return tensor.unflatten(1, (3, side, side))
    return _scale_queries(tensor, inverse=True) if name.endswith("attn.qkv.weight") else tensor


def _to_published(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("patch_embed.proj.weight"):
        return (tensor.permute(0, 2, 3, 1) if tensor.shape[-1] == STRIDE else tensor).flatten(1).contiguous()
    return _scale_queries(tensor) if name.endswith("attn.qkv.weight") else tensor


def _scale_queries(qkv: Tensor, inverse: bool = False) -> Tensor:
    """Multiply (`inverse`: divide) the first third of the rows by (dim / 64)^½, rounding once."""
    queries, others = qkv.tensor_split([len(qkv) // 3])
    factor = math.sqrt(qkv.shape[1] / HEAD_DIM)
    scaled = queries.double() / factor if inverse else queries.double() * factor
    return torch.cat([scaled.to(qkv.dtype), others])
