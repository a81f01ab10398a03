"""What a forgetting method is: it says what is trained, which passes an epoch makes, and what the loss is.

It never loops over batches, steps an optimizer, logs, saves or evaluates: `util/training/engine.py` does, the same for all.
The types of the hooks stand here alone.
"""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from keyword import iskeyword
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from backbone.recognizer import Recognizer
from data.batches import Batch, Pass
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from util.runtime.hardware import Hardware


@dataclass(frozen=True)
class Option:
    """`--name` on the command line, `args.name` in the method (`args.lambda_` for a word of Python's own).

    Its type is the default's; a list takes one value or more. Numbers range from `low` to `high`. `published` is what
    --as-published sets, where that is not the default, and `few_shot` what --as-published few-shot does, where that differs.
    Without `help` it is another default for a shared option (lr, …).
    """

    name: str
    default: Any
    help: str = ""
    published: Any = None
    few_shot: Any = None
    choices: Sequence[str] | None = None
    low: float = 0
    high: float = float("inf")

    @property
    def dest(self) -> str:
        return f"{self.name}_" if iskeyword(self.name) else self.name

    def value(self, preset: str | None) -> Any:
        """The default, or what it is with `--as-published preset`."""
        values = {None: [], "table": [self.published], "few-shot": [self.few_shot, self.published]}[preset]
        return next((value for value in values if value is not None), self.default)


PRESETS = ("table", "few-shot")  # of the published code: its 4-task table, and that with four images a class
# Of all methods.
SHARED_OPTIONS = (
    Option("sched", "cosine", published="cosine-by-epoch"),
    Option("few_shot", None, few_shot=4),
    Option("last_batch", "full", published="short"),
)


@dataclass
class TaskOutput:
    """What a task leaves beside the model.

    files:  tensors by the name of their folder, {"adapters": {"blocks.0.…": …}}, saved as <folder>/task_<t>.safetensors.
    groups: {"norms", "zero_ratio"} for results.json.
    """

    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    groups: dict[str, Any] | None = None


class Method(ABC):
    """Made once per run, told of each task. Subclass, override `loss`, and register in `methods/__init__.py`."""

    name: ClassVar[str]
    title: ClassVar[str]  # as in the paper's tables
    options: ClassVar[Sequence[Option]] = ()  # the last one of a name counts
    unused: ClassVar[Sequence[str]] = ()  # the shared options that do nothing here
    counts_statistics: ClassVar[bool] = False  # whether batch norms count the statistics of what is trained on
    average: AveragedModel | None = None  # within a task, for the methods that have one
    replay: ImageSet | None = None  # images that it trains on beside the run's

    def __init__(self, args: argparse.Namespace, hardware: Hardware) -> None:
        self.args = args
        self.hardware = hardware

    def check(self, model: Recognizer, tasks: Sequence[ForgettingTask], train_set: ImageSet) -> None:
        """Raise UsageError for options that do not fit this model, these tasks or images, before anything is written."""

    def begin_run(self, model: Recognizer, tasks: Sequence[ForgettingTask], train_set: ImageSet) -> None:
        """Before the first task, also of a resumed run; `model` is the pre-trained one."""

    def begin_task(self, model: Recognizer, task: ForgettingTask, train_set: ImageSet, epochs: int) -> None:
        """Before each task, also of a resumed one. Trained is, unless `prepare` chooses otherwise, everything but the head:
        a head that moved would forget by itself, the backbone keeping the identity.
        """
        self.task, self.train_set, self.epochs = task, train_set, epochs
        model.requires_grad_(True)
        model.head.requires_grad_(False)
        self.prepare(model)

    def prepare(self, model: Recognizer) -> None:
        """Choose what is trained; take snapshots of `model`; compute a teacher's outputs once."""

    def passes(self, task: ForgettingTask, epoch: int, epochs: int) -> list[Pass]:
        """What epoch `epoch` (from 0) of `epochs` runs: by default one pass of paired batches of D_f and D_r."""
        streams = {"forget": task.forget_indices, "remain": task.remain_indices}
        return [self.one_pass(streams, over=self.args.epoch_over)]

    def one_pass(self, streams: dict[str, Tensor], **how: Any) -> Pass:
        """A pass over `streams` in batches as the options say; `how` are further fields of `Pass`."""
        return Pass(streams, self.args.batch_size, last_batch=self.args.last_batch, **how)

    def begin_epoch(self, model: Recognizer, epoch: int) -> None:
        """Before each epoch: schedules of coefficients."""

    @abstractmethod
    def loss(self, model: Recognizer, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss of one batch, each a scalar; "total" is differentiated, all are logged."""

    def end_epoch(self, model: Recognizer, epoch: int) -> dict[str, float]:
        """After each epoch: running averages of the weights. Returns further numbers to log."""
        return {}

    def end_task(self, model: Recognizer) -> TaskOutput:
        """Merge adapters, take over averages."""
        return TaskOutput()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beyond the model: within a task at every save, after it what the next task needs.

        By default the running average of the weights, if there is one.
        """
        return {} if self.average is None else {"average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        if state:
            self.average.load_state_dict(state["average"])


def per_task(values: Sequence[float], task: ForgettingTask) -> float:
    """The value for a task from a list with one for all tasks, or one per task, the last one for any further."""
    return values[min(task.number, len(values)) - 1]
