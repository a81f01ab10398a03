"""The device and the fast path: every choice that depends on the machine is made here.

Each part is automatic, and is worth what `scripts/benchmark.py` measures for it.
"""

import contextlib
import functools
import logging
import resource
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from util.runtime import distributed
from util.runtime.errors import UsageError

# Training FLOPs from which on compiling pays for itself twice over. CPU: measured, it takes 10 to 25 seconds and then saves
# 0.4 s per TFLOP on two cores. CUDA: an estimate, from half a minute of compiling.
WORTH_COMPILING = {"cpu": 1e14, "cuda": 1e16}
WORTH_BF16 = 1.2  # speed of matrix products against fp32's, from which on autocast's conversions are earned back


@dataclass(frozen=True)
class Hardware:
    """The device and the parts of the fast path. `compile` and `cuda_graphs` are None until `resolve_compile`."""

    device: torch.device
    bf16: bool
    fused_attention: bool = False
    cls_only_last_block: bool = False
    fast_dropout: bool = False
    fused_optimizer: bool = False
    compile: bool | None = False
    cuda_graphs: bool | None = False

    def resolve_compile(self, work: float) -> "Hardware":
        """Where it is left open, compile if that pays for `work` FLOPs of training and works here."""
        compiles = self.compile
        if compiles is None:
            compiles = distributed.all_processes(work >= WORTH_COMPILING[self.device.type] and can_compile(self.device))
        elif compiles and not can_compile(self.device):
            raise UsageError("torch.compile does not work here (is there a C++ compiler?); switch compiling off")
        graphs = compiles and self.device.type == "cuda" and self.cuda_graphs is not False
        if self.cuda_graphs and not graphs:
            raise UsageError("--cuda-graphs on does nothing here: it needs CUDA and a compiled backbone (--compile on)")
        return replace(self, compile=compiles, cuda_graphs=graphs)

    def compile_modules(self, modules: Iterable[torch.nn.Module]) -> None:
        """Compile each of them, in place and at its first call: a backbone, and its blocks for whoever calls them alone."""
        if not self.compile:
            return
        # All blocks share one function, compiled anew for each kind of block and shape of batch: 8 times is torch's limit.
        torch._dynamo.config.recompile_limit = 64
        mode = "reduce-overhead" if self.cuda_graphs else None
        for module in modules:
            # Static: a shape's code does not depend on those before it: a resumed run computes what the first did.
            module.compile(mode=mode, dynamic=False)

    def eager(self) -> contextlib.AbstractContextManager:
        """Inside, what is compiled runs eagerly: for shapes that come once, and under `torch.func`."""
        return torch.compiler.set_stance("force_eager") if self.compile else contextlib.nullcontext()

    def begin_step(self) -> None:
        """Before every step: lets CUDA graphs reuse the memory of the one before."""
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    @property
    def eval_batch(self) -> int:
        """Batch size without gradients. On a CPU a small batch stays in the caches: 1.5 times as fast."""
        return 512 if self.device.type == "cuda" else 64

    def describe(self) -> str:
        """The one line that scripts print at their start."""
        is_cuda = self.device.type == "cuda"
        threads = torch.get_num_threads()
        name = torch.cuda.get_device_name(self.device) if is_cuda else f"{threads} thread{'s' * (threads > 1)}"
        parts = ["bf16" if self.bf16 else "fp32"]
        parts += ["compiled"] * bool(self.compile) + ["CUDA graphs"] * bool(self.cuda_graphs)
        parts += [f"{distributed.world_size()} processes"] * (distributed.world_size() > 1)
        return f"{self.device.type} ({name}), {', '.join(parts)}"

    def as_dict(self) -> dict:
        return asdict(self) | {"device": str(self.device)}

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory_mb(self) -> float:
        """Allocated on the GPU since `reset_peak_memory`, or resident of the whole process since it started."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def choose_hardware(
    device: str = "auto",
    precision: str = "auto",
    cls_only_last_block: str = "auto",
    compile: str = "auto",
    cuda_graphs: str = "auto",
) -> Hardware:
    """Resolve the options of these names. Raises UsageError for a device that is not there."""
    chosen = _device(device)
    on_cpu = chosen.type == "cpu"
    known = {"on": True, "off": False}
    return Hardware(
        chosen,
        bf16=has_fast_bf16(chosen) if precision == "auto" else precision == "bf16",
        # On a CPU the backward pass of scaled_dot_product_attention costs more than all else at 50 tokens.
        fused_attention=not on_cpu,
        cls_only_last_block=known.get(cls_only_last_block, True),
        fast_dropout=on_cpu,
        fused_optimizer=True,
        compile=known.get(compile),
        cuda_graphs=known.get(cuda_graphs),
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
        if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()):
            return device
    raise UsageError(f"no device {name!r} here; use auto, cpu, cuda or cuda:0 (CUDA devices: {torch.cuda.device_count()})")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 pays: on CUDA from Ampere on; on a CPU that has it in hardware, if it is measured to be faster."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # torch has no public query for these two; without them autocast would emulate, slower than fp32.
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    has = any(probe() for probe in probes if probe is not None)
    return distributed.all_processes(has and bf16_speedup() > WORTH_BF16)


@functools.cache
def bf16_speedup() -> float:
    """How many times as fast as in fp32 this CPU multiplies matrices in bf16, from 0.1 s of products in turn.

    The CPU's flags do not tell: with avx512_bf16 alone some are several times as fast, others half as fast.
    """
    matrices = [torch.ones(768, 768, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    seconds = [[], []]
    for _ in range(6):  # the first of them sets up
        for taken, matrix in zip(seconds, matrices, strict=True):
            start = time.perf_counter()
            matrix @ matrix
            taken.append(time.perf_counter() - start)
    return min(seconds[0]) / min(seconds[1])


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here, found by compiling something."""
    # With CUDA's tools but no GPU, the first compilation for a CPU warns of that.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    unseen = time.time_ns() % 2**20  # a constant that no cache of kernels knows
    try:
        return torch.compile(lambda x: x + unseen)(torch.ones(8, device=device)).sum().item() == 8 * (1 + unseen)
    except Exception:  # no compiler, no headers, no place to write, …
        return False


@contextlib.contextmanager
def plain_attention(model: torch.nn.Module) -> Iterator[None]:
    """Inside, timm's `fused_attn` is off in all blocks."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True
