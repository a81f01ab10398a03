"""Bad Teacher, DELETE and Spotter: what their teachers say, and what the student is told."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from methods.spotter import Spotter
from util.runtime.hardware import Hardware


def masked(arithmetic, logits: np.ndarray, classes) -> np.ndarray:
    """The softmax over the other classes: probabilities with zeros at `classes`, one or more of each row."""
    p = arithmetic.softmax(logits)
    for row, gone in zip(p, classes, strict=True):
        row[gone] = 0
    return p / p.sum(axis=1, keepdims=True)


def kl(arithmetic, p: np.ndarray, student: np.ndarray) -> float:
    q = arithmetic.softmax(student)
    return float(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0).sum(axis=1).mean())


def test_bad_teachers_loss_is_its_formula(begin, arithmetic):
    begun = begin("bad_teacher", "--lambda", "2", "--temperature", "3")
    batch = begun.batch()
    losses = begun.method.loss(begun.model, batch)
    images, indices = batch.split(batch.images), batch.split(batch.indices)
    student = {name: arithmetic.logits(begun.model, part) for name, part in images.items()}
    remain = arithmetic.kl(arithmetic.logits(begun.before, images["remain"]), student["remain"], 3.0)
    random = arithmetic.array(begun.method.incompetent.logits(indices["forget"]))
    forget = arithmetic.kl(random, student["forget"], 3.0)
    assert losses["remain"].item() == pytest.approx(remain, rel=1e-4)
    assert losses["forget"].item() == pytest.approx(forget, rel=1e-4)
    assert losses["total"].item() == pytest.approx(2 * forget + remain, rel=1e-4)


def test_the_incompetent_teacher_is_untrained_and_follows_the_seed(begin):
    first, second = begin("bad_teacher"), begin("bad_teacher")
    indices = first.task.forget_indices
    assert torch.equal(first.method.incompetent.logits(indices), second.method.incompetent.logits(indices))
    cosine = torch.nn.functional.cosine_similarity(
        first.method.incompetent.embeddings(indices), first.before.embed(first.images.images[indices]).detach().float()
    )
    assert cosine.abs().max() < 0.9


def test_the_incompetent_teacher_is_near_uniform_and_tells_images_apart(begin):
    begun = begin("bad_teacher", classes=60)
    log_p = begun.method.incompetent.logits(begun.task.forget_indices).log_softmax(dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    assert (entropy > 0.95 * np.log(60)).all()
    assert (log_p - log_p.mean(dim=0)).abs().amax(dim=1).min() > 1e-3
    assert log_p.std(dim=1).min() > 0.1  # of images, a random model prefers some classes


def test_deletes_loss_is_the_divergence_from_what_else_the_teacher_saw(begin, arithmetic):
    begun = begin("delete")
    batch = begun.batch()
    assert set(batch.labels.tolist()) <= set(begun.task.forget)
    teacher = masked(arithmetic, arithmetic.logits(begun.before, batch.images), batch.labels.tolist())
    expected = kl(arithmetic, teacher, arithmetic.logits(begun.model, batch.images))
    assert expected > 0.1
    assert begun.method.loss(begun.model, batch)["total"].item() == pytest.approx(expected, rel=1e-4)


def test_spotters_loss_is_its_formula(begin, arithmetic):
    begun = begin("spotter", "--lambda", "0.6", "--dispersion", "0.5")
    batch = begun.batch()
    losses = begun.method.loss(begun.model, batch)
    near = begun.method.near[begun.method.teacher.rows[batch.indices]]
    gone = len(batch) * [list(begun.task.forget)]
    parts = []
    for images in (batch.images, near):
        teacher = masked(arithmetic, arithmetic.logits(begun.before, images), gone)
        parts.append(kl(arithmetic, teacher, arithmetic.logits(begun.model, images)))
    unit = arithmetic.embeddings(begun.model, batch.images)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    labels = batch.labels.tolist()
    same = [(i, j) for i in range(len(labels)) for j in range(len(labels)) if i != j and labels[i] == labels[j]]
    together = np.mean([unit[i] @ unit[j] for i, j in same])
    assert losses["forget"].item() == pytest.approx(parts[0], rel=1e-4)
    assert losses["near"].item() == pytest.approx(parts[1], rel=1e-4)
    assert losses["together"].item() == pytest.approx(together, rel=1e-5)
    expected = 0.6 * parts[0] + 0.4 * parts[1] + 0.5 * together
    assert losses["total"].item() == pytest.approx(expected, rel=1e-4)


def test_spotter_perturbs_as_many_images_at_once_as_a_step_has(make_recognizer, make_images, make_tasks, method_arguments):
    """Under autocast, and eagerly where steps are compiled."""
    images, hardware, seen = make_images(), Noting(torch.device("cpu"), bf16=True, compile=True), []

    class Noted(Spotter):
        def _perturbed(self, teacher, images, labels):
            seen.append((len(images), torch.is_autocast_enabled("cpu"), hardware.is_eager))
            return super()._perturbed(teacher, images, labels)

    method, (task, _) = Noted(method_arguments("spotter"), hardware), make_tasks(images, 2)
    method.begin_run(model := make_recognizer(), [task], images)
    method.begin_task(model, task, images, 1)
    whole, rest = divmod(len(task.forget_indices), 8)
    assert whole
    assert [size for size, *_ in seen] == [8] * whole + [rest] * (rest > 0)
    assert {(autocast, is_eager) for _, autocast, is_eager in seen} == {(True, True)}


class Noting(Hardware):
    """Knows whether it is within `eager`."""

    is_eager = False

    @contextmanager
    def eager(self):
        type(self).is_eager = True
        with super().eager():
            yield
        type(self).is_eager = False


def test_images_near_the_forgotten_are_within_epsilon_and_nearer_the_next_class(begin):
    begun = begin("spotter", "--epsilon", "0.03", moved=False)
    own = begun.images.images[begun.task.forget_indices]
    labels = begun.images.labels[begun.task.forget_indices]
    near = begun.method.near
    assert near.dtype == torch.uint8
    assert 0 < (near.int() - own.int()).abs().max() <= 8  # 0.03 · 255 = 7.65, rounded
    before, after = begun.before(own), begun.before(near)
    target = before.scatter(1, labels[:, None], -1e9).argmax(dim=1)
    log_p = [logits.log_softmax(dim=1).gather(1, target[:, None]).mean() for logits in (before, after)]
    assert log_p[1] > log_p[0]
