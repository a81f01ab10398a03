"""Training images that are decoded when they are asked for, and those alone."""

import os

import numpy as np
import pytest
import torch

from data.cache import cached_images, partly_cached
from data.image_folder import image_folder
from tests.data.conftest import SIZE
from util.runtime.errors import RunError

SHAPE = (6, 3, 4, 4)
CONTENT = np.random.default_rng(0).integers(1, 256, SHAPE, np.uint8)


class Fill:
    def __init__(self):
        self.filled = []

    def __call__(self, target, rows=None):
        for row in range(len(CONTENT)) if rows is None else rows:
            target[row] = CONTENT[row]
            self.filled.append(row)


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def assert_filled(images, rows):
    for row in range(len(CONTENT)):
        assert np.array_equal(images[row].numpy(), CONTENT[row] if row in rows else np.zeros_like(CONTENT[row]))


def test_rows_are_filled_once_and_seen_by_all(tmp_path):
    fill = Fill()
    (images, need), (others, need_too) = (partly_cached("key", SHAPE, fill, tmp_path) for _ in range(2))
    need(torch.tensor([1, 4]))
    need_too(torch.tensor([4, 2]))
    assert fill.filled == [1, 4, 2]
    for found in (images, others, partly_cached("key", SHAPE, None, tmp_path)[0]):
        assert_filled(found, {1, 2, 4})
    assert files(tmp_path) == ["key.part"]
    need(torch.arange(6))
    assert fill.filled == [1, 4, 2, 0, 3, 5]
    assert_filled(images, range(6))
    assert_filled(others, range(6))


def test_what_is_open_goes_on_when_all_is_built_beside_it(tmp_path):
    fill = Fill()
    images, need = partly_cached("key", SHAPE, fill, tmp_path)
    need(torch.tensor([1]))
    assert_filled(cached_images("key", SHAPE, Fill(), tmp_path), range(6))
    assert files(tmp_path) == ["key.raw"]
    need(torch.tensor([1, 3]))
    assert_filled(images, {1, 3})
    need(torch.arange(6))
    assert files(tmp_path) == ["key.raw"] and fill.filled == [1, 3, 0, 2, 4, 5]


def test_a_full_disk_is_told_before_the_rows_are_filled(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    fill = Fill()
    _, need = partly_cached("key", SHAPE, fill, tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space left"):
        need(torch.tensor([1]))
    assert not fill.filled


def test_a_failure_leaves_rows_to_be_filled_again(tmp_path):
    def fail(target, rows):
        target[rows[0]] = CONTENT[rows[0]]
        raise RunError("damaged")

    _, need = partly_cached("key", SHAPE, fail, tmp_path)
    with pytest.raises(RunError, match="damaged"):
        need(torch.tensor([2, 3]))
    fill = Fill()
    partly_cached("key", SHAPE, fill, tmp_path)[1](torch.tensor([2, 3]))
    assert fill.filled == [2, 3]


def test_a_file_that_does_not_fit_is_begun_anew(tmp_path):
    partly_cached("key", SHAPE, Fill(), tmp_path)[1](torch.tensor([2]))
    (tmp_path / "key.part").write_bytes(b"1")
    fill = Fill()
    images, need = partly_cached("key", SHAPE, fill, tmp_path)
    need(torch.tensor([1, 2]))
    assert fill.filled == [1, 2]
    assert_filled(images, {1, 2})


def test_without_a_cache_all_is_held_in_memory(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    images, need = partly_cached("key", SHAPE, Fill(), tmp_path / "file")
    need(torch.tensor([1]))
    assert_filled(images, range(6))
    assert "images are held in memory" in capsys.readouterr().err


def test_a_folder_decodes_its_test_images_and_what_is_asked_for(root, tmp_path, decoded):
    train, test = image_folder(root, SIZE, tmp_path / "cache", on_demand=True)
    assert {*decoded} == {"test/a/1.png", "test/b/1.png"}
    part = train.subset(slice(1, None))
    part.decode(torch.tensor([1]))
    assert decoded["train/b/1.png"] == 1 and sum(decoded.values()) == 3
    whole, whole_test = image_folder(root, SIZE, tmp_path / "other")
    assert torch.equal(train.images[2], whole.images[2]) and torch.equal(test.images, whole_test.images)
    assert train.digests == whole.digests
    copied = train.subset(torch.tensor([3, 0]))  # decodes what it copies
    assert torch.equal(copied.images, whole.images[[3, 0]])
    decoded.clear()
    copied.decode(torch.arange(2))
    assert not decoded
