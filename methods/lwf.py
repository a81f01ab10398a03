"""LwF: learning without forgetting (Li & Hoiem, ECCV 2016, arXiv 1606.09282)."""

import argparse

from torch import Tensor

from backbone.recognizer import Recognizer
from data.batches import Batch
from methods.base import refuse_negative
from methods.distillation import RelabelAndMatch, kl_divergence
from util.runtime.errors import UsageError


class LwF(RelabelAndMatch):
    """L = CE(z_f, ỹ) + λ_r · CE(z_r, y_r) + λ_kd · KL_T(teacher(x_r) ‖ student(x_r))

    The teacher is θ₀, the model that enters the task; distilled are the label-free logits.
    """

    name = "lwf"
    title = "LwF"
    defaults = {"lr": 1e-3}
    # The published distillation takes the logarithm of a log-softmax, which is NaN, and sets NaN to 0.
    published = {"lr": 1e-4, "lambda_remain": 10.0, "lambda_kd": 0.0}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("LwF (arXiv 1606.09282)")
        group.add_argument(
            "--lambda-remain", type=float, default=1.0, metavar="λ", help="weight λ_r of the replay (published: 10)"
        )
        group.add_argument(
            "--lambda-kd",
            type=float,
            default=0.5,
            metavar="λ",
            help="weight λ_kd of the distillation (published: 0.5, on a term that is always 0: 0 repeats it)",
        )
        group.add_argument("--temperature", type=float, default=2.0, metavar="T", help="temperature of the distillation")

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        refuse_negative(args, "lambda_remain", "lambda_kd")
        if not args.temperature > 0:
            raise UsageError("--temperature must be above 0")

    def loss(self, model: Recognizer, batch: Batch) -> dict[str, Tensor]:
        logits, labels = batch.split(model(batch.images)), batch.split(batch.labels)
        indices = batch.split(batch.indices)["remain"]
        forget = self.forget_loss(model, logits["forget"], labels["forget"])
        remain = model.head.loss_of_logits(logits["remain"], labels["remain"])
        distillation = kl_divergence(self.teacher.logits(indices), logits["remain"], self.args.temperature)
        total = forget + self.args.lambda_remain * remain + self.args.lambda_kd * distillation
        return {"total": total, "forget": forget, "remain": remain, "distillation": distillation}
