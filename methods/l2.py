"""L2: stay near the weights that entered the task."""

import torch

from backbone.recognizer import Recognizer
from methods.base import Option
from methods.importance import Importance
from methods.penalty import QuadraticPenalty


class L2(QuadraticPenalty):
    """L = CE(z, y or ỹ) + λ · Σ_i (θ_i − θ₀,i)², θ₀ the model that enters the task. Published: one such term per task."""

    name = "l2"
    title = "L2*"
    options = [
        *QuadraticPenalty.options,
        Option("lr", 3e-4, published=1e-4),
        Option("lambda", 0.01, "weight λ of the penalty", published=0.1),
        Option("terms", "last", "penalty terms: of this task, or of all so far", published="all", choices=("last", "all")),
    ]

    @property
    def accumulates(self) -> bool:
        return self.args.terms == "all"

    def importance_of(self, model: Recognizer) -> Importance:
        return {name: torch.ones_like(parameter) for name, parameter in model.trained().items()}
