"""Readout: what the logits over all rows say of a forgotten face, as they are and upside down."""

import numpy as np

from util.audit.base import Figure, Measurement
from util.audit.statistics import mean_statistic, value_of
from util.audit.subject import DRAWS, Scene, Subject


class Readout(Figure):
    """acc_forget: the own class has the largest logit; sign_flip: the smallest; readout: the better of the two.

    A method that pushes the own class from the top of the list to its bottom has hidden it from the first alone. A model
    without rows for the forgotten gets those of enrolment with 5 images.
    """

    name = "readout"
    titles = {
        "acc_forget": "recognized by the largest logit",
        "sign_flip": "recognized by the smallest logit",
        "readout": "recognized by the better of the two",
    }
    known_by = {"sign_flip": "acc_forget"}

    def measure(self, subject: Subject, scene: Scene) -> Measurement:
        draws = DRAWS if subject.absent.any() else 1
        hits = np.zeros((2, len(scene.forget_test)))
        for draw in range(draws):
            logits = subject.logits(subject.test[scene.forget_test], subject.rows(scene, draw))
            for row, sign in zip(hits, (1, -1), strict=True):
                row += ((sign * logits).argmax(dim=1) == scene.forget_labels).numpy() / draws
        largest, smallest = (mean_statistic(row, scene.who, len(scene.forget)) for row in hits)
        better = max((largest, smallest), key=lambda statistic: value_of(statistic, len(scene.forget)))
        return Measurement({"acc_forget": largest, "sign_flip": smallest, "readout": better})
