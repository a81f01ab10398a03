"""Enrolment: the search, and the rates of one gallery after another by hand."""

import numpy as np
import pytest
import torch

import util.audit.enrolment
from tests.util.audit.conftest import DRAWN, array, at, gallery, make_up, quantile, share, unit
from util.audit.enrolment import Enrolment, search
from util.audit.statistics import bootstrap_interval, value_of


@pytest.mark.parametrize("most", [1, 51, 140, 51 * 9, 1 << 16])
def test_a_search_is_the_largest_cosine_in_blocks_of_any_size(most, monkeypatch):
    monkeypatch.setattr(util.audit.enrolment, "SIMILARITIES", most)
    generator = torch.Generator().manual_seed(0)
    lengths = 1 + 100 * torch.rand(51, 1, generator=generator)
    probes, templates = torch.randn(9, 8, generator=generator), lengths * torch.randn(51, 8, generator=generator)
    probes[4] = -templates.sum(dim=0)
    cosines = unit(array(probes)) @ unit(array(templates)).T
    similarity, found = search(probes, templates)
    assert found.tolist() == cosines.argmax(axis=1).tolist()
    np.testing.assert_allclose(similarity.numpy(), cosines.max(axis=1), rtol=1e-5)


def test_a_search_finds_a_face_that_is_like_nobody():
    similarity, found = search(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.1], [-1.0, 0.0], [-1.0, 0.3]]))
    assert found.item() == 2
    assert similarity.item() == pytest.approx(-1 / 1.09**0.5)


def test_each_rate_is_the_mean_over_ten_galleries():
    audited, task = make_up(noise=1.5)
    probes, labels = unit(array(audited.test_embeddings))[task.forget_test], task.forget_labels.numpy()
    strangers = unit(array(audited.stranger_embeddings))
    hits = {"enrolment_1": np.zeros(len(labels)), "enrolment_5": np.zeros(len(labels)), "tpir_1pct": np.zeros(len(labels))}
    for draw in range(10):
        for images in (1, 5):
            templates = gallery(audited, task, images, draw)
            threshold = quantile([max(templates @ face) for face in strangers], 0.99)
            for i, (face, label) in enumerate(zip(probes, labels, strict=True)):
                cosines = templates @ face
                right = cosines.argmax() == label
                hits[f"enrolment_{images}"][i] += right / 10
                if images == 5:
                    hits["tpir_1pct"][i] += (right and cosines.max() > threshold) / 10
    found = Enrolment().measure(audited, task).statistics
    assert {*found} == {*hits, "photos_enrolment_1"} == {*Enrolment.titles}
    for key, expected in hits.items():
        assert at(found[key]) == pytest.approx([share(expected, task.test_groups, people) for people in DRAWN])
    assert 100 > hits["enrolment_5"].mean() * 100 > hits["enrolment_1"].mean() * 100 > 10
    assert 0 < hits["tpir_1pct"].mean() < hits["enrolment_5"].mean()


def test_without_strangers_no_rate_at_their_threshold():
    found = Enrolment().measure(*make_up(stranger_set=None)).statistics
    assert found["tpir_1pct"] == "needs --strangers"
    assert at(found["enrolment_5"]).min() > 0


def test_one_point_for_all_faces_recognizes_nobody_but_one():
    audited, task = make_up()
    for name in ("train_embeddings", "test_embeddings", "stranger_embeddings"):
        setattr(audited, name, torch.ones_like(getattr(audited, name)) * 0.3)
    found = Enrolment().measure(audited, task).statistics
    first = [at(found[key], [(0, 0, 0), (1, 1, 1), (2, 2, 2)]) for key in ("enrolment_1", "enrolment_5")]
    assert all(sorted(each)[:2] == [0, 0] for each in first), "all are taken for the same one"
    assert at(found["tpir_1pct"]).tolist() == [0] * len(DRAWN)


@pytest.mark.parametrize("forget", [(1, 4, 6), (4,)], ids=["people", "one person"])
def test_training_photos_are_searched_where_they_are_not_enrolled(forget):
    audited, task = make_up(forget=forget, noise=1.5)
    faces, labels = unit(array(audited.train_embeddings)), task.train_set.labels.tolist()
    rates = []
    for position in task.forget_train.tolist():
        draws = [draw for draw in range(10) if position not in np.concatenate(task.enrolled(1, draw))]
        found = [(gallery(audited, task, 1, draw) @ faces[position]).argmax() == labels[position] for draw in draws]
        rates += [np.mean(found)] if draws else []
    statistic = Enrolment().measure(audited, task).statistics["photos_enrolment_1"]
    assert value_of(statistic, task.num_groups) == pytest.approx(100 * np.mean(rates))
    assert 0 < np.mean(rates) < 1
    low, high = bootstrap_interval(statistic, task.num_groups, seed=0)
    assert low < 100 * np.mean(rates) < high
