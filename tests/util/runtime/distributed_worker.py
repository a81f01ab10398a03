"""Started by torchrun from test_distributed.py: every method's training, by all processes together and by each alone.

Prints one line of JSON a method: the losses of every step and the final parameters' largest difference. Then, with
dropout, what the processes agree on.
"""

import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.distributed as dist
from torch import nn

import train_forget
from backbone.recognizer import to_device
from data.batches import batches
from methods import METHODS
from methods.pretrain import Pretrain
from tests.conftest import coloured_images, drawn_tasks, small_recognizer
from util.evaluation.evaluate import predict
from util.runtime import distributed
from util.runtime.hardware import Hardware
from util.training.engine import Trainer

STEPS = 4


def train(
    name: str, drop: float = 0.0, fast_dropout: bool = False
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], list[int]]:
    """A few steps in float32: their losses, the model, and its predictions. Shares are uneven: 9 and 5 images."""
    hardware = Hardware(torch.device("cpu"), bf16=False, fast_dropout=fast_dropout)
    images = coloured_images(per_class=5)
    (task,) = drawn_tasks(images.labels, 6, num_tasks=1, per_task=1, seed=0, data_ratio=1.0)
    words = ["--method", "gs_lora" if name == "pretrain" else name, "--checkpoint", "none", "--batch-size", "9"]
    args = train_forget.parse_arguments([*words, "--epochs", "2", "--lr", "1e-3"])
    args.mirror = "on"  # an option of pre-training
    model = to_device(small_recognizer(pos_drop_rate=drop, proj_drop_rate=drop), hardware)
    method = (Pretrain if name == "pretrain" else METHODS[name])(args, hardware)
    torch.manual_seed(5)
    method.begin_run(model, [task], images)
    method.begin_task(model, task, images, args.epochs)
    trainer = Trainer(model, method, task)
    model.train()
    method.begin_epoch(model, 0)
    losses = []
    plans = method.passes(task, 0, args.epochs)
    for plan in plans if sum(plan.steps for plan in plans) > 2 else 3 * plans:
        stream = batches(images, plan, torch.Generator().manual_seed(0), hardware.device)
        for batch in itertools.islice(stream, STEPS):
            losses.append({part: value.item() for part, value in trainer.step(batch).items()})
    method.end_epoch(model, 0)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return losses, state, predict(model, images, hardware).predicted


def of_all_processes(value: object) -> list:
    values = [None] * distributed.world_size()
    dist.all_gather_object(values, value)
    return values


def with_dropout(fast: bool) -> dict:
    """EWC draws wrong labels, which all processes must agree on, after dropout masks, in which they must differ."""
    masks = []

    def noted(module: nn.Module, _: object, output: torch.Tensor) -> None:
        if isinstance(module, nn.Dropout) and module.training and module.p:
            masks.append((output == 0).flatten().tolist())

    hook = nn.modules.module.register_module_forward_hook(noted)
    losses, state, _ = train("ewc", drop=0.5, fast_dropout=fast)
    hook.remove()
    first, second = of_all_processes(masks[0])
    return {
        "name": f"dropout {'fast' if fast else 'torch'}",
        "losses": of_all_processes(losses),
        "same_generators": len({str(state.tolist()) for state in of_all_processes(torch.get_rng_state())}) == 1,
        "same_weights": len({str(value) for value in of_all_processes(sum(v.sum().item() for v in state.values()))}) == 1,
        "kept_alike": sum(a == b for a, b in zip(first, second, strict=True)) / len(first),
    }


def main() -> None:
    torch.set_num_threads(1)
    distributed.start("cpu")
    assert distributed.world_size() == 2
    for name in ["pretrain", *(name for name in METHODS if name != "ssd")]:  # which makes no step
        together = train(name)
        with distributed.single_process():
            alone = train(name)
        difference = max((together[1][key] - alone[1][key]).abs().max().item() for key in alone[1])
        line = {"name": name, "together": together[0], "alone": alone[0], "weights": difference}
        print(json.dumps(line | {"predictions": torch.equal(together[2], alone[2])}), flush=True)
    for fast in (False, True):
        print(json.dumps(with_dropout(fast)), flush=True)
    distributed.stop()


if __name__ == "__main__":
    main()
