"""Retrain: from scratch, on what remains."""

from torch import Tensor

from backbone.published import initialize_as_published
from backbone.recognizer import Recognizer, build_recognizer
from data.batches import Batch, Pass
from data.tasks import ForgettingTask
from methods.base import Method, Option


class Retrain(Method):
    """L = CE(z_r, y_r) on D_r, from random weights, backbone and head, in `passes` as many epochs as the other methods get.

    Published: as many epochs; the first task alone starts from random weights, and its random head is not trained.
    """

    name = "retrain"
    title = "Retrain"
    unused = ("epoch_over",)
    options = [
        Option("lr", 1e-3, published=3e-4),
        Option("warmup_epochs", 1, published=5),
        Option("passes", 4, "passes over D_r that an epoch makes", published=1, low=1),
        Option("init", "timm", "random weights to start from", published="published", choices=("timm", "published")),
        Option("restart", "task", "start anew each task, or once", published="run", choices=("task", "run")),
    ]

    def prepare(self, model: Recognizer) -> None:
        if self.args.restart == "task" or self.task.number == 1:
            fresh = build_recognizer(model.architecture)
            if self.args.init == "published":
                initialize_as_published(fresh.backbone)
            model.load_state_dict(fresh.state_dict())
        model.head.requires_grad_(self.args.restart == "task")

    def passes(self, task: ForgettingTask, epoch: int, epochs: int) -> list[Pass]:
        return [Pass({"remain": task.remain_indices}, self.args.batch_size)] * self.args.passes

    def loss(self, model: Recognizer, batch: Batch) -> dict[str, Tensor]:
        return {"total": model.head.loss(model.embed(batch.images), batch.labels)}
