"""Wrong labels: the continual-learning baselines learn to forget as a relabelling of the forgotten images."""

import torch
from torch import Tensor


def wrong_labels(labels: Tensor, num_classes: int) -> Tensor:
    """ỹ: for each label (B,) one of the other classes, uniformly, drawn anew at every call."""
    return (labels + torch.randint(1, num_classes, labels.shape, device=labels.device)) % num_classes
