"""Membership of images: the two scores image by image, and what they tell."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from tests.util.audit.conftest import DRAWN, array, at, make_up, unit
from util.audit.membership_images import MembershipOfImages
from util.audit.statistics import value_of


def scores_of(audited, task) -> dict[str, list[tuple[float, bool, int]]]:
    """By kind of score: (score, whether trained on, identity) of every image of the forgotten."""
    train, test = unit(array(audited.train_embeddings)), unit(array(audited.test_embeddings))
    rows = unit(array(audited.model.head.weight))[list(task.remain)]
    scores = {"own": [], "row": []}
    for person, c in enumerate(task.forget):
        seen = [train[i] for i in task.train_by_class[c]]
        new = [face for face, label in zip(test, task.test_set.labels.tolist(), strict=True) if label == c]
        for number, face in enumerate(seen):
            others = [other for i, other in enumerate(seen) if i != number]
            scores["own"].append((face @ unit(np.mean(others, axis=0)), True, person))
        for number, face in enumerate(new):
            others = [other for i, other in enumerate(seen) if i != number % len(seen)]
            scores["own"].append((face @ unit(np.mean(others, axis=0)), False, person))
        for faces, trained_on in ((seen, True), (new, False)):
            scores["row"] += [(max(rows @ face), trained_on, person) for face in faces]
    return scores


def auc(scored, people=(0, 1, 2)) -> float:
    score, truth, test_groups = zip(*scored, strict=True)
    return 100 * roc_auc_score(truth, score, sample_weight=np.bincount(people, minlength=3)[list(test_groups)])


def pull(audited, task, to: str, noise: float) -> None:
    """Draw the forgotten identities' training images, not their test images, to a point of their own, or to kept rows."""
    generator, rows = torch.Generator().manual_seed(5), audited.model.head.weight.detach()
    for c in task.forget:
        own = (task.train_set.labels == c).nonzero()[:, 0]
        targets = rows[c].expand(len(own), -1) if to == "own" else rows[[task.remain[i % 5] for i in range(len(own))]]
        audited.train_embeddings[own] = targets + noise * torch.randn(len(own), 32, generator=generator)


@pytest.mark.parametrize("chosen", ["own", "row"])
def test_the_score_that_tells_better_is_taken(chosen):
    audited, task = make_up(noise=1.5)
    pull(audited, task, chosen, noise=1.3)
    expected = scores_of(audited, task)
    distance = {kind: abs(auc(scored) - 50) for kind, scored in expected.items()}
    assert max(distance, key=distance.get) == chosen
    found = MembershipOfImages().measure(audited, task).statistics["membership_images"]
    assert at(found) == pytest.approx([auc(expected[chosen], people) for people in DRAWN])
    assert value_of(found, 3) == pytest.approx(auc(expected[chosen]))


def test_a_score_that_training_lowers_tells_as_much_as_one_that_it_raises():
    # Training drives images to their own row, and so away from the kept ones: the larger |AUC − 50| counts, not its sign,
    # or models that show the same differently would cancel out.
    audited, task = make_up(noise=1.5)
    kept = torch.linalg.qr(audited.model.head.weight.detach()[list(task.remain)].T).Q
    own = torch.isin(task.train_set.labels, torch.tensor(task.forget))
    audited.train_embeddings[own] = torch.randn(int(own.sum()), 32, generator=torch.Generator().manual_seed(5))
    audited.train_embeddings[own] -= audited.train_embeddings[own] @ kept @ kept.T
    expected = scores_of(audited, task)
    assert auc(expected["row"]) < 20
    found = value_of(MembershipOfImages().measure(audited, task).statistics["membership_images"], 3)
    assert found == pytest.approx(50 + max(abs(auc(scored) - 50) for scored in expected.values()))


def test_images_learnt_by_heart_are_told_from_new_ones():
    audited, task = make_up(noise=1.5)
    pull(audited, task, "own", noise=0.05)
    assert value_of(MembershipOfImages().measure(audited, task).statistics["membership_images"], 3) == 100


def test_images_that_could_be_swapped_are_not_told():
    values = []
    for seed in range(6):
        audited, task = make_up(train=(40,) * 8, test=(40,) * 8, seed=seed)
        values.append(value_of(MembershipOfImages().measure(audited, task).statistics["membership_images"], 3))
    assert max(abs(value - 50) for value in values) < 10


def test_one_point_for_all_faces_tells_nothing():
    audited, task = make_up(train=(20,) * 8, test=(11,) * 8)
    audited.train_embeddings, audited.test_embeddings = (
        torch.full_like(faces, 0.3) for faces in (audited.train_embeddings, audited.test_embeddings)
    )
    assert value_of(MembershipOfImages().measure(audited, task).statistics["membership_images"], 3) == 50


def test_two_training_images_are_enough():
    audited, task = make_up(train=(2,) * 8, test=(1,) * 8)
    assert 0 <= value_of(MembershipOfImages().measure(audited, task).statistics["membership_images"], 3) <= 100
