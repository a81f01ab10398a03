"""Decoded images, kept: one file of raw pixels per key, which later runs map. The folder may be deleted at any time."""

import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

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
    key: str, shape: tuple[int, ...], fill: Callable[[np.ndarray, list[int]], None], cache_dir: Path
) -> tuple[Tensor, Callable[[Tensor], None]]:
    """The same tensor, of zeros, and a function that has the rows at given positions filled, once: by `fill(array, rows)`.

    The file is KEY.part, with holes, and at its end a byte for each row that is filled; `cached_images` replaces it. Where
    the folder cannot be written to, all is filled at once, into memory.
    """
    path, part, size = cache_dir / f"{key}.raw", cache_dir / f"{key}.part", math.prod(shape)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with file_lock(path.with_name(f".{key}.lock")):
            if _is_whole(path, shape):
                return _mapped(path, shape), lambda rows: None
            if not part.is_file() or part.stat().st_size != size + shape[0]:
                part.write_bytes(b"")
                os.truncate(part, size + shape[0])
            # It stays this process's own, where another one builds KEY.raw in the meantime.
            images, file = _mapped(part, shape), open(part, "r+b")  # noqa: SIM115
            array, done = np.memmap(file, np.uint8, "r+", 0, shape), np.memmap(file, np.uint8, "r+", size)
    except OSError:
        return cached_images(key, shape, fill, cache_dir), lambda rows: None

    def fill_rows(rows: Tensor) -> None:
        with file_lock(path.with_name(f".{key}.lock")):
            missing = rows.numpy()[done[rows.numpy()] == 0].tolist()
            for row in missing:
                _reserve(file, row * array[0].size, array[0].size)
            fill(array, missing)
            array.flush()
            done[missing] = 1

    return images, fill_rows


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "continual-forgetting"


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    return path.is_file() and path.stat().st_size == math.prod(shape)


def _build(path: Path, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")  # left by a killed process, it is overwritten
    try:
        with open(temporary, "wb") as file:
            _reserve(file, 0, math.prod(shape))
        array = np.memmap(temporary, np.uint8, "r+", shape=shape)
        fill(array)
        array.flush()
        os.replace(temporary, path)
        path.with_suffix(".part").unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)


def _reserve(file: BinaryIO, start: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):  # if the disk filled up later, writing to the mapping would kill the process
        os.posix_fallocate(file.fileno(), start, size)


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
        return torch.from_numpy(np.memmap(path, np.uint8, "r", shape=shape))  # copy-on-write would reserve all of it
