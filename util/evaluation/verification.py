"""Face verification: do two images show the same person? Judged by the cosine of their embeddings."""

import numpy as np
import torch
from sklearn.metrics import auc, roc_curve
from torch import Tensor
from torch.nn.functional import normalize

FALSE_ACCEPT_RATES = (1e-2, 1e-3)


def draw_pairs(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Up to `count` genuine (one class) and up to `count` impostor (two classes) pairs of images, drawn at random.

    labels (N,) → genuine (P, 2), impostor (Q, 2) int64 positions; no pair twice, none of an image with itself.
    """
    generator = torch.Generator().manual_seed(seed)
    by_class = [torch.nonzero(labels == c).flatten() for c in labels.unique()]
    genuine = torch.cat([torch.combinations(positions) for positions in by_class])
    genuine = genuine[torch.randperm(len(genuine), generator=generator)[:count]]
    total = len(labels) * (len(labels) - 1) // 2
    if total <= 8 * count:
        every = torch.combinations(torch.arange(len(labels)))
        impostor = every[labels[every[:, 0]] != labels[every[:, 1]]]
    else:
        # Far more pairs than wanted: draw twice as many as needed instead of listing them all.
        drawn = torch.randint(len(labels), (4 * count, 2), generator=generator)
        drawn = drawn[labels[drawn[:, 0]] != labels[drawn[:, 1]]].sort(dim=1).values
        impostor = torch.unique(drawn, dim=0)
    return genuine, impostor[torch.randperm(len(impostor), generator=generator)[:count]]


def verify(embeddings: Tensor, labels: Tensor, count: int, seed: int) -> dict | None:
    """Area under the ROC curve of the pairs, and the true accept rates at FALSE_ACCEPT_RATES, all in %.

    embeddings (N, dim), labels (N,). None where there are no genuine or no impostor pairs; a rate is None where there
    are too few impostor pairs to tell it from 0.
    """
    if not len(labels):
        return None
    labels = labels.cpu()
    genuine, impostor = draw_pairs(labels, count, seed)
    if not len(genuine) or not len(impostor):
        return None
    unit = normalize(embeddings.float().cpu())
    pairs = torch.cat([genuine, impostor])
    scores = (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(dim=1).numpy()
    same = np.repeat([1, 0], [len(genuine), len(impostor)])
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    rates = {
        f"tar_at_far_{rate:g}": 100 * float(tar[far <= rate].max()) if len(impostor) * rate >= 1 else None
        for rate in FALSE_ACCEPT_RATES
    }
    counts = {"genuine_pairs": len(genuine), "impostor_pairs": len(impostor)}
    return {"auc": 100 * float(auc(far, tar)), **rates, **counts}
