"""Decoded images, kept: one `.npy` file per key, mapped by every later run.

A cache file is written beside its place under a name of its own, flushed to disk and renamed, so that a reader sees a
whole file or none, whatever is killed when. Processes that build the same key at once each write their own; the last
rename wins and the others keep the pages they have mapped. Nothing ever writes to a file under its final name. The
folder may be deleted at any time. Pixels damaged inside a file of the right header and length go unnoticed: the cache
is trusted like any other file of its owner.
"""

import io
import math
import mmap
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TEMPORARY_SUFFIX = ".continual-forgetting.tmp"
ABANDONED_SECONDS = 24 * 3600
# A private mapping that reserves no memory: a set larger than the machine's memory can still be mapped. Python names
# the flag from 3.13 on; its value is Linux's, but for a few old architectures.
NORESERVE = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0
PRIVATE = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", NORESERVE)


def cached_images(
    key: str, shape: Sequence[int], fill: Callable[[np.ndarray], None], cache_dir: str | os.PathLike | None = None
) -> Tensor:
    """The uint8 tensor that `fill` writes, from the cache where `key` is known with this shape.

    key:       a file name without extension that changes whenever the content would.
    shape:     of the tensor, no dimension 0.
    fill:      writes the content into a uint8 array of `shape`. What it raises is passed on, and nothing is kept.
    cache_dir: default `$XDG_CACHE_HOME/continual-forgetting`, else `~/.cache/continual-forgetting`.

    Returns a tensor mapped copy-on-write: it may be written to, and the file does not change. A file that is truncated
    or of another shape or dtype is built anew. Where the folder cannot be written to or is full, the images are held
    in memory instead and one line on stderr says so.
    """
    shape = tuple(shape)
    try:
        path = cache_folder(cache_dir) / f"{key}.npy"
        images = _stored(path, shape)
        if images is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path.parent)
    except (OSError, RuntimeError) as error:  # pathlib raises RuntimeError where there is no home folder
        return _in_memory(shape, fill, error)
    return _build(path, shape, fill) if images is None else images


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "continual-forgetting"


def _build(path: Path, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]) -> Tensor:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        try:
            mapping = _allocate(temporary, shape)
        except OSError as error:
            return _in_memory(shape, fill, error)
        array = _array(mapping, shape)
        fill(array)
        try:
            mapping.flush()
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
                images = _private(file, shape)
            os.replace(temporary, path)
        except OSError as error:
            _warn(error)
            return torch.from_numpy(array)  # the mapping outlives the name of its file
        return images
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _allocate(path: Path, shape: tuple[int, ...]) -> mmap.mmap:
    """A shared mapping of a new .npy file of this shape, its header written."""
    header = _header(shape)
    size = len(header) + math.prod(shape)
    with open(path, "x+b") as file:
        file.write(header)
        file.truncate(size)
        file.flush()
        if hasattr(os, "posix_fallocate"):  # a page of a sparse file that finds the disk full kills the process
            os.posix_fallocate(file.fileno(), 0, size)
        return mmap.mmap(file.fileno(), size)


def _stored(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The images of a cache file; None where it is missing, unreadable, truncated or of another shape or dtype."""
    try:
        with open(path, "rb") as file:
            header = _header(shape)
            if os.fstat(file.fileno()).st_size != len(header) + math.prod(shape) or file.read(len(header)) != header:
                return None
            return _private(file, shape)
    except OSError:
        return None


def _header(shape: tuple[int, ...]) -> bytes:
    """The only header a cache file may have: comparing bytes leaves nothing of a strange file to be parsed."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _private(file: io.BufferedReader, shape: tuple[int, ...]) -> Tensor:
    size = len(_header(shape)) + math.prod(shape)
    mapping = mmap.mmap(file.fileno(), size, flags=PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.from_numpy(_array(mapping, shape))


def _array(mapping: mmap.mmap, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(mapping, np.uint8, offset=len(_header(shape))).reshape(shape)


def _in_memory(shape: tuple[int, ...], fill: Callable[[np.ndarray], None], error: Exception) -> Tensor:
    _warn(error)
    array = np.empty(shape, np.uint8)
    fill(array)
    return torch.from_numpy(array)


def _warn(error: Exception) -> None:
    print(f"warning: the image cache cannot be written, images are held in memory instead ({error})", file=sys.stderr)


def _remove_abandoned(folder: Path) -> None:
    """Remove what builds killed more than a day ago have left; a build that runs keeps its file's time young."""
    for temporary in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        with suppress(OSError):
            if time.time() - temporary.stat().st_mtime > ABANDONED_SECONDS:
                temporary.unlink()
