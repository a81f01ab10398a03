"""SCRUB and SCRUB-S: scalable remembering and unlearning unbound (Kurmanji et al., NeurIPS 2023, arXiv 2302.09880)."""

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from methods.base import Option
from methods.distillation import KD_LOGITS, Distillation, kl_divergences
from util.runtime import foreach

AVERAGE_WEIGHT = 0.1  # of the newest weights in SCRUB-S's running average


class SCRUB(Distillation):
    """max pass over D_f:  L = −mean min(KL_T(teacher ‖ student), bound)
    min pass over D_r:  L = γ · CE(z_r, y_r) + a · KL_T(teacher ‖ student)

    A round is a first half of epochs with a max and a min pass each, and a second half of epochs with a min pass alone;
    the published 100 epochs are ten rounds of 5 + 5. The teacher is θ₀. A max pass is no longer than a min pass, and pushes
    no image beyond the bound. The source's does: the model collapses, while some images are hardly moved.
    """

    name = "scrub"
    title = "SCRUB"
    unused = ("epoch_over",)
    taught = ("forget", "remain")
    options = [
        *Distillation.options,
        Option("lr", 8e-4, published=1e-4),
        Option("sched", "cosine", published="step"),
        Option("weight_decay", 5e-4),
        Option("decay_on", "matrices", published="all"),
        Option("opt", "adam"),
        Option("gamma", 0.99, "weight γ of the replay"),
        Option("kd_weight", 0.1, "weight a of the min pass's KL", published=0.001),
        Option("temperature", 2.0, "temperature T of KL", low=0.01),
        Option("rounds", 2, "rounds, at most one per two epochs", published=10, low=1),
        Option("max_share", 1.0, "most steps of a max pass, as a share of a min pass's", published=1e9),
        Option("bound", 10.0, "divergence beyond which a max pass pushes an image no further", published=1e9),
        KD_LOGITS,
    ]

    def passes(self, task, epoch, epochs):
        minimize = self.one_pass({"remain": task.remain_indices}, name="min")
        if 2 * self._place_in_round(epoch, epochs) >= epochs:
            return [minimize]
        most = max(1, int(self.args.max_share * minimize.steps))
        return [self.one_pass({"forget": task.forget_indices}, name="max", most_steps=most), minimize]

    def _place_in_round(self, epoch: int, epochs: int) -> int:
        """How far `epoch` is in its round: 0 at its beginning, `epochs` at its end."""
        rounds = max(1, min(self.args.rounds, epochs // 2))
        return epoch * rounds % epochs

    def loss(self, model, batch):
        logits = model(batch.images)
        student, teacher = logits, self.teacher.logits(batch.indices)
        if self.args.kd_logits == "training":
            student, teacher = (model.head.add_margin(each, batch.labels) for each in (student, teacher))
        kl = kl_divergences(teacher, student, self.args.temperature)
        if batch.pass_name == "max":
            return {"total": -kl.clamp(max=self.args.bound).mean(), "forget_kl": kl.mean()}
        kl = kl.mean()
        remain = model.head.loss_of_logits(logits, batch.labels)
        return {"total": self.args.gamma * remain + self.args.kd_weight * kl, "remain": remain, "remain_kl": kl}


class SCRUBS(SCRUB):
    """SCRUB with + ρ · Σ ‖θ − θ_avg‖₂ in both passes, the sum over parameter tensors.

    θ_avg starts as θ₀ and takes in a tenth of θ after each round. Published, it starts once, with the run, and the first
    round's end replaces it.
    """

    name = "scrub_s"
    title = "SCRUB-S"
    options = [
        *SCRUB.options,
        Option("rho", 0.001, "weight ρ of the distance to the running average", published=0.1),
        Option("average_over", "task", "span of the running average", published="run", choices=("task", "run")),
    ]
    saved: dict[str, Any] = {}  # an earlier task's average, of a resumed run

    def prepare(self, model):
        super().prepare(model)
        self.trained = nn.ParameterList(model.trained().values())
        if self.average is None:
            self.average = AveragedModel(self.trained, multi_avg_fn=get_ema_multi_avg_fn(1 - AVERAGE_WEIGHT))
            if self.args.average_over == "task":
                self.average.update_parameters(self.trained)  # the first call copies
        super().load_state_dict(self.saved)
        self.saved = {}

    def loss(self, model, batch):
        losses = super().loss(model, batch)
        averages = [average.detach() for average in self.average.module]
        distance = foreach.norms(foreach.differences([*self.trained], averages)).sum()
        return losses | {"total": losses["total"] + self.args.rho * distance, "distance": distance}

    def end_epoch(self, model, epoch):
        if self._place_in_round(epoch + 1, self.epochs) < self._place_in_round(epoch, self.epochs):  # the round is over
            self.average.update_parameters(self.trained)
        return {}

    def end_task(self, model):
        if self.args.average_over == "task":
            self.average = None
        return super().end_task(model)

    def load_state_dict(self, state):
        if self.average is None:
            self.saved = state
        else:
            super().load_state_dict(state)
