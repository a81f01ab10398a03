"""Readout: what the logits over all rows say of a forgotten face: over rows made anew, and over its own upside down."""

import numpy as np

from util.audit.base import AuditMetric, Measurement
from util.audit.inputs import DRAWS, AuditedModel, AuditTask
from util.audit.statistics import mean_statistic


class Readout(AuditMetric):
    """acc_forget: the own class has the largest logit, over rows made anew of 5 images, for every model alike.

    sign_flip: the smallest, over the model's own rows: a method that pushes the own class from the top of the list to its
    bottom still knows it.
    """

    name = "readout"
    family = "re-identification"
    titles = {
        "acc_forget": "top-1 accuracy, over rows rebuilt from 5 photos",
        "sign_flip": "inverted ranking: the smallest logit, over its own rows",
    }
    scale_from = {"sign_flip": "acc_forget"}

    def measure(self, audited: AuditedModel, task: AuditTask) -> Measurement:
        hits, faces = np.zeros((2, len(task.forget_test))), audited.test_embeddings[task.forget_test]
        for draw in range(DRAWS):
            for row, sign, own in zip(hits, (1, -1), (False, True), strict=True):
                logits = sign * audited.head(task, draw, own)(faces)
                row += (logits.argmax(dim=1) == task.forget_labels).numpy() / DRAWS
        largest, smallest = (mean_statistic(row, task.test_groups) for row in hits)
        return Measurement({"acc_forget": largest, "sign_flip": smallest})
