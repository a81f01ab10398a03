"""Marker: was *this person* in the training set? Forgotten faces against faces that nobody has ever trained on."""

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from util.audit.base import Figure, Measurement
from util.audit.statistics import auc_statistic
from util.audit.subject import Scene, Subject

FOLDS = 5


class MembershipOfPerson(Figure):
    """AUC of a logistic regression that tells forgotten from never-seen faces, with whole identities held out.

    Features of an image: its cosines to the kept rows, sorted; ‖embedding‖; the entropy of the softmax over the kept rows.
    """

    name = "membership_person"
    family = "membership"
    titles = {"membership_person": "membership inference (person): against strangers (AUC)"}

    def measure(self, subject: Subject, scene: Scene) -> Measurement:
        key, people = self.name, len(scene.forget)
        if scene.unseen is None:
            return Measurement({key: "needs --unseen"})
        strangers = scene.unseen.labels.cpu()
        if min(people, len(strangers.unique())) < FOLDS:
            return Measurement({key: f"needs {FOLDS} forgotten and {FOLDS} strangers"})
        embeddings = torch.cat([subject.test[scene.forget_test], subject.unknown])
        features = self._features(subject, scene, embeddings)
        groups = torch.cat([torch.from_numpy(scene.who), people + strangers])
        forgotten = torch.arange(len(groups)) < len(scene.who)
        probe = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
        folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=scene.seed)
        scores = cross_val_predict(
            probe, features.numpy(), forgotten.numpy(), groups=groups.numpy(), cv=folds, method="decision_function"
        )
        told = forgotten.numpy()
        return Measurement({key: auc_statistic(scores[told], scores[~told], scene.who[:, None])})

    def _features(self, subject: Subject, scene: Scene, embeddings: Tensor) -> Tensor:
        rows, kept = subject.rows(scene), list(scene.remain)
        cosines = F.normalize(embeddings) @ F.normalize(rows[0][kept]).T
        log_p = subject.logits(embeddings, *rows)[:, kept].log_softmax(dim=1)
        entropy = -(log_p.exp() * log_p).sum(dim=1, keepdim=True)
        return torch.cat([cosines.sort(dim=1).values, embeddings.norm(dim=1, keepdim=True), entropy], dim=1)
