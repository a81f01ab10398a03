"""Low-rank adapters (LoRA, arXiv 2106.09685) for the linear layers and convolutions of any backbone: add, group, merge.

An adapted layer computes y = W x + b + (1/r) B A x with W, b frozen, A (r, in) and B (out, r). Of a convolution, A is one
with r outputs and W's kernel (r, in, k, k), and B a 1×1 one. The adapters stay apart from W while they train (a rank-r
product is all the backward pass needs) and are added to it exactly at the end of a task.
"""

import re
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.blocks import block_names
from util.runtime import foreach
from util.runtime.errors import UsageError

# Which layers of a block, by their names in it. timm calls them so in all its transformers and ConvNeXts; an MLP inside the
# attention, of relative positions, is none of the block's.
PLACES = {
    "ffn": (nn.Module, r"(?!.*attn\.)(.*\.)?(mlp|ffn)\.[^.]+"),
    "attention": (nn.Module, r"(.*\.)?attn\.(qkv|[qkv]v?)(_proj)?"),
    "conv": (nn.Conv2d, r".*"),
    "all": (nn.Module, r".*"),
}
PLACE_HELP = (
    f"layers that get adapters: {', '.join(PLACES)}, names like blocks.*.fc1; auto takes ffn, or conv where there is none"
)

GROUPINGS = ("block", "module", "matrix")
MATRICES = ("lora_A", "lora_B")


class Adapter:
    """The part that all adapted layers share: W and b are the layer's own, frozen; A starts Kaiming uniform with
    a = √`slope` and B at zero, so a new adapter changes nothing."""

    def adapt(self, layer: nn.Module, rank: int, slope: float) -> None:
        self.weight = layer.weight.requires_grad_(False)
        self.bias = None if layer.bias is None else layer.bias.requires_grad_(False)
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, *self.weight.shape[1:]))
        self.lora_B = nn.Parameter(self.weight.new_zeros(len(self.weight), rank))
        nn.init.kaiming_uniform_(self.lora_A, a=slope**0.5)
        self._layer = (layer,)  # in a tuple, so that it is no submodule

    def plain(self) -> nn.Module:
        """The layer as it was."""
        self._layer[0].weight, self._layer[0].bias = self.weight, self.bias
        return self._layer[0]


class LoRALinear(Adapter, nn.Linear):
    """`layer` with a trained low-rank update."""

    def __init__(self, layer: nn.Linear, rank: int, slope: float = 5.0) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.adapt(layer, rank, slope)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.update(x, self.lora_B)

    def update(self, x: Tensor, lora_B: Tensor) -> Tensor:
        """(1/r) B A x, for all of B or for some of its rows: those outputs alone."""
        # Contiguous, so that the gradient of B is the product that CPUs make ten times as fast as its transpose.
        return F.linear(x, self.lora_A) / len(self.lora_A) @ lora_B.t().contiguous()


class LoRAConv2d(Adapter, nn.Conv2d):
    """`layer`, a convolution without groups, with a trained low-rank update."""

    def __init__(self, layer: nn.Conv2d, rank: int, slope: float = 5.0) -> None:
        sizes = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        super().__init__(layer.in_channels, layer.out_channels, bias=layer.bias is not None, device="meta", **sizes)
        self.adapt(layer, rank, slope)

    def forward(self, x: Tensor) -> Tensor:
        low = self._conv_forward(x, self.lora_A, None) / len(self.lora_A)
        return self._conv_forward(x, self.weight, self.bias) + F.conv2d(low, self.lora_B[:, :, None, None])


ADAPTED = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d}


def layers_to_adapt(backbone: nn.Module, rank: int, place: str) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers of `place` (PLACE_HELP), by name. Raises UsageError if there are none or the rank is too large."""
    layers = {n: m for n, m in backbone.named_modules() if type(m) in ADAPTED and getattr(m, "groups", 1) == 1}
    blocks = block_names(backbone)

    def found(place: str) -> dict[str, nn.Module]:
        if place not in PLACES:
            return {name: layer for name, layer in layers.items() if fnmatchcase(name, place)}
        kind, pattern = PLACES[place]
        inside = {name: block_of(name, blocks) for name in layers}
        own = {name: name.removeprefix(block).lstrip(".") for name, block in inside.items() if block}
        return {n: layers[n] for n in own if re.fullmatch(pattern, own[n]) and isinstance(layers[n], kind)}

    chosen = found(place) if place != "auto" else found("ffn") or found("conv") or found("all")
    if not chosen:
        names = ", ".join([*layers][:3])
        message = f"no layers to adapt: {type(backbone).__name__} has no linear layer or plain convolution {place!r}"
        raise UsageError(f"{message}; --lora-place takes {', '.join(PLACES)} or a pattern of names like {names}")
    largest = min(min(len(layer.weight), layer.weight[0].numel()) for layer in chosen.values())
    if not 1 <= rank <= largest:
        raise UsageError(f"rank {rank} is out of range: the adapted layers allow 1 to {largest}")
    return chosen


def add_adapters(backbone: nn.Module, rank: int, place: str = "auto", slope: float = 5.0) -> None:
    """Put a fresh adapter on every layer of `place`, its A with `slope`, and freeze all else."""
    layers = layers_to_adapt(backbone, rank, place)
    backbone.requires_grad_(False)
    for name, layer in layers.items():
        backbone.set_submodule(name, ADAPTED[type(layer)](layer, rank, slope))


def adapted_layers(backbone: nn.Module) -> dict[str, LoRALinear | LoRAConv2d]:
    return {name: module for name, module in backbone.named_modules() if isinstance(module, Adapter)}


def adapter_groups(backbone: nn.Module, grouping: str = "block") -> dict[str, list[nn.Parameter]]:
    """The adapter parameters as groups θ_g: one a block, one an adapted module, or one a matrix."""
    groups: dict[str, list[nn.Parameter]] = {}
    blocks = block_names(backbone)
    for name, layer in adapted_layers(backbone).items():
        for matrix in MATRICES:
            groups.setdefault(group_of(name, matrix, grouping, blocks), []).append(getattr(layer, matrix))
    return groups


def group_of(layer: str, matrix: str, grouping: str, blocks: list[str]) -> str:
    """The group that `matrix` of `layer` belongs to; a layer outside of all blocks is a group of its own."""
    return {"block": block_of(layer, blocks) or layer, "module": layer, "matrix": f"{layer}.{matrix}"}[grouping]


def block_of(layer: str, blocks: list[str]) -> str | None:
    return next((block for block in blocks if f"{layer}.".startswith(f"{block}.")), None)


def group_norms(groups: dict[str, list[nn.Parameter]]) -> Tensor:
    """‖θ_g‖₂ of every group, (number of groups,), differentiable and with a finite gradient at zero."""
    norms = foreach.norms([parameter for group in groups.values() for parameter in group])
    squares = [part.sum() for part in norms.square().split([len(group) for group in groups.values()])]
    return (torch.stack(squares) + 1e-12).sqrt()


def update_of(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """(1/r) B A in float64 on the CPU, whatever device trained them; of the layer's shape."""
    lora_A, lora_B = lora_A.detach().cpu().double(), lora_B.detach().cpu().double()
    return (lora_B @ lora_A.flatten(1) / len(lora_A)).unflatten(1, lora_A.shape[1:])


def relative_updates(backbone: nn.Module, grouping: str = "block") -> dict[str, float]:
    """How much each group changes the layers it touches: ‖(1/r) B A‖ / ‖W‖, Frobenius norms over those layers."""
    update, weight, blocks = Counter(), Counter(), block_names(backbone)
    for name, layer in adapted_layers(backbone).items():
        for group in dict.fromkeys(group_of(name, matrix, grouping, blocks) for matrix in MATRICES):
            update[group] += update_of(layer.lora_A, layer.lora_B).square().sum().item()
            weight[group] += layer.weight.detach().square().sum().item()
    return {group: (update[group] / weight[group]) ** 0.5 for group in update}


def adapter_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """Copies of every A and B on the CPU, by name: `blocks.0.mlp.fc1.lora_A`, …"""
    return {name: tensor.cpu().clone() for name, tensor in backbone.state_dict().items() if name.endswith(MATRICES)}


def merge_adapters(backbone: nn.Module) -> dict[str, Tensor]:
    """W ← W + (1/r) B A for every adapted layer, then take the adapters off. Returns their `adapter_tensors`."""
    tensors = adapter_tensors(backbone)
    for name, layer in adapted_layers(backbone).items():
        backbone.set_submodule(name, layer.plain())
    apply_adapters(backbone, tensors)
    return tensors


@torch.no_grad()
def apply_adapters(backbone: nn.Module, tensors: dict[str, Tensor], source: str | Path = "these adapters") -> None:
    """Add the updates of saved adapters to the plain layers of `backbone`, rounding once, or none if any does not fit."""
    layers = {name: module for name, module in backbone.named_modules() if type(module) in ADAPTED}
    updated, nothing = {}, torch.empty(0)
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        lora_A, lora_B = (tensors.get(f"{name}.{matrix}", nothing) for matrix in MATRICES)
        weight = layers[name].weight if name in layers else None
        if weight is None or lora_A.shape[1:] != weight.shape[1:] or lora_B.shape != (len(weight), len(lora_A)):
            raise UsageError(f"{source} does not fit this model at {name}; use the checkpoint it was trained on")
        updated[name] = (weight.cpu().double() + update_of(lora_A, lora_B)).to(weight.dtype)
        if not updated[name].isfinite().all():
            raise UsageError(f"{source}: {name} would make weights that are not finite; the file is damaged")
    for name, values in updated.items():
        layers[name].weight.copy_(values)
