"""Decoded images, kept: one file of raw pixels per key, which later runs map. The folder may be deleted at any time."""

import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from util.runtime.files import file_lock


def cached_images(key: str, shape: tuple[int, ...], fill: Callable[[np.ndarray], None], cache_dir: Path) -> Tensor:
    """The uint8 tensor of `shape` that `fill` writes, from the cache where `key` is known. It is read-only.

    key:  a file name without extension that changes whenever the content or the shape would.
    fill: writes the content into a uint8 array. What it raises is passed on, and nothing is kept.

    Where the folder cannot be written to or is full, the images are held in memory, and one line on stderr says so.
    """
    path = cache_dir / f"{key}.raw"
    try:
        if not _is_whole(path, shape):
            cache_dir.mkdir(parents=True, exist_ok=True)
            with file_lock(path.with_name(f".{key}.lock")):
                if not _is_whole(path, shape):  # nobody has built it in the meantime
                    _build(path, shape, fill)
        return _mapped(path, shape)
    except OSError as error:
        print(f"warning: the image cache cannot be written, images are held in memory instead ({error})", file=sys.stderr)
    images = torch.empty(shape, dtype=torch.uint8)
    fill(images.numpy())
    return images


def partly_cached(
    key: str, shape: tuple[int, ...], fill: Callable[[Any, list[int]], None], cache_dir: Path
) -> tuple[Tensor, Callable[[Tensor], None]]:
    """The same tensor, of zeros, and a function that fills the rows at given positions, if they have not been before.

    fill: `fill(target, rows)` does `target[row] = content` for each of `rows`.

    Until all rows are there, the file is KEY.part, with holes; KEY.done tells which are. Where the folder cannot be written
    to, all is filled at once, as `cached_images` does.
    """
    path, part, done_path = (cache_dir / f"{key}.{suffix}" for suffix in ("raw", "part", "done"))
    lock = path.with_name(f".{key}.lock")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with file_lock(lock):
            if _is_whole(path, shape):
                return _mapped(path, shape), lambda rows: None
            for file, size in ((part, math.prod(shape)), (done_path, shape[0])):
                if not file.is_file() or file.stat().st_size != size:
                    done_path.unlink(missing_ok=True)
                    with open(file, "wb") as opened:
                        opened.truncate(size)
            # Both stay open: they are this process's own still where another one has built KEY.raw in the meantime.
            images, target, done = _mapped(part, shape), _Rows(part, shape), np.memmap(done_path, np.uint8, "r+")
    except OSError:
        return cached_images(key, shape, fill, cache_dir), lambda rows: None

    def fill_rows(rows: Tensor) -> None:
        with file_lock(lock):
            missing = rows.numpy()[done[rows.numpy()] == 0].tolist()
            if missing:
                fill(target, missing)
                os.fsync(target.file.fileno())
                done[missing] = 1
                done.flush()
            if done.all() and not path.exists():
                os.replace(part, path)
                done_path.unlink()

    return images, fill_rows


class _Rows:
    """An array in a file, to write rows to. A full disk raises OSError here, and would kill who writes to a mapping."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.file, self.shape = open(path, "r+b"), shape  # noqa: SIM115

    def __setitem__(self, row: int, content: np.ndarray) -> None:
        os.pwrite(self.file.fileno(), content.tobytes(), row * content.nbytes)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "continual-forgetting"


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    return path.is_file() and path.stat().st_size == math.prod(shape)


def _build(path: Path, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")  # left by a killed process, it is overwritten
    try:
        with open(temporary, "wb") as file:
            if hasattr(os, "posix_fallocate"):  # if the disk filled up later, writing to the mapping would kill the process
                os.posix_fallocate(file.fileno(), 0, math.prod(shape))
        array = np.memmap(temporary, np.uint8, "r+", shape=shape)
        fill(array)
        array.flush()
        os.replace(temporary, path)
        for suffix in (".part", ".done"):  # of `partly_cached`
            path.with_suffix(suffix).unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
        return torch.from_numpy(np.memmap(path, np.uint8, "r", shape=shape))  # copy-on-write would reserve all of it
