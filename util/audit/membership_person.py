"""Marker: was *this person* in the training set? Forgotten faces against faces that nobody has ever trained on."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from util.audit.base import AuditMetric, Measurement
from util.audit.inputs import AuditedModel, AuditTask
from util.audit.statistics import auc_statistic

FOLDS = 5


class MembershipOfPerson(AuditMetric):
    """AUC of a logistic regression that tells forgotten from never-seen faces, with whole identities held out.

    Features of an image: its cosines to the kept rows, sorted; ‖embedding‖; the entropy of the softmax over the kept rows.
    """

    name = "membership_person"
    family = "membership"
    titles = {"membership_person": "membership inference (person): against strangers (AUC)"}

    def measure(self, audited: AuditedModel, task: AuditTask) -> Measurement:
        people = len(task.forget)
        if task.stranger_set is None:
            return Measurement({self.name: "needs --strangers"})
        strangers = task.stranger_set.labels.cpu()
        if min(people, len(strangers.unique())) < FOLDS:
            return Measurement({self.name: f"needs {FOLDS} forgotten and {FOLDS} strangers"})
        embeddings = torch.cat([audited.test_embeddings[task.forget_test], audited.stranger_embeddings])
        features = self._features(audited, task, embeddings)
        groups = np.concatenate([task.test_groups, people + strangers.numpy()])
        forgotten = np.arange(len(groups)) < len(task.test_groups)
        probe = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
        settings = {"cv": StratifiedGroupKFold(FOLDS, shuffle=True, random_state=task.seed), "method": "decision_function"}
        scores = cross_val_predict(probe, features.numpy(), forgotten, groups=groups, **settings)
        return Measurement({self.name: auc_statistic(scores[forgotten], scores[~forgotten], task.test_groups[:, None])})

    def _features(self, audited: AuditedModel, task: AuditTask, embeddings: Tensor) -> Tensor:
        head, kept = audited.head(task), list(task.remain)
        cosines = F.normalize(embeddings) @ F.normalize(head.weight[kept]).T
        log_p = head(embeddings)[:, kept].log_softmax(dim=1)
        entropy = -(log_p.exp() * log_p).sum(dim=1, keepdim=True)
        return torch.cat([cosines.sort(dim=1).values, embeddings.norm(dim=1, keepdim=True), entropy], dim=1)


class Apart(AuditMetric):
    """AUC of forgotten people's photos against those of `task.strangers`, by the largest cosine to a kept row, negated:
    training drives a photo away from everybody else's row. It takes the marker's place in an audit beside strangers.

    photos_apart: of training photos; apart: of test photos. 50 is chance, and what strangers have on average.
    """

    name = "apart"
    family = "membership"
    titles = {
        "photos_apart": "membership inference (person): training photos far from kept rows (AUC)",
        "apart": "membership inference (person): other photos far from kept rows (AUC)",
    }

    def measure(self, audited: AuditedModel, task: AuditTask) -> Measurement:
        rows, statistics = F.normalize(audited.head(task).weight[list(task.remain)]), {}
        sets = (audited.train_embeddings, task.train_set), (audited.test_embeddings, task.test_set)
        for key, (embeddings, images) in zip(self.titles, sets, strict=True):
            own, strangers = (torch.isin(images.labels, torch.tensor(group)) for group in (task.forget, task.strangers))
            far = -(F.normalize(embeddings) @ rows.T).amax(dim=1).numpy()
            test_groups = np.searchsorted(task.forget, images.labels[own].numpy())
            statistics[key] = auc_statistic(far[own], far[strangers], test_groups[:, None])
        return Measurement(statistics)
