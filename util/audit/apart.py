"""Apart: do photos stand out among those of strangers? Training drives a photo away from everybody else's row."""

import torch
import torch.nn.functional as F
from torch import Tensor

from util.audit.base import Figure, Measurement
from util.audit.statistics import Statistic, auc_statistic
from util.audit.subject import Scene, Subject


class Apart(Figure):
    """AUC of the forgotten people's photos against those of `scene.strangers`, by the largest cosine to a kept row, negated.

    photos_apart: of training photos; apart: of test photos. 50 is chance, and what strangers have on average.
    """

    name = "apart"
    family = "membership"
    titles = {
        "photos_apart": "its training photos stand out among strangers' (AUC)",
        "apart": "its other photos stand out among strangers' (AUC)",
    }

    def measure(self, subject: Subject, scene: Scene) -> Measurement:
        rows = F.normalize(subject.rows(scene)[0][list(scene.remain)])
        trained, new = self.titles
        return Measurement(
            {
                trained: self._auc(subject.train, rows, scene.train_set.labels, scene),
                new: self._auc(subject.test, rows, scene.test_set.labels, scene),
            }
        )

    def _auc(self, embeddings: Tensor, rows: Tensor, labels: Tensor, scene: Scene) -> Statistic:
        own, strangers = (torch.isin(labels, torch.tensor(group)) for group in (scene.forget, scene.strangers))
        far = -(F.normalize(embeddings) @ rows.T).amax(dim=1).numpy()
        who = torch.searchsorted(torch.tensor(scene.forget), labels[own])
        return auc_statistic(far[own], far[strangers], who.numpy()[:, None])
