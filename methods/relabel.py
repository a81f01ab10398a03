"""Wrong labels: the continual-learning baselines learn to forget as a relabelling of the forgotten images."""

import torch
from torch import Tensor

from methods.base import Method, Option

WRONG_LABELS = Option(
    "wrong_labels", "all", "wrong labels: other classes, or as published", published="modulo", choices=("all", "modulo")
)


def wrong_labels(labels: Tensor, num_classes: int) -> Tensor:
    """ỹ: for each label (B,) one of the other classes, uniformly, drawn anew at every call."""
    return (labels + torch.randint(1, num_classes, labels.shape, device=labels.device)) % num_classes


def modulo_labels(labels: Tensor, num_forgotten: int) -> Tensor:
    """The published ỹ: (y + 1…100) modulo the number of classes *forgotten now*, or (y + 1) modulo it where that is y.

    With 20 forgotten classes only the ids 0 to 19 are ever drawn, whoever they are.
    """
    drawn = (labels + torch.randint(1, 101, labels.shape, device=labels.device)) % num_forgotten
    return torch.where(drawn == labels, (labels + 1) % num_forgotten, drawn)


def draw_labels(method: Method, labels: Tensor) -> Tensor:
    """ỹ for labels (B,), as the method's option WRONG_LABELS says, where it has that."""
    if getattr(method.args, "wrong_labels", "all") == "all":
        return wrong_labels(labels, len(method.train_set.classes))
    return modulo_labels(labels, len(method.task.forget))
