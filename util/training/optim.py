"""Optimizer, learning rate and length of a task's training: the options of `util.cli.options.add_optimization`."""

import argparse
from bisect import bisect_left
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


def steps_of_epochs(method: Method, task: ForgettingTask, epochs: int) -> list[int]:
    """Updates in each of `epochs` epochs."""
    return [sum(plan.steps for plan in method.passes(task, epoch, epochs)) for epoch in range(epochs)]


def epochs_for(method: Method, task: ForgettingTask, epochs: int, min_updates: int) -> int:
    """`epochs`, or as many more as it takes to make `min_updates` updates; one where the method makes none."""
    if not sum(steps_of_epochs(method, task, epochs)):
        return 1
    candidates = range(max(epochs, min_updates) + 1)
    return bisect_left(candidates, min_updates, lo=epochs, key=lambda n: sum(steps_of_epochs(method, task, n)))


def make_optimizer(model: nn.Module, args: argparse.Namespace, hardware: Hardware) -> Optimizer:
    """The optimizer named by `args.opt`, one fused kernel a step where it has that. Raises UsageError if unknown."""
    from timm.optim import create_optimizer_v2

    options = {"fused": True} if hardware.fused_optimizer and args.opt in FUSED_OPTIMIZERS else {}
    # Handed the module, timm leaves frozen parameters out, and spares biases and norms the weight decay by default.
    options |= {"weight_decay": args.weight_decay, "filter_bias_and_bn": args.decay_on == "matrices"}
    try:
        return create_optimizer_v2(model, opt=args.opt, lr=args.lr, **options)
    except ValueError as error:
        raise UsageError(f"--opt {args.opt}: {error}") from None


def make_scheduler(optimizer: Optimizer, args: argparse.Namespace, steps: list[int]) -> "Scheduler":
    """The learning rate of `args` over a training of so many `steps` in each epoch.

    `cosine`: linear warm-up, then a cosine, by updates. `cosine-by-epoch`: timm's of the published code, a stair. `step`:
    constant, and a tenth of it in the last 30% of the epochs (the last three of SCRUB's ten published rounds).
    """
    from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler

    lr_min, warmup_epochs = min(args.min_lr, args.lr), args.warmup_epochs
    if args.sched == "step":
        # timm's milestones count from 1.
        return MultiStepLRScheduler(optimizer, [round(0.7 * len(steps)) + 1], decay_rate=0.1, warmup_t=warmup_epochs)
    if args.sched == "cosine-by-epoch":
        warmup = {"warmup_t": warmup_epochs, "warmup_lr_init": 1e-6}
        return CosineLRScheduler(optimizer, t_initial=len(steps), lr_min=lr_min, **warmup)
    first = sum(steps[:warmup_epochs])
    warmup = {"warmup_t": first, "warmup_lr_init": 0.0, "warmup_prefix": True}
    updates = max(2, sum(steps) - first)  # of 1, timm warns
    return CosineLRScheduler(optimizer, t_initial=updates, lr_min=lr_min, t_in_epochs=False, **warmup)


def derived_seed(*parts: int) -> int:
    """A 64-bit seed from a run's seed and a position in it; neighbouring positions give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
