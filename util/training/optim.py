"""Optimizer, schedule and length of a task's training."""

import argparse
from bisect import bisect_left
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from torch import nn
from torch.optim import Optimizer

from data.tasks import ForgettingTask
from methods.base import Method
from util.runtime.errors import UsageError
from util.runtime.hardware import Hardware

if TYPE_CHECKING:  # it takes 2.7 s to import, which --help need not wait for
    from timm.scheduler.scheduler import Scheduler

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
    sched: str = "cosine"
    decay_on: str = "matrices"

    @classmethod
    def of(cls, args: argparse.Namespace, epochs: int | None = None) -> "Schedule":
        values = {field.name: getattr(args, field.name) for field in fields(cls)}
        return cls(**values | ({} if epochs is None else {"epochs": epochs}))


def steps_of_epochs(method: Method, task: ForgettingTask, epochs: int) -> list[int]:
    """Updates in each of `epochs` epochs."""
    return [sum(plan.steps for plan in method.passes(task, epoch, epochs)) for epoch in range(epochs)]


def epochs_for(method: Method, task: ForgettingTask, epochs: int, min_updates: int) -> int:
    """`epochs`, or as many more as it takes to make `min_updates` updates; one where the method makes none."""
    if not sum(steps_of_epochs(method, task, epochs)):
        return 1
    candidates = range(max(epochs, min_updates) + 1)
    return bisect_left(candidates, min_updates, lo=epochs, key=lambda n: sum(steps_of_epochs(method, task, n)))


def make_optimizer(model: nn.Module, schedule: Schedule, hardware: Hardware) -> Optimizer:
    """The optimizer named by `schedule.opt`, one fused kernel a step where it has that. Raises UsageError if unknown."""
    from timm.optim import create_optimizer_v2

    options = {"fused": True} if hardware.fused_optimizer and schedule.opt in FUSED_OPTIMIZERS else {}
    # Handed the module, timm leaves frozen parameters out, and spares biases and norms the weight decay by default.
    options |= {"weight_decay": schedule.weight_decay, "filter_bias_and_bn": schedule.decay_on == "matrices"}
    try:
        return create_optimizer_v2(model, opt=schedule.opt, lr=schedule.lr, **options)
    except ValueError as error:
        raise UsageError(f"--opt {schedule.opt}: {error}") from None


def make_scheduler(optimizer: Optimizer, schedule: Schedule, steps: list[int]) -> "Scheduler":
    """The learning rate over a training of `steps` updates in each epoch.

    `cosine`: linear warm-up, then a cosine, by updates. `cosine-by-epoch`: timm's of the published code, a stair. `step`:
    constant, and a tenth of it in the last 30% of the epochs (the last three of SCRUB's ten published rounds).
    """
    from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler

    lr_min, warmup_epochs = min(schedule.min_lr, schedule.lr), schedule.warmup_epochs
    if schedule.sched == "step":
        # timm's milestones count from 1.
        return MultiStepLRScheduler(optimizer, [round(0.7 * schedule.epochs) + 1], decay_rate=0.1, warmup_t=warmup_epochs)
    if schedule.sched == "cosine-by-epoch":
        warmup = {"warmup_t": warmup_epochs, "warmup_lr_init": 1e-6}
        return CosineLRScheduler(optimizer, t_initial=schedule.epochs, lr_min=lr_min, **warmup)
    warmup = sum(steps[:warmup_epochs])
    return CosineLRScheduler(
        optimizer,
        t_initial=max(2, sum(steps) - warmup),  # of 1, timm warns
        lr_min=lr_min,
        warmup_t=warmup,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def derived_seed(*parts: int) -> int:
    """A 64-bit seed from a run's seed and a position in it; neighbouring positions give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
