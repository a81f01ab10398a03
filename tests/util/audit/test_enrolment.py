"""Enrolment: the search and its memory, and the rates of one gallery after another by hand."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.util.audit.conftest import DRAWN, array, at, gallery, make_up, quantile, share, unit
from util.audit.enrolment import Enrolment, search


@pytest.mark.parametrize("block", [1, 7, 50, 51, 64, 1 << 16])
def test_a_search_is_the_largest_cosine_in_blocks_of_any_size(block):
    generator = torch.Generator().manual_seed(0)
    lengths = 1 + 100 * torch.rand(51, 1, generator=generator)
    probes, templates = torch.randn(9, 8, generator=generator), lengths * torch.randn(51, 8, generator=generator)
    probes[4] = -templates.sum(dim=0)
    cosines = unit(array(probes)) @ unit(array(templates)).T
    similarity, found = search(probes, templates, block)
    assert found.tolist() == cosines.argmax(axis=1).tolist()
    np.testing.assert_allclose(similarity.numpy(), cosines.max(axis=1), rtol=1e-5)


def test_a_search_finds_a_face_that_is_like_nobody():
    similarity, found = search(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.1], [-1.0, 0.0], [-1.0, 0.3]]), 2)
    assert found.item() == 2
    assert similarity.item() == pytest.approx(-1 / 1.09**0.5)


@pytest.fixture
def little_memory():
    """little_memory(megabytes): no more than that can be had on top of what this process has."""
    if not Path("/proc/self/status").exists():
        pytest.skip("not Linux")
    before = resource.getrlimit(resource.RLIMIT_DATA)

    def limit(megabytes: int) -> None:
        with open("/proc/self/status") as file:
            (used,) = (int(line.split()[1]) << 10 for line in file if line.startswith("VmData:"))
        resource.setrlimit(resource.RLIMIT_DATA, (used + (megabytes << 20), before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.fixture
def a_hundred_thousand(tmp_path):
    """Templates mapped from a file: 102 MB in float16, twice that in float32."""
    path, chance = tmp_path / "gallery", np.random.default_rng(0)
    some = chance.standard_normal((1000, 512), dtype=np.float32)
    with open(path, "wb") as file:
        for turn in range(100):  # rolled, so that no two are alike
            file.write(np.roll(some, turn, axis=1).astype(np.float16).tobytes())
    return np.memmap(path, np.float16, "c", shape=(100_000, 512))


def test_a_large_gallery_is_searched_in_its_file_with_little_memory(a_hundred_thousand, little_memory):
    positions = np.random.default_rng(1).integers(0, 100_000, 12)
    noise = np.random.default_rng(2).standard_normal((12, 512), dtype=np.float32)
    probes = a_hundred_thousand[positions].astype(np.float32) + 0.5 * noise
    templates = torch.from_numpy(a_hundred_thousand)
    parts = (a_hundred_thousand[start : start + 1000].astype(float) for start in range(0, 100_000, 1000))
    expected = np.concatenate([unit(part) @ unit(probes).T for part in parts])
    little_memory(64)
    similarity, found = search(torch.from_numpy(probes), templates, 4096)
    assert found.tolist() == expected.argmax(axis=0).tolist() == positions.tolist()
    np.testing.assert_allclose(similarity.numpy(), expected.max(axis=0), rtol=1e-5)


def test_each_rate_is_the_mean_over_ten_galleries():
    subject, scene = make_up(noise=1.5)
    probes, labels = unit(array(subject.test))[scene.forget_test], scene.forget_labels.numpy()
    strangers = unit(array(subject.unknown))
    hits = {"enrolment_1": np.zeros(len(labels)), "enrolment_5": np.zeros(len(labels)), "tpir_1pct": np.zeros(len(labels))}
    for draw in range(10):
        for images in (1, 5):
            templates = gallery(subject, scene, images, draw)
            threshold = quantile([max(templates @ face) for face in strangers], 0.99)
            for i, (face, label) in enumerate(zip(probes, labels, strict=True)):
                cosines = templates @ face
                right = cosines.argmax() == label
                hits[f"enrolment_{images}"][i] += right / 10
                if images == 5:
                    hits["tpir_1pct"][i] += (right and cosines.max() > threshold) / 10
    found = Enrolment().measure(subject, scene).statistics
    assert [*found] == [*hits] == [*Enrolment.titles]
    for key, expected in hits.items():
        assert at(found[key]) == pytest.approx([share(expected, scene.who, people) for people in DRAWN])
    assert 100 > hits["enrolment_5"].mean() * 100 > hits["enrolment_1"].mean() * 100 > 10
    assert 0 < hits["tpir_1pct"].mean() < hits["enrolment_5"].mean()


def test_without_strangers_no_rate_at_their_threshold():
    found = Enrolment().measure(*make_up(unseen=None)).statistics
    assert found["tpir_1pct"] == "needs --unseen"
    assert at(found["enrolment_5"]).min() > 0


def test_one_point_for_all_faces_recognizes_nobody_but_one():
    subject, scene = make_up()
    for name in ("train", "test", "unknown"):
        setattr(subject, name, torch.ones_like(getattr(subject, name)) * 0.3)
    found = Enrolment().measure(subject, scene).statistics
    first = [at(found[key], [(0, 0, 0), (1, 1, 1), (2, 2, 2)]) for key in ("enrolment_1", "enrolment_5")]
    assert all(sorted(each)[:2] == [0, 0] for each in first), "all are taken for the same one"
    assert at(found["tpir_1pct"]).tolist() == [0] * len(DRAWN)
