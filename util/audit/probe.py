"""Probe, layer by layer: can a linear classifier read the identity from what the model computes on the way?"""

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from util.audit.base import AuditMetric, Measurement
from util.audit.inputs import PER_IDENTITY, AuditedModel, AuditTask
from util.audit.statistics import mean_statistic


class Probe(AuditMetric):
    """Accuracy on forgotten test images of a logistic regression fitted on training images of all identities.

    On the class token after each block, and on the embedding; features standardized, C by cross-validation. The curve has
    the accuracy among the forgotten identities alone beside it.
    """

    name = "probe"
    family = "verification"
    titles = {"probe_embedding": "linear probe on the embedding"}

    def measure(self, audited: AuditedModel, task: AuditTask) -> Measurement:
        positions = torch.from_numpy(np.concatenate([own[:PER_IDENTITY] for own in task.train_by_class]))
        if task.seed not in audited.probes:  # fitted on everybody: further requests find them
            labels, tokens = task.train_set.labels.cpu()[positions], audited.tokens(task.train_set, positions)
            audited.probes[task.seed] = [fit_probe(seen, labels) for seen in (audited.train_embeddings[positions], *tokens)]
        tokens = audited.tokens(task.test_set, task.forget_test)
        keys = ["probe_embedding", *(f"probe_block_{block}" for block in range(len(tokens)))]
        layers = zip(keys, audited.probes[task.seed], (audited.test_embeddings[task.forget_test], *tokens), strict=True)
        statistics, curve = {}, {"layers": [], "all": [], "forgotten": []}
        for key, probe, faces in layers:
            among_all, among_forgotten = probe_hits(probe, faces, task)
            statistics[key] = mean_statistic(among_all, task.test_groups)
            curve["layers"].append(key.removeprefix("probe_").replace("_", " "))
            curve["all"].append(round(100 * among_all.mean(), 2))
            curve["forgotten"].append(round(100 * among_forgotten.mean(), 2))
        for values in curve.values():
            values.append(values.pop(0))  # the embedding comes after the blocks
        return Measurement(statistics, {"probe": curve})


def fit_probe(seen: Tensor, labels: Tensor) -> GridSearchCV:
    """To features (N, dim) of training images and their labels (N,)."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, tol=1e-3))
    folds = min(3, int(labels.bincount().max()))
    search = GridSearchCV(probe, {"logisticregression__C": [0.01, 0.1, 1, 10]}, cv=folds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the largest C may not, and is not chosen then
        warnings.simplefilter("ignore", UserWarning)  # identities with fewer images than folds
        return search.fit(seen.numpy(), labels.numpy())


def probe_hits(probe: GridSearchCV, faces: Tensor, task: AuditTask) -> tuple[np.ndarray, np.ndarray]:
    """Which forgotten test images (N, dim) are recognized among all, and among the forgotten alone: bool (N,) each."""
    scores, truth = probe.decision_function(faces.numpy()), task.forget_labels.numpy()
    forgotten = np.isin(probe.classes_, task.forget)
    return probe.classes_[scores.argmax(1)] == truth, probe.classes_[forgotten][scores[:, forgotten].argmax(1)] == truth
