"""Pre-training: the margin head's loss on every training image. A method like the others, so that one loop serves all."""

import torch
from torch import Tensor

from backbone.recognizer import Recognizer
from data.batches import Batch, Pass, random_flip
from data.image_set import ImageSet
from methods.base import Method


class Pretrain(Method):
    """L = CE(z, y), z the training logits of randomly mirrored images; trains backbone and head."""

    name = "pretrain"
    title = "Pre-train"

    def begin_task(self, model: Recognizer, task: None, train_set: ImageSet) -> None:
        super().begin_task(model, task, train_set)
        model.requires_grad_(True)

    def passes(self, epoch: int) -> list[Pass]:
        return [Pass({"train": torch.arange(len(self.train_set))}, self.args.batch_size)]

    def loss(self, model: Recognizer, batch: Batch) -> dict[str, Tensor]:
        return {"total": model.head.loss(model.embed(random_flip(batch.images)), batch.labels)}
