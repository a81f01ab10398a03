"""DELETE: decoupled distillation to erase (Zhou et al., CVPR 2025, arXiv 2503.23751)."""

import torch

from methods.base import Option
from methods.distillation import Distillation, kl_divergence

MASKED_LOGIT = -1e4  # a logit whose softmax is zero; with −∞ the divergence would be 0 · ∞


class DELETE(Distillation):
    """L = KL(teacher without its own class ‖ h_f), over D_f alone

    The teacher's softmax over all other classes says what the image looks like otherwise. No remaining image is needed.
    """

    name = "delete"
    title = "DELETE"
    options = [*Distillation.options, Option("lr", 3e-4)]
    unused = ("epoch_over",)
    taught = ("forget",)

    def passes(self, task, epoch, epochs):
        return [self.one_pass({"forget": task.forget_indices})]

    def loss(self, model, batch):
        classes = torch.arange(model.head.weight.shape[0], device=batch.labels.device)
        others = self.teacher.logits(batch.indices).masked_fill(classes == batch.labels[:, None], MASKED_LOGIT)
        forget = kl_divergence(others, model(batch.images))
        return {"total": forget}
