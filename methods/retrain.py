"""Retrain: from scratch, on what remains."""

from torch import Tensor

from backbone.recognizer import Recognizer, build_recognizer
from data.batches import Batch, Pass
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from methods.base import Method, Option


class Retrain(Method):
    """L = CE(z_r, y_r) on D_r, from random weights, backbone and head, for as many epochs as the other methods get."""

    name = "retrain"
    title = "Retrain"
    options = [Option("lr", 1e-3, published=3e-4), Option("warmup_epochs", 1, published=5)]

    def begin_task(self, model: Recognizer, task: ForgettingTask, train_set: ImageSet, epochs: int) -> None:
        super().begin_task(model, task, train_set, epochs)
        model.load_state_dict(build_recognizer(model.architecture).state_dict())
        model.requires_grad_(True)

    def passes(self, task: ForgettingTask, epoch: int, epochs: int) -> list[Pass]:
        return [Pass({"remain": task.remain_indices}, self.args.batch_size)]

    def loss(self, model: Recognizer, batch: Batch) -> dict[str, Tensor]:
        return {"total": model.head.loss(model.embed(batch.images), batch.labels)}
