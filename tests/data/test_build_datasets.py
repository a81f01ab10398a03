from argparse import Namespace

import pytest
import torch

from data import build_datasets, synthetic_faces
from tests.data.conftest import SIZE

CPU = torch.device("cpu")


def arguments(cache_dir, data="synthetic_faces", seed=7):
    counts = {"identities": 3, "train_per_identity": 2, "test_per_identity": 1, "data_seed": seed}
    return Namespace(data=data, cache_dir=cache_dir, val_fraction=None, images="auto", **counts)


def test_folders_are_read(root, tmp_path):
    train, test = build_datasets(arguments(tmp_path / "cache", str(root)), SIZE, CPU)
    assert (train.name, len(train), len(test)) == ("faces", 4, 2)


def test_synthetic_faces_are_drawn_once(tmp_path, monkeypatch):
    drawn = synthetic_faces.synthetic_faces(3, 2, 1, 16, 7)
    for _ in range(2):  # as drawn, and as mapped
        for expected, got in zip(drawn, build_datasets(arguments(tmp_path), 16, CPU), strict=True):
            assert torch.equal(expected.images, got.images) and torch.equal(expected.labels, got.labels)
            assert (expected.name, expected.classes) == (got.name, got.classes)
        monkeypatch.setattr(synthetic_faces, "render", None)
    with pytest.raises(TypeError):  # another seed must be drawn
        build_datasets(arguments(tmp_path, seed=8), 16, CPU)
