"""What the machine offers, and the fast path: every choice that depends on the machine is made here.

Each part is automatic, can be switched off alone (`util.cli.options.add_fast_path`), and is worth what
`scripts/benchmark.py` measures for it.
"""

import contextlib
import ctypes
import functools
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch

from util.runtime import distributed
from util.runtime.errors import UsageError

# Training arithmetic, in FLOPs, from which on compiling pays for itself twice over. CPU: measured, it takes 10 to 25
# seconds and then saves 0.4 s per TFLOP on two cores. CUDA: an estimate, from half a minute of compiling.
WORTH_COMPILING = {"cpu": 1e14, "cuda": 1e16}
# From this speed of bf16 against fp32 matrix products on: what autocast converts has to be earned back.
WORTH_BF16 = 1.2
# One function is compiled anew for each shape of batch, mode, and kind of block; past the limit it would run eagerly.
RECOMPILE_LIMIT = 64
# Names in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


@dataclass(frozen=True)
class Hardware:
    """The device and the parts of the fast path. `compile` and `cuda_graphs` are None until `decide` knows the work."""

    device: torch.device
    bf16: bool
    fused_attention: bool = False
    cls_only_last_block: bool = False
    fast_dropout: bool = False
    fused_optimizer: bool = False
    compile: bool | None = False
    cuda_graphs: bool | None = False

    def decide(self, work: float) -> "Hardware":
        """Settle what is still open for `work` FLOPs of training: compile where that pays and the machine can."""
        compiles = self.compile
        if compiles is None:
            worth = work >= WORTH_COMPILING[self.device.type]
            compiles = distributed.everywhere(worth and can_compile(self.device))
        elif compiles and not can_compile(self.device):
            raise UsageError("--compile on: torch.compile does not work here (is there a C++ compiler?); use --compile off")
        graphs = compiles and self.device.type == "cuda" and self.cuda_graphs is not False
        return replace(self, compile=compiles, cuda_graphs=graphs)

    def prepare(self, model: torch.nn.Module) -> None:
        """Compile the transformer blocks, in place; at each block's first call. One block's code serves all of them."""
        if not self.compile:
            return
        import torch._dynamo  # takes seconds: only where it is used

        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        mode = "reduce-overhead" if self.cuda_graphs else None
        for module in model.modules():
            for block in getattr(module, "blocks", ()):
                # A shape keeps its own code, whatever came before it: a resumed run computes what the first one did.
                block.compile(mode=mode, dynamic=False)

    def eager(self) -> contextlib.AbstractContextManager:
        """Inside, compiled blocks run as they were written: for shapes that come once, and under `torch.func`."""
        return torch.compiler.set_stance("force_eager") if self.compile else contextlib.nullcontext()

    def begin_step(self) -> None:
        """Before every step: CUDA graphs may reuse the memory of the step before."""
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    @property
    def eval_batch(self) -> int:
        """Images of one forward pass without gradients. On a CPU a small batch stays in the caches: 1.5 times as fast."""
        return 512 if self.device.type == "cuda" else 64

    def describe(self) -> str:
        """The one line that scripts print at their start."""
        is_cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if is_cuda else f"{torch.get_num_threads()} CPU threads"
        parts = ["bf16 autocast" if self.bf16 else "fp32", f"{'fused' if self.fused_attention else 'plain'} attention"]
        parts += ["class-token-only last block"] * self.cls_only_last_block
        parts += ["fast dropout"] * self.fast_dropout + ["fused optimizer"] * self.fused_optimizer
        parts += ["compiled blocks"] * bool(self.compile) + ["CUDA graphs"] * bool(self.cuda_graphs)
        parts += [f"{distributed.world_size()} processes"] * (distributed.world_size() > 1)
        return f"{self.device.type} ({name}), {', '.join(parts)}"

    def as_dict(self) -> dict:
        """For config.json."""
        return asdict(self) | {"device": str(self.device)}

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
        else:
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # proc(5): resets VmHWM, the peak


def choose_hardware(
    device: str = "auto",
    precision: str = "auto",
    attention: str = "auto",
    cls_only_last_block: str = "auto",
    dropout: str = "auto",
    fused_optimizer: str = "auto",
    compile: str = "auto",
    cuda_graphs: str = "auto",
) -> Hardware:
    """Resolve the options of these names. Raises UsageError for a device that is not there."""
    chosen = _device(device)
    on_cpu = chosen.type == "cpu"
    return Hardware(
        chosen,
        bf16=has_fast_bf16(chosen) if precision == "auto" else precision == "bf16",
        # On a CPU the backward pass of scaled_dot_product_attention costs more than all else at 50 tokens, and about as
        # much as two matrix products and a softmax at 197.
        fused_attention=_choice(attention, "fused", not on_cpu),
        cls_only_last_block=_choice(cls_only_last_block, "on", True),
        fast_dropout=_choice(dropout, "fast", on_cpu),
        fused_optimizer=_choice(fused_optimizer, "on", True),
        compile=_choice(compile, "on", None),
        cuda_graphs=_choice(cuda_graphs, "on", None),
    )


def _choice(value: str, yes: str, automatic: bool | None) -> bool | None:
    return automatic if value == "auto" else value == yes


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is not a device; use auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r} is not supported; use auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: {torch.cuda.device_count()} CUDA devices are visible; use --device cpu")
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 pays: on CUDA from Ampere on, on a CPU that has it in hardware and gains by it, which is measured."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # torch has no public query for these two; without them autocast would emulate, slower than fp32.
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    has = any(probe() for probe in probes if probe is not None)
    return distributed.everywhere(has and bf16_speedup() > WORTH_BF16)


@functools.cache
def bf16_speedup() -> float:
    """How many times as fast as in fp32 this CPU multiplies matrices in bf16: 0.1 s of products, taken in turn.

    Flags do not tell: with avx512_bf16 alone, AMD's cores are several times as fast, and some of Intel's half as fast.
    """
    matrices = [torch.ones(768, 768, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    best = [math.inf, math.inf]
    for _ in range(6):  # the first of them sets up
        for number, matrix in enumerate(matrices):
            start = time.perf_counter()
            matrix @ matrix
            best[number] = min(best[number], time.perf_counter() - start)
    return best[0] / best[1]


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here: by compiling something, which needs a C++ compiler (CUDA: Triton as well)."""
    # With CUDA's tools but no GPU, the first compilation for a CPU warns that there is no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    unseen = time.time_ns() % 2**20  # a constant in the code: no cache of kernels knows it
    try:
        return torch.compile(lambda x: x + unseen)(torch.ones(8, device=device)).sum().item() == 8 * (1 + unseen)
    except Exception:  # the kinds of failure are without number: no compiler, no headers, no place to write
        return False


def keep_freed_memory(keep: bool) -> None:
    """Let the C library keep what is freed for the next allocation, instead of unmapping it at once.

    Activations are large and are allocated and freed at every step; without this each of them is mapped, page by page
    zeroed by the kernel, and unmapped again. Only glibc can be told; elsewhere nothing happens.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return
    # Off: the values that glibc arrives at by itself once large blocks have been freed.
    library.mallopt(M_MMAP_THRESHOLD, 32 << 20)
    library.mallopt(M_MMAP_MAX, 0 if keep else 65536)
    library.mallopt(M_TRIM_THRESHOLD, -1 if keep else 64 << 20)  # -1: never
    if not keep:
        library.malloc_trim(0)


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


def _peak_resident_mb() -> float:
    """VmHWM of /proc/self/status; 0 where there is no such file."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0
