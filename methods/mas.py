"""MAS: memory aware synapses (Aljundi et al., ECCV 2018, arXiv 1711.09601)."""

import torch
from torch import Tensor

from backbone.recognizer import Recognizer
from methods.base import Option
from methods.importance import Importance, mean_importance
from methods.penalty import IMPORTANCE_DATA, QuadraticPenalty


class MAS(QuadraticPenalty):
    """L = CE(z, y or ỹ) + λ · Σ_s Σ_i Ω_s,i (θ_i − θ_s,i)²,  Ω_i = mean over images of |∂‖f(x)‖₂² / ∂θ_i|

    f are the label-free logits of the model that entered task s, x its D_r. One term per task so far. Published: the mean
    squared training logit of a batch for ‖f(x)‖₂², where images cancel.
    """

    name = "mas"
    title = "MAS*"
    options = [
        *QuadraticPenalty.options,
        IMPORTANCE_DATA,
        Option("lr", 3e-4, published=1e-4),
        Option("lambda", 1e-5, "weight λ of the penalty", published=0.005),
        Option("importance", "image", "importance of images or batches", published="batch", choices=("image", "batch")),
    ]

    def importance_of(self, model: Recognizer) -> Importance:
        data = (torch.abs, self.train_set, self.importance_indices(), self.hardware)
        if self.args.importance == "image":
            return mean_importance(model, lambda logits, labels: logits.square().sum(dim=1).mean(), *data)

        def mean_square(logits: Tensor, labels: Tensor) -> Tensor:
            return model.head.add_margin(logits, labels).square().mean()

        return mean_importance(model, mean_square, *data, self.args.batch_size)
