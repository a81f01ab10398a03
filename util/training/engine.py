"""The loop: every epoch, every pass, every batch, for pre-training and for all methods alike.

Nothing in here reads a number back from the device between two epochs.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from signal import Signals

import torch
from torch import Tensor, nn

from backbone.blocks import block_names
from backbone.recognizer import Recognizer
from data.batches import Batch, batches
from data.tasks import ForgettingTask
from methods.base import Method
from util.runtime.distributed import parallel
from util.runtime.interrupt import Interrupted, stop_on_signals
from util.training.monitor import Monitor
from util.training.optim import derived_seed, make_optimizer, make_scheduler, steps_of_epochs


@dataclass
class Position:
    """How far a task's training is: whole epochs, steps of the epoch at hand, updates in all."""

    epoch: int = 0
    step: int = 0
    updates: int = 0


class Trainer:
    """One task's training. The method has begun the task; `train` runs what is left of it."""

    def __init__(self, model: Recognizer, method: Method, task: ForgettingTask) -> None:
        self.model, self.method, self.task = model, method, task
        self.args, self.hardware, self.epochs = method.args, method.hardware, method.epochs
        self.position = Position()
        self.optimizer = make_optimizer(model, self.args, self.hardware)
        self.scheduler = make_scheduler(self.optimizer, self.args, steps_of_epochs(method, task, self.epochs))
        for part in filter(None, (model.backbone, getattr(model, "deposit", None))):
            self.hardware.compile_modules([part, *map(part.get_submodule, block_names(part))])
        self.loss = parallel(Loss(model, method))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def train(self, monitor: Monitor, save: Callable[["Trainer"], None], after_epoch: Callable[["Trainer"], None]) -> float:
        """Run the epochs that are left, `after_epoch` after each. Returns images per second.

        SIGINT and SIGTERM end the training after the step at hand, with a `save`. Raises Interrupted then, and RunError
        if a part of the loss is not finite, naming the part and the step.
        """
        seconds, images = 0.0, 0
        with stop_on_signals() as received:
            while self.position.epoch < self.epochs:
                start = time.perf_counter()
                self.train_one_epoch(monitor, received, save)
                self.hardware.synchronize()
                seconds += time.perf_counter() - start
                images += monitor.images
                after_epoch(self)
        return images / seconds if seconds else 0.0

    def train_one_epoch(self, monitor: Monitor, received: list[Signals], save: Callable[["Trainer"], None]) -> None:
        epoch = self.position.epoch
        self.model.train()
        if not self.method.counts_statistics:
            keep_statistics(self.model)
        self.scheduler.step(epoch)
        self.method.begin_epoch(self.model, epoch)
        monitor.begin_epoch(epoch, self.position.step)
        for batch in self.batches_left():
            monitor.step(self.step(batch), len(batch))
            if received:
                monitor.check()
                save(self)
                where = f"epoch {epoch + 1} of {self.epochs}"
                message = f"{monitor.label}: stopped by {received[-1].name} in {where} and saved; continue with --resume"
                raise Interrupted(message, received[-1])
        self.position.epoch, self.position.step = epoch + 1, 0
        monitor.end_epoch(self.optimizer.param_groups[0]["lr"], self.method.end_epoch(self.model, epoch))

    def batches_left(self) -> Iterator[Batch]:
        """The epoch's batches from the position on, pass after pass."""
        epoch, done = self.position.epoch, self.position.step
        for number, plan in enumerate(self.method.passes(self.task, epoch, self.epochs)):
            # The order of batches depends on the position alone, so that a resumed run sees the same one. They are of the
            # method's images, which may be more than the run's.
            generator = torch.Generator().manual_seed(derived_seed(self.args.seed, self.task.number, epoch, number))
            yield from batches(self.method.train_set, plan, generator, self.hardware.device, start=min(done, plan.steps))
            done = max(0, done - plan.steps)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update. Returns the parts of the loss, on the device."""
        self.scheduler.step_update(self.position.updates)
        self.hardware.begin_step()
        with self.hardware.autocast():
            losses = self.loss(batch)
        losses["total"].backward()
        if self.args.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.args.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.position.step += 1
        self.position.updates += 1
        return losses

    def state_dict(self) -> dict:
        """All that a resumed run needs beyond the data and the model that entered the task."""
        random = {"cpu": torch.get_rng_state()}
        if self.hardware.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.hardware.device)
        return {
            "task": self.task.number,
            "position": vars(self.position).copy(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "random": random,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state["method"])
        self.position = Position(**state["position"])
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"] and self.hardware.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], self.hardware.device)


def keep_statistics(model: nn.Module) -> None:
    """Batch norms stay as they were pre-trained: a few batches of the forgotten would be no statistics of faces."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm):
            module.eval()


class Loss(nn.Module):
    """A method's loss as a module, for DistributedDataParallel."""

    def __init__(self, model: Recognizer, method: Method) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.method.loss(self.model, batch)
