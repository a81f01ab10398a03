"""The marker: forgotten people against strangers, with whole identities held out."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.util.audit.conftest import array, make_up, unit
from util.audit.membership_person import MembershipOfPerson
from util.audit.statistics import value_of

MANY = {"forget": range(10), "train": (5,) * 40, "test": (8,) * 40, "stranger_set": (8,) * 10}


def value(audited, task) -> float:
    return value_of(MembershipOfPerson().measure(audited, task).statistics["membership_person"], len(task.forget))


def swappable(seed: int, within: float):
    """Forgotten people and strangers alike: each a point of its own, with so much noise within."""
    audited, task = make_up(**MANY, seed=seed)
    generator = torch.Generator().manual_seed(100 + seed)
    everybody = torch.cat([task.forget_labels, 10 + task.stranger_set.labels])
    points = torch.randn(20, 32, generator=generator) * (0.5 + torch.rand(20, 1, generator=generator))
    faces = points[everybody] + within * torch.randn(len(everybody), 32, generator=generator)
    audited.test_embeddings[task.forget_test], audited.stranger_embeddings = faces[:80], faces[80:]
    return audited, task


def test_strangers_with_longer_embeddings_are_told():
    audited, task = swappable(0, 1.0)
    audited.test_embeddings[task.forget_test] *= 10 / audited.test_embeddings[task.forget_test].norm(dim=1, keepdim=True)
    audited.stranger_embeddings = audited.stranger_embeddings * (20 / audited.stranger_embeddings.norm(dim=1, keepdim=True))
    assert value(audited, task) > 99.9


def test_people_of_whom_a_kept_row_remembers_more_are_told():
    audited, task = swappable(0, 1.0)
    audited.test_embeddings[task.forget_test] += 2 * audited.model.head.weight.detach()[10 + task.forget_labels]
    assert value(audited, task) > 95


def test_people_who_could_be_swapped_are_not_told():
    values = [value(*swappable(seed, within=1.0)) for seed in range(5)]
    assert np.mean(values) == pytest.approx(50, abs=10)


def test_what_tells_one_person_from_another_does_not_tell_forgotten_people_from_strangers():
    values, leaking = [], []
    for seed in range(12):
        audited, task = swappable(seed, within=0.02)
        values.append(value(audited, task))
        faces = torch.cat([audited.test_embeddings[task.forget_test], audited.stranger_embeddings])
        features = MembershipOfPerson()._features(audited, task, faces)
        truth = np.arange(160) < 80
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        scores = cross_val_predict(probe, features.numpy(), truth, cv=5, method="decision_function")
        leaking.append(100 * (scores[truth][:, None] > scores[~truth]).mean())
    assert np.mean(leaking) > 80, "whoever has images on both sides is known again"
    assert np.mean(values) == pytest.approx(50, abs=10)


def test_features_are_sorted_cosines_length_and_entropy():
    audited, task = make_up(noise=1.5)
    rows, faces = array(audited.model.head.weight)[list(task.remain)], array(audited.stranger_embeddings)
    found = MembershipOfPerson()._features(audited, task, audited.stranger_embeddings).numpy()
    for face, features in zip(faces, found, strict=True):
        cosines = unit(rows) @ unit(face)
        p = np.exp(64 * cosines) / np.exp(64 * cosines).sum()
        expected = [*sorted(cosines), np.linalg.norm(face), -(p * np.log(np.maximum(p, 1e-300))).sum()]
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_too_few_people_are_a_reason():
    assert MembershipOfPerson().measure(*make_up(stranger_set=None)).statistics == {"membership_person": "needs --strangers"}
    for options in ({"forget": range(4)}, {"forget": range(5), "stranger_set": (3,) * 4}):
        (reason,) = MembershipOfPerson().measure(*make_up(**options)).statistics.values()
        assert reason == "needs 5 forgotten and 5 strangers"
    assert 0 <= value(*make_up(forget=range(5), stranger_set=(1,) * 5)) <= 100
