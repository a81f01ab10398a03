"""Margin heads: embeddings (B, dim) → logits (B, classes), label-free (recognition) or with the margin (training).

Notation: cos_c = ê·ŵ_c is the cosine between embedding e and class weight w_c, θ_c its angle, s the scale, m the
margin, y the label. Logits are float32 and computed outside autocast: bfloat16 resolves a cosine near 1 to 1/256, which
times s = 64 is a quarter of a logit.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """Label-free logits s·cos_c and their cross entropy, without a margin. Subclasses say what differs."""

    def __init__(self, embed_dim: int, num_classes: int, scale: float = 64.0) -> None:
        super().__init__()
        self.scale = scale
        self.lowest = -scale  # the logit of a class without a row
        self.weight = nn.Parameter(torch.empty(num_classes, embed_dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embeddings: Tensor) -> Tensor:
        """embeddings (B, dim) → label-free logits (B, classes)."""
        with torch.autocast(embeddings.device.type, enabled=False):
            # At least float32: a float64 model stays float64, a bfloat16 copy still multiplies in float32.
            dtype = torch.promote_types(torch.promote_types(embeddings.dtype, self.weight.dtype), torch.float32)
            return self.logits(embeddings.to(dtype))

    @property
    def absent(self) -> Tensor:
        """Classes that have no row, bool (classes,): deleted, or never trained on. Their rows are zero."""
        return ~self.weight.detach().any(dim=1)

    @torch.no_grad()
    def delete_rows(self, classes: Sequence[int]) -> None:
        """Make classes absent: the head never answers with them."""
        for rows in self.parameters():
            rows[list(classes)] = 0

    def logits(self, embeddings: Tensor) -> Tensor:
        weight = self.weight.to(embeddings.dtype)
        lengths = weight.norm(dim=1)
        cosines = F.linear(F.normalize(embeddings), weight / lengths.clamp_min(1e-12)[:, None])
        # Absent rows, which their lengths show here. With a logit of 0 they would be above negative ones.
        return (self.scale * cosines).masked_fill(lengths.detach() == 0, self.lowest)

    def add_margin(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Label-free logits (B, classes) → training logits: one forward pass serves both."""
        return logits

    def loss_of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The batch's mean training loss, from **label-free** logits (B, classes)."""
        return F.cross_entropy(self.add_margin(logits, labels), labels)

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.loss_of_logits(self(embeddings), labels)


class Softmax(Head):
    """A plain linear layer with bias."""

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__(embed_dim, num_classes)
        self.lowest = -1e4  # as softmax has no smallest logit; of −∞ divergences would be NaN
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def logits(self, embeddings: Tensor) -> Tensor:
        logits = F.linear(embeddings, self.weight.to(embeddings.dtype), self.bias.to(embeddings.dtype))
        return logits.masked_fill(self.absent, self.lowest)


class CosFace(Head):
    """Training logits s·(cos_c − m·[c = y]) (arXiv 1801.09414)."""

    def __init__(self, embed_dim: int, num_classes: int, scale: float = 64.0, margin: float = 0.35) -> None:
        super().__init__(embed_dim, num_classes, scale)
        self.margin = margin

    def add_margin(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits - self.scale * self.margin * _is_label(logits, labels).to(logits.dtype)


class ArcFace(Head):
    """Training logits s·cos(θ_c + m·[c = y]) (arXiv 1801.07698).

    Beyond θ + m = π the cosine would rise again; there the logit is s·(cos θ − m·sin(π − m)), which keeps falling.
    """

    def __init__(self, embed_dim: int, num_classes: int, scale: float = 64.0, margin: float = 0.5) -> None:
        super().__init__(embed_dim, num_classes, scale)
        self.margin = margin

    def add_margin(self, logits: Tensor, labels: Tensor) -> Tensor:
        margin, cos = self.margin, logits / self.scale
        # (1 − cos)(1 + cos) is exact near ±1, where 1 − cos² cancels. The bound keeps the root's gradient finite at ±1
        # and passes none through: there only the term cos θ · cos m is left.
        sin = ((1 - cos) * (1 + cos)).clamp_min(1e-12).sqrt()
        inside, beyond = cos * math.cos(margin) - sin * math.sin(margin), cos - margin * math.sin(math.pi - margin)
        with_margin = torch.where(cos > math.cos(math.pi - margin), inside, beyond)
        return torch.where(_is_label(logits, labels), self.scale * with_margin, logits)


class SFace(Head):
    """Sigmoid-constrained hypersphere loss (arXiv 2205.12010).

    loss = −[r_y]·s·cos_y + Σ_{c≠y} [r_c]·s·cos_c, r_y = σ(k(θ_y − a)), r_c = σ(k(b − θ_c)), [·] without gradient: the
    own class pulls until θ_y < a, the others push until θ_c > b. There is no margin.
    """

    def __init__(
        self, embed_dim: int, num_classes: int, scale: float = 64.0, k: float = 80.0, a: float = 0.80, b: float = 1.22
    ) -> None:
        super().__init__(embed_dim, num_classes, scale)
        self.k, self.a, self.b = k, a, b

    def loss_of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        own = _is_label(logits, labels)
        theta = (logits.detach() / self.scale).clamp(-1, 1).acos()
        weight = torch.where(own, -torch.sigmoid(self.k * (theta - self.a)), torch.sigmoid(self.k * (self.b - theta)))
        return (weight * logits).sum(dim=1).mean()


def _is_label(logits: Tensor, labels: Tensor) -> Tensor:
    """[c = y] as a mask (B, classes). Deterministic on CUDA, unlike scatter and one_hot."""
    return labels[:, None] == torch.arange(logits.shape[1], device=logits.device)


HEADS = {"cosface": CosFace, "arcface": ArcFace, "sface": SFace, "softmax": Softmax}
