"""EWC: elastic weight consolidation (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796)."""

import torch
from torch import Tensor

from backbone.recognizer import Recognizer
from methods.base import Option
from methods.importance import Importance, mean_importance
from methods.penalty import IMPORTANCE_DATA, QuadraticPenalty


class EWC(QuadraticPenalty):
    """L = CE(z, y or ỹ) + λ · Σ_s Σ_i F_s,i (θ_i − θ_s,i)²,  F_i = mean over images of (∂ log p(y) / ∂θ_i)²

    F is the diagonal of the empirical Fisher information of the model that entered task s, on that task's D_r; −log p(y)
    is the head's training loss. One term per task so far. Published: squared gradients of batch means, times the batch's
    size, in the mean over batches.
    """

    name = "ewc"
    title = "EWC*"
    options = [
        *QuadraticPenalty.options,
        IMPORTANCE_DATA,
        Option("lr", 3e-4, published=1e-4),
        Option("lambda", 0.01, "weight λ of the penalty", published=10.0),
        Option("fisher", "image", "Fisher information of images or batches", published="batch", choices=("image", "batch")),
    ]

    def importance_of(self, model: Recognizer) -> Importance:
        def root_of_sum(logits: Tensor, labels: Tensor) -> Tensor:
            """Squared, its gradient is the squared gradient of the mean, times the number of images."""
            return len(labels) ** 0.5 * model.head.loss_of_logits(logits, labels)

        data = (self.train_set, self.importance_indices(), self.hardware)
        batch_size = self.args.batch_size if self.args.fisher == "batch" else None
        return mean_importance(model, root_of_sum, torch.square, *data, batch_size)
