"""Verification: pairs, thresholds of kept pairs and collapse, pair by pair."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from tests.util.audit.conftest import DRAWN, array, at, make_up, pairs_of, quantile, share, unit
from util.audit import verification
from util.audit.statistics import bootstrap_interval, value_of
from util.audit.verification import Verification

MANY = (12, 8, 12, 14, 9, 12, 11, 12)  # 62 kept faces of 5 people: 1,536 impostor pairs
KEYS = ["verification_auc", "verification_tar_1pct", "verification_tar_01pct", "collapse_1pct"]
TRAINED = "photos_verification_auc"


@pytest.fixture
def scored():
    """A scene with its pairs: (score, identity, identity) of the forgotten and of the kept faces."""
    audited, task = make_up(test=MANY, noise=1.5)
    pairs = []
    for where in (task.forget_test, task.remain_test):
        pairs.append(pairs_of(array(audited.test_embeddings)[where], task.test_set.labels[where].numpy()))
    return audited, task, *pairs


def test_genuine_against_impostor_pairs_both_among_the_forgotten(scored):
    audited, task, forgotten, _ = scored
    found = Verification().measure(audited, task).statistics
    assert {*found} == {*KEYS, TRAINED} == {*Verification.titles}
    scores, truth = [score for score, _, _ in forgotten], [a == b for _, a, b in forgotten]
    for people in DRAWN[:-1]:
        times = dict(zip(task.forget, np.bincount(people, minlength=3), strict=True))
        weights = [times[a] if a == b else times[a] * times[b] for _, a, b in forgotten]
        expected = 100 * roc_auc_score(truth, scores, sample_weight=weights)
        assert at(found["verification_auc"], [people]) == pytest.approx([expected])
    assert 60 < value_of(found["verification_auc"], 3) < 99


def test_the_threshold_is_that_of_kept_impostor_pairs(scored, monkeypatch):
    monkeypatch.setattr(verification, "LEAST", 1)
    audited, task, forgotten, kept = scored
    found = Verification().measure(audited, task).statistics
    impostors = [score for score, a, b in kept if a != b]
    assert len(impostors) == 62 * 61 / 2 - 4 * 66 - 91
    genuine = np.array([(score, a) for score, a, b in forgotten if a == b])
    test_groups = np.searchsorted(task.forget, genuine[:, 1])
    for key, rate in (("verification_tar_1pct", 0.01), ("verification_tar_01pct", 0.001)):
        above = genuine[:, 0] > quantile(impostors, 1 - rate)
        assert at(found[key]) == pytest.approx([share(above, test_groups, people) for people in DRAWN])
        assert 0 < above.mean() < 1


def test_collapse_is_the_share_of_pairs_with_anybody_else(scored):
    audited, task, _, kept = scored
    statistic = Verification().measure(audited, task).statistics["collapse_1pct"]
    threshold = quantile([score for score, a, b in kept if a != b], 0.99)
    faces, labels = unit(array(audited.test_embeddings)), task.test_set.labels.tolist()
    shares = []
    for face, own in zip(faces[task.forget_test], task.forget_labels.tolist(), strict=True):
        others = [face @ other > threshold for other, label in zip(faces, labels, strict=True) if label != own]
        shares.append(np.mean(others))
    assert at(statistic) == pytest.approx([share(np.array(shares), task.test_groups, people) for people in DRAWN])
    assert 0 < np.mean(shares) < 0.2


def test_forgotten_faces_that_became_one_are_mistaken_for_each_other(scored):
    audited, task, *_ = scored
    before = value_of(Verification().measure(audited, task).statistics["collapse_1pct"], 3)
    audited.test_embeddings[task.forget_test] = torch.randn(32, generator=torch.Generator().manual_seed(1))
    found = {key: value_of(s, 3) for key, s in Verification().measure(audited, task).statistics.items() if callable(s)}
    assert found["verification_auc"] == 50
    others = np.mean([1 - MANY[c] / sum(MANY) for c in task.forget_labels.tolist()])
    forgotten = np.mean([(28 - MANY[c]) / (sum(MANY) - MANY[c]) for c in task.forget_labels.tolist()])
    assert before < 5 < 100 * forgotten <= found["collapse_1pct"] < 100 * others


def test_one_point_for_all_faces_is_no_less_of_a_collapse(scored):
    audited, task, *_ = scored
    before = value_of(Verification().measure(audited, task).statistics["collapse_1pct"], 3)
    audited.test_embeddings = torch.full_like(audited.test_embeddings, 0.3)
    found = Verification().measure(audited, task).statistics
    assert value_of(found["verification_auc"], 3) == 50
    assert value_of(found["verification_tar_1pct"], 3) <= 1
    assert isinstance(found["collapse_1pct"], str) or value_of(found["collapse_1pct"], 3) > before


def test_a_rate_rests_on_ten_false_accepts(scored):
    audited, task, *_ = scored
    found = Verification().measure(audited, task).statistics
    assert found["verification_tar_01pct"] == "needs 10000 impostor pairs of kept faces, there are 1536"
    assert callable(found["verification_tar_1pct"])


def test_without_pairs_there_is_a_reason():
    found = Verification().measure(*make_up(test=(5, 1, 5, 5, 1, 5, 1, 5))).statistics
    assert callable(found.pop(TRAINED))
    assert found == dict.fromkeys(KEYS, "needs two test images of a forgotten person")


def test_one_person_is_told_from_the_kept():
    audited, task = make_up(forget=(4,), test=MANY, noise=1.5)
    statistic = Verification().measure(audited, task).statistics["verification_auc"]
    faces = unit(array(audited.test_embeddings))
    own, others = faces[task.forget_test], faces[task.remain_test]
    genuine = [(own[i] @ own[j], (i, j)) for i in range(9) for j in range(i)]
    impostor = [(face @ other, (i,)) for i, face in enumerate(own) for other in others]
    truth, scores = [1] * len(genuine) + [0] * len(impostor), [score for score, _ in genuine + impostor]
    for photos in ((0, 1, 2, 3, 4, 5, 6, 7, 8), (0, 0, 1, 3, 3, 3, 5, 7, 8)):
        times = np.bincount(photos, minlength=9)
        weights = [np.prod([times[i] for i in which]) for _, which in genuine + impostor]
        expected = 100 * roc_auc_score(truth, scores, sample_weight=weights)
        assert at(statistic, [photos], task.num_groups) == pytest.approx([expected])
    low, high = bootstrap_interval(statistic, task.num_groups, seed=0)
    assert low < value_of(statistic, task.num_groups) < high


@pytest.mark.parametrize("forget", [(1, 4, 6), (4,)], ids=["people", "one person"])
def test_training_photos_are_matched_like_test_photos(forget):
    audited, task = make_up(forget=forget, noise=1.5)
    own, labels = unit(array(audited.train_embeddings))[task.forget_train], task.train_set.labels[task.forget_train].tolist()
    pairs = [(own[i] @ own[j], labels[i] == labels[j]) for i in range(len(own)) for j in range(i)]
    if len(forget) == 1:
        pairs += [(face @ other, False) for face in own for other in unit(array(audited.test_embeddings))[task.remain_test]]
    scores, same = zip(*pairs, strict=True)
    statistic = Verification().measure(audited, task).statistics[TRAINED]
    assert value_of(statistic, task.num_groups) == pytest.approx(100 * roc_auc_score(same, scores))


def test_without_pairs_of_kept_faces_the_auc_is_left():
    # Only one of those who remain has test images: no threshold.
    audited, task = make_up(test=(5, 6, 0, 0, 4, 0, 8, 0))
    found = Verification().measure(audited, task).statistics
    assert 50 < value_of(found["verification_auc"], 3) <= 100
    assert all(isinstance(found[key], str) for key in KEYS[1:])
    assert 50 < value_of(found[TRAINED], 3) <= 100


def test_the_curve_is_the_share_of_genuine_pairs_at_each_rate_of_false_ones(scored):
    audited, task, forgotten, kept = scored
    curve = Verification().measure(audited, task).curves["roc"]
    genuine = np.array([score for score, a, b in forgotten if a == b])
    impostors = np.sort([score for score, a, b in kept if a != b])[::-1]  # as of the thresholds
    assert curve["far"][0] == 0
    assert (curve["far"][-1], curve["tar"][-1]) == (1, 1)
    for rate, height in zip(curve["far"], curve["tar"], strict=True):
        allowed = int(rate * len(impostors) + 1e-9)
        threshold = impostors[allowed] if allowed < len(impostors) else -np.inf
        # scikit-learn leaves out points on a straight line, and the rates are rounded.
        assert height == pytest.approx((genuine > threshold).mean(), abs=0.02)
