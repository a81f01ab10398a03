"""Apart: do photos stand out among those of strangers? Training drives a photo away from everybody else's row."""

import numpy as np
import torch
import torch.nn.functional as F

from util.audit.base import Figure, Measurement
from util.audit.statistics import auc_statistic
from util.audit.subject import Scene, Subject


class Apart(Figure):
    """AUC of the forgotten people's photos against those of `scene.strangers`, by the largest cosine to a kept row, negated.

    photos_apart: of training photos; apart: of test photos. 50 is chance, and what strangers have on average.
    """

    name = "apart"
    family = "membership"
    titles = {
        "photos_apart": "membership inference (person): training photos far from kept rows (AUC)",
        "apart": "membership inference (person): other photos far from kept rows (AUC)",
    }

    def measure(self, subject: Subject, scene: Scene) -> Measurement:
        rows, statistics = F.normalize(subject.rows(scene)[0][list(scene.remain)]), {}
        sets = (subject.train, scene.train_set), (subject.test, scene.test_set)
        for key, (embeddings, images) in zip(self.titles, sets, strict=True):
            own, strangers = (torch.isin(images.labels, torch.tensor(group)) for group in (scene.forget, scene.strangers))
            far = -(F.normalize(embeddings) @ rows.T).amax(dim=1).numpy()
            who = np.searchsorted(scene.forget, images.labels[own].numpy())
            statistics[key] = auc_statistic(far[own], far[strangers], who[:, None])
        return Measurement(statistics)
