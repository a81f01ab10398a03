"""Retrain: from scratch, on what remains."""

from backbone.published import initialize_as_published
from backbone.recognizer import build_recognizer
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

    def prepare(self, model):
        fresh = build_recognizer(model.architecture)
        if self.args.init == "published":
            initialize_as_published(fresh.backbone)
        model.load_state_dict(fresh.state_dict())
        model.head.requires_grad_(True)

    def passes(self, task, epoch, epochs):
        return [self.one_pass({"remain": task.remain_indices})] * self.args.passes

    def loss(self, model, batch):
        return {"total": model.head.loss(model.embed(batch.images), batch.labels)}
