"""Linear probes of every layer."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.util.audit.conftest import DRAWN, at, make_up, share
from util.audit import probe
from util.audit.probe import Probe, fit_probe, probe_hits

DRAW = torch.Generator().manual_seed


def with_layers(audited, task, *layers: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Let the blocks leave these tokens of the training and the test images."""
    audited.asked = {}

    def tokens(images, positions):
        audited.asked[images] = positions
        return torch.stack([pair[images is task.test_set][positions] for pair in layers])

    audited.tokens = tokens


def noise_like(audited, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(
        torch.randn(faces.shape, generator=DRAW(seed + i))
        for i, faces in enumerate((audited.train_embeddings, audited.test_embeddings))
    )


def test_layers_that_tell_people_apart_are_read_and_others_are_not():
    audited, task = make_up(noise=0.05)
    with_layers(audited, task, noise_like(audited, 3), (audited.train_embeddings, audited.test_embeddings))
    measurement = Probe().measure(audited, task)
    assert [*measurement.statistics] == ["probe_embedding", "probe_block_0", "probe_block_1"]
    found = {key: at(statistic) for key, statistic in measurement.statistics.items()}
    assert (found["probe_embedding"] == 100).all()
    assert (found["probe_block_1"] == 100).all()
    assert found["probe_block_0"][0] < 40
    curve = measurement.curves["probe"]
    assert curve["layers"] == ["block 0", "block 1", "embedding"]
    assert curve["all"] == [round(found["probe_block_0"][0], 2), 100, 100]
    assert curve["forgotten"][1:] == [100, 100]


def hits_of(audited, task) -> tuple[np.ndarray, np.ndarray]:
    return probe_hits(
        fit_probe(audited.train_embeddings, task.train_set.labels), audited.test_embeddings[task.forget_test], task
    )


def test_a_share_counts_images_and_is_not_smaller_among_fewer_people():
    audited, task = make_up(noise=2.5)
    order = np.concatenate(task.train_by_class)
    fitted = fit_probe(audited.train_embeddings[order], task.train_set.labels[order])
    among_all, among_forgotten = probe_hits(fitted, audited.test_embeddings[task.forget_test], task)
    assert (among_forgotten >= among_all).all()
    assert 0.1 < among_all.mean() < among_forgotten.mean() < 1
    with_layers(audited, task, noise_like(audited, 3))
    measurement = Probe().measure(audited, task)
    found = at(measurement.statistics["probe_embedding"])
    assert found == pytest.approx([share(among_all, task.test_groups, people) for people in DRAWN])
    curve = measurement.curves["probe"]
    assert curve["forgotten"][-1] == round(100 * among_forgotten.mean(), 2)
    assert (np.array(curve["forgotten"]) >= curve["all"]).all()


def test_one_forgotten_person_has_nobody_to_be_taken_for_among_the_forgotten():
    audited, task = make_up(forget=(3,), noise=2.5)
    assert hits_of(audited, task)[1].all()


def test_the_scale_of_a_feature_does_not_matter():
    audited, task = make_up(noise=2.0)
    scale, shift = torch.logspace(-2, 3, 32), torch.linspace(-50, 50, 32)
    expected = hits_of(audited, task)
    audited.train_embeddings, audited.test_embeddings = (
        faces * scale + shift for faces in (audited.train_embeddings, audited.test_embeddings)
    )
    for found, hits in zip(hits_of(audited, task), expected, strict=True):
        assert (found != hits).mean() < 0.1


def test_features_that_never_change_tell_nothing():
    audited, task = make_up(train=(8,) * 8)
    audited.train_embeddings, audited.test_embeddings = (
        torch.full_like(faces, 0.3) for faces in (audited.train_embeddings, audited.test_embeddings)
    )
    assert hits_of(audited, task)[0].sum() in {0, *np.bincount(task.test_groups)}


def test_it_is_fitted_on_sixty_images_of_each_identity_at_most_and_on_all_identities():
    audited, task = make_up(train=(70, 8, 61, 60, 9, 8, 100, 8))
    with_layers(audited, task, (audited.train_embeddings, audited.test_embeddings))
    Probe().measure(audited, task)
    shown = task.train_set.labels[audited.asked[task.train_set]]
    assert shown.bincount().tolist() == [60, 8, 60, 60, 9, 8, 60, 8]
    assert len({*audited.asked[task.train_set].tolist()}) == len(shown)
    assert torch.equal(audited.asked[task.test_set], task.forget_test)


def test_two_training_images_of_everybody_are_enough():
    audited, task = make_up(train=(2,) * 8, noise=0.05)
    assert hits_of(audited, task)[0].mean() > 0.9


def test_a_further_request_is_read_by_the_probes_that_are_fitted(monkeypatch):
    audited, task = make_up()
    with_layers(audited, task, noise_like(audited, 3))
    Probe().measure(audited, task)
    monkeypatch.setattr(probe, "fit_probe", lambda *_: pytest.fail("fitted again"))
    again = replace(task, forget=(1,), remain=(0, 2, 3, 4, 5, 6, 7))
    assert len(Probe().measure(audited, again).statistics) == 2
