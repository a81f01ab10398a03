"""Where the forgotten faces lie, as a picture: linear centred kernel alignment (CKA, arXiv 1905.00414) of embeddings."""

import numpy as np
import torch
from torch import Tensor

from util.audit.base import AuditMetric, Measurement
from util.audit.inputs import AuditedModel, AuditTask


class CKA(AuditMetric):
    """Of forgotten test images, to the references (other than itself) and to the pre-trained model; no verdict."""

    name = "cka"
    family = ""
    titles = {"cka": "similarity to models that never saw them (CKA)"}

    def measure(self, audited: AuditedModel, task: AuditTask) -> Measurement:
        own = audited.test_embeddings[task.forget_test]
        to = [linear_cka(own, other.test_embeddings[task.forget_test]) for other in task.references if other is not audited]
        to_before = linear_cka(own, task.before.test_embeddings[task.forget_test])
        mean = sum(to) / len(to)
        curve = {"references": round(mean, 4), "before": round(to_before, 4)}
        return Measurement({"cka": lambda weights: np.full(len(weights), mean)}, {"cka": curve})


def linear_cka(x: Tensor, y: Tensor) -> float:
    """‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) of centred features (N, d), Frobenius norms: from 0 to 1."""
    x, y = (features.double() - features.double().mean(dim=0) for features in (x, y))
    denominator = (torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y)).item()
    return (torch.linalg.norm(y.T @ x) ** 2).item() / denominator if denominator else 0.0
