"""Face verification: do two images show the same person? Judged by the cosine of their embeddings."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from backbone.recognizer import Recognizer
from data.pairs import FacePairs
from util.evaluation.evaluate import map_images
from util.runtime.errors import RunError
from util.runtime.hardware import Hardware

FALSE_ACCEPT_RATES = (1e-2, 1e-3)
BENCHMARK_RATES = (1e-3, 1e-4)
THRESHOLDS = np.arange(0, 4, 0.01)  # of squared distances of unit embeddings, as in arcface_torch


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
    return _rates(scores, np.repeat([True, False], [len(genuine), len(impostor)]), FALSE_ACCEPT_RATES)


def _rates(scores: np.ndarray, same: np.ndarray, rates: Sequence[float]) -> dict:
    """Of the scores (P,) of pairs that show one person or not (P,): the area under the ROC curve, and points on it."""
    from sklearn.metrics import auc, roc_curve  # two seconds to import: where it is used

    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    impostors = int((~same).sum())
    tars = {f"tar_at_far_{r:g}": 100 * float(tar[far <= r].max()) if impostors * r >= 1 else None for r in rates}
    return {"auc": 100 * float(auc(far, tar)), **tars, "genuine_pairs": int(same.sum()), "impostor_pairs": impostors}


def pair_benchmark(model: Recognizer, pairs: Mapping[str, FacePairs], hardware: Hardware) -> dict[str, dict]:
    """Of each benchmark, by name: accuracy over folds (mean and standard deviation), AUC, TAR at BENCHMARK_RATES, in %.

    As arcface_torch measures: an image's embedding is the sum of its own and its mirror image's, of unit length; a fold's
    threshold is the first of THRESHOLDS that is right most often on the other folds. TAR is that of all pairs together;
    None where there are too few impostor pairs for the rate. Raises RunError where embeddings are not finite.
    """

    def of(images: Tensor) -> Tensor:
        return model.embed(images).float() + model.embed(images.flip(-1)).float()

    found = {}
    for name, one in pairs.items():
        embeddings = map_images(model, of, one.images, hardware).cpu()
        if not embeddings.isfinite().all():
            raise RunError(f"embeddings of the images of {name} are not finite")
        left, right = normalize(embeddings.double())[one.pairs].unbind(dim=1)
        distances, same, folds = (left - right).square().sum(dim=1).numpy(), one.same.numpy(), one.folds.numpy()
        hits = (distances[:, None] < THRESHOLDS) == same[:, None]
        accuracies = [hits[folds == f, hits[folds != f].mean(axis=0).argmax()].mean() for f in np.unique(folds)]
        spread = {"accuracy": 100 * float(np.mean(accuracies)), "accuracy_std": 100 * float(np.std(accuracies))}
        found[name] = spread | _rates(-distances, same, BENCHMARK_RATES)
    return found
