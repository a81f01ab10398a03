"""Started by torchrun: `train_forget.py` in processes that talk as GPUs do, through a group that serves no CPU tensors."""

import math
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

import train_forget
from tests.gpu import device
from util.runtime import hardware

init_process_group = dist.init_process_group
gloo: list[dist.ProcessGroup] = []
collectives = torch.library.Library("c10d", "IMPL")


def init(backend: str, device_id: torch.device, timeout: timedelta) -> None:
    """The group of `distributed.start`, of the device alone as NCCL's is."""
    assert (backend, device_id.type) == ("nccl", "cuda")
    init_process_group(f"{device.NAME}:gloo", timeout=timeout)
    gloo.append(dist.new_group(backend="gloo"))


def on_device(name: str) -> None:
    """Have the collective `name` take tensors of the device: beneath, they travel as the CPU's."""
    op = getattr(torch.ops.c10d, name).default
    place = [argument.name for argument in op._schema.arguments].index("process_group")

    def run(*args: object) -> object:
        return device.run(op, *args[:place], gloo[0].boxed(), *args[place + 1 :])

    collectives.impl(name, run, "PrivateUse1")


def main() -> None:
    here = device.start()
    for name in ("allgather_", "allreduce_", "broadcast_", "barrier"):
        on_device(name)
    dist.init_process_group = init
    torch.cuda.device_count, torch.cuda.set_device = lambda: 2, lambda number: None
    hardware._device = lambda name: here
    hardware.WORTH_COMPILING[device.NAME] = math.inf
    torch.set_num_threads(1)
    train_forget.main(sys.argv[1:])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
