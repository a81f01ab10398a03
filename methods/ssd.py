"""SSD: selective synaptic dampening (Foster et al., AAAI 2024, arXiv 2308.07707)."""

import torch

from methods.base import Method, Option, TaskOutput
from methods.importance import mean_importance


class SSD(Method):
    """θ_i ← min(λ · F_i / F_f,i, 1) · θ_i  wherever  F_f,i > α · F_i

    F is the diagonal of the Fisher information over D_f and D_r, F_f that over D_f alone. Nothing is trained.
    """

    name = "ssd"
    title = "SSD"
    unused = ("epochs", "batch_size", "lr", "min_lr", "weight_decay", "warmup_epochs", "opt", "sched", "decay_on")
    unused += ("clip_grad", "epoch_over", "min_updates", "save_every", "eval_every")
    options = [
        Option("selection", 1.2, "ratio α of importance to D_f and to all, from which a weight is dampened"),
        Option("dampening", 1.0, "strength λ of the dampening; larger values dampen less"),
    ]

    def passes(self, task, epoch, epochs):
        return []

    def loss(self, model, batch):
        raise NotImplementedError("SSD makes no pass")

    def end_task(self, model):
        forget, remain = self.task.forget_indices, self.task.remain_indices
        what = model, model.head.loss_of_logits, torch.square, self.train_set
        of_forget, of_remain = (mean_importance(*what, indices, self.hardware) for indices in (forget, remain))
        share = len(forget) / (len(forget) + len(remain))
        for name, own in of_forget.items():
            of_all = share * own + (1 - share) * of_remain[name]
            factor = (self.args.dampening * of_all / own.clamp(min=1e-30)).clamp(max=1)
            parameter = model.get_parameter(name).detach()
            parameter.mul_(torch.where(own > self.args.selection * of_all, factor, 1.0))
        return TaskOutput()
