"""Unseen: targets computed once more in numpy, the loss, and what a task leaves."""

import numpy as np
import pytest
import torch
from scipy.linalg import eigh

from backbone.halves import mid_features
from backbone.lora import apply_adapters
from util.runtime.errors import UsageError


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def discriminants(kept: np.ndarray, labels: np.ndarray, shrinkage: float) -> np.ndarray:
    """Fisher's directions as columns, from the generalized eigenvalues of the scatter between and within the classes."""

    def covariance(x: np.ndarray) -> np.ndarray:
        s = np.cov(x.T, bias=True)
        return (1 - shrinkage) * s + shrinkage * np.trace(s) / len(s) * np.eye(len(s))

    within = sum((labels == c).mean() * covariance(kept[labels == c]) for c in np.unique(labels))
    vectors = eigh(covariance(kept) - within, within)[1][:, ::-1]
    return vectors[:, : len(np.unique(labels)) - 1]


def expected_targets(begun, arithmetic, person: float, likeness: float, sharpness: float) -> np.ndarray:
    task, model, images = begun.task, begun.before, begun.images
    f, r = task.forget_indices, task.remain_indices
    e_f, e_r = (unit(arithmetic.embeddings(model, images.images[i])) for i in (f, r))
    y_f, y_r = images.labels[f].numpy(), images.labels[r].numpy()
    means = np.stack([e_f[y_f == c].mean(axis=0) for c in np.unique(y_f)])
    inside = e_f @ np.linalg.pinv(means) @ means  # onto the span of the means
    erased = person * unit(inside) + np.sqrt(1 - person**2) * unit(e_f - inside)

    def features(indices) -> np.ndarray:
        tokens = mid_features(model.backbone, model.normalize(images.images[indices]), 1)
        return arithmetic.array(tokens[:, 1:].mean(dim=1))

    phi_f, phi_r = features(f), features(r)
    directions = discriminants(phi_r, y_r, 0.1)
    z_f, z_r = ((phi - phi_r.mean(axis=0)) @ directions for phi in (phi_f, phi_r))
    weights = arithmetic.softmax(unit(z_f) @ unit(z_r).T / (sharpness / np.sqrt(directions.shape[1])))
    return unit((1 - likeness) * erased + likeness * unit(weights @ e_r))


@pytest.mark.parametrize(
    ("person", "likeness", "sharpness"), [(0.4, 0.6, 0.5), (0.0, 0.0, 0.5), (1.0, 0.3, 2.0), (0.5, 1.0, 0.1)]
)
def test_targets_are_their_formula(begin, arithmetic, person, likeness, sharpness):
    options = ("--person", str(person), "--likeness", str(likeness), "--sharpness", str(sharpness))
    begun = begin("unseen", *options, moved=False)
    targets = arithmetic.array(begun.method.targets)
    expected = expected_targets(begun, arithmetic, person, likeness, sharpness)
    np.testing.assert_allclose(targets[begun.task.forget_indices], expected, atol=2e-5)
    kept = unit(arithmetic.embeddings(begun.before, begun.images.images[begun.task.remain_indices]))
    np.testing.assert_allclose(targets[begun.task.remain_indices], kept, atol=2e-6)


def test_the_loss_is_its_formula(begin, arithmetic):
    begun = begin("unseen", "--lambda-forget", "3", "--lambda-remain", "0.7", "--lambda", "0.2")
    batch = begun.batch()
    losses = begun.method.loss(begun.model, batch)
    images, labels, indices = map(batch.split, (batch.images, batch.labels, batch.indices))
    away = {}
    for stream, part in images.items():
        target = arithmetic.array(begun.method.targets[indices[stream]])
        away[stream] = 1 - (unit(arithmetic.embeddings(begun.model, part)) * target).sum(axis=1).mean()
    replay = arithmetic.cross_entropy(arithmetic.logits(begun.model, images["remain"]), labels["remain"])
    assert losses["forget"].item() == pytest.approx(away["forget"], rel=1e-5)
    assert losses["remain"].item() == pytest.approx(away["remain"], rel=1e-4)
    assert losses["replay"].item() == pytest.approx(replay, rel=1e-9)
    expected = 3 * away["forget"] + 0.7 * away["remain"] + 0.2 * replay
    assert losses["total"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("head", ["cosface", "softmax"])
def test_a_task_leaves_no_row_and_no_target_of_the_forgotten(begin, head):
    begun = begin("unseen", head=head)
    task, model = begun.task, begun.model
    embeddings = model.embed(begun.images.images)
    output = begun.method.end_task(model)
    for before, after in zip(begun.before.head.parameters(), model.head.parameters(), strict=True):
        assert (after[list(task.forget)] == 0).all()
        assert torch.equal(after[list(task.remain)], before[list(task.remain)])
    assert not hasattr(begun.method, "targets")
    assert begun.method.state_dict() == {}
    torch.testing.assert_close(model.embed(begun.images.images), embeddings)
    apply_adapters(begun.before.backbone, output.files["adapters"])
    torch.testing.assert_close(begun.before.embed(begun.images.images), embeddings)


def test_an_epoch_makes_two_passes_over_the_longer_stream(begin):
    begun = begin("unseen")
    passes = begun.method.passes(begun.task, 0, begun.method.epochs)
    assert [plan.steps for plan in passes] == 2 * [-(-len(begun.task.remain_indices) // 8)]


@pytest.mark.parametrize("few", [1, 2])
def test_too_few_kept_images_are_refused(begin, few, make_images, make_tasks, make_recognizer, method_arguments, cpu):
    from dataclasses import replace

    from methods import METHODS

    images = make_images()
    (task, *_) = make_tasks(images, 2)
    one_each = torch.stack([task.remain_indices[images.labels[task.remain_indices] == c][0] for c in task.remain])
    one_class = task.remain_indices[images.labels[task.remain_indices] == task.remain[0]]
    task = replace(task, remain_indices=one_each if few == 1 else one_class)
    method = METHODS["unseen"](method_arguments("unseen"), cpu)
    with pytest.raises(UsageError, match="two remaining classes"):
        method.begin_run(make_recognizer(), [task], images)
