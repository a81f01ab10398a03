"""The field's verification protocol, against plain loops and scikit-learn's folds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold

from data.image_set import ImageSet
from data.pairs import FacePairs
from util.evaluation.verification import pair_benchmark
from util.runtime.errors import RunError


@pytest.fixture
def pairs(make_images):
    images = make_images(6, 40)
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(240, (400, 2), generator=generator)
    pairs[::2, 1] = pairs[::2, 0] // 40 * 40 + torch.randint(40, (200,), generator=generator)  # of one class
    same = images.labels[pairs[:, 0]] == images.labels[pairs[:, 1]]
    return FacePairs(ImageSet("x", images.images, images.labels, ()), pairs, same, torch.arange(400) // 40)


def test_against_the_protocol_spelt_out(pairs, make_recognizer, cpu):
    model = make_recognizer().train()
    (found,) = pair_benchmark(model, {"lfw": pairs}, cpu).values()
    assert model.training
    model.eval()
    with torch.no_grad():
        embeddings = model.embed(pairs.images.images) + model.embed(pairs.images.images.flip(3))
    unit = (embeddings / embeddings.norm(dim=1, keepdim=True)).double().numpy()
    first, second = unit[pairs.pairs[:, 0]], unit[pairs.pairs[:, 1]]
    distances, same = ((first - second) ** 2).sum(axis=1), pairs.same.numpy()
    accuracies = []
    for others, held in KFold(10).split(distances):
        best, threshold = -1, None
        for candidate in np.arange(0, 4, 0.01):
            right = ((distances[others] < candidate) == same[others]).sum()
            best, threshold = max((best, threshold), (right, candidate), key=lambda one: one[0])
        accuracies.append(100 * ((distances[held] < threshold) == same[held]).mean())
    assert found["accuracy"] == pytest.approx(np.mean(accuracies))
    assert found["accuracy_std"] == pytest.approx(np.std(accuracies))
    assert 60 < found["accuracy"] < 100 and found["accuracy_std"] > 0
    assert found["auc"] == pytest.approx(100 * roc_auc_score(same, -distances), abs=1e-3)
    assert (found["genuine_pairs"], found["impostor_pairs"]) == (same.sum(), (~same).sum())
    assert found["tar_at_far_0.001"] is found["tar_at_far_0.0001"] is None  # of fewer than 1,000 impostors


def test_rates_where_there_are_enough_impostors(pairs, make_recognizer, cpu):
    other = pairs.pairs[~pairs.same]
    many = torch.cat([pairs.pairs[pairs.same], *[other] * (1000 // len(other) + 1)])
    same = torch.arange(len(many)) < pairs.same.sum()
    more = replace(pairs, pairs=many, same=same, folds=torch.arange(len(many)) % 10)
    found = pair_benchmark(make_recognizer(), {"x": more}, cpu)["x"]
    assert 0 <= found["tar_at_far_0.001"] < 100 and found["tar_at_far_0.0001"] is None


def test_embeddings_that_are_not_finite(pairs, make_recognizer, cpu):
    model = make_recognizer()
    model.backbone.norm.weight.data += 3e38
    with pytest.raises(RunError, match="embeddings of the images of lfw are not finite"):
        pair_benchmark(model, {"lfw": pairs}, cpu)
