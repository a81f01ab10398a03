import multiprocessing
import os
import resource
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from data.cache import ABANDONED_SECONDS, TEMPORARY_SUFFIX, cache_folder, cached_images

SHAPE = (5, 3, 8, 8)


def content() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)


class Fill:
    def __init__(self):
        self.calls = 0

    def __call__(self, array):
        self.calls += 1
        array[:] = content()


def get(cache_dir, fill, key="key", shape=SHAPE):
    return cached_images(key, shape, fill, cache_dir)


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
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["key.npy"]


def test_file_is_a_plain_npy(tmp_path):
    get(tmp_path, Fill())
    assert np.array_equal(np.load(tmp_path / "key.npy"), content())


def test_writing_to_the_tensor_leaves_the_file_alone(tmp_path):
    for _ in range(2):  # as built, and as mapped
        get(tmp_path, Fill()).zero_()
        assert np.array_equal(np.load(tmp_path / "key.npy"), content())


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


def other_shape(path):
    np.save(path, content().reshape(5, 8, 8, 3))


def other_type(path):
    np.save(path, content().astype(np.int8))


def fortran_order(path):
    np.save(path, np.asfortranarray(content()))


def header_garbled(path):
    path.write_bytes(path.read_bytes().replace(b"descr", b"((((("))


@pytest.mark.parametrize(
    "damage", [truncated, too_long, emptied, other_shape, other_type, fortran_order, header_garbled, Path.unlink]
)
def test_a_file_that_does_not_fit_is_built_anew(tmp_path, damage, capsys):
    fill = Fill()
    get(tmp_path, fill)
    damage(tmp_path / "key.npy")
    assert_right(get(tmp_path, fill))
    assert fill.calls == 2
    assert_right(get(tmp_path, fill))
    assert fill.calls == 2
    assert capsys.readouterr().err == ""


def test_mutated_files_are_rebuilt_or_read_but_never_raise(tmp_path):
    get(tmp_path, Fill())
    whole, random = (tmp_path / "key.npy").read_bytes(), np.random.default_rng(1)
    for _ in range(60):
        mutant = bytearray(whole)
        for place in random.integers(0, 128, random.integers(1, 4)):  # the header, of 128 bytes
            mutant[place] = random.integers(256)
        length = len(mutant) if random.random() < 0.5 else random.integers(len(mutant))
        (tmp_path / "key.npy").write_bytes(mutant[:length])
        assert_right(get(tmp_path, Fill()))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_failing_fill_leaves_nothing_behind(tmp_path, error):
    def fill(array):
        array[0] = 1
        raise error("no more")

    with pytest.raises(error, match="no more"):
        get(tmp_path, fill)
    assert list(tmp_path.iterdir()) == []


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
    assert list(tmp_path.iterdir()) == []
    assert_one_warning(capsys, "File too large")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_after_the_images_are_decoded(tmp_path, capsys, monkeypatch, step):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    fill = Fill()
    assert_right(get(tmp_path, fill))
    assert fill.calls == 1
    assert list(tmp_path.iterdir()) == []
    assert_one_warning(capsys, "No space left")


def test_no_home_folder(capsys, monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    assert_right(get(None, Fill()))
    assert_one_warning(capsys, "home")


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "continual-forgetting"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "continual-forgetting"
    assert cache_folder("here") == Path("here")


def test_abandoned_temporary_files_are_removed_and_young_ones_kept(tmp_path):
    old, young, foreign = tmp_path / f".a{TEMPORARY_SUFFIX}", tmp_path / f".b{TEMPORARY_SUFFIX}", tmp_path / ".c.tmp"
    for path in (old, young, foreign):
        path.touch()
    long_ago = time.time() - ABANDONED_SECONDS - 60
    for path in (old, foreign):
        os.utime(path, (long_ago, long_ago))
    get(tmp_path, Fill())
    assert {path.name for path in tmp_path.iterdir()} == {young.name, foreign.name, "key.npy"}


def build(cache_dir, filling, go_on, result):
    def fill(array):
        filling.release()
        go_on.acquire()
        Fill()(array)

    result.put(get(cache_dir, fill).numpy().tobytes())


def test_two_processes_at_once_and_a_third_that_is_killed(tmp_path):
    processes = multiprocessing.get_context("fork")
    filling, go_on, result = processes.Semaphore(0), processes.Semaphore(0), processes.SimpleQueue()
    builders = [processes.Process(target=build, args=(tmp_path, filling, go_on, result)) for _ in range(3)]
    for builder in builders:
        builder.start()
    for _ in builders:
        assert filling.acquire(timeout=30)
    builders[2].kill()
    builders[2].join()
    for _ in range(2):
        go_on.release()
    for builder in builders[:2]:
        assert result.get() == content().tobytes()
        builder.join()
    assert np.array_equal(np.load(tmp_path / "key.npy"), content())
    partial = [path.name for path in tmp_path.iterdir() if path.name != "key.npy"]
    assert len(partial) == 1  # SIGKILL leaves it; a later build removes it, see above
    assert partial[0].endswith(TEMPORARY_SUFFIX)
