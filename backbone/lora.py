"""Low-rank adapters (LoRA, arXiv 2106.09685) for any timm vision transformer: add, group, merge.

An adapted layer computes y = W x + b + (1/r) B A x with W, b frozen, A (r, in) and B (out, r). The adapters stay apart
from W while they train (a rank-r product is all the backward pass needs) and are added to it exactly at the end of a task.
"""

from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.runtime.errors import UsageError

# Layer names are timm's, which all of its plain vision transformers share.
PLACES = {"ffn": ("mlp.fc1", "mlp.fc2"), "attention": ("attn.qkv",)}
GROUPINGS = ("block", "module", "matrix")
MATRICES = ("lora_A", "lora_B")


class LoRALinear(nn.Linear):
    """`linear`, frozen (its parameters are shared), with a trained low-rank update.

    A starts Kaiming uniform with a = √`slope` and B at zero, so a new adapter changes nothing.
    """

    def __init__(self, linear: nn.Linear, rank: int, slope: float = 5.0) -> None:
        weight, bias = linear.weight.requires_grad_(False), linear.bias
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias is not None, weight.device, weight.dtype)
        self.weight, self.bias = weight, None if bias is None else bias.requires_grad_(False)
        self.lora_A = nn.Parameter(weight.new_empty(rank, in_features))
        self.lora_B = nn.Parameter(weight.new_zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=slope**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.update(x, self.lora_B)

    def update(self, x: Tensor, lora_B: Tensor) -> Tensor:
        """(1/r) B A x, for all of B or for some of its rows: those outputs alone."""
        # Contiguous, so that the gradient of B is the product that CPUs make ten times as fast as its transpose.
        return F.linear(x, self.lora_A) / len(self.lora_A) @ lora_B.t().contiguous()


def layers_to_adapt(backbone: nn.Module, rank: int, place: str) -> dict[str, nn.Linear]:
    """The layers of `place` (a key of PLACES), by name. Raises UsageError if there are none or the rank is too large."""
    layers = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.") and name.endswith(PLACES[place])
    }
    if not layers:
        wanted = ", ".join(f"blocks.<i>.{suffix}" for suffix in PLACES[place])
        raise UsageError(f"no layers to adapt: {type(backbone).__name__} has no linear {wanted}; use a plain timm ViT")
    largest = min(min(layer.weight.shape) for layer in layers.values())
    if not 1 <= rank <= largest:
        raise UsageError(f"rank {rank} is out of range: the adapted layers allow 1 to {largest}")
    return layers


def add_adapters(backbone: nn.Module, rank: int, place: str = "ffn", slope: float = 5.0) -> None:
    """Put a fresh adapter on every layer of `place`, its A with `slope`, and freeze all else."""
    layers = layers_to_adapt(backbone, rank, place)
    backbone.requires_grad_(False)
    for name, layer in layers.items():
        backbone.set_submodule(name, LoRALinear(layer, rank, slope))


def adapted_layers(backbone: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in backbone.named_modules() if isinstance(module, LoRALinear)}


def adapter_groups(backbone: nn.Module, grouping: str = "block") -> dict[str, list[nn.Parameter]]:
    """The adapter parameters as groups θ_g: one a transformer block, one an adapted module, or one a matrix."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, layer in adapted_layers(backbone).items():
        for matrix in MATRICES:
            groups.setdefault(group_of(name, matrix, grouping), []).append(getattr(layer, matrix))
    return groups


def group_of(layer: str, matrix: str, grouping: str) -> str:
    """The group that `matrix` of `layer` (`blocks.<i>.…`) belongs to."""
    block = ".".join(layer.split(".")[:2])
    return {"block": block, "module": layer, "matrix": f"{layer}.{matrix}"}[grouping]


def group_norms(groups: dict[str, list[nn.Parameter]]) -> Tensor:
    """‖θ_g‖₂ of every group, (number of groups,), differentiable and with a finite gradient at zero."""
    norms = torch.stack(torch._foreach_norm([parameter for group in groups.values() for parameter in group]))
    squares = [part.sum() for part in norms.square().split([len(group) for group in groups.values()])]
    return (torch.stack(squares) + 1e-12).sqrt()


def update_of(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """(1/r) B A in float64 on the CPU, whatever device trained them."""
    return lora_B.detach().cpu().double() @ lora_A.detach().cpu().double() / lora_A.shape[0]


def relative_updates(backbone: nn.Module, grouping: str = "block") -> dict[str, float]:
    """How much each group changes the layers it touches: ‖(1/r) B A‖ / ‖W‖, Frobenius norms over those layers."""
    update, weight = Counter(), Counter()
    for name, layer in adapted_layers(backbone).items():
        for group in dict.fromkeys(group_of(name, matrix, grouping) for matrix in MATRICES):
            update[group] += update_of(layer.lora_A, layer.lora_B).square().sum().item()
            weight[group] += layer.weight.detach().square().sum().item()
    return {group: (update[group] / weight[group]) ** 0.5 for group in update}


def adapter_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """Copies of every A and B on the CPU, by name: `blocks.0.mlp.fc1.lora_A`, …"""
    return {name: tensor.cpu().clone() for name, tensor in backbone.state_dict().items() if name.endswith(MATRICES)}


def merge_adapters(backbone: nn.Module) -> None:
    """W ← W + (1/r) B A for every adapted layer, then take the adapters off."""
    tensors = adapter_tensors(backbone)
    for name, layer in adapted_layers(backbone).items():
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        backbone.set_submodule(name, plain)
    apply_adapters(backbone, tensors)


@torch.no_grad()
def apply_adapters(backbone: nn.Module, tensors: dict[str, Tensor], source: str | Path = "these adapters") -> None:
    """Add the updates of saved adapters to the plain layers of `backbone`, rounding once, or none if any does not fit."""
    layers = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
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
