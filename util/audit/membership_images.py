"""Membership of images: were *these photos* of a forgotten person in the training set?"""

import numpy as np
import torch
import torch.nn.functional as F

from util.audit.base import AuditMetric, Measurement
from util.audit.inputs import AuditedModel, AuditTask
from util.audit.statistics import auc_statistic, value_of


class MembershipOfImages(AuditMetric):
    """AUC of the forgotten identities' training against their test images, by the score that tells them best apart:

    (a) the cosine to the mean of the identity's other training images, (b) the largest cosine to a kept row. Chance, 50,
    holds only if training and test images were split at random: the references show whether they were.
    """

    name = "membership_images"
    family = "membership"
    titles = {"membership_images": "membership inference (photo): training photos against others (AUC)"}

    def measure(self, audited: AuditedModel, task: AuditTask) -> Measurement:
        train, test = F.normalize(audited.train_embeddings), F.normalize(audited.test_embeddings)
        rows = F.normalize(audited.head(task).weight[list(task.remain)])
        labels = task.test_set.labels.cpu()
        own, row, places = [], [], []
        for c in task.forget:
            seen, new = train[torch.from_numpy(task.train_by_class[c])], test[labels == c]
            # Each image against the mean of all training images but one: itself, or for a test image any.
            others = F.normalize((seen.sum(dim=0) - seen) / (len(seen) - 1))
            left_out = torch.arange(len(new)) % len(seen)
            own.append(((seen * others).sum(dim=1), (new * others[left_out]).sum(dim=1)))
            row.append(((seen @ rows.T).amax(dim=1), (new @ rows.T).amax(dim=1)))
            places.append(np.flatnonzero(task.forget_labels == c))
        groups = task.train_groups[:, None], task.test_groups[np.concatenate(places), None]
        found = []
        for scores in (own, row):
            seen, new = (torch.cat(parts).numpy() for parts in zip(*scores, strict=True))
            found.append(auc_statistic(seen, new, *groups))
        if task.strangers:  # every group of people by the score that tells it best
            return Measurement({self.name: lambda weights: 50 + np.max([abs(one(weights) - 50) for one in found], axis=0)})
        best = max(found, key=lambda statistic: abs(value_of(statistic, task.num_groups) - 50))
        # Training raises one score and may lower the other: what tells is the distance to chance.
        best_statistic = best if value_of(best, task.num_groups) >= 50 else lambda weights: 100 - best(weights)
        return Measurement({self.name: best_statistic})
