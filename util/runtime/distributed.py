"""Several processes on one run: `torchrun --nproc-per-node=N train_forget.py …`, one GPU each (NCCL), or CPUs (gloo).

Every process draws the same batches. Only the backbone's forward pass is divided: each process embeds its share of the
rows (`sharded`), the embeddings are gathered, and every process computes the loss of the whole batch. So a loss need not
be a mean over images (GS-LoRA clamps a batch's mean), and no method knows of this. Only the first process writes and prints.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from util.runtime.errors import UsageError

TIMEOUT = timedelta(minutes=30)  # after which a process that takes part in nothing is given up
DECODING = timedelta(hours=12)  # the first process may decode a large data set, or write it over a slow network

_single_process = False


def world_size() -> int:
    return 1 if _single_process or not dist.is_initialized() else dist.get_world_size()


def rank() -> int:
    """This process's number, from 0; known before `start`, from torchrun's environment."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def start(device: str) -> str:
    """Join the other processes where torchrun has started this one. Takes the device asked for, returns this process's."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return device
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if count else "cpu"
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device {device}: torchrun gives each process its own; use auto, cpu or cuda")
    if device == "cpu":
        dist.init_process_group("gloo", timeout=TIMEOUT)
    elif local >= count:
        raise UsageError(f"{os.environ['LOCAL_WORLD_SIZE']} processes, but {count} CUDA devices; start fewer")
    else:
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", device_id=torch.device(device), timeout=TIMEOUT)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def all_processes(condition: bool) -> bool:
    """Whether `condition` holds in every process; all must ask."""
    found = [condition] * world_size()
    if len(found) > 1:
        dist.all_gather_object(found, condition)
    return all(found)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The first process goes through the block before the others: they find what it has left on disk."""
    group = dist.new_group(backend="gloo", timeout=DECODING) if world_size() > 1 else None
    if group and rank():
        dist.barrier(group)
    yield
    if group and not rank():
        dist.barrier(group)


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Inside, nothing is shared out: each process does all of what it is asked."""
    global _single_process
    before, _single_process = _single_process, True
    try:
        yield
    finally:
        _single_process = before


def local_share(items: list) -> list:
    """Every N-th of the items, from this process's number on."""
    return items[rank() :: world_size()] if world_size() > 1 else items


def sum_over_processes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums over all processes, elementwise; every process names the same tensors."""
    if world_size() > 1:
        for tensor in tensors.values():
            dist.all_reduce(tensor)
    return tensors


def sharded(function: Callable[[Tensor], tuple[Tensor, ...]], rows: Tensor) -> tuple[Tensor, ...]:
    """function(rows): rows (B, …) → tensors (B, …), each process computing it for its share of the rows.

    `function` must treat rows apart. Differentiable; the outputs are float32.
    """
    if world_size() == 1:
        return function(rows)
    # Equal shares: the last row is repeated to make them even, and dropped again.
    size = -(-len(rows) // world_size())
    mine = torch.arange(rank() * size, (rank() + 1) * size, device=rows.device).clamp_max(len(rows) - 1)
    with _own_randomness(rows.device):
        parts = function(rows[mine])
    return tuple(_gather(part.float())[: len(rows)] for part in parts)


def _gather(mine: Tensor) -> Tensor:
    """The rows of all processes, one after another. Only this process's own rows carry gradients, N times as large.

    Every process goes on to the same loss, so each has the gradients of its own rows. DistributedDataParallel averages the
    parameters' gradients over the N processes: of what is N times as large, that is the sum over the shares. Gradients
    that do not pass here (the head's, a penalty's) are the same everywhere, and so is their average.
    """
    own = mine.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    parts[rank()] = own + (mine - own) * world_size()
    return torch.cat(parts)


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Inside, each process draws its own random numbers (dropout masks for its share); outside, all draw the same ones.

    Where nothing is drawn inside, those outside are a single process's.
    """
    on_gpu = [device.index] if device.type == "cuda" else []
    generators = [torch.default_generator, *(torch.cuda.default_generators[index] for index in on_gpu)]
    with torch.random.fork_rng(on_gpu):
        for generator in generators:
            seed = hashlib.sha256(generator.get_state().numpy().tobytes() + rank().to_bytes(2, "little")).digest()
            generator.manual_seed(int.from_bytes(seed[:7], "little"))
        entered = [generator.get_state() for generator in generators]
        yield
        drawn = [g for g, state in zip(generators, entered, strict=True) if not torch.equal(g.get_state(), state)]
    for generator in drawn:  # other numbers the next time: go on by one, alike in all processes
        torch.rand((), generator=generator, device=generator.device)


def parallel(module: nn.Module) -> nn.Module:
    """`module`, whose forward pass is a loss, with gradients averaged over the processes."""
    return module if world_size() == 1 else DistributedDataParallel(module)
