"""Linear CKA against centred Gram matrices."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.util.audit.conftest import array, make_up
from util.audit.cka import CKA, linear_cka
from util.audit.statistics import value_of

DRAW = torch.Generator().manual_seed


def by_gram(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) of linear kernels."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, kernel = centre @ (x @ x.T) @ centre, centre @ (y @ y.T) @ centre
    return np.trace(k @ kernel) / np.sqrt(np.trace(k @ k) * np.trace(kernel @ kernel))


@pytest.mark.parametrize("dims", [(5, 5), (3, 40), (64, 7)])
def test_it_is_the_alignment_of_centred_kernels(dims):
    x, y = (5 + torch.randn(20, dim, generator=DRAW(dim)) for dim in dims)
    y = y + x.mean(dim=1, keepdim=True)
    assert linear_cka(x, y) == pytest.approx(by_gram(array(x), array(y)), abs=1e-9)
    assert linear_cka(y, x) == pytest.approx(linear_cka(x, y))


def test_rotated_scaled_and_moved_embeddings_are_the_same():
    x = torch.randn(30, 8, generator=DRAW(0))
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, generator=DRAW(1)))
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, -3 * x @ rotation + 7) == pytest.approx(1)
    assert linear_cka(x, x * torch.logspace(-2, 0, 8)) < 0.99


def test_one_point_is_like_nothing():
    x = torch.randn(30, 8, generator=DRAW(0))
    assert linear_cka(x, torch.full((30, 8), 0.5)) == 0
    assert linear_cka(torch.full((30, 8), 0.5), torch.full((30, 8), 0.5)) == 0


def test_the_figure_is_the_mean_likeness_to_the_other_references():
    audited, task = make_up()
    for number, reference in enumerate(task.references):
        reference.test_embeddings = (
            torch.randn(audited.test_embeddings.shape, generator=DRAW(number)) + 0.2 * number * audited.test_embeddings
        )
    faces = [array(model.test_embeddings)[task.forget_test] for model in (audited, *task.references)]
    measurement = CKA().measure(audited, replace(task, before=task.references[2]))
    expected = [by_gram(faces[0], other) for other in faces[1:]]
    assert value_of(measurement.statistics["cka"], 3) == pytest.approx(np.mean(expected))
    assert measurement.curves["cka"]["before"] == round(expected[2], 4)
    of_itself = CKA().measure(task.references[0], task)
    expected = [by_gram(faces[1], faces[i]) for i in (2, 3)]
    assert value_of(of_itself.statistics["cka"], 3) == pytest.approx(np.mean(expected))
    assert of_itself.curves["cka"]["references"] == round(np.mean(expected), 4)
