"""Test images that are training images as well: accuracies on them say nothing about new images."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def shared_images(root: Path, paths: Sequence[str], sizes: Sequence[int], num_train: int) -> dict[str, str]:
    """Test images whose files hold the same bytes as a training image's: test path → a training path.

    `paths`, of which the first `num_train` are training images, are relative to `root`; `sizes` are in bytes, -1 where
    there is no file. Few files are read in whole: only those with the size and the beginning of one of the other split.
    """
    groups: dict[object, tuple[list[str], list[str]]] = {}
    for index, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        if size >= 0:
            groups.setdefault(size, ([], []))[index >= num_train].append(path)
    for length in (4096, -1):
        refined: dict[object, tuple[list[str], list[str]]] = {}
        for before, (train, test) in groups.items():
            if train and test:
                for split, members in enumerate((train, test)):
                    for path in members:
                        with suppress(OSError):
                            key = before, _digest(root / path, length)
                            refined.setdefault(key, ([], []))[split].append(path)
        groups = refined
    return {path: train[0] for train, test in groups.values() if train for path in test}


def _digest(path: Path, length: int) -> bytes:
    """SHA-256 of the first `length` bytes, of all where it is -1."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(length)).digest()
