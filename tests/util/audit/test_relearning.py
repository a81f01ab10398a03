"""Relearning: what is trained on, from which rows, and the mean over the logarithm of steps."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from backbone.heads import Head
from tests.conftest import coloured_images, small_recognizer
from tests.util.audit.conftest import CPU, array, at, gallery, share, take_rows, unit
from util.audit import relearning
from util.audit.inputs import AuditedModel, AuditTask
from util.audit.relearning import STEPS, Relearning, _mean_over_log_steps, relearn
from util.audit.statistics import value_of

KEYS = ["relearn_1", "relearn_5", "relearn_kept_only"]


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(relearning, "STEPS", (0, 1, 4))


def colours(head: str = "cosface", classes: int = 6, per_class: int = 8) -> tuple[AuditedModel, AuditTask]:
    """An untrained model of colours, its rows the classes' means; it knows a good part."""
    train, test = coloured_images(classes, per_class), coloured_images(classes, 5, seed=1)
    model = small_recognizer(classes, head).eval()
    audited = AuditedModel(model, train, test, None, CPU)
    with torch.no_grad():
        model.head.weight.copy_(
            torch.stack([audited.train_embeddings[train.labels == c].mean(dim=0) for c in range(classes)])
        )
    return audited, AuditTask(
        train, test, (1, 4), tuple(c for c in range(classes) if c not in (1, 4)), None, audited, (), CPU
    )


def accuracy(embeddings, labels, rows, bias=None) -> float:
    logits = embeddings @ rows.T + bias if bias is not None else unit(embeddings) @ unit(rows).T
    return round(100 * (logits.argmax(axis=1) == labels).mean(), 2)


def test_the_mean_over_the_logarithm_of_steps():
    hits = np.random.default_rng(0).integers(0, 2, (len(STEPS), 7)).astype(float)
    places = [math.log(1 + step) for step in STEPS]
    for image, found in enumerate(_mean_over_log_steps(hits)):
        area = sum((places[i + 1] - places[i]) * (hits[i, image] + hits[i + 1, image]) / 2 for i in range(len(STEPS) - 1))
        assert found == pytest.approx(area / math.log(101))
    assert _mean_over_log_steps(np.ones((len(STEPS), 2))) == pytest.approx(1)


def test_a_figure_is_the_mean_of_its_curve(few_steps):
    audited, task = colours()
    measurement = Relearning().measure(audited, task)
    assert [*measurement.curves] == KEYS
    assert {*measurement.statistics} == {*KEYS, "photos_relearn_1"} == {*Relearning.titles}
    for key, curve in measurement.curves.items():
        assert curve["steps"] == [0, 1, 4]
        first, second, third = curve["accuracy"]
        expected = (math.log(2) * (first + second) + math.log(2.5) * (second + third)) / 2 / math.log(5)
        assert at(measurement.statistics[key], [(0, 1)], 2) == pytest.approx([expected], abs=0.01)


def test_people_are_weighed_by_their_images(few_steps):
    audited, task = colours()
    nobody = torch.empty(0, dtype=torch.long)
    average = _mean_over_log_steps(relearn(audited, task, audited.head(task), nobody, nobody)[0])
    found = Relearning().measure(audited, task).statistics["relearn_kept_only"]
    draws = [(0, 0), (1, 1), (0, 1)]
    assert at(found, draws, 2) == pytest.approx([share(average, task.test_groups, people) for people in draws])


def test_training_photos_that_are_not_trained_on_count_too(few_steps):
    audited, task = colours()
    shown = torch.tensor([task.train_by_class[c][0] for c in task.forget])
    head = audited.head(task)
    _, trained = relearn(audited, task, head, shown, task.forget_train)
    assert trained.shape == (3, 16)
    answers = head(audited.train_embeddings[task.forget_train]).argmax(dim=1)
    assert (trained[0] == (answers == audited.train_set.labels[task.forget_train]).numpy()).all(), "before any step"
    assert 0 < value_of(Relearning().measure(audited, task).statistics["photos_relearn_1"], 2) <= 100


@pytest.mark.parametrize("head", ["cosface", "softmax"])
@pytest.mark.parametrize("has_rows", [True, False])
def test_it_starts_from_templates_as_long_as_the_kept_rows(head, has_rows, few_steps):
    audited, task = colours(head)
    weight, kept = array(audited.model.head.weight), list(task.remain)
    bias = np.zeros(6) if head == "softmax" else None  # a missing row's is the others' mean
    if not has_rows:
        take_rows(audited.model, task.forget)
    length = np.mean([np.linalg.norm(weight[c]) for c in kept])
    faces, labels = array(audited.test_embeddings)[task.forget_test], task.forget_labels.numpy()
    curves = Relearning().measure(audited, task).curves
    for images in (1, 5):
        rows = weight.copy()
        rows[[1, 4]] = length * gallery(audited, task, images, 0)[[1, 4]]
        expected = accuracy(faces, labels, rows, bias)
        assert expected > 20
        assert curves[f"relearn_{images}"]["accuracy"][0] == expected


@pytest.mark.parametrize("head", ["cosface", "softmax"])
@pytest.mark.parametrize("original", [True, False])
def test_the_rows_put_back_are_the_pretrained_models_or_an_originals_own(head, original, few_steps):
    audited, task = colours(head)
    faces, labels = array(audited.test_embeddings)[task.forget_test], task.forget_labels.numpy()
    rows, bias = array(audited.model.head.weight), np.zeros(6) if head == "softmax" else None
    edited = replace(audited, model=copy.deepcopy(audited.model), original=original)
    with torch.no_grad():
        edited.model.head.weight[[1, 4]] *= -1
        if head == "softmax":
            edited.model.head.bias[[1, 4]] = -50.0
    if original:
        rows[[1, 4]] *= -1
        bias = None if bias is None else np.array([0, -50, 0, 0, -50, 0])
    found = Relearning().measure(edited, task).curves["relearn_kept_only"]["accuracy"][0]
    assert found == accuracy(faces, labels, rows, bias)
    assert found == 0 if original else found > 20


def test_it_is_trained_on_the_images_enrolled_and_as_many_kept_ones(few_steps, monkeypatch):
    shown, loss = [], Head.loss

    def record(head, embeddings, labels):
        shown.append(labels.tolist())
        return loss(head, embeddings, labels)

    monkeypatch.setattr(Head, "loss", record)
    audited, task = colours()
    Relearning().measure(audited, task)
    of_one, of_five, of_kept = shown[:5], shown[5:10], shown[10:]
    assert len(of_kept) == 5
    for labels in of_one:
        assert sorted(labels[:2]) == [1, 4]
        assert len(labels) == 4
    for labels in of_five:
        assert sorted(labels[:10]) == [1] * 5 + [4] * 5
        assert len(labels) == 20
    for labels in of_kept:
        assert len(labels) == 16
    for labels in [labels[len(labels) // 2 :] for labels in (*of_one, *of_five)] + of_kept:
        assert {*labels} <= {0, 2, 3, 5}
    assert {label for labels in of_kept for label in labels} == {0, 2, 3, 5}


def test_the_model_stays_as_it_is_and_the_figure_repeats(few_steps):
    audited, task = colours()
    audited.model.train().requires_grad_(False)
    before = copy.deepcopy(audited.model.state_dict())
    first, second = (Relearning().measure(audited, task) for _ in range(2))
    assert first.curves == second.curves
    assert all(torch.equal(before[key], value) for key, value in audited.model.state_dict().items())
    assert audited.model.training
    assert not any(p.requires_grad or p.grad is not None for p in audited.model.parameters())


def test_training_on_people_brings_them_up(monkeypatch):
    monkeypatch.setattr(relearning, "STEPS", (0, 30))
    monkeypatch.setattr(relearning, "LR", 3e-3)
    audited, task = colours()
    first, last = Relearning().measure(audited, task).curves["relearn_5"]["accuracy"]
    assert last > first + 10 or last > 95
