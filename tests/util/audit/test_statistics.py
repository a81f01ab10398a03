"""Statistics, their bootstrap and the verdicts, against loops, scikit-learn and sums done by hand."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests.util.audit.conftest import DRAWN, at, quantile, share
from util.audit.statistics import (
    INCONCLUSIVE,
    OVER_FORGOTTEN,
    STILL_KNOWN,
    WITHIN,
    auc_statistic,
    bootstrap_interval,
    compare,
    mean_statistic,
    value_of,
)

WHO = np.array([0, 2, 1, 1, 0, 2, 2, 1, 2, 0, 2])


@pytest.fixture
def chance():
    return np.random.default_rng(3)


def test_a_mean_counts_each_image_as_often_as_its_identity_is_drawn(chance):
    hits = chance.random(len(WHO))
    statistic = mean_statistic(hits, WHO)
    assert at(statistic) == pytest.approx([share(hits, WHO, people) for people in DRAWN])
    assert value_of(statistic, 3) == pytest.approx(100 * hits.mean())


def test_a_mean_of_nobody_is_no_number():
    statistic = mean_statistic(np.array([1.0, 1.0]), np.array([0, 2]))
    assert np.isnan(at(statistic, [(1, 1, 1)])).all()


def by_sklearn(positive, negative, positive_weight, negative_weight) -> float:
    truth = np.repeat([1, 0], [len(positive), len(negative)])
    weights = np.concatenate([positive_weight, negative_weight])
    return 100 * roc_auc_score(truth, np.concatenate([positive, negative]), sample_weight=weights)


@pytest.mark.parametrize("levels", [3, 1000], ids=["many ties", "few ties"])
@pytest.mark.parametrize("of_nobody", [False, True])
def test_an_auc_weighs_every_score_by_its_identity(levels, of_nobody, chance):
    positive, negative = chance.integers(1, levels + 1, 40), chance.integers(0, levels, 50)
    positive_groups, negative_groups = chance.integers(0, 3, 40), chance.integers(0, 3, 50)
    statistic = auc_statistic(positive, negative, positive_groups[:, None], None if of_nobody else negative_groups[:, None])
    for people in DRAWN:
        weights = np.bincount(people, minlength=3)
        down = np.ones(50) if of_nobody else weights[negative_groups]
        expected = by_sklearn(positive, negative, weights[positive_groups], down)
        assert at(statistic, [people]) == pytest.approx([expected])


def test_a_pair_of_two_identities_counts_as_often_as_both_are_drawn(chance):
    positive, negative = chance.normal(0.5, 1, 30), chance.normal(0, 1, 60)
    groups, pairs = chance.integers(0, 3, 30), np.array([(0, 1), (0, 2), (1, 2)])[chance.integers(0, 3, 60)]
    statistic = auc_statistic(positive, negative, groups[:, None], pairs)
    for people in DRAWN[:-1]:
        weights = np.bincount(people, minlength=3)
        expected = by_sklearn(positive, negative, weights[groups], weights[pairs[:, 0]] * weights[pairs[:, 1]])
        assert at(statistic, [people]) == pytest.approx([expected])
    assert np.isnan(at(statistic, [(1, 1, 1)])).all(), "one identity alone has no impostor pairs"


def test_a_pair_of_photos_counts_as_often_as_both_are_drawn(chance):
    hits, pairs = chance.random(4), np.array([(0, 1), (0, 2), (1, 2), (1, 1)])
    statistic = mean_statistic(hits, pairs)
    for people in DRAWN[:-1]:
        times = np.bincount(people, minlength=3)
        each = [times[a] * times[b] for a, b in pairs]
        assert at(statistic, [people]) == pytest.approx([100 * np.average(hits, weights=each)])


def test_scores_that_all_tie_tell_nothing():
    statistic = auc_statistic(np.ones(5), np.ones(7), np.zeros((5, 1), dtype=int))
    assert value_of(statistic, 1) == 50


@pytest.mark.parametrize("metric", ["mean", "auc"])
def test_an_interval_is_that_of_samples_of_identities(metric, chance):
    scores, negative = chance.random(len(WHO)), chance.random(20)
    statistic = mean_statistic(scores, WHO) if metric == "mean" else auc_statistic(scores, negative, WHO[:, None])
    found = []
    for counts in np.random.default_rng(5).multinomial(3, [1 / 3] * 3, 1000):
        sample = np.concatenate([scores[person == WHO] for person in np.repeat(np.arange(3), counts)])
        wins = (sample[:, None] > negative).mean()
        found.append(100 * (sample.mean() if metric == "mean" else wins))
    expected = quantile(found, 0.025), quantile(found, 0.975)
    assert bootstrap_interval(statistic, 3, seed=5) == pytest.approx(expected)
    assert expected[0] < value_of(statistic, 3) < expected[1]


def test_samples_without_the_figure_are_left_out_of_the_interval():
    statistic = mean_statistic(np.array([1.0, 0.0]), np.array([0, 1]))  # nobody's image where the third is drawn thrice
    low, high = bootstrap_interval(statistic, 3, seed=0)
    assert (low, high) == (0, 100)


def test_a_comparison_is_its_formulas():
    found = compare(40.0, [10.0, 12.0, 17.0], [90.0, 98.0], resolution=1.0)
    spread = (((10 - 13) ** 2 + (12 - 13) ** 2 + (17 - 13) ** 2) / 2) ** 0.5
    assert found["delta"] == pytest.approx(27)
    assert found["z"] == pytest.approx(27 / (spread * (4 / 3) ** 0.5))
    assert found["p"] == pytest.approx(1 - found["z"] / (2 + found["z"] ** 2) ** 0.5)  # of t at two degrees of freedom
    assert found["rho"] == pytest.approx(27 / 81)
    assert found["power"] == pytest.approx(81 / spread)
    assert (found["significant"], found["verdict"]) == (True, STILL_KNOWN)


def test_within_the_margin_a_figure_may_be_significantly_off():
    for value, off in ((12, False), (21.9, False), (22, True), (2, True)):  # z decides at 12 ± 9.937
        found = compare(value, NEAR, [92], resolution=1.0)
        assert (found["significant"], found["verdict"]) == (off, WITHIN)


NEAR = [10, 12, 14]  # mean 12, spread 2; at 2 degrees of freedom Student's t is 4.3027, so z decides at 12 ± 9.937
FIVE = [8, 10, 12, 14, 16]  # mean 12, spread √10; at 4 degrees 2.7764: 12 ± 9.618


@pytest.mark.parametrize(
    ("value", "references", "originals", "verdict"),
    [
        # ρ = 0.2 is within the margin; beyond it z decides, and is large here.
        (12, NEAR, [92], WITHIN),
        (28, NEAR, [92], WITHIN),
        (28.01, NEAR, [92], STILL_KNOWN),
        (92, NEAR, [92], STILL_KNOWN),
        (-4, NEAR, [92], WITHIN),
        (-4.01, NEAR, [92], OVER_FORGOTTEN),
        # z at Student's t, where ρ is beyond 0.2 already: 0.24 at five references, 0.33 at three.
        (21.61, FIVE, [52], INCONCLUSIVE),
        (21.63, FIVE, [52], STILL_KNOWN),
        (2.39, FIVE, [52], INCONCLUSIVE),
        (2.37, FIVE, [52], OVER_FORGOTTEN),
        (21.93, NEAR, [42], INCONCLUSIVE),
        (21.94, NEAR, [42], STILL_KNOWN),
        # Power 3 is a gap of 6: below it nothing can be told, be the value what it will.
        (12, NEAR, [18], WITHIN),
        (12, NEAR, [17.99], INCONCLUSIVE),
        (100, NEAR, [18], STILL_KNOWN),
        (100, NEAR, [17.99], INCONCLUSIVE),
        (-100, NEAR, [18], OVER_FORGOTTEN),
        (18, NEAR, [18], INCONCLUSIVE),
        # Originals that show less than the references: a low value is no sign of knowing.
        (2, [60, 62, 64], [2], INCONCLUSIVE),
        (100, [60, 62, 64], [2], INCONCLUSIVE),
        # The mean of the originals counts.
        (28.01, NEAR, [82, 102], STILL_KNOWN),
        (28.01, NEAR, [83, 102], WITHIN),
    ],
)
def test_a_verdict_on_either_side_of_each_boundary(value, references, originals, verdict):
    assert compare(value, references, originals, resolution=1.0)["verdict"] == verdict


@pytest.mark.parametrize(
    ("value", "original", "verdict"),
    [
        *((2, 2, INCONCLUSIVE), (50, 2, WITHIN), (74, 2, WITHIN), (76, 2, OVER_FORGOTTEN)),
        *((2, 56.01, INCONCLUSIVE), (92, 92, INCONCLUSIVE)),
    ],
)
def test_little_of_what_goes_wrong_is_no_sign_of_knowing(value, original, verdict):
    assert compare(value, [60, 62, 64], [original], 0.1, lower_if_known=True)["verdict"] == verdict


def test_without_a_gap_nothing_can_be_told():
    found = compare(100, NEAR, [12], resolution=1.0)
    assert (found["rho"], found["power"], found["verdict"]) == (None, 0, INCONCLUSIVE)


def test_references_that_agree_are_no_surer_than_one_image():
    # A spread of 5 instead of 0: z decides at 4.3027 · 5 · √(4/3) = 24.84.
    for value, verdict in ((24.8, INCONCLUSIVE), (24.9, STILL_KNOWN)):
        found = compare(value, [0, 0, 0], [100], resolution=5)
        assert found["power"] == pytest.approx(20)
        assert found["verdict"] == verdict
    assert compare(14.9, [0, 0, 0], [14.9], resolution=5)["verdict"] == INCONCLUSIVE
    assert compare(0, [0, 0, 0], [15], resolution=5)["verdict"] == WITHIN
    assert compare(0, [8, 10, 12], [90], resolution=1.9)["z"] == compare(0, [8, 10, 12], [90], resolution=0)["z"]
