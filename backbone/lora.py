"""Low-rank adapters (LoRA, arXiv 2106.09685) for any timm vision transformer: add, group, merge.

An adapted layer computes y = W x + b + (1/r) B A x with W, b frozen, A (r, in) and B (out, r). The adapters stay apart
from W while they train (a rank-r product is all the backward pass needs) and are added to it exactly at the end of a task.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.runtime.errors import UsageError

# Layer names are timm's, which all of its plain vision transformers share.
PLACES = {"ffn": ("mlp.fc1", "mlp.fc2"), "attention": ("attn.qkv",)}
GROUPINGS = ("block", "module", "matrix")
MATRICES = ("lora_A", "lora_B")
# Inside the root of a group's norm: keeps its gradient finite where a whole group is zero.
NORM_EPS = 1e-12


class LoRALinear(nn.Linear):
    """A linear layer with frozen weight and bias and a trained low-rank update.

    A starts Kaiming uniform with a = √5 and B starts at zero, so a new adapter changes nothing.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, **kwargs) -> None:
        super().__init__(in_features, out_features, **kwargs)
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @classmethod
    def around(cls, linear: nn.Linear, rank: int) -> "LoRALinear":
        """Adapt `linear`, sharing its parameters."""
        adapted = cls(
            linear.in_features,
            linear.out_features,
            rank,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        adapted.weight, adapted.bias = linear.weight, linear.bias
        adapted.train(linear.training)
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
        return adapted

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.update(x, self.lora_B)

    def update(self, x: Tensor, lora_B: Tensor) -> Tensor:
        """(1/r) B A x, for all of B or for some of its rows: those outputs alone."""
        return F.linear(F.linear(x, self.lora_A), lora_B) / len(self.lora_A)


def add_adapters(backbone: nn.Module, rank: int, place: str = "ffn") -> None:
    """Put a fresh rank-`rank` adapter on every layer of `place` (a key of PLACES). Freezes the whole backbone.

    Raises UsageError as `layers_to_adapt` does.
    """
    layers = layers_to_adapt(backbone, rank, place)
    backbone.requires_grad_(False)
    for name, layer in layers.items():
        backbone.set_submodule(name, LoRALinear.around(layer, rank))


def layers_to_adapt(backbone: nn.Module, rank: int, place: str) -> dict[str, nn.Linear]:
    """By name. Raises UsageError if the backbone has no such layers or the rank is larger than a layer allows."""
    names = [name for name, module in backbone.named_modules() if _is_target(name, module, place)]
    if not names:
        wanted = ", ".join(f"blocks.<i>.{suffix}" for suffix in PLACES[place])
        raise UsageError(f"no layers to adapt: {type(backbone).__name__} has no linear {wanted}; use a plain timm ViT")
    layers = {name: backbone.get_submodule(name) for name in names}
    largest = min(min(layer.weight.shape) for layer in layers.values())
    if not 1 <= rank <= largest:
        raise UsageError(f"--rank {rank} is out of range: the adapted layers allow 1 to {largest}")
    return layers


def _is_target(name: str, module: nn.Module, place: str) -> bool:
    return name.startswith("blocks.") and name.endswith(PLACES[place]) and isinstance(module, nn.Linear)


def adapted_layers(backbone: nn.Module) -> dict[str, LoRALinear]:
    """The layers that carry an adapter, by name."""
    return {name: module for name, module in backbone.named_modules() if isinstance(module, LoRALinear)}


def adapter_groups(backbone: nn.Module, grouping: str = "block") -> dict[str, list[nn.Parameter]]:
    """The adapter parameters as groups θ_g: one a transformer block, one an adapted module, or one a matrix."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, layer in adapted_layers(backbone).items():
        for matrix in MATRICES:
            groups.setdefault(group_of(name, matrix, grouping), []).append(getattr(layer, matrix))
    return groups


def group_of(layer: str, matrix: str, grouping: str) -> str:
    """The name of the group that `matrix` of `layer` (`blocks.<i>.…`) belongs to."""
    block = ".".join(layer.split(".")[:2])
    return {"block": block, "module": layer, "matrix": f"{layer}.{matrix}"}[grouping]


def group_norms(groups: dict[str, list[nn.Parameter]]) -> Tensor:
    """‖θ_g‖₂ of every group, (number of groups,), differentiable and with a finite gradient at zero."""
    squares = [sum(parameter.square().sum() for parameter in parameters) for parameters in groups.values()]
    return (torch.stack(squares) + NORM_EPS).sqrt()


def update_of(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """(1/r) B A in float64 on the CPU, where the order of summation does not depend on the device that trained."""
    return lora_B.detach().cpu().double() @ lora_A.detach().cpu().double() / lora_A.shape[0]


def relative_updates(backbone: nn.Module, grouping: str = "block") -> dict[str, float]:
    """How much each group changes the layers it touches: ‖(1/r) B A‖ / ‖W‖, Frobenius norms over those layers."""
    update, weight = {}, {}
    for name, layer in adapted_layers(backbone).items():
        for key in {group_of(name, matrix, grouping) for matrix in MATRICES}:
            change = update_of(layer.lora_A, layer.lora_B).square().sum().item()
            update[key] = update.get(key, 0.0) + change
            weight[key] = weight.get(key, 0.0) + layer.weight.detach().square().sum().item()
    return {key: (update[key] / weight[key]) ** 0.5 for key in update}


def adapter_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """Copies of every A and B on the CPU, keyed as in the saved file: `blocks.0.mlp.fc1.lora_A`, …"""
    return {
        f"{name}.{matrix}": getattr(layer, matrix).detach().cpu().clone()
        for name, layer in adapted_layers(backbone).items()
        for matrix in MATRICES
    }


def remove_adapters(backbone: nn.Module) -> None:
    """Take every adapter off again; the layers are as they were before `add_adapters`, bit for bit."""
    for name, layer in adapted_layers(backbone).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        plain.train(layer.training)
        backbone.set_submodule(name, plain)


def merge_adapters(backbone: nn.Module) -> None:
    """W ← W + (1/r) B A for every adapted layer, then take the adapters off."""
    tensors = adapter_tensors(backbone)
    remove_adapters(backbone)
    apply_adapters(backbone, tensors)


@torch.no_grad()
def apply_adapters(backbone: nn.Module, tensors: dict[str, Tensor], source: str | Path = "these adapters") -> None:
    """Add the updates of saved adapters to the plain layers of `backbone`, rounding once.

    Raises UsageError, and changes nothing, if they belong to another architecture or are damaged.
    """
    layers = {name: m for name, m in backbone.named_modules() if isinstance(m, nn.Linear)}
    names = sorted({key.rpartition(".")[0] for key in tensors})
    updated = {}
    for name in names:
        lora_A, lora_B = tensors.get(f"{name}.lora_A"), tensors.get(f"{name}.lora_B")
        if lora_A is None or lora_B is None or lora_A.ndim != 2 or lora_B.ndim != 2 or len(lora_A) != lora_B.shape[1]:
            raise UsageError(f"{source}: {name!r} is not a pair of matrices lora_A (r, in) and lora_B (out, r)")
        if name not in layers or (len(lora_B), lora_A.shape[1]) != tuple(layers[name].weight.shape):
            has = tuple(layers[name].weight.shape) if name in layers else "no such layer"
            raise UsageError(
                f"{source}: does not fit this model at {name}: the adapter is for {(len(lora_B), lora_A.shape[1])}, "
                f"the model has {has}; use the checkpoint it was trained on"
            )
        weight = layers[name].weight
        updated[name] = (weight.cpu().double() + update_of(lora_A, lora_B)).to(weight.dtype)
        if not updated[name].isfinite().all():
            raise UsageError(f"{source}: {name!r} would make weights that are not finite; the file is damaged")
    for name, values in updated.items():
        layers[name].weight.copy_(values)
