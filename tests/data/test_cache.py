import multiprocessing
import os
import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from data.cache import cache_folder, cached_images

SHAPE = (5, 3, 8, 8)


def content() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)


class Fill:
    def __init__(self):
        self.calls = 0

    def __call__(self, array):
        self.calls += 1
        array[:] = content()


def get(cache_dir, fill, key="key"):
    return cached_images(key, SHAPE, fill, cache_dir)


def files(folder):
    """What lies in a cache folder, but for locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def assert_right(images):
    assert images.dtype == torch.uint8
    assert np.array_equal(images.numpy(), content())


def test_is_filled_once_and_then_mapped_without_a_warning(tmp_path):
    fill = Fill()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = get(tmp_path / "a" / "b", fill), get(tmp_path / "a" / "b", fill)
    assert fill.calls == 1
    assert_right(first)
    assert_right(second)
    assert files(tmp_path / "a" / "b") == ["key.raw"]


def test_keys_do_not_share(tmp_path):
    get(tmp_path, lambda array: array.fill(1), key="one")
    assert get(tmp_path, lambda array: array.fill(2), key="two").unique().tolist() == [2]
    assert get(tmp_path, Fill(), key="one").unique().tolist() == [1]


def truncated(path):
    os.truncate(path, path.stat().st_size - 1)


def too_long(path):
    path.write_bytes(path.read_bytes() + b"\0")


def emptied(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncated, too_long, emptied, Path.unlink])
def test_a_file_that_does_not_fit_is_built_anew(tmp_path, damage, capsys):
    fill = Fill()
    get(tmp_path, fill)
    damage(tmp_path / "key.raw")
    assert_right(get(tmp_path, fill))
    assert fill.calls == 2
    assert_right(get(tmp_path, fill))
    assert fill.calls == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_failing_fill_leaves_nothing_behind(tmp_path, error):
    def fill(array):
        array[0] = 1
        raise error("no more")

    with pytest.raises(error, match="no more"):
        get(tmp_path, fill)
    assert files(tmp_path) == []


def assert_one_warning(capsys, part):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: the image cache cannot be written, images are held in memory")
    assert part in lines[0]


def test_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert_right(get(tmp_path / "file", Fill()))
    assert_one_warning(capsys, "file")


def test_full_disk_before_the_images_are_decoded(tmp_path, capsys):
    """A limit on the size of files refuses the space, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    fill = Fill()
    try:
        images = get(tmp_path, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_right(images)
    assert fill.calls == 1
    assert files(tmp_path) == []
    assert_one_warning(capsys, "File too large")


def test_failure_after_the_images_are_decoded(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert_right(get(tmp_path, Fill()))
    assert files(tmp_path) == []
    assert_one_warning(capsys, "No space left")


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "continual-forgetting"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "continual-forgetting"


def build(cache_dir, filling, go_on):
    def fill(array):
        filling.release()
        go_on.acquire()
        Fill()(array)

    assert_right(get(cache_dir, fill))


def test_a_build_that_is_killed_and_two_that_waited_for_it(tmp_path):
    processes = multiprocessing.get_context("fork")
    filling, go_on = processes.Semaphore(0), processes.Semaphore(0)
    killed, *others = [processes.Process(target=build, args=(tmp_path, filling, go_on)) for _ in range(3)]
    killed.start()
    assert filling.acquire(timeout=30)
    for other in others:
        other.start()
    assert files(tmp_path) == [".key.raw.tmp"]
    killed.kill()
    assert filling.acquire(timeout=30)
    go_on.release()
    for other in others:
        other.join()
    assert [other.exitcode for other in others] == [0, 0]
    assert not filling.acquire(block=False)  # the second has found what the first has built
    assert files(tmp_path) == ["key.raw"]
    assert_right(get(tmp_path, None))
