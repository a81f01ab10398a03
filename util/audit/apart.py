"""Apart: do photos stand out among those of strangers? Training drives a photo away from everybody else's row."""

import numpy as np
import torch
import torch.nn.functional as F

from util.audit.base import AuditMetric, Measurement
from util.audit.inputs import AuditedModel, AuditTask
from util.audit.statistics import auc_statistic


class Apart(AuditMetric):
    """AUC of the forgotten people's photos against those of `task.strangers`, by the largest cosine to a kept row, negated.

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
