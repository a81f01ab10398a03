"""Marker: was *this person* in the training set? Forgotten faces against faces that nobody has ever trained on."""

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
        key, people = self.name, len(task.forget)
        if task.stranger_set is None:
            return Measurement({key: "needs --strangers"})
        strangers = task.stranger_set.labels.cpu()
        if min(people, len(strangers.unique())) < FOLDS:
            return Measurement({key: f"needs {FOLDS} forgotten and {FOLDS} strangers"})
        embeddings = torch.cat([audited.test_embeddings[task.forget_test], audited.stranger_embeddings])
        features = self._features(audited, task, embeddings)
        groups = torch.cat([torch.from_numpy(task.test_groups), people + strangers])
        forgotten = torch.arange(len(groups)) < len(task.test_groups)
        probe = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
        folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=task.seed)
        scores = cross_val_predict(
            probe, features.numpy(), forgotten.numpy(), groups=groups.numpy(), cv=folds, method="decision_function"
        )
        is_forgotten = forgotten.numpy()
        return Measurement({key: auc_statistic(scores[is_forgotten], scores[~is_forgotten], task.test_groups[:, None])})

    def _features(self, audited: AuditedModel, task: AuditTask, embeddings: Tensor) -> Tensor:
        head, kept = audited.head(task), list(task.remain)
        cosines = F.normalize(embeddings) @ F.normalize(head.weight[kept]).T
        log_p = head(embeddings)[:, kept].log_softmax(dim=1)
        entropy = -(log_p.exp() * log_p).sum(dim=1, keepdim=True)
        return torch.cat([cosines.sort(dim=1).values, embeddings.norm(dim=1, keepdim=True), entropy], dim=1)
