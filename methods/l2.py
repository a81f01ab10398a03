"""L2: stay near the weights that entered the task."""

import argparse

import torch

from backbone.recognizer import Recognizer
from methods.importance import Importance
from methods.penalty import QuadraticPenalty


class L2(QuadraticPenalty):
    """L = CE(z, y or ỹ) + λ · Σ_i (θ_i − θ₀,i)², θ₀ the model that enters the task."""

    name = "l2"
    title = "L2*"
    defaults = {"lr": 3e-4}
    published = {"lr": 1e-4, "lambda_": 0.1}
    accumulates = False

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        cls.add_penalty_weight(parser.add_argument_group("L2"), 0.01, "published: 0.1")

    def importance_of(self, model: Recognizer) -> Importance:
        return {name: torch.ones_like(parameter) for name, parameter in self._trained(model)}
