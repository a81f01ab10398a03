"""EWC: elastic weight consolidation (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796)."""

import argparse

import torch

from backbone.recognizer import Recognizer
from methods.importance import Importance, batch_importance, image_importance
from methods.penalty import QuadraticPenalty


class EWC(QuadraticPenalty):
    """L = CE(z, y or ỹ) + λ · Σ_s Σ_i F_s,i (θ_i − θ_s,i)²,  F_i = mean over images of (∂ log p(y) / ∂θ_i)²

    F is the diagonal of the empirical Fisher information of the model that entered task s, on that task's D_r; −log p(y)
    is the head's training loss. One term per task so far.
    """

    name = "ewc"
    title = "EWC*"
    defaults = {"lr": 3e-4}
    published = {"lr": 1e-4, "lambda_": 10.0, "fisher": "batch"}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("EWC (arXiv 1612.00796)")
        cls.add_penalty_weight(group, 0.01, "published: 10")
        group.add_argument(
            "--fisher",
            choices=("image", "batch"),
            default="image",
            help="squared gradients of single images; published: of batch means, times the batch size",
        )

    def importance_of(self, model: Recognizer) -> Importance:
        arguments = (model, model.head.loss_of_logits, torch.square, self.train_set, self.task.remain_indices, self.hardware)
        if self.args.fisher == "image":
            return image_importance(*arguments)
        size = self.args.batch_size
        return {name: size * value for name, value in batch_importance(*arguments, size).items()}
