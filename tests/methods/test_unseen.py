"""Unseen: targets computed once more in numpy, the loss, and what a task leaves."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import eigh
from torch.utils._python_dispatch import TorchDispatchMode

from backbone.blocks import block_outputs
from backbone.lora import apply_adapters
from methods import METHODS, unseen
from methods.unseen import those_alike, without_person
from tests.methods.conftest import arguments
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


def ridge(x: np.ndarray, y: np.ndarray, penalty: float, new: np.ndarray) -> np.ndarray:
    """Dual ridge regression with an unpenalized intercept."""
    centre, mean = x.mean(axis=0), y.mean(axis=0)
    kernel = (x - centre) @ (x - centre).T + penalty * np.eye(len(x))
    return (new - centre) @ (x - centre).T @ np.linalg.solve(kernel, y - mean) + mean


def as_strangers(kept: np.ndarray, places: np.ndarray, people: np.ndarray, forgotten: np.ndarray) -> np.ndarray:
    """Ridge regression to where the kept people lie."""
    means = {person: places[people == person].mean(axis=0) for person in np.unique(people)}
    own = np.stack([means[person] for person in people]) - np.mean([*means.values()], axis=0)
    centre, scale = kept.mean(axis=0), kept.std(axis=0)
    return ridge((kept - centre) / scale, own, len(kept) / 170, (forgotten - centre) / scale)


def coherence(embeddings: np.ndarray, labels: np.ndarray) -> float:
    """The mean cosine of two photos of a person, over people."""
    similarity = unit(embeddings) @ unit(embeddings).T
    pairs = [similarity[np.ix_(labels == c, labels == c)] for c in np.unique(labels)]
    return np.mean([(p.sum() - len(p)) / (len(p) * (len(p) - 1)) for p in pairs if len(p) > 1] or [0])


def expected_targets(begun, arithmetic, likeness: float, sharpness: float, excess: float = 0.0) -> np.ndarray:
    task, model, images = begun.task, begun.before, begun.images
    f, r = task.forget_indices, task.remain_indices
    e_f, e_r = (unit(arithmetic.embeddings(model, images.images[i])) for i in (f, r))
    y_f, y_r = images.labels[f].numpy(), images.labels[r].numpy()
    means = np.stack([e_f[y_f == c].mean(axis=0) for c in np.unique(y_f)])
    inside = e_f @ np.linalg.pinv(means) @ means  # onto the span of the means

    def features(indices) -> np.ndarray:
        """(N, side, side, dim), of the one block of the first quarter and of the first half alike."""
        outputs = block_outputs(model.backbone, model.normalize(images.images[indices]), ["blocks.0"])
        tokens = arithmetic.array(outputs[0][:, 1:])
        side = int(tokens.shape[1] ** 0.5)
        return tokens.reshape(len(tokens), side, side, -1)

    phi_f, phi_r = (features(i).mean(axis=(1, 2)) for i in (f, r))
    directions = discriminants(phi_r, y_r, 0.1)
    z_f, z_r = ((phi - phi_r.mean(axis=0)) @ directions for phi in (phi_f, phi_r))
    weights = arithmetic.softmax(unit(z_f) @ unit(z_r).T / (sharpness / np.sqrt(directions.shape[1])))
    near = unit(weights @ e_r)

    def quadrants(indices) -> np.ndarray:
        halves = [part for rows in np.split(features(indices), 2, axis=1) for part in np.split(rows, 2, axis=2)]
        return np.concatenate([part.mean(axis=(1, 2)) for part in halves], axis=1)

    early_f, early_r = quadrants(f), quadrants(r)
    strangers = unit(as_strangers(early_r, e_r, y_r, early_f))
    candidates = []
    for share in np.arange(20, -1, -1) / 20:
        anew = share * strangers + np.sqrt(1 - share**2) * unit(e_f - inside)
        candidates.append(unit((1 - likeness) * anew + likeness * near))
    wanted = coherence(strangers, y_f) - excess
    return min(candidates, key=lambda targets: abs(coherence(targets, y_f) - wanted))


@pytest.mark.parametrize(("likeness", "sharpness"), [(0.45, 0.5), (0.0, 0.5), (0.3, 2.0), (1.0, 0.1)])
def test_targets_are_their_formula(begin, arithmetic, likeness, sharpness):
    begun = begin("unseen", "--likeness", str(likeness), "--sharpness", str(sharpness), moved=False)
    targets = arithmetic.array(begun.method.targets)
    expected = expected_targets(begun, arithmetic, likeness, sharpness)
    np.testing.assert_allclose(targets[begun.task.forget_indices], expected, atol=2e-5)
    kept = unit(arithmetic.embeddings(begun.before, begun.images.images[begun.task.remain_indices]))
    np.testing.assert_allclose(targets[begun.task.remain_indices], kept, atol=2e-6)


def test_after_an_epoch_the_targets_make_up_for_half_of_what_it_left_too_alike(begin, arithmetic):
    begun = begin("unseen", "--likeness", "0.3")
    method, forget = begun.method, begun.task.forget_indices
    labels = begun.images.labels[forget].numpy()
    reached = arithmetic.embeddings(begun.model, begun.images.images[forget])
    excess = 0.5 * (coherence(reached, labels) - coherence(arithmetic.array(method.targets[forget]), labels))
    method.end_epoch(begun.model, 0)
    expected = expected_targets(begun, arithmetic, 0.3, 0.5, excess)
    np.testing.assert_allclose(arithmetic.array(method.targets[forget]), expected, atol=2e-5)

    resumed = begin("unseen", "--likeness", "0.3").method
    resumed.load_state_dict(method.state_dict())
    assert torch.equal(resumed.targets, method.targets)


@pytest.mark.parametrize(
    ("people", "share"), [([0, 1, 2, 3, 4] * 8, 0.4), ([0] * 40, 0.4), (range(40), 1)], ids=["five", "one", "a photo each"]
)
def test_the_share_is_that_of_targets_as_alike_as_strangers(begin, people, share):
    method = begin("unseen", "--likeness", "0").method
    generator = torch.Generator().manual_seed(0)
    person = F.normalize(torch.eye(5).repeat(8, 4))
    rest = F.normalize(torch.randn(40, 20, generator=generator))
    alike = F.normalize(0.4 * person + 0.84**0.5 * rest)
    method.people, method.targets = torch.tensor([*people]), torch.zeros(40, 20)
    method.task = SimpleNamespace(forget_indices=torch.arange(40))
    method.parts = alike, rest, rest  # with s of 1 they are the targets
    method.wanted = coherence(alike.numpy(), method.people.numpy())
    method._aim(0.0)
    assert method.share == 1
    method.parts = person, rest, rest
    method._aim(0.0)
    assert method.share == pytest.approx(share)


@pytest.fixture
def strangers(make_images, monkeypatch):
    images = make_images(num_classes=5, seed=9)
    monkeypatch.setattr(METHODS["unseen"], "strangers", images)
    return images


def test_strangers_say_how_alike_targets_are(begin, arithmetic, strangers):
    begun = begin("unseen", moved=False)
    expected = coherence(arithmetic.embeddings(begun.before, strangers.images), strangers.labels.numpy())
    assert begun.method.wanted == pytest.approx(expected, abs=1e-5)


def test_people_no_more_alike_than_strangers_are_no_knowledge_of_the_network(begin, strangers, monkeypatch, capsys):
    for known, warned in ((0.4, True), (0.6, False)):
        monkeypatch.setattr("methods.unseen.coherence", lambda _, labels, k=known: 0.5 if labels is strangers.labels else k)
        begin("unseen", depth=4, moved=False)
        assert ("may never have learned these people" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(("wanted", "block"), [(0.0, 0), (0.5, 2), (1.0, 3)])
def test_strangers_say_how_deep_a_strangers_eye_looks(begin, strangers, monkeypatch, wanted, block):
    looked, alike, made, fitted = [], [0.1, 0.4, 0.6, 0.9], {}, unseen.as_strangers

    def features(self, model, seen, name, size):
        looked.append(int(name[-1]))
        return np.random.default_rng(looked[-1]).normal(size=(len(seen), 4))

    def regression(*inputs):
        made[looked[-1]] = fitted(*inputs)
        return made[looked[-1]]

    def alike_of(_, labels):
        return wanted if labels is strangers.labels else alike[looked[-1]]

    monkeypatch.setattr(METHODS["unseen"], "_features", features)
    monkeypatch.setattr("methods.unseen.as_strangers", regression)
    monkeypatch.setattr("methods.unseen.coherence", alike_of)
    method = begin("unseen", depth=4, moved=False).method
    torch.testing.assert_close(method.parts[0], F.normalize(made[block]).to(method.parts[0]))
    assert len(looked) == len({*looked[1:]}) + 1  # the first look is for those alike; no block is read twice


def test_strangers_have_two_photos_and_are_in_no_training_set(make_images, make_recognizer, make_tasks, cpu, tmp_path):
    train_set, model = make_images(), make_recognizer()
    for person, photos in (("new", 1), (train_set.classes[0], 2)):
        (tmp_path / person).mkdir()
        for number in range(photos):
            Image.new("RGB", (8, 8)).save(tmp_path / person / f"{number}.png")
        method = METHODS["unseen"](
            arguments("unseen", "--strangers", str(tmp_path), "--cache-dir", str(tmp_path / "c")), cpu
        )
        with pytest.raises(
            UsageError, match="nobody there has two photos" if person == "new" else "1 identities of the training set"
        ):
            method.check(model, make_tasks(train_set, 2), train_set)


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
    assert not hasattr(begun.method, "parts")
    assert begun.method.state_dict() == {}
    torch.testing.assert_close(model.embed(begun.images.images), embeddings)
    apply_adapters(begun.before.backbone, output.files["adapters"])
    torch.testing.assert_close(begun.before.embed(begun.images.images), embeddings)


def photos(people: int, each: int, dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    person = torch.randn(people, 1, dim, generator=generator)
    unit = F.normalize(person + 0.7 * torch.randn(people, each, dim, generator=generator), dim=-1)
    return unit.flatten(0, 1), torch.arange(people).repeat_interleave(each)


def like_rounding(unit: torch.Tensor) -> torch.Tensor:
    return unit + 1e-7 * torch.randn(unit.shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("people", [16, 40])
def test_as_many_people_as_dimensions_leave_what_a_photo_shows_beside_its_own_person(people):
    unit, labels = photos(people, each=4)
    rest = without_person(unit, labels)
    means = F.normalize(torch.stack([unit[labels == c].mean(dim=0) for c in range(people)]))[labels]
    expected = F.normalize(unit - (unit * means).sum(dim=1, keepdim=True) * means)
    torch.testing.assert_close(rest, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(without_person(like_rounding(unit), labels), rest, atol=1e-4, rtol=0)


def test_people_who_lie_in_one_direction_span_one():
    unit, labels = photos(3, each=4)
    unit, labels = torch.cat([unit, unit[labels == 1]]), torch.cat([labels, torch.full((4,), 3)])  # twins
    rest = without_person(unit, labels)
    torch.testing.assert_close(rest[:12], without_person(unit[:12], labels[:12]), atol=1e-5, rtol=0)
    torch.testing.assert_close(without_person(like_rounding(unit), labels), rest, atol=1e-4, rtol=0)


def test_an_only_photo_shows_nothing_beside_its_person():
    unit, labels = photos(3, each=4)
    rest = without_person(unit[:9], labels[:9])
    assert not rest[8].any()
    torch.testing.assert_close(rest[:8].norm(dim=1), torch.ones(8))


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made inside."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_forgotten_times_kept_is_never_held_at_once():
    forgotten, kept, labels = 2000, 300, torch.arange(300) % 5
    features = np.random.default_rng(0).normal(size=(forgotten + kept, 6))
    embeddings = F.normalize(torch.randn(kept, 4, generator=torch.Generator().manual_seed(0)))
    with Largest() as largest:
        those_alike(features, embeddings, labels, 0.5)
    assert 0 < largest.elements < forgotten * kept / 5


@pytest.mark.parametrize(("visits", "passes"), [(0, 2), (4, 2), (5, 3), (20, 10)])
def test_an_epoch_makes_two_passes_over_the_longer_stream_or_shows_each_forgotten_image_often(begin, visits, passes):
    begun = begin("unseen", "--visits", str(visits))
    assert (len(begun.task.forget_indices), len(begun.task.remain_indices)) == (8, 16)
    plans = begun.method.passes(begun.task, 0, begun.method.epochs)
    assert [plan.steps for plan in plans] == passes * [2]


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
        method.check(make_recognizer(), [task], images)
