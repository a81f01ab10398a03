"""Pre-training: the margin head's loss on every training image. A method like the others, so that one loop serves all."""

import torch

from data.batches import random_flip
from methods.base import Method, TaskOutput


class Pretrain(Method):
    """L = CE(z, y), z the training logits of (randomly mirrored) images; trains backbone and head.

    Classes left out of the task (`task.old`) have no part in the loss: their rows are no class to tell the others from.
    """

    name = "pretrain"
    title = "Pre-train"
    counts_statistics = True

    def prepare(self, model):
        model.requires_grad_(True)
        self.rows = torch.tensor(self.task.remain, device=self.hardware.device)

    def passes(self, task, epoch, epochs):
        return [self.one_pass({"train": task.remain_indices})]

    def loss(self, model, batch):
        images = random_flip(batch.images) if self.args.mirror == "on" else batch.images
        logits, labels = model(images), batch.labels
        if self.task.old:
            logits, labels = logits[:, self.rows], torch.searchsorted(self.rows, labels)
        return {"total": model.head.loss_of_logits(logits, labels)}

    def end_task(self, model):
        model.head.delete_rows(self.task.old)
        return TaskOutput()
