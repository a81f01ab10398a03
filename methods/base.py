"""What a forgetting method is: it says what is trained, which passes an epoch makes, and what the loss is.

It never loops over batches, steps an optimizer, logs, saves or evaluates: `util/engine.py` does, the same for all.
"""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from backbone.recognizer import Recognizer
from data.batches import Batch, Pass
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from util.runtime.errors import UsageError
from util.runtime.hardware import Hardware


class Method(ABC):
    """Constructed once per run, told of each task. Subclass, override `loss`, and register in `methods/__init__.py`.

    What `begin_task` leaves to the other functions: `task` and `train_set`.
    """

    name: ClassVar[str]
    title: ClassVar[str]  # as the paper's tables write it
    # Of the shared optimisation options (lr, weight_decay, opt, warmup_epochs), this method's own values.
    defaults: ClassVar[dict[str, Any]] = {}
    # What --as-published sets: the readings and the values of the published code's four-task table.
    published: ClassVar[dict[str, Any]] = {}

    epochs = 1  # of the task at hand; the trainer sets it

    def __init__(self, args: argparse.Namespace, hardware: Hardware) -> None:
        self.args = args
        self.hardware = hardware

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the method's own options, as one group."""

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        """Raise UsageError for values that cannot work, before anything is loaded."""

    @classmethod
    def check_model(cls, args: argparse.Namespace, model: Recognizer) -> None:
        """Raise UsageError for values that do not fit this model, before anything is written."""

    def begin_run(self, model: Recognizer, tasks: Sequence[ForgettingTask], train_set: ImageSet) -> None:
        """Before the first task, also of a resumed run; `model` is the pre-trained one."""

    def begin_task(self, model: Recognizer, task: ForgettingTask, train_set: ImageSet) -> None:
        """Choose what is trained; take snapshots of `model`; compute a teacher's outputs once.

        By default everything but the head: a head that moved would forget by itself, the backbone keeping the identity.
        """
        self.task = task
        self.train_set = train_set
        model.requires_grad_(True)
        model.head.requires_grad_(False)

    def passes(self, epoch: int) -> list[Pass]:
        """The streams epoch `epoch` (from 0) runs: by default one pass of paired batches of D_f and D_r."""
        streams = {"forget": self.task.forget_indices, "remain": self.task.remain_indices}
        return [Pass(streams, self.args.batch_size)]

    def begin_epoch(self, model: Recognizer, epoch: int) -> None:
        """Before each epoch: schedules of coefficients."""

    @abstractmethod
    def loss(self, model: Recognizer, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss of one batch, each a scalar; "total" is differentiated, all are logged."""

    def end_epoch(self, model: Recognizer, epoch: int) -> dict[str, float]:
        """After each epoch: running averages of the weights. Returns further numbers to log."""
        return {}

    def end_task(self, model: Recognizer) -> dict[str, Any]:
        """Merge adapters, take over averages. What the task leaves beside the model:
        "adapters", "deposit": the tensors of such a file; "groups": {"norms", "zero_ratio"} for results.json."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beyond the model that entered the task and the parameters in training.

        During a task that is written with every save; after a task it is what the next task needs of this one.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


def per_task(values: Sequence[float], task: ForgettingTask) -> float:
    """The value for a task from a list with one for all tasks, or one per task, the last one for any further."""
    return values[min(task.number, len(values)) - 1]


def refuse_negative(args: argparse.Namespace, *names: str) -> None:
    """Raise UsageError if one of these options (or one of its values) is negative."""
    for name in names:
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 0:
            option = name.strip("_").replace("_", "-")
            raise UsageError(f"--{option} cannot be negative")
