import pytest
import torch

from data import load_data
from tests.data.conftest import SIZE
from util.runtime.errors import UsageError


def test_load_data_reads_folders(root, tmp_path):
    train, test = load_data(str(root), SIZE, 100, 24, 6, 0, tmp_path / "cache")
    assert (train.name, len(train), len(test)) == ("faces", 4, 2)


def test_load_data_draws_synthetic_faces_once(tmp_path, monkeypatch):
    faces = pytest.importorskip("data.synthetic_faces")
    drawn = faces.synthetic_faces(3, 2, 1, 16, 7)
    for _ in range(2):  # as drawn, and as mapped
        for expected, got in zip(drawn, load_data("synthetic_faces", 16, 3, 2, 1, 7, tmp_path), strict=True):
            assert torch.equal(expected.images, got.images) and torch.equal(expected.labels, got.labels)
            assert (expected.name, expected.classes) == (got.name, got.classes)
        monkeypatch.setattr(faces, "render", None)
    with pytest.raises(TypeError):  # another seed must be drawn
        load_data("synthetic_faces", 16, 3, 2, 1, 8, tmp_path)


WRONG_NUMBERS = [
    (0, 3, 2, 1, 7),
    (8, 3, 2, 1, 7),
    (16, 0, 2, 1, 7),
    (16, -1, 2, 1, 7),
    (16, 3, 0, 1, 7),
    (16, 3, 2, 0, 7),
    (16, 3, 0, 0, 7),
    (16, 3, 2, 1, -1),
]


@pytest.mark.parametrize("numbers", WRONG_NUMBERS)
def test_load_data_refuses_impossible_numbers_of_synthetic_faces(tmp_path, numbers):
    with pytest.raises(UsageError):
        load_data("synthetic_faces", *numbers, tmp_path)
