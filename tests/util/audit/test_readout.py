"""Readout: the largest and the smallest logit, the better of the two, and a model without rows."""

import numpy as np
import pytest
import torch

from tests.util.audit.conftest import DRAWN, array, at, gallery, make_up, share, take_rows, unit
from util.audit.readout import Readout
from util.audit.statistics import value_of


def by_loop(embeddings, labels, rows, bias=None) -> np.ndarray:
    """Which faces have their own class first, and which last: (2, N)."""
    hits = []
    for embedding, label in zip(embeddings, labels, strict=True):
        logits = rows @ embedding + bias if bias is not None else unit(rows) @ unit(embedding)
        hits.append((logits.argmax() == label, logits.argmin() == label))
    return np.array(hits, dtype=float).T


def check(found, hits, scene) -> None:
    better = hits[0] if hits[0].mean() >= hits[1].mean() else hits[1]
    assert [*found] == ["acc_forget", "sign_flip", "readout"] == [*Readout.titles]
    for statistic, expected in zip(found.values(), [*hits, better], strict=True):
        assert at(statistic) == pytest.approx([share(expected, scene.who, people) for people in DRAWN])


def negate(model, classes) -> None:
    with torch.no_grad():
        model.head.weight[list(classes)] *= -1


@pytest.mark.parametrize("head", ["cosface", "softmax"])
@pytest.mark.parametrize("negated", [(), (1, 4, 6), (4,)], ids=["as it is", "all rows negated", "one row negated"])
def test_the_own_class_is_first_or_last_among_all(head, negated):
    subject, scene = make_up(noise=1.8, head=head)
    negate(subject.model, negated)
    bias = array(subject.model.head.bias) if head == "softmax" else None
    embeddings = array(subject.test)[scene.forget_test]
    hits = by_loop(embeddings, scene.forget_labels.tolist(), array(subject.model.head.weight), bias)
    check(Readout().measure(subject, scene).statistics, hits, scene)
    assert 0.4 < max(hits.mean(axis=1)) < 1


def test_the_sign_turned_around_has_everybody_again():
    subject, scene = make_up(noise=0.1)
    before = value_of(Readout().measure(subject, scene).statistics["acc_forget"], 3)
    negate(subject.model, scene.forget)
    after = {key: value_of(s, 3) for key, s in Readout().measure(subject, scene).statistics.items()}
    assert after == {"acc_forget": 0, "sign_flip": 100, "readout": before}


@pytest.mark.parametrize("head", ["cosface", "softmax"])
def test_a_model_without_rows_is_read_by_templates_of_ten_draws(head):
    subject, scene = make_up(noise=1.8, head=head)
    take_rows(subject.model, (1, 4, 6, 7))  # an identity was forgotten earlier
    kept = [0, 2, 3, 5]
    rows = array(subject.model.head.weight)
    length, bias = np.mean([np.linalg.norm(rows[c]) for c in kept]), None
    if head == "softmax":
        bias = array(subject.model.head.bias)
        bias[[1, 4, 6, 7]] = np.mean([bias[c] for c in kept])
    hits = np.zeros((2, len(scene.forget_test)))
    for draw in range(10):
        rows[[1, 4, 6, 7]] = length * gallery(subject, scene, 5, draw)[[1, 4, 6, 7]]
        hits += by_loop(array(subject.test)[scene.forget_test], scene.forget_labels.tolist(), rows, bias) / 10
    check(Readout().measure(subject, scene).statistics, hits, scene)
    assert 0.2 < hits[0].mean() < 1
