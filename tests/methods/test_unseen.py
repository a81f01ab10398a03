"""Unseen: targets computed once more in numpy, the loss, and what a task leaves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from backbone.lora import apply_adapters
from methods import METHODS, unseen


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def fields(tokens: np.ndarray) -> np.ndarray:
    """(N, height, width, dim) → (N, dim * 9): means over 3×3 fields, which overlap where 3 does not divide the side."""
    ends = [[(i * side // 3, -(-(i + 1) * side // 3)) for i in range(3)] for side in tokens.shape[1:3]]
    means = [[tokens[:, y:y_, x:x_].mean(axis=(1, 2)) for x, x_ in ends[1]] for y, y_ in ends[0]]
    return np.stack([np.stack(row, axis=-1) for row in means], axis=-2).reshape(len(tokens), -1)


def ridge(features: np.ndarray, answers: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Ridge regression whose penalty makes the least error when each image in turn is left out."""
    mean, spread = features.mean(axis=0), features.std(axis=0)
    spread[spread == 0] = 1
    x, x_new = (features - mean) / spread, (new - mean) / spread
    centre = answers.mean(axis=0)
    errors = []
    for penalty in 10.0 ** np.arange(-1, 5.5, 0.5):
        inverse = np.linalg.inv(x @ x.T + penalty * np.eye(len(x)))
        hat = x @ x.T @ inverse + 1 / len(x)
        left_out = (answers - centre - x @ x.T @ inverse @ (answers - centre)) / (1 - np.diag(hat))[:, None]
        errors.append(((left_out**2).mean(), inverse))
    best = min(errors, key=lambda pair: pair[0])[1]
    return centre + x_new @ x.T @ best @ (answers - centre)


def expected_targets(begun, arithmetic, pull: float, likeness: float, person: float) -> np.ndarray:
    task, model, images = begun.task, begun.before, begun.images
    f, r = task.forget_indices, task.remain_indices
    e_f, e_r = (unit(arithmetic.embeddings(model, images.images[i])) for i in (f, r))
    y_f = images.labels[f].numpy()

    def features(indices) -> np.ndarray:
        backbone, x = model.backbone, model.normalize(images.images[indices])
        tokens = backbone.blocks[0](backbone._pos_embed(backbone.patch_embed(x)))[:, backbone.num_prefix_tokens :]
        return fields(arithmetic.array(tokens).reshape(len(x), *backbone.patch_embed.grid_size, -1))

    found = unit(ridge(features(r), e_r, features(f)))
    place = unit(found + pull * unit(arithmetic.softmax(found @ e_r.T / 0.1) @ e_r))
    means = np.stack([e_f[y_f == c].mean(axis=0) for c in np.unique(y_f)])
    inside = e_f @ np.linalg.pinv(means) @ means  # onto the span of the means
    old = person * unit(inside) + np.sqrt(1 - person**2) * unit(e_f - inside)
    return unit(likeness * place + (1 - likeness) * old)


@pytest.mark.parametrize(
    ("pull", "likeness", "person"), [(0.4, 0.7, 0.4), (0.0, 1.0, 0.5), (2.0, 0.5, 0.0), (0.5, 0.0, 1.0)]
)
def test_targets_are_their_formula(begin, arithmetic, pull, likeness, person):
    options = ("--pull", str(pull), "--likeness", str(likeness), "--person", str(person))
    begun = begin("unseen", *options, moved=False)
    targets = arithmetic.array(begun.method.targets)
    expected = expected_targets(begun, arithmetic, pull, likeness, person)
    np.testing.assert_allclose(targets[begun.task.forget_indices], expected, atol=2e-5)
    kept = unit(arithmetic.embeddings(begun.before, begun.images.images[begun.task.remain_indices]))
    np.testing.assert_allclose(targets[begun.task.remain_indices], kept, atol=2e-6)


def test_of_very_many_kept_images_every_nth_is_asked(begin, arithmetic, monkeypatch):
    monkeypatch.setattr(unseen, "AT_MOST", 8)
    begun = begin("unseen", "--pull", "0", "--likeness", "1", moved=False)
    targets = begun.method.targets[begun.task.forget_indices]
    assert len(begun.task.remain_indices) > 8
    monkeypatch.setattr(unseen, "AT_MOST", 10_000)
    assert not torch.allclose(
        begin("unseen", "--pull", "0", "--likeness", "1", moved=False).method.targets[begun.task.forget_indices], targets
    )


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


def test_two_kept_images_will_do(begin, make_images, make_tasks, make_recognizer, method_arguments, cpu):
    images = make_images()
    (task, *_) = make_tasks(images, 2)
    task = replace(task, remain_indices=task.remain_indices[:2])
    method, model = METHODS["unseen"](method_arguments("unseen"), cpu), make_recognizer()
    method.begin_run(model, [task], images)
    method.begin_task(model, task, images, 1)
    assert method.targets.isfinite().all()
