"""Retrain: from scratch, on what remains."""

from torch import Tensor

from backbone.published import initialize_as_published
from backbone.recognizer import Recognizer, build_recognizer
from data.batches import Batch, Pass
from data.tasks import ForgettingTask
from methods.base import Method, Option


class Retrain(Method):
    """L = CE(z_r, y_r) on D_r, from random weights, backbone and head, in `passes` as many epochs as the other methods get.

    Published, as of 23 December 2025: as many epochs. Earlier code started the first task alone from random weights.
    """

    name = "retrain"
    title = "Retrain"
    counts_statistics = True
    unused = ("epoch_over",)
    options = [
        Option("lr", 1e-3, published=3e-4),
        Option("warmup_epochs", 1, published=5),
        Option("passes", 4, "passes over D_r that an epoch makes", published=1, low=1),
        Option("init", "timm", "random weights to start from", published="published", choices=("timm", "published")),
    ]

    def prepare(self, model: Recognizer) -> None:
        fresh = build_recognizer(model.architecture)
        if self.args.init == "published":
            initialize_as_published(fresh.backbone)
        model.load_state_dict(fresh.state_dict())
        model.head.requires_grad_(True)

    def passes(self, task: ForgettingTask, epoch: int, epochs: int) -> list[Pass]:
        return [self.one_pass({"remain": task.remain_indices})] * self.args.passes

    def loss(self, model: Recognizer, batch: Batch) -> dict[str, Tensor]:
        return {"total": model.head.loss(model.embed(batch.images), batch.labels)}
