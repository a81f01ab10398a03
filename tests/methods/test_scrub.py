"""SCRUB and SCRUB-S."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

NAMES = pytest.mark.parametrize("name", ["scrub", "scrub_s"])


def order(begun) -> list[str]:
    """Every epoch's passes, joined: "max+min" or "min"."""
    method = begun.method
    epochs = (method.passes(method.task, epoch, method.epochs) for epoch in range(method.epochs))
    return ["+".join(plan.name for plan in passes) for passes in epochs]


def with_epochs(begin, epochs: int, rounds: int = 10, name: str = "scrub"):
    return begin(name, "--epochs", str(epochs), "--rounds", str(rounds))


def test_a_hundred_epochs_are_ten_rounds_of_five_and_five(begin):
    assert order(with_epochs(begin, 100)) == 10 * (5 * ["max+min"] + 5 * ["min"])


@pytest.mark.parametrize(
    ("epochs", "rounds", "expected"),
    [
        (1, 10, "M"),
        (2, 10, "Mm"),
        (3, 10, "MMm"),
        (4, 10, "MmMm"),
        (4, 1, "MMmm"),
        (7, 2, "MMmmMMm"),
        (10, 1, "MMMMMmmmmm"),
        (20, 10, "Mm" * 10),
    ],
)
def test_fewer_epochs_are_fewer_or_shorter_rounds(begin, epochs, rounds, expected):
    assert order(with_epochs(begin, epochs, rounds)) == [{"M": "max+min", "m": "min"}[letter] for letter in expected]


@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("epochs", [2, 3, 5, 7, 11, 19, 24, 50, 101])
def test_training_begins_with_a_max_pass_and_ends_with_a_min_pass_alone(begin, epochs, rounds):
    passes = order(with_epochs(begin, epochs, rounds))
    assert passes[0] == "max+min"
    assert passes[-1] == "min"
    turns = sum(before == "min" and after == "max+min" for before, after in pairwise(passes))
    assert turns + 1 == min(rounds, epochs // 2)


@NAMES
def test_a_max_pass_shows_what_is_forgotten_and_a_min_pass_what_remains(begin, name):
    begun = begin(name)
    maximize, minimize = begun.method.passes(begun.method.task, 0, begun.method.epochs)
    (forget,), (remain,) = maximize.streams.values(), minimize.streams.values()
    assert sorted(forget.tolist()) == sorted(begun.task.forget_indices.tolist())
    assert sorted(remain.tolist()) == sorted(begun.task.remain_indices.tolist())


@NAMES
@pytest.mark.parametrize(("share", "steps"), [("1", 3), ("0.7", 2), ("0.1", 1), ("1e9", None)])
def test_a_max_pass_takes_a_share_of_a_min_passes_steps(begin, name, share, steps):
    begun = begin(name, "--batch-size", "2", "--max-share", share, number=2)
    task = replace(begun.task, remain_indices=begun.task.remain_indices[:5])
    maximize, minimize = begun.method.passes(task, 0, begun.method.epochs)
    assert minimize.steps == 3
    assert maximize.steps == (steps or -(-len(task.forget_indices) // 2))


def distance(begun, arithmetic) -> float:
    """Σ ‖θ − θ₀‖ over the tensors."""
    pairs = zip(begun.model.backbone.parameters(), begun.before.backbone.parameters(), strict=True)
    return sum(np.linalg.norm((arithmetic.array(a) - arithmetic.array(b)).ravel()) for a, b in pairs)


@NAMES
@pytest.mark.parametrize("kd_logits", ["label-free", "training"])
@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_the_losses_of_both_passes_are_their_formulas(begin, arithmetic, name, kd_logits, temperature):
    options = ("--gamma", "0.9", "--kd-weight", "0.05", "--temperature", str(temperature), "--kd-logits", kd_logits)
    options += ("--bound", "1e9")
    begun = begin(name, *options, *(("--rho", "0.2") if name == "scrub_s" else ()))
    smoothing = 0.2 * distance(begun, arithmetic) if name == "scrub_s" else 0.0
    for number, part in ((0, "forget_kl"), (1, "remain_kl")):
        batch = begun.batch(number)
        losses = begun.method.loss(begun.model, batch)
        logits = student = arithmetic.logits(begun.model, batch.images)
        teacher = arithmetic.logits(begun.before, batch.images)
        if kd_logits == "training":
            student, teacher = (arithmetic.with_margin(each, batch.labels) for each in (student, teacher))
        kl = arithmetic.kl(teacher, student, temperature)
        assert kl > 0.1
        assert losses[part].item() == pytest.approx(kl, rel=1e-4)
        parts = {"total", part} | ({"distance"} if name == "scrub_s" else set())
        if number == 0:
            expected = -kl
        else:
            remain = arithmetic.cross_entropy(logits, batch.labels)
            assert losses["remain"].item() == pytest.approx(remain, rel=1e-9)
            expected, parts = 0.9 * remain + 0.05 * kl, parts | {"remain"}
        assert set(losses) == parts
        assert losses["total"].item() == pytest.approx(expected + smoothing, rel=1e-4)
        if name == "scrub_s":
            assert losses["distance"].item() == pytest.approx(smoothing / 0.2, rel=1e-9)


@NAMES
def test_a_max_pass_pushes_each_image_up_to_the_bound_and_no_further(begin, arithmetic, name):
    begun = begin(name)
    batch = begun.batch(0)
    teacher, student = (arithmetic.logits(model, batch.images) for model in (begun.before, begun.model))
    temperature = begun.method.args.temperature
    reached = np.array([arithmetic.kl(p[None], q[None], temperature) for p, q in zip(teacher, student, strict=True)])
    assert reached.min() < 0.9 * reached.max()
    for bound, moves in ((0.9 * reached.min(), False), (reached.mean(), True), (1.1 * reached.max(), True)):
        begun.method.args.bound, begun.method.args.rho = bound, 0.0
        losses = begun.method.loss(begun.model, batch)
        assert losses["total"].item() == pytest.approx(-np.minimum(reached, bound).mean(), rel=1e-4)
        gradients = torch.autograd.grad(losses["total"], [p for p in begun.model.parameters() if p.requires_grad])
        assert any(gradient.any() for gradient in gradients) == moves


def test_smoothing_starts_at_zero_with_a_finite_gradient(begin):
    begun = begin("scrub_s", moved=False)
    losses = begun.method.loss(begun.model, begun.batch(1))
    losses["total"].backward()
    assert losses["distance"].item() == 0
    assert all(p.grad.isfinite().all() for p in begun.model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("epochs", "rounds", "ends"),
    [(100, 10, range(9, 100, 10)), (7, 2, [3, 6]), (4, 10, [1, 3]), (3, 10, [2]), (24, 5, [4, 9, 14, 19, 23])],
)
def test_the_average_takes_in_a_tenth_of_the_weights_once_a_round(begin, move_weights, arithmetic, epochs, rounds, ends):
    begun = with_epochs(begin, epochs, rounds, "scrub_s")
    method, model = begun.method, begun.model
    batch = begun.batch(1)
    expected = [arithmetic.array(p) for p in begun.before.backbone.parameters()]
    updated = []
    for epoch in range(epochs):
        move_weights(model, seed=epoch)
        now = [arithmetic.array(p) for p in model.backbone.parameters()]
        before = method.loss(model, batch)["distance"].item()
        method.end_epoch(model, epoch)
        after = method.loss(model, batch)["distance"].item()
        if epoch in ends:
            expected = [0.9 * average + 0.1 * weight for average, weight in zip(expected, now, strict=True)]
        if after != before:
            updated.append(epoch)
        far = sum(np.linalg.norm((a - b).ravel()) for a, b in zip(now, expected, strict=True))
        assert after == pytest.approx(far, rel=1e-9)
    assert updated == list(ends)


def test_the_average_starts_anew_with_each_task(begin):
    begun = begin("scrub_s")
    begun.method.end_task(begun.model)
    begun.method.begin_task(begun.model, begun.tasks[1], begun.images, begun.method.args.epochs)
    assert begun.method.loss(begun.model, begun.batch(1))["distance"].item() == 0
