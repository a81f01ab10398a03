"""DER and DER++: dark experience replay (Buzzega et al., NeurIPS 2020, arXiv 2004.07211)."""

import argparse

from torch import Tensor

from backbone.recognizer import Recognizer
from data.batches import Batch, Pass
from methods.base import refuse_negative
from methods.distillation import RelabelAndMatch


class DER(RelabelAndMatch):
    """L = CE(z_f, ỹ) + λ · ‖h_r − h_r^teacher‖², h the label-free logits, the squared norm averaged over the batch."""

    name = "der"
    title = "DER"
    defaults = {"lr": 2e-3}
    published = {"lr": 1e-3, "lambda_": 0.01, "distill_on": "embeddings"}
    default_lambda = 0.01

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group(f"{cls.title} (arXiv 2004.07211)")
        group.add_argument(
            "--lambda",
            dest="lambda_",
            type=float,
            default=cls.default_lambda,
            metavar="λ",
            help=f"weight λ of the matched outputs (published: {cls.published['lambda_']}, of embeddings)",
        )
        group.add_argument(
            "--distill-on",
            choices=("logits", "embeddings"),
            default="logits",
            help="what is matched; published: embeddings, their squared distance summed over the batch",
        )

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        refuse_negative(args, "lambda_")

    def loss(self, model: Recognizer, batch: Batch) -> dict[str, Tensor]:
        embeddings = model.embed(batch.images)
        logits, labels, indices = map(batch.split, (model.head(embeddings), batch.labels, batch.indices))
        forget = self.forget_loss(model, logits["forget"], labels["forget"])
        if self.args.distill_on == "logits":
            matched = (logits["remain"] - self.teacher.logits(indices["remain"])).square().sum(dim=1).mean()
        else:
            target = self.teacher.embeddings(indices["remain"])
            matched = (batch.split(embeddings)["remain"].float() - target).square().sum()
        losses = {"total": forget + self.args.lambda_ * matched, "forget": forget, "matched": matched}
        if "replay" in batch.sizes:
            losses["replay"] = model.head.loss_of_logits(logits["replay"], labels["replay"])
            losses["total"] = losses["total"] + self.args.lambda_replay * losses["replay"]
        return losses


class DERpp(DER):
    """L = CE(z_f, ỹ) + λ · ‖h_r − h_r^teacher‖² + λ₂ · CE(z_r′, y_r′), r′ a second, independent batch of D_r."""

    name = "der_pp"
    title = "DER++"
    defaults = {"lr": 1e-3}
    default_lambda = 0.001
    published = {"lr": 1e-3, "lambda_": 0.005, "lambda_replay": 0.005, "distill_on": "embeddings"}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        group = parser.add_argument_group("DER++'s replay")
        group.add_argument(
            "--lambda-replay", type=float, default=2.0, metavar="λ", help="weight λ₂ of the replay (published: 0.005)"
        )

    @classmethod
    def check_arguments(cls, args: argparse.Namespace) -> None:
        refuse_negative(args, "lambda_", "lambda_replay")

    def passes(self, epoch: int) -> list[Pass]:
        (plan,) = super().passes(epoch)
        return [Pass(plan.streams | {"replay": self.task.remain_indices}, plan.batch_size)]
