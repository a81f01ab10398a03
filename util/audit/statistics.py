"""From measurements to verdicts: bootstrap over identities, and comparison with models that never saw the person.

A *statistic* is a metric as a function of the identities' weights: (B, identities) → (B,), in percent. With all weights 1
it is the metric itself, with weights drawn anew its bootstrap.
"""

from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np
from scipy.stats import t as student_t

Statistic = Callable[[np.ndarray], np.ndarray]

REPLICATES, CONFIDENCE = 1000, 0.95
STRANGER_CONFIDENCE = 0.995  # for groups of strangers, which differ more than references, in some ten metrics at once
DIGITS = 4  # of what audit.json holds
MARGIN, POWER = 0.2, 3.0  # the equivalence margin of |ρ|; power from which on a metric can tell
HIGHLY_SIGNIFICANT = 0.01  # p below which one metric alone decides

STILL_KNOWN, OVER_FORGOTTEN = "still known", "over-forgotten"
WITHIN, INCONCLUSIVE = "within the margin", "inconclusive"


def mean_statistic(hits: np.ndarray, groups: np.ndarray) -> Statistic:
    """The share of hits: hits (N,) in [0, 1], groups (N,) the identity of each, or (N, m) those whose weights multiply."""
    # Images of the same identities are summed once, not in each of a thousand replicates.
    groups, where, counts = np.unique(groups.reshape(len(hits), -1), axis=0, return_inverse=True, return_counts=True)
    sums = np.bincount(where.ravel(), hits, len(groups))

    def one(weights: np.ndarray) -> float:
        times = _times(weights, groups)
        with np.errstate(invalid="ignore"):  # none of the identities drawn has an image
            return 100 * (times @ sums) / (times @ counts)

    return lambda weights: np.array([one(row) for row in weights])


def _times(weights: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """What (N, m) identities' weights multiply to; column by column, as m is small."""
    return reduce(np.multiply, (weights[column] for column in groups.T))


def auc_statistic(
    positive: np.ndarray, negative: np.ndarray, positive_groups: np.ndarray, negative_groups: np.ndarray | None = None
) -> Statistic:
    """Area under the ROC curve, ties counting half: P(positive > negative).

    positive (P,), negative (N,) are scores; `…_groups` (P, m), (N, m) the identities of each, whose weights multiply; None:
    of nobody, weight 1.
    """
    scores, rank = np.unique(np.concatenate([positive, negative]), return_inverse=True)
    positive_rank, negative_rank = np.split(rank, [len(positive)])

    def one(weights: np.ndarray) -> float:
        up = np.bincount(positive_rank, _times(weights, positive_groups), len(scores))
        down_weights = None if negative_groups is None else _times(weights, negative_groups)
        down = np.bincount(negative_rank, down_weights, len(scores))
        pairs = up.sum() * down.sum()
        return 100 * float(up @ (down.cumsum() - down / 2)) / pairs if pairs else np.nan

    return lambda weights: np.array([one(row) for row in weights])


def value_of(statistic: Statistic | str, identities: int) -> float | str:
    """The metric itself; or why there is none, as it is."""
    return statistic if isinstance(statistic, str) else float(statistic(np.ones((1, identities)))[0])


def bootstrap_interval(statistic: Statistic, identities: int, seed: int) -> list[float]:
    """The middle 95% of the metric over samples of the identities, drawn with replacement."""
    draws = np.random.default_rng(seed).multinomial(identities, [1 / identities] * identities, REPLICATES)
    return middle(statistic(draws.astype(float)))


def middle(values: np.ndarray) -> list[float]:
    """Where the middle 95% begin and end."""
    tail = 50 * (1 - CONFIDENCE)
    return np.nanpercentile(values, [tail, 100 - tail]).tolist()


def compare(
    value: float,
    references: Sequence[float],
    originals: Sequence[float],
    resolution: float,
    lower_if_known: bool = False,
    independent: float | None = None,
) -> dict:
    """Judge a metric m of an unlearned model beside those of the references R (never seen) and the originals O.

    Returns delta Δ = m − mean R, z = Δ / (s √(1 + 1/K)), p (two-sided, of Student's t at K − 1 degrees of freedom),
    rho ρ = Δ / (mean O − mean R), power = (mean O − mean R) / s or 0, significant (p < 5%; strangers: 0.5%) and the verdict.

    resolution: the least s, what one image is worth: K values may agree by chance.
    lower_if_known: originals show less of the metric than references, or it has no power. It says of a model only that too
    much was forgotten: little of it is no sign of knowing.
    independent: where the references are groups of strangers, how many there are without anybody in two: K in z.
    """
    mean = float(np.mean(references))
    spread = max(float(np.std(references, ddof=1)), resolution)
    delta, gap = value - mean, float(np.mean(originals)) - mean
    z = delta / (spread * (1 + 1 / (independent or len(references))) ** 0.5)
    power = max(0.0, -gap if lower_if_known else gap) / spread
    rho = delta / gap if abs(gap) > 1e-6 else None
    confidence = STRANGER_CONFIDENCE if independent else CONFIDENCE
    p = 2 * float(student_t.sf(abs(z), len(references) - 1))
    significant = p < 1 - confidence
    if power < POWER:
        verdict = INCONCLUSIVE
    elif abs(rho) <= MARGIN:
        verdict = WITHIN
    elif not significant:
        verdict = INCONCLUSIVE  # the references' own spread could explain it
    else:
        verdict = OVER_FORGOTTEN if rho < 0 else INCONCLUSIVE if lower_if_known else STILL_KNOWN
    return {"delta": delta, "z": z, "p": p, "rho": rho, "power": power, "significant": significant, "verdict": verdict}


def rounded(value):
    """All floats in a JSON value to DIGITS."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return round(float(value), DIGITS) if isinstance(value, float) else value
