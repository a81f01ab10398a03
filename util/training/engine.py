"""The loop: every epoch, every pass, every batch, for pre-training and for all methods alike.

Nothing in here reads a number back from the device between two epochs.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from backbone.recognizer import Recognizer
from data.batches import Batch, batches
from data.image_set import ImageSet
from methods.base import Method
from util.runtime.distributed import parallel
from util.runtime.errors import RunError, UsageError
from util.runtime.hardware import Hardware
from util.runtime.interrupt import Interrupted, Stop, stop_on_signals
from util.training.monitor import Monitor

# Those of timm's names that stand for torch optimizers with a fused kernel on every device.
FUSED_OPTIMIZERS = {"adam", "adamw", "sgd", "nesterov", "momentum"}


@dataclass
class Optimization:
    """How one task's parameters are optimised. Rates are per update, `warmup_epochs` and `epochs` count epochs."""

    epochs: int
    lr: float
    min_lr: float
    weight_decay: float
    warmup_epochs: int
    opt: str
    clip_grad: float | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Optimization":
        """The options of `util.cli.arguments.add_optimization_arguments`."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def epochs_of_task(args: argparse.Namespace, steps: int) -> int:
    """--epochs, or more where an epoch's `steps` would make fewer than --min-updates updates."""
    return max(args.epochs, -(-args.min_updates // steps))


@dataclass
class Throughput:
    """What a call of `train` did: seconds in the loop, and images that went through it."""

    seconds: float = 0.0
    images: int = 0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


class Loss(nn.Module):
    """A method's loss as a module, so that all parameters it trains can be found in one place."""

    def __init__(self, model: Recognizer, method: Method) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.method.loss(self.model, batch)


class Trainer:
    """One task's training: model, method, optimizer and schedule, and the position in it."""

    def __init__(
        self, model: Recognizer, method: Method, train_set: ImageSet, settings: Optimization, seed: int, task: int = 0
    ) -> None:
        self.model, self.method, self.train_set, self.settings = model, method, train_set, settings
        self.hardware = method.hardware
        self.seed, self.task = seed, task
        self.epoch = self.updates = 0
        self.step_of_epoch = 0  # steps of the epoch at hand that are done
        method.epochs = settings.epochs
        self.steps = [sum(plan.steps for plan in method.passes(epoch)) for epoch in range(settings.epochs)]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(model, settings, self.hardware)
        self.hardware.compile_blocks(model)
        self.loss = parallel(Loss(model, method))
        warmup = sum(self.steps[: settings.warmup_epochs])
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=max(1, sum(self.steps) - warmup),
            lr_min=min(settings.min_lr, settings.lr),
            warmup_t=warmup,
            warmup_lr_init=0.0,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def train(
        self,
        monitor: Monitor,
        after_epoch: Callable[["Trainer"], None] | None = None,
        save: Callable[["Trainer"], None] | None = None,
    ) -> Throughput:
        """Run the remaining epochs; `after_epoch` is called after each (to save, to evaluate).

        With `save`, SIGINT and SIGTERM end the training after the step at hand, saved. Raises Interrupted then, and
        RunError if a part of the loss is not finite, naming the part and the step.
        """
        done = Throughput()
        with stop_on_signals() if save is not None else contextlib.nullcontext(Stop()) as stop:
            while self.epoch < self.settings.epochs:
                start = time.perf_counter()
                self._train_epoch(monitor, stop, save)
                monitor.end_epoch(self.optimizer.param_groups[0]["lr"], self.method.end_epoch(self.model, self.epoch - 1))
                self.hardware.synchronize()
                done.seconds += time.perf_counter() - start
                done.images += monitor.images
                if after_epoch is not None:
                    after_epoch(self)
        return done

    def _train_epoch(self, monitor: Monitor, stop: Stop, save: Callable[["Trainer"], None] | None) -> None:
        self.model.train()
        self.method.begin_epoch(self.model, self.epoch)
        monitor.begin_epoch(self.epoch, self.step_of_epoch)
        for batch in self._batches_left():
            monitor.step(self.step(batch), len(batch))
            self.step_of_epoch += 1
            if stop.received is not None:
                monitor.check(wait=True)
                save(self)
                raise Interrupted(
                    f"{monitor.label}: stopped by {stop.received.name} in epoch {self.epoch + 1} of {self.settings.epochs} "
                    f"and saved; continue with --resume",
                    stop.received,
                )
        self.epoch, self.step_of_epoch = self.epoch + 1, 0

    def _batches_left(self) -> Iterator[Batch]:
        """The epoch's batches from `step_of_epoch` on, pass after pass."""
        done = self.step_of_epoch
        for number, plan in enumerate(self.method.passes(self.epoch)):
            # The order of batches depends on the position alone, so that a resumed run sees the same one.
            generator = torch.Generator().manual_seed(derived_seed(self.seed, self.task, self.epoch, number))
            yield from batches(self.train_set, plan, generator, self.hardware.device, start=min(done, plan.steps))
            done = max(0, done - plan.steps)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update. Returns the parts of the loss, on the device."""
        self.scheduler.step_update(self.updates)
        self.hardware.begin_step()
        with self.hardware.autocast():
            losses = self.loss(batch)
        losses["total"].backward()
        if self.settings.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return losses

    def state_dict(self) -> dict:
        """All that a resumed run needs beyond the data and the model that entered the task."""
        random = {"cpu": torch.get_rng_state()}
        if self.hardware.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.hardware.device)
        return {
            "task": self.task,
            "epoch": self.epoch,
            "step_of_epoch": self.step_of_epoch,
            "updates": self.updates,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "random": random,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken. Raises RunError if the state belongs to another run."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.method.load_state_dict(state["method"])
            self.epoch, self.step_of_epoch, self.updates = (state[key] for key in ("epoch", "step_of_epoch", "updates"))
            torch.set_rng_state(state["random"]["cpu"].cpu())
            if "cuda" in state["random"] and self.hardware.device.type == "cuda":
                torch.cuda.set_rng_state(state["random"]["cuda"].cpu(), self.hardware.device)
        except Exception as error:  # of a damaged file anything can be wrong
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(
                f"checkpoints/last.pth is damaged or of another run ({line}); use --overwrite to start anew"
            ) from None


def make_optimizer(model: Recognizer, settings: Optimization, hardware: Hardware) -> torch.optim.Optimizer:
    """The optimizer named by `settings.opt`, one fused kernel a step where it has that. Raises UsageError if unknown."""
    fused = {"fused": True} if hardware.fused_optimizer and settings.opt in FUSED_OPTIMIZERS else {}
    try:
        # Handed the module, timm spares biases and norms the weight decay and leaves frozen parameters out.
        return create_optimizer_v2(
            model, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay, **fused
        )
    except ValueError as error:
        raise UsageError(f"--opt {settings.opt}: {error}") from None


def derived_seed(*parts: int) -> int:
    """A 64-bit seed from a run's seed and a position in it; neighbouring positions give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
