"""SCRUB and SCRUB-S: scalable remembering and unlearning unbound (Kurmanji et al., NeurIPS 2023, arXiv 2302.09880)."""

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from backbone.recognizer import Recognizer
from data.batches import Batch, Pass
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from methods.base import Method, refuse_negative
from methods.distillation import Teacher, kl_divergence
from util.runtime.errors import UsageError

AVERAGE_WEIGHT = 0.1  # of the newest weights in SCRUB-S's running average


class SCRUB(Method):
    """max pass over D_f:  L = −KL_T(teacher ‖ student)
    min pass over D_r:  L = γ · CE(z_r, y_r) + a · KL_T(teacher ‖ student)

    A round is a first half of epochs with a max and a min pass each, and a second half of epochs with a min pass alone;
    the published 100 epochs are ten rounds of 5 + 5. The teacher is θ₀, the model that enters the task.
    """

    name = "scrub"
    title = "SCRUB"
    defaults = {"lr": 2e-4, "weight_decay": 5e-4, "opt": "adam"}
    published = {"lr": 1e-4, "gamma": 0.99, "kd_weight": 0.001, "rounds": 10, "kd_logits": "training"}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group(f"{cls.title} (arXiv 2302.09880)")
        group.add_argument("--gamma", type=float, default=0.99, metavar="γ", help="weight γ of the replay (published: 0.99)")
        group.add_argument(
            "--kd-weight", type=float, default=0.1, metavar="a", help="weight a of the min pass's KL (published: 0.001)"
        )
        group.add_argument("--temperature", type=float, default=2.0, metavar="T", help="temperature of KL (published: 2)")
        group.add_argument(
            "--rounds", type=int, default=2, metavar="N", help="rounds, at most one per two epochs (published: 10)"
        )
        group.add_argument(
            "--kd-logits",
            choices=("label-free", "training"),
            default="label-free",
            help="logits that KL compares; published: the training logits, with the margin",
        )

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        refuse_negative(args, "gamma", "kd_weight")
        if not args.temperature > 0 or args.rounds < 1:
            raise UsageError("--temperature must be above 0, --rounds at least 1")

    def begin_task(self, model: Recognizer, task: ForgettingTask, train_set: ImageSet) -> None:
        super().begin_task(model, task, train_set)
        seen = torch.cat([task.forget_indices, task.remain_indices])
        self.teacher = Teacher(model, train_set, seen, self.hardware)

    def passes(self, epoch: int) -> list[Pass]:
        minimise = Pass({"remain": self.task.remain_indices}, self.args.batch_size, "min")
        if 2 * self._place_in_round(epoch) >= self.epochs:
            return [minimise]
        return [Pass({"forget": self.task.forget_indices}, self.args.batch_size, "max"), minimise]

    def _place_in_round(self, epoch: int) -> int:
        """How far epoch `epoch` is in its round: 0 at its beginning, `self.epochs` at its end."""
        rounds = max(1, min(self.args.rounds, self.epochs // 2))
        return epoch * rounds % self.epochs

    def loss(self, model: Recognizer, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch.images)
        student, teacher = logits, self.teacher.logits(batch.indices)
        if self.args.kd_logits == "training":
            student, teacher = (model.head.add_margin(each, batch.labels) for each in (student, teacher))
        kl = kl_divergence(teacher, student, self.args.temperature)
        if batch.pass_name == "max":
            return {"total": -kl, "forget_kl": kl}
        remain = model.head.loss_of_logits(logits, batch.labels)
        return {"total": self.args.gamma * remain + self.args.kd_weight * kl, "remain": remain, "remain_kl": kl}


class SCRUBS(SCRUB):
    """SCRUB with + ρ · Σ ‖θ − θ_avg‖₂ in both passes, the sum over parameter tensors.

    θ_avg starts as θ₀ and takes in a tenth of θ after each round.
    """

    name = "scrub_s"
    title = "SCRUB-S"
    published = SCRUB.published | {"rho": 0.1}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        group = parser.add_argument_group("SCRUB-S's smoothing")
        group.add_argument("--rho", type=float, default=0.1, metavar="ρ", help="weight ρ of the distance (published: 0.1)")

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        super().check_arguments(args)
        refuse_negative(args, "rho")

    def begin_task(self, model: Recognizer, task: ForgettingTask, train_set: ImageSet) -> None:
        super().begin_task(model, task, train_set)
        self.trained = nn.ParameterList([parameter for parameter in model.parameters() if parameter.requires_grad])
        self.average = AveragedModel(self.trained, multi_avg_fn=get_ema_multi_avg_fn(1 - AVERAGE_WEIGHT))
        self.average.update_parameters(self.trained)  # the first call copies

    def loss(self, model: Recognizer, batch: Batch) -> dict[str, Tensor]:
        losses = super().loss(model, batch)
        pairs = zip(self.trained, self.average.module, strict=True)
        distance = torch.stack([torch.linalg.vector_norm(p - average.detach()) for p, average in pairs]).sum()
        return losses | {"total": losses["total"] + self.args.rho * distance, "distance": distance}

    def end_epoch(self, model: Recognizer, epoch: int) -> dict[str, float]:
        if self._place_in_round(epoch + 1) < self._place_in_round(epoch):  # the round is over
            self.average.update_parameters(self.trained)
        return {}

    def end_task(self, model: Recognizer) -> dict[str, Any]:
        self.average = None
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {} if self.average is None else {"average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.average.load_state_dict(state["average"])
