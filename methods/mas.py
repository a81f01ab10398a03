"""MAS: memory aware synapses (Aljundi et al., ECCV 2018, arXiv 1711.09601)."""

import argparse

import torch
from torch import Tensor

from backbone.recognizer import Recognizer
from methods.importance import Importance, batch_importance, image_importance
from methods.penalty import QuadraticPenalty


class MAS(QuadraticPenalty):
    """L = CE(z, y or ỹ) + λ · Σ_s Σ_i Ω_s,i (θ_i − θ_s,i)²,  Ω_i = mean over images of |∂‖f(x)‖₂² / ∂θ_i|

    f are the label-free logits of the model that entered task s, x its D_r. One term per task so far.
    """

    name = "mas"
    title = "MAS*"
    defaults = {"lr": 3e-4}
    published = {"lr": 1e-4, "lambda_": 0.005, "importance": "batch"}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("MAS (arXiv 1711.09601)")
        cls.add_penalty_weight(group, 1e-5, "published: 0.005")
        group.add_argument(
            "--importance",
            choices=("image", "batch"),
            default="image",
            help="gradients of single images; published: of the mean squared training logit of a batch, where images cancel",
        )

    def importance_of(self, model: Recognizer) -> Importance:
        if self.args.importance == "image":
            return image_importance(
                model, _squared_norm, torch.abs, self.train_set, self.task.remain_indices, self.hardware
            )

        def mean_square(logits: Tensor, labels: Tensor) -> Tensor:
            return model.head.add_margin(logits, labels).square().mean()

        return batch_importance(
            model, mean_square, torch.abs, self.train_set, self.task.remain_indices, self.hardware, self.args.batch_size
        )


def _squared_norm(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.square().sum(dim=1).mean()
