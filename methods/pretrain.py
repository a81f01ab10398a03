"""Pre-training: the margin head's loss on every training image. A method like the others, so that one loop serves all."""

from torch import Tensor

from backbone.recognizer import Recognizer
from data.batches import Batch, Pass, random_flip
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from methods.base import Method


class Pretrain(Method):
    """L = CE(z, y), z the training logits of randomly mirrored images; trains backbone and head."""

    name = "pretrain"
    title = "Pre-train"

    def begin_task(self, model: Recognizer, task: ForgettingTask, train_set: ImageSet, epochs: int) -> None:
        super().begin_task(model, task, train_set, epochs)
        model.requires_grad_(True)

    def passes(self, task: ForgettingTask, epoch: int, epochs: int) -> list[Pass]:
        return [Pass({"train": task.remain_indices}, self.args.batch_size)]

    def loss(self, model: Recognizer, batch: Batch) -> dict[str, Tensor]:
        return {"total": model.head.loss(model.embed(random_flip(batch.images)), batch.labels)}
