"""Readout: the largest logit over rows made anew, the smallest over a model's own, and a model without rows."""

import numpy as np
import pytest
import torch

from tests.util.audit.conftest import DRAWN, array, at, gallery, make_up, share, take_rows, unit
from util.audit.readout import Readout
from util.audit.statistics import bootstrap_interval, value_of


def by_loop(embeddings, labels, rows, bias=None) -> np.ndarray:
    """Which faces have their own class first, and which last: (2, N)."""
    hits = []
    for embedding, label in zip(embeddings, labels, strict=True):
        logits = rows @ embedding + bias if bias is not None else unit(rows) @ unit(embedding)
        hits.append((logits.argmax() == label, logits.argmin() == label))
    return np.array(hits, dtype=float).T


def check(found, hits, task) -> None:
    assert [*found] == ["acc_forget", "sign_flip"] == [*Readout.titles]
    for statistic, expected in zip(found.values(), hits, strict=True):
        assert at(statistic) == pytest.approx([share(expected, task.test_groups, people) for people in DRAWN])


def negate(model, classes) -> None:
    with torch.no_grad():
        model.head.weight[list(classes)] *= -1


def made_anew(audited, task, anew, kept, draw):
    """Rows and bias with those of `anew` made of templates as long as the kept ones."""
    rows = array(audited.model.head.weight)
    length, bias = np.mean([np.linalg.norm(rows[c]) for c in kept]), None
    if hasattr(audited.model.head, "bias"):
        bias = array(audited.model.head.bias)
        bias[anew] = np.mean([bias[c] for c in kept])
    rows[anew] = length * gallery(audited, task, 5, draw)[anew]
    return rows, bias


@pytest.mark.parametrize("head", ["cosface", "softmax"])
@pytest.mark.parametrize("negated", [(), (1, 4, 6), (4,)], ids=["as it is", "all rows negated", "one row negated"])
def test_the_largest_is_read_over_rows_made_anew_and_the_smallest_over_its_own(head, negated):
    audited, task = make_up(noise=1.8, head=head)
    negate(audited.model, negated)
    faces, labels = array(audited.test_embeddings)[task.forget_test], task.forget_labels.tolist()
    hits = np.zeros((2, len(labels)))
    for draw in range(10):
        hits[0] += by_loop(faces, labels, *made_anew(audited, task, [1, 4, 6], [0, 2, 3, 5, 7], draw))[0] / 10
    own = [array(part) for part in audited.model.head.parameters()]
    hits[1] = by_loop(faces, labels, *own)[1]
    check(Readout().measure(audited, task).statistics, hits, task)
    assert 0.4 < max(hits.mean(axis=1)) < 1


def test_the_sign_turned_around_has_everybody_again_and_so_have_rows_made_anew():
    audited, task = make_up(noise=0.1)
    before = {key: value_of(s, 3) for key, s in Readout().measure(audited, task).statistics.items()}
    negate(audited.model, task.forget)
    after = {key: value_of(s, 3) for key, s in Readout().measure(audited, task).statistics.items()}
    assert before == pytest.approx({"acc_forget": 100, "sign_flip": 0})
    assert after == pytest.approx({"acc_forget": 100, "sign_flip": 100})


@pytest.mark.parametrize("head", ["cosface", "softmax"])
def test_a_model_without_rows_is_read_by_templates_of_ten_draws(head):
    audited, task = make_up(noise=1.8, head=head)
    take_rows(audited.model, (1, 4, 6, 7))  # an identity was forgotten earlier
    hits = np.zeros((2, len(task.forget_test)))
    for draw in range(10):
        rows = made_anew(audited, task, [1, 4, 6, 7], [0, 2, 3, 5], draw)
        hits += by_loop(array(audited.test_embeddings)[task.forget_test], task.forget_labels.tolist(), *rows) / 10
    check(Readout().measure(audited, task).statistics, hits, task)
    assert 0.2 < hits[0].mean() < 1


def test_of_one_person_photos_are_drawn_anew():
    audited, task = make_up(forget=(4,), noise=1.8)
    statistic = Readout().measure(audited, task).statistics["acc_forget"]
    low, high = bootstrap_interval(statistic, task.num_groups, seed=0)
    assert low < value_of(statistic, task.num_groups) < high
