"""Started by torchrun from test_distributed.py: every method's training, by all processes together and by each alone.

Prints one line of JSON a method: the losses of every step and the final parameters' largest difference.
"""

import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import train_forget
from data.batches import batches
from methods import METHODS
from methods.pretrain import Pretrain
from tests.conftest import coloured_images, drawn_tasks, small_recognizer
from util import distributed
from util.engine import Optimization, Trainer
from util.evaluate import predict
from util.hardware import Hardware

STEPS = 4


def train(name: str) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], list[int]]:
    """A few steps in float32: their losses, the model, and its predictions. Shares are uneven: 9 and 5 images."""
    hardware = Hardware(torch.device("cpu"), bf16=False)
    images = coloured_images(per_class=5)
    (task,) = drawn_tasks(images.labels, 6, num_tasks=1, per_task=1, seed=0, data_ratio=1.0)
    words = ["--method", "gs_lora" if name == "pretrain" else name, "--checkpoint", "none", "--batch-size", "9"]
    args = train_forget.parse_arguments([*words, "--epochs", "2", "--lr", "1e-3"])
    model = small_recognizer()
    method = (Pretrain if name == "pretrain" else METHODS[name])(args, hardware)
    torch.manual_seed(5)
    method.begin_run(model, [task], images)
    method.begin_task(model, task, images)
    trainer = Trainer(model, method, images, Optimization.of(args), seed=0)
    model.train()
    method.begin_epoch(model, 0)
    losses = []
    for plan in method.passes(0):
        stream = batches(images, plan, torch.Generator().manual_seed(0), hardware.device)
        for batch in itertools.islice(stream, STEPS):
            losses.append({part: value.item() for part, value in trainer.step(batch).items()})
    method.end_epoch(model, 0)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return losses, state, predict(model, images, hardware).predicted


def main() -> None:
    torch.set_num_threads(1)
    distributed.start("cpu")
    assert distributed.world_size() == 2
    for name in ["pretrain", *METHODS]:
        together = train(name)
        with distributed.alone():
            alone = train(name)
        difference = max((together[1][key] - alone[1][key]).abs().max().item() for key in alone[1])
        line = {"name": name, "together": together[0], "alone": alone[0], "weights": difference}
        print(json.dumps(line | {"predictions": torch.equal(together[2], alone[2])}), flush=True)
    distributed.stop()


if __name__ == "__main__":
    main()
