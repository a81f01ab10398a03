"""Verification: do two photos show the same person? Pairs of forgotten test images, judged as the kept ones are."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_curve
from torch import Tensor

from util.audit.base import AuditMetric, Measurement
from util.audit.inputs import AuditedModel, AuditTask
from util.audit.statistics import auc_statistic, mean_statistic
from util.evaluation.verification import draw_pairs

PAIRS = 100_000  # most of each kind
RATES = (1e-2, 1e-3, 1e-2)  # of the three keys with a threshold
LEAST = 10  # false accepts that the threshold of the smaller one must rest on
CURVE_POINTS = 200


class Verification(AuditMetric):
    """verification_auc: genuine against impostor pairs, both among the forgotten; of one person's against the kept.

    photos_verification_auc: the same of the forgotten training images; one person's against the kept test images.

    verification_tar_…: genuine pairs above the threshold that 1% (0.1%) of the impostor pairs among the *kept* exceed.
    collapse_1pct: pairs of a forgotten face and anybody else's above that of 1%: high where faces became one.
    """

    name = "verification"
    family = "verification"
    lower_if_known = frozenset({"collapse_1pct"})
    titles = {
        "verification_auc": "verification: two photos matched (AUC)",
        "photos_verification_auc": "verification on training photos (AUC)",
        "verification_tar_1pct": "verification: TAR at FMR 1%",
        "verification_tar_01pct": "verification: TAR at FMR 0.1%",
        "collapse_1pct": "mistaken for somebody else, at FMR 1%",
    }

    def measure(self, audited: AuditedModel, task: AuditTask) -> Measurement:
        auc, trained_auc, *keys = self.titles
        unit, labels = F.normalize(audited.test_embeddings), task.test_set.labels.cpu()
        forgotten, remaining = unit[task.forget_test], unit[task.remain_test]
        known = _scores(remaining, draw_pairs(labels[task.remain_test], PAIRS, task.seed)[1])
        trained = F.normalize(audited.train_embeddings[task.forget_train]), task.train_set.labels.cpu()[task.forget_train]
        statistics = {trained_auc: auc_statistic(*_pairs(*trained, task.train_groups, remaining, task))}
        pairs = own, other, test_groups, _ = _pairs(forgotten, task.forget_labels, task.test_groups, remaining, task)
        if not len(own):
            return Measurement(statistics | dict.fromkeys((auc, *keys), "needs two test images of a forgotten person"))
        statistics[auc] = auc_statistic(*pairs)
        for key, rate, needed in zip(keys, RATES, (1, LEAST / RATES[1], 1), strict=True):
            if len(known) < needed:
                statistics[key] = f"needs {needed:.0f} impostor pairs of kept faces, there are {len(known)}"
                continue
            threshold = np.quantile(known, 1 - rate)
            if key != "collapse_1pct":
                statistics[key] = mean_statistic(own > threshold, test_groups)
                continue
            strangers = labels[:, None] != task.forget_labels
            # At the threshold counts, up to rounding: where all faces are one point, all pairs are.
            above = ((unit @ forgotten.T >= threshold - 1e-6) & strangers).sum(dim=0) / strangers.sum(dim=0)
            statistics[key] = mean_statistic(above.numpy(), task.test_groups)
        # The curve's false pairs are those of the thresholds, so that it goes through the rates above.
        false = known if len(known) else other
        far, tar, _ = roc_curve(np.repeat([1, 0], [len(own), len(false)]), np.concatenate([own, false]))
        grid = np.concatenate([[0], np.geomspace(1e-4, 1, CURVE_POINTS)])
        heights = tar[np.searchsorted(far, grid, side="right") - 1]
        curve = {"far": grid.round(6).tolist(), "tar": heights.round(4).tolist()}
        return Measurement(statistics, {"roc": curve})


def _pairs(unit: Tensor, labels: Tensor, groups: np.ndarray, remaining: Tensor, task: AuditTask) -> tuple[np.ndarray, ...]:
    """Cosines of genuine and of impostor pairs of forgotten faces `unit` (N, dim), and whose pairs both are."""
    genuine, impostor = (pairs.numpy() for pairs in draw_pairs(labels, PAIRS, task.seed))
    if len(task.forget) - len(task.strangers) > 1:
        return _scores(unit, genuine), _scores(unit, impostor), groups[genuine[:, :1]], groups[impostor]
    others = task.generator().permutation(len(remaining))[: max(1, PAIRS // len(unit))]
    other = (unit @ remaining[others].T).flatten().numpy()
    # Of two photos of the person both may be drawn anew.
    return _scores(unit, genuine), other, groups[genuine], np.repeat(groups, len(others))[:, None]


def _scores(unit: Tensor, pairs: Tensor | np.ndarray) -> np.ndarray:
    return torch.einsum("nd,nd->n", unit[pairs[:, 0]], unit[pairs[:, 1]]).numpy()
