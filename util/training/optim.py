"""Optimizer, schedule and length of a task's training."""

import argparse
from bisect import bisect_left
from dataclasses import dataclass, fields

import numpy as np
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from data.tasks import ForgettingTask
from methods.base import Method
from util.runtime.errors import UsageError
from util.runtime.hardware import Hardware

# Those of timm's names that stand for torch optimizers with a fused kernel on every device.
FUSED_OPTIMIZERS = {"adam", "adamw", "sgd", "nesterov", "momentum"}


@dataclass(frozen=True)
class Schedule:
    """How one task's parameters are optimized: the options of `util.cli.options.add_optimization`."""

    epochs: int
    lr: float
    min_lr: float
    weight_decay: float
    warmup_epochs: int
    opt: str
    clip_grad: float | None
    seed: int

    @classmethod
    def of(cls, args: argparse.Namespace, epochs: int | None = None) -> "Schedule":
        values = {field.name: getattr(args, field.name) for field in fields(cls)}
        return cls(**values | ({} if epochs is None else {"epochs": epochs}))


def steps_of_epochs(method: Method, task: ForgettingTask, epochs: int) -> list[int]:
    """Updates in each of `epochs` epochs."""
    return [sum(plan.steps for plan in method.passes(task, epoch, epochs)) for epoch in range(epochs)]


def epochs_for(method: Method, task: ForgettingTask, epochs: int, min_updates: int) -> int:
    """`epochs`, or as many more as it takes to make `min_updates` updates."""
    candidates = range(max(epochs, min_updates) + 1)
    return bisect_left(candidates, min_updates, lo=epochs, key=lambda n: sum(steps_of_epochs(method, task, n)))


def make_optimizer(model: nn.Module, schedule: Schedule, hardware: Hardware) -> Optimizer:
    """The optimizer named by `schedule.opt`, one fused kernel a step where it has that. Raises UsageError if unknown."""
    fused = {"fused": True} if hardware.fused_optimizer and schedule.opt in FUSED_OPTIMIZERS else {}
    try:
        # Handed the module, timm spares biases and norms the weight decay and leaves frozen parameters out.
        return create_optimizer_v2(model, opt=schedule.opt, lr=schedule.lr, weight_decay=schedule.weight_decay, **fused)
    except ValueError as error:
        raise UsageError(f"--opt {schedule.opt}: {error}") from None


def make_scheduler(optimizer: Optimizer, schedule: Schedule, steps: list[int]) -> CosineLRScheduler:
    """Linear warm-up, then a cosine, by updates; `steps` of them in each epoch."""
    warmup = sum(steps[: schedule.warmup_epochs])
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, sum(steps) - warmup),
        lr_min=min(schedule.min_lr, schedule.lr),
        warmup_t=warmup,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def derived_seed(*parts: int) -> int:
    """A 64-bit seed from a run's seed and a position in it; neighbouring positions give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
