import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from util.evaluation.verification import draw_pairs, verify

LABELS = torch.arange(20).repeat_interleave(10)


@pytest.mark.parametrize("count", [50, 800, 100_000])
def test_pairs_are_what_they_are_called_and_none_is_drawn_twice(count):
    genuine, impostor = draw_pairs(LABELS, count, seed=0)
    assert len(genuine) == min(count, 20 * 45)
    assert len(impostor) == min(count, 200 * 199 // 2 - 20 * 45)
    assert bool((LABELS[genuine[:, 0]] == LABELS[genuine[:, 1]]).all())
    assert bool((LABELS[impostor[:, 0]] != LABELS[impostor[:, 1]]).all())
    for pairs in (genuine, impostor):
        assert bool((pairs[:, 0] < pairs[:, 1]).all())
        assert len(torch.unique(pairs, dim=0)) == len(pairs)
    assert torch.equal(draw_pairs(LABELS, count, seed=0)[1], impostor)


def test_rates_against_counting():
    torch.manual_seed(0)
    embeddings = torch.nn.functional.one_hot(LABELS).float() + 0.15 * torch.randn(200, 20)
    found = verify(embeddings, LABELS, 100_000, seed=0)
    unit = (embeddings / embeddings.norm(dim=1, keepdim=True)).numpy()
    i, j = np.triu_indices(200, k=1)
    scores, same = (unit[i] * unit[j]).sum(axis=1), (LABELS[i] == LABELS[j]).numpy()
    assert found["auc"] == pytest.approx(100 * roc_auc_score(same, scores), abs=1e-4)
    for rate in (1e-2, 1e-3):
        # The lowest threshold that accepts at most this share of the impostors.
        impostors = np.sort(scores[~same])[::-1]
        threshold = impostors[int(rate * len(impostors))]
        expected = 100 * (scores[same] > threshold).mean()
        assert found[f"tar_at_far_{rate:g}"] == pytest.approx(expected, abs=0.2)
    assert 50 < found["tar_at_far_0.01"] < 100


def test_what_too_few_pairs_cannot_tell_is_none():
    embeddings = torch.randn(6, 4)
    found = verify(embeddings, torch.tensor([0, 0, 0, 1, 1, 1]), 100, seed=0)
    assert found["tar_at_far_0.01"] is None
    assert found["auc"] is not None
    assert verify(embeddings, torch.arange(6), 100, seed=0) is None
    assert verify(embeddings, torch.zeros(6, dtype=torch.int64), 100, seed=0) is None


@pytest.mark.parametrize("labels", [[], [0], [0, 0], [0, 1]])
def test_groups_of_hardly_an_image_have_no_pairs(labels):
    assert verify(torch.randn(len(labels), 4), torch.tensor(labels, dtype=torch.int64), 100, seed=0) is None
