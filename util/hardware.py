"""What the machine offers: the device, the precision of matrix products, and the attention that is fastest there."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from util.errors import UsageError

ModelType = TypeVar("ModelType", bound=torch.nn.Module)


@dataclass(frozen=True)
class Hardware:
    """The device a run uses, whether its forward passes run under bf16 autocast, and whether attention is fused."""

    device: torch.device
    bf16: bool
    fused_attention: bool = False

    def place(self, model: ModelType) -> ModelType:
        """Move a model to the device and set the attention of all its blocks (timm's `fused_attn`)."""
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = self.fused_attention
        return model.to(self.device)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def describe(self) -> str:
        is_cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if is_cuda else f"{torch.get_num_threads()} CPU threads"
        attention = "fused" if self.fused_attention else "plain"
        return f"{self.device.type} ({name}), {'bf16 autocast' if self.bf16 else 'fp32'}, {attention} attention"

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory_mb(self) -> float:
        """Most memory held at once since `reset_peak_memory`: on a GPU allocated there, else of the whole process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return _peak_resident_mb()

    def reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


@contextlib.contextmanager
def plain_attention(model: torch.nn.Module) -> Iterator[None]:
    """Written-out attention in all blocks (timm's `fused_attn` off) inside the block."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def choose_hardware(device: str = "auto", precision: str = "auto", attention: str = "auto") -> Hardware:
    """Resolve --device (auto, cpu, cuda, cuda:N), --precision (auto, bf16, fp32) and --attention (auto, fused, plain)."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device {device!r} is not a device; use auto, cpu, cuda or cuda:0") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device!r} is not supported; use auto, cpu, cuda or cuda:0")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: {torch.cuda.device_count()} CUDA devices are visible; use --device cpu")
    bf16 = precision == "bf16" or (precision == "auto" and has_fast_bf16(chosen))
    # On a CPU the backward pass of scaled_dot_product_attention costs more than all else at these sizes (50 to 197
    # tokens); two matrix products and a softmax train the tiny model twice as fast.
    fused = attention == "fused" or (attention == "auto" and chosen.type == "cuda")
    return Hardware(chosen, bf16, fused)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware: CUDA from Ampere on, CPUs with avx512_bf16 or amx."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # torch has no public query for these two; without them autocast would emulate, slower than fp32.
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)


def _peak_resident_mb() -> float:
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
