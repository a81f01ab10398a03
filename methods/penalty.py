"""What L2, EWC and MAS share: relabelling and replay in one stream, and a quadratic penalty on moving away from θ₀."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from backbone.recognizer import Recognizer
from methods.base import Method, Option
from methods.importance import Importance
from methods.relabel import WRONG_LABELS, draw_labels
from util.runtime import foreach

IMPORTANCE_DATA = Option(
    "importance_data",
    "sampled",
    "images of the importance: D_r, or after the first task all remaining ones",
    published="all",
    choices=("sampled", "all"),
)


class _Quadratic(torch.autograd.Function):
    """Σ r² (θ − θ_s)² and its gradient 2 r² (θ − θ_s): autograd's own takes four small kernels for each parameter."""

    @staticmethod
    def forward(ctx: Any, roots: list[Tensor], centre: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.roots, ctx.weighted = roots, foreach.products(foreach.differences(parameters, centre), roots)
        return foreach.norms(ctx.weighted).square().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *foreach.products(foreach.products(ctx.weighted, ctx.roots), 2 * gradient)


class QuadraticPenalty(Method):
    """L = CE(z, y or ỹ) + λ · Σ_s Σ_i Ω_s,i (θ_i − θ_s,i)²

    One shuffled stream of D_f with wrong labels ỹ and D_r with its own; θ_s is the model that entered task s and Ω_s how
    much each parameter matters to it. The sum runs over the tasks so far (`accumulates`), or holds this task's term alone.
    """

    options = (WRONG_LABELS,)
    unused = ("epoch_over",)
    accumulates = True
    importance: Importance | None = None

    @abstractmethod
    def importance_of(self, model: Recognizer) -> Importance:
        """Ω of the model that enters the task, by parameter name."""

    def prepare(self, model):
        forget, classes = {*self.task.forget}, range(len(self.train_set.classes))
        self.is_forgotten = torch.tensor([c in forget for c in classes], device=self.hardware.device)
        importance = self.importance_of(model)
        centre = {name: parameter.detach().clone() for name, parameter in model.trained().items()}
        if self.importance is not None and self.accumulates:
            self._add_term(importance, centre)
        else:
            self.importance, self.centre = importance, centre
            self.constant = torch.zeros((), device=self.hardware.device)
        self._take_roots()

    def passes(self, task, epoch, epochs):
        union = torch.cat([task.forget_indices, task.remain_indices])
        return [self.one_pass({"all": union})]

    def loss(self, model, batch):
        # isin sorts where many are forgotten
        labels = torch.where(self.is_forgotten[batch.labels], draw_labels(self, batch.labels), batch.labels)
        relabelled = model.head.loss(model.embed(batch.images), labels)
        penalty = self.penalty(model)
        return {"total": relabelled + self.args.lambda_ * penalty, "relabelled": relabelled, "penalty": penalty}

    def penalty(self, model: Recognizer) -> Tensor:
        """Σ_s Σ_i Ω_s,i (θ_i − θ_s,i)²"""
        trained = model.trained()
        roots, centre = ([tensors[name] for name in trained] for tensors in (self.roots, self.centre))
        return _Quadratic.apply(roots, centre, *trained.values()) + self.constant

    def _take_roots(self) -> None:
        self.roots = {name: value.sqrt() for name, value in self.importance.items()}

    def _add_term(self, importance: Importance, centre: dict[str, Tensor]) -> None:
        """Keep one quadratic for all terms: a(x−u)² + b(x−v)² = (a+b)(x − (au+bv)/(a+b))² + ab/(a+b) (u−v)²."""
        for name, b in importance.items():
            a, u, v = self.importance[name], self.centre[name], centre[name]
            total = a + b
            share = torch.where(total > 0, b / total, 0.0)
            self.constant = self.constant + (a * share * (u - v).square()).sum()
            self.importance[name], self.centre[name] = total, torch.lerp(u, v, share)

    def importance_indices(self) -> Tensor:
        """The images of Ω: D_r, or, as published after the first task, all training images of the remaining classes."""
        if self.args.importance_data == "sampled" or self.task.number == 1:
            return self.task.remain_indices
        lending = torch.tensor([c for c in self.task.remain if c not in self.task.missing])
        return torch.isin(self.train_set.labels.cpu(), lending).nonzero()[:, 0]

    def state_dict(self):
        if not self.accumulates:
            return {}  # begin_task finds it again
        return {"importance": self.importance, "centre": self.centre, "constant": self.constant}

    def load_state_dict(self, state):
        if state:
            device = self.hardware.device
            self.importance = {name: tensor.to(device) for name, tensor in state["importance"].items()}
            self.centre = {name: tensor.to(device) for name, tensor in state["centre"].items()}
            self.constant = state["constant"].to(device)
            self._take_roots()
