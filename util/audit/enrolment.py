"""Enrolment: one photo, or five, of everybody, as a face recognizer is used (ISO/IEC 19795: TPIR, FPIR)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from util.audit.base import AuditMetric, Measurement
from util.audit.inputs import DRAWS, ENROLLED, AuditedModel, AuditTask
from util.audit.statistics import mean_statistic

SIMILARITIES = 1 << 26  # most that are computed at a time: 256 MB
FPIR = 0.01


class Enrolment(AuditMetric):
    """enrolment_k: rank-1 identification in a gallery of all identities, each the normalized mean of k training images.

    photos_enrolment_1: that of the forgotten training images that are not in the gallery. A model that was trained on them
    knows them better than new ones, and there are more of them: of one person little else has power.

    tpir_1pct: the same with 5 images, where the similarity must also exceed what 1% of the never-seen faces reach. Means
    over 10 draws of the gallery.
    """

    name = "enrolment"
    family = "re-identification"
    titles = {
        "enrolment_1": "re-identification from 1 photo",
        "enrolment_5": "re-identification from 5 photos",
        "photos_enrolment_1": "re-identification of training photos from 1 of them",
        "tpir_1pct": "open-set identification from 5 photos (TPIR at FPIR 1%)",
    }

    def measure(self, audited: AuditedModel, task: AuditTask) -> Measurement:
        statistics, trained = {}, task.train_set.labels.cpu()[task.forget_train]
        again, shown = np.zeros((2, len(task.forget_train)))
        for images in (1, ENROLLED):
            hits, identified = np.zeros((2, len(task.forget_test)))
            for draw in range(DRAWS):
                gallery = audited.templates(task, images, draw)
                similarity, found = search(audited.test_embeddings[task.forget_test], gallery)
                right = (found == task.forget_labels).numpy()
                hits += right / DRAWS
                if images == 1:
                    _, found = search(audited.train_embeddings[task.forget_train], gallery)
                    new = ~np.isin(task.forget_train, np.concatenate(task.enrolled(1, draw)))
                    again, shown = again + (new & (found == trained).numpy()), shown + new
                elif task.stranger_set is not None:
                    strangers, _ = search(audited.stranger_embeddings, gallery)
                    threshold = np.quantile(strangers.numpy(), 1 - FPIR)
                    identified += (right & (similarity.numpy() > threshold)) / DRAWS
            statistics[f"enrolment_{images}"] = mean_statistic(hits, task.test_groups)
        seen = shown > 0
        statistics["photos_enrolment_1"] = mean_statistic(again[seen] / shown[seen], task.train_groups[seen])
        measured = mean_statistic(identified, task.test_groups)
        statistics["tpir_1pct"] = measured if task.stranger_set is not None else "needs --strangers"
        return Measurement(statistics)


def search(probes: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar template of each probe: cosines (N,) and positions in the gallery (N,).

    probes (N, dim); gallery (M, dim).
    """
    gallery = F.normalize(gallery)
    parts = F.normalize(probes).split(max(1, SIMILARITIES // len(gallery)))
    best = [(part @ gallery.T).max(dim=1) for part in parts]
    return torch.cat([part.values for part in best]), torch.cat([part.indices for part in best])
