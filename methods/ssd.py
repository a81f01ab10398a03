"""SSD: selective synaptic dampening (Foster et al., AAAI 2024, arXiv 2308.07707)."""

import torch

from backbone.recognizer import Recognizer
from data.batches import Batch, Pass
from data.tasks import ForgettingTask
from methods.base import Method, Option, TaskOutput
from methods.importance import mean_importance


class SSD(Method):
    """θ_i ← min(λ · F_i / F_f,i, 1) · θ_i  wherever  F_f,i > α · F_i

    F is the diagonal of the Fisher information over D_f and D_r, F_f that over D_f alone. Nothing is trained.
    """

    name = "ssd"
    title = "SSD"
    source = "arXiv 2308.07707"
    options = [
        Option("selection", 10.0, "α: how much more a weight matters to D_f than to all, to be dampened"),
        Option("dampening", 1.0, "λ: the larger, the less it is dampened"),
    ]

    def passes(self, task: ForgettingTask, epoch: int, epochs: int) -> list[Pass]:
        return []

    def loss(self, model: Recognizer, batch: Batch) -> dict:
        raise NotImplementedError("SSD makes no pass")

    @torch.no_grad()
    def end_task(self, model: Recognizer) -> TaskOutput:
        task = self.task
        seen = torch.cat([task.forget_indices, task.remain_indices])
        of_all, of_forget = (self._fisher(model, indices) for indices in (seen, task.forget_indices))
        for name, forget in of_forget.items():
            factor = (self.args.dampening * of_all[name] / forget.clamp(min=1e-30)).clamp(max=1)
            chosen = forget > self.args.selection * of_all[name]
            model.get_parameter(name).mul_(torch.where(chosen, factor, 1.0))
        return TaskOutput()

    def _fisher(self, model: Recognizer, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.enable_grad():
            data = self.train_set, indices, self.hardware
            return mean_importance(model, model.head.loss_of_logits, torch.square, *data)
