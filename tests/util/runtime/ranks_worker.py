"""Started by torchrun from test_ranks.py: what two processes share, and how long they wait. Prints one line of JSON."""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.distributed as dist

from backbone.recognizer import to_device
from methods import importance
from methods.importance import mean_importance
from tests.conftest import coloured_images, small_recognizer
from util.runtime import distributed
from util.runtime.hardware import Hardware

INDICES = torch.tensor([3, 40, 11, 25, 0, 17, 30, 8, 21, 5, 33])


def importances(indices: torch.Tensor, batch_size: int | None) -> dict[str, torch.Tensor]:
    """Each process holds the gradients of another number of images: 3, and 2."""
    hardware = Hardware(torch.device("cpu"), bf16=False)
    model = to_device(small_recognizer(dtype=torch.float64).eval(), hardware)
    importance.GRADIENT_BYTES = (3 - distributed.rank()) * 4 * model.num_trainable()
    torch.manual_seed(5)
    data = coloured_images(), indices, hardware
    return mean_importance(model, model.head.loss_of_logits, torch.square, *data, batch_size)


def difference(indices: torch.Tensor, batch_size: int | None = None) -> float:
    together = importances(indices, batch_size)
    with distributed.single_process():
        alone = importances(indices, batch_size)
    return max(((together[name] - alone[name]).abs().max() / alone[name].abs().max()).item() for name in alone)


def patience() -> bool:
    """Whether the others wait for the first process as long as DECODING says."""
    distributed.DECODING = timedelta(seconds=3)
    try:
        with distributed.main_process_first():
            time.sleep(0 if distributed.rank() else 5)
    except RuntimeError:
        return False
    return True


def main() -> None:
    torch.set_num_threads(1)
    distributed.start("cpu")
    found = {"images": difference(INDICES), "one image": difference(INDICES[:1]), "batches": difference(INDICES, 4)}
    group = dist.distributed_c10d._get_default_group()
    found["timeout"] = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    found["waited"] = patience()
    if distributed.rank():
        print(json.dumps(found), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
