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

from util.audit.base import Figure, Measurement
from util.audit.statistics import mean_statistic
from util.audit.subject import PER_IDENTITY, Scene, Subject


class Probe(Figure):
    """Accuracy on forgotten test images of a logistic regression fitted on training images of all identities.

    On the class token after each block, and on the embedding; features standardized, C by cross-validation. The curve has
    the accuracy among the forgotten identities alone beside it.
    """

    name = "probe"
    family = "verification"
    titles = {"probe_embedding": "read from the embedding by a linear probe"}

    def measure(self, subject: Subject, scene: Scene) -> Measurement:
        positions = torch.from_numpy(np.concatenate([own[:PER_IDENTITY] for own in scene.train_by_class]))
        train, test = (
            subject.tokens(images, where)
            for images, where in ((scene.train_set, positions), (scene.test_set, scene.forget_test))
        )
        layers = {f"probe_block_{block}": pair for block, pair in enumerate(zip(train, test, strict=True))}
        layers = {"probe_embedding": (subject.train[positions], subject.test[scene.forget_test])} | layers
        labels, statistics, curve = scene.train_set.labels.cpu()[positions], {}, {"layers": [], "all": [], "forgotten": []}
        for key, (seen, new) in layers.items():
            among_all, among_forgotten = probe_hits(seen, labels, new, scene)
            statistics[key] = mean_statistic(among_all, scene.who, scene.drawn)
            curve["layers"].append(key.removeprefix("probe_").replace("_", " "))
            curve["all"].append(round(100 * among_all.mean(), 2))
            curve["forgotten"].append(round(100 * among_forgotten.mean(), 2))
        for values in curve.values():
            values.append(values.pop(0))  # the embedding comes after the blocks
        return Measurement(statistics, {"probe": curve})


def probe_hits(seen: Tensor, labels: Tensor, new: Tensor, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Which forgotten test images are recognized among all, and among the forgotten identities alone: bool (N,) each."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, tol=1e-3))
    folds = min(3, int(labels.bincount().max()))
    search = GridSearchCV(probe, {"logisticregression__C": [0.01, 0.1, 1, 10]}, cv=folds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the largest C may not, and is not chosen then
        warnings.simplefilter("ignore", UserWarning)  # identities with fewer images than folds
        search.fit(seen.numpy(), labels.numpy())
    scores = search.decision_function(new.numpy())
    truth = scene.forget_labels.numpy()
    forgotten = np.isin(search.classes_, scene.forget)
    return search.classes_[scores.argmax(1)] == truth, search.classes_[forgotten][scores[:, forgotten].argmax(1)] == truth
