"""Beside strangers: models of which the truth is known, one to which the forgotten are strangers and one that knows them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from tests.util.audit.conftest import DIM, array, make_up, unit
from util.audit import strangers as beside
from util.audit.audit import Audit
from util.audit.membership_person import Apart
from util.audit.statistics import INCONCLUSIVE, STILL_KNOWN, WITHIN, value_of
from util.audit.strangers import Strangers, choose_strangers, metrics_against_strangers
from util.audit.verdict import LIKE_STRANGERS, UNLIKE_STRANGERS, calibration
from util.runtime.errors import UsageError

FORGET, GROUPS = tuple(range(6)), 60


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beside, "ROUNDS", 1)
        patch.setattr(beside, "GROUPS", GROUPS)
        patch.setattr("util.audit.enrolment.DRAWS", 2)
        patch.setattr("util.audit.readout.DRAWS", 2)
        yield


@pytest.fixture(scope="module")
def models():
    """A pre-trained model, one that embeds at random, and the scene: six forgotten people, eight kept, 40 strangers."""
    train, test = (8,) * 14, (4,) * 14
    known, task = make_up(FORGET, train, test, stranger_set=(6,) * 40, noise=0.2)
    generator = torch.Generator().manual_seed(3)
    rows = known.model.head.weight.detach()[list(task.remain)]
    # To the model that was trained on them, people lie off the others' rows, which strangers do not.
    off = torch.linalg.qr(rows.T).Q
    for embeddings, labels in (
        (known.train_embeddings, task.train_set.labels),
        (known.test_embeddings, task.test_set.labels),
    ):
        own = torch.isin(labels, torch.tensor(task.forget))
        embeddings[own] -= embeddings[own] @ off @ off.T
    known.stranger_embeddings = torch.randn(len(task.stranger_set), DIM, generator=generator)
    blank = replace(known)
    blank.train_embeddings, blank.test_embeddings = (
        torch.randn(x.shape, generator=generator) for x in (known.train_embeddings, known.test_embeddings)
    )
    blank.stranger_embeddings = torch.randn(known.stranger_embeddings.shape, generator=generator)
    return known, blank, task


@pytest.fixture(scope="module")
def found(models):
    known, blank, task = models
    return {name: audit_of(model, task) for name, model in (("knows", known), ("blank", blank))}


def audit_of(audited, task) -> Audit:
    strangers = choose_strangers(task)
    return Audit(task, audited, metrics_against_strangers(strangers, audited, task), {}, {}, strangers.about)


def test_a_model_that_embeds_at_random_finds_them_like_strangers(found):
    assert found["blank"].verdict == LIKE_STRANGERS
    assert {entry["verdict"] for entry in found["blank"].metrics.values()} <= {WITHIN, INCONCLUSIVE, None}


def test_a_model_that_knows_them_is_told(found):
    assert found["knows"].verdict == STILL_KNOWN
    for key in ("enrolment_1", "photos_enrolment_1", "verification_auc", "photos_apart", "apart"):
        entry = found["knows"].metrics[key]
        assert (entry["verdict"], entry["rho"]) == (STILL_KNOWN, pytest.approx(1, abs=0.05)), key


def test_people_whom_it_knows_less_than_strangers_are_unlike_them(models):
    _, blank, task = models
    damaged = replace(blank)
    damaged.train_embeddings, damaged.test_embeddings, damaged.stranger_embeddings = (
        blank.train_embeddings.clone(),
        blank.test_embeddings.clone(),
        blank.stranger_embeddings,
    )
    rows = blank.model.head.weight.detach()[list(task.remain)]
    own = torch.isin(task.train_set.labels, torch.tensor(task.forget)).nonzero()[:, 0]
    damaged.train_embeddings[own] = rows[torch.arange(len(own)) % len(rows)]  # each photo became one of the kept people
    assert audit_of(damaged, task).verdict == UNLIKE_STRANGERS


def test_what_is_measured_is_what_one_would_of_the_forgotten_alone(found, models):
    """Pairs are of the forgotten alone, whoever else is in the scene; ρ is the share of what the model knew more."""
    known, _, task = models
    for entry in found["blank"].metrics.values():
        if entry["value"] is not None and entry["rho"] is not None:
            mean = np.mean(entry["references"])
            assert len(entry["references"]) == GROUPS
            assert entry["known"] - mean != 0
            assert entry["rho"] == pytest.approx((entry["value"] - mean) / (entry["known"] - mean), rel=1e-2, abs=2e-2)
    strangers = Strangers(tuple(range(40)), 2, 4, 0)
    round_task, place = beside._with_strangers(known, task, strangers, 0)
    faces = unit(array(known.test_embeddings[task.forget_test]))
    pairs = [(i, j) for i in range(len(faces)) for j in range(i)]
    same = [bool(task.forget_labels[i] == task.forget_labels[j]) for i, j in pairs]
    expected = 100 * roc_auc_score(same, [faces[i] @ faces[j] for i, j in pairs])
    statistic = beside.STRANGER_METRICS["verification"].measure(round_task, place).statistics["verification_auc"]
    weights = np.zeros((1, 46))
    weights[0, :6] = 1
    assert statistic(weights)[0] == pytest.approx(expected)


def test_everybody_has_as_many_photos_and_nobody_twice(models):
    known, _, task = models
    round_task, place = beside._with_strangers(known, task, Strangers(tuple(range(3, 33)), 3, 1, 0), 1)
    assert (place.forget, place.strangers) == ((*FORGET, *range(14, 44)), tuple(range(14, 44)))
    for labels, few, many in ((place.train_set.labels, 3, 8), (place.test_set.labels, 1, 4)):
        assert np.bincount(labels).tolist() == 6 * [few] + 8 * [many] + 30 * [few]
    photos = torch.cat(
        [round_task.train_embeddings[place.train_set.labels > 13], round_task.test_embeddings[place.test_set.labels > 13]]
    )
    assert len(torch.unique(photos, dim=0)) == 30 * 4
    assert round_task.model.head.absent.tolist() == 14 * [False] + 30 * [True]


def test_apart_is_the_auc_against_strangers_photos(models):
    known, _, task = models
    round_task, place = beside._with_strangers(known, task, Strangers(tuple(range(40)), 2, 2, 0), 0)
    rows = unit(array(known.model.head.weight))[list(task.remain)]
    far = -(array(F.normalize(round_task.test_embeddings)) @ rows.T).max(axis=1)
    labels = place.test_set.labels.numpy()
    own, others = far[np.isin(labels, FORGET)], far[labels > 13]
    statistic = Apart().measure(round_task, place).statistics["apart"]
    weights = np.zeros((1, 46))
    weights[0, :6] = 1
    truth = np.repeat([1, 0], [len(own), len(others)])
    assert statistic(weights)[0] == pytest.approx(100 * roc_auc_score(truth, np.concatenate([own, others])))
    assert 0 <= value_of(statistic, 46) <= 100


def test_one_person_is_compared_with_one_stranger_at_a_time(models):
    known, blank, task = models
    for model, verdicts in ((known, {STILL_KNOWN}), (blank, {WITHIN, INCONCLUSIVE})):
        metrics = audit_of(model, replace(task, forget=(2,), before=known)).metrics
        assert metrics["photos_enrolment_1"]["verdict"] in verdicts
        assert metrics["verification_auc"]["value"] is not None
        assert metrics["photos_enrolment_1"]["interval"] is None


def test_photos_that_half_of_the_strangers_have_are_used_and_who_has_fewer_is_left_out(monkeypatch):
    _, task = make_up(FORGET, (8,) * 14, (4,) * 14, stranger_set=(3,) * 5 + (4,) * 10 + (5,) * 15 + (9,) * 10)
    chosen = choose_strangers(task)
    assert (chosen.enrolled, chosen.tested, chosen.left_out, len(chosen.people)) == (3, 2, 15, 25)
    monkeypatch.setattr(beside, "MAX_STRANGERS", 21)
    assert len(choose_strangers(task).people) == 21
    _, task = make_up(FORGET, (2,) * 14, (1,) * 14, stranger_set=(9,) * 30)
    assert (choose_strangers(task).enrolled, choose_strangers(task).tested) == (2, 1)


def test_too_few_strangers_are_refused_with_what_to_do():
    with pytest.raises(UsageError, match=r"^comparing with strangers needs people in no training set: --strangers DIR"):
        choose_strangers(make_up(stranger_set=None)[1])
    with pytest.raises(UsageError, match=r"^--strangers has 19 people with 4 photos or more, and 20 are needed"):
        choose_strangers(make_up(stranger_set=(4,) * 19 + (3,) * 9)[1])


def test_groups_of_strangers_are_seldom_told_from_the_others(found):
    request = found["blank"].as_dict() | {"task": 1}
    truth = calibration([request])["strangers"]
    decided = truth.total() - truth["not enough evidence"]
    assert truth.total() == GROUPS
    assert truth[LIKE_STRANGERS] >= 0.9 * decided > 0
