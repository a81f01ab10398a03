"""Pairs of faces to verify, as the field's benchmarks hold them: insightface's `.bin` files, and LFW's `pairs.txt`.

A `.bin` is a pickle of (encoded images, two a pair; whether each pair shows one person), written by Python 2 or 3, of
bytes or numpy arrays. Nothing that it names is imported or run.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.cache import cache_folder
from data.image_files import ImageFiles
from data.image_folder import decode_all
from data.image_set import ImageSet
from util.runtime.errors import RunError, UsageError
from util.runtime.files import readable

FOLDS = 10  # of a .bin, which names none: parts of the file in its order, as the field cuts it


@dataclass(frozen=True)
class FacePairs:
    """P pairs of images; an image of several pairs is there once."""

    images: ImageSet
    pairs: Tensor  # int64 (P, 2), positions in `images`
    same: Tensor  # bool (P,): one person?
    folds: Tensor  # int64 (P,)


def load_pairs(texts: Sequence[str], image_size: int, cache_dir: Path | None, crop_pct: float = 1.0) -> dict[str, FacePairs]:
    """By name, the pairs of FILE.bin or of PAIRS.TXT:FOLDER, with images of `image_size` pixels a side.

    `cache_dir` (default: the user's) is where damaged images are listed. Raises UsageError for files that are not there,
    RunError for damaged ones and for a .bin that asks for code.
    """
    found = {}
    for text in texts:
        is_bin, (file, colon, folder) = text.endswith(".bin"), text.rpartition(":")
        if not is_bin and not colon:
            raise UsageError(f"--pairs {text}: neither FILE.bin nor, with the folder of its people, PAIRS.TXT:FOLDER")
        path = Path(text if is_bin else file)
        name = Path(text if is_bin else folder).resolve().stem
        if name in found:
            raise UsageError(f"--pairs: two of the name {name}")
        with readable(path, "no readable pairs of faces"):
            images, same, folds = _read_bin(path) if is_bin else _read_text(path, Path(folder))
            if len({*same}) < 2 or len({*folds}) < 2:
                raise RunError(f"{path}: pairs of one person and of two people are needed, in at least two folds")
        decoded = _decoded(path, images, image_size, cache_dir, crop_pct)
        found[name] = FacePairs(*decoded, torch.tensor(same), torch.tensor(folds))
    return found


def _decoded(
    path: Path, images: list[bytes | Path], image_size: int, cache_dir: Path | None, crop_pct: float
) -> tuple[ImageSet, Tensor]:
    """The different ones of `images`, decoded, and which of them each pair shows."""
    positions: dict[bytes | Path, int] = {}
    pairs = torch.tensor([positions.setdefault(image, len(positions)) for image in images]).view(-1, 2)
    every = [*positions]
    names = tuple(f"image {number}" if isinstance(image, bytes) else str(image) for number, image in enumerate(every))

    def read(index: int) -> bytes:
        return every[index] if isinstance(every[index], bytes) else every[index].read_bytes()

    pixels = torch.empty(len(every), 3, image_size, image_size, dtype=torch.uint8)
    listed = ImageFiles(path, (), names, (), 0, [], read)
    decode_all(listed, cache_dir or cache_folder(), pixels.numpy(), crop_pct=crop_pct)
    return ImageSet(path.name, pixels, torch.zeros(len(every)), ()), pairs


def _read_text(path: Path, folder: Path) -> tuple[list[Path], list[bool], list[int]]:
    """LFW's list: how many sets and pairs of each kind in each; then `name i j`, and `name i name j` of two people."""
    (sets, count), *lines = (line.split() for line in path.read_text().splitlines() if line.strip())
    if len(lines) != int(sets) * 2 * int(count):
        raise RunError(f"{path}: {len(lines)} pairs, not {sets} × 2 × {count}")
    images = []
    for line in lines:
        first, i, *other, j = line
        (second,) = other or [first]
        for name, number in ((first, i), (second, j)):
            jpg, png = (folder / name / f"{name}_{int(number):04}.{suffix}" for suffix in ("jpg", "png"))
            images.append(png if png.exists() else jpg)
    return images, [len(line) == 3 for line in lines], [number // (2 * int(count)) for number in range(len(lines))]


def _read_bin(path: Path) -> tuple[list[bytes], list[bool], list[int]]:
    try:
        with open(path, "rb") as file:
            images, same = _Plain(file, encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise RunError(f"{path}: no readable pairs of faces: {error}") from None
    images, same = [bytes(_content(image)) for image in images], [any(_content(one)) for one in _content(same)]
    if len(images) != 2 * len(same):
        raise RunError(f"{path}: {len(images)} images for {len(same)} pairs")
    cuts = np.array_split(np.arange(len(same)), FOLDS)
    return images, same, [fold for fold, part in enumerate(cuts) for _ in part]


class _Plain(pickle.Unpickler):
    """Reads plain values; what numpy's arrays are made of is kept, and nothing is made of it."""

    def find_class(self, module: str, name: str) -> type:
        if module.partition(".")[0] == "numpy" and name in ("ndarray", "dtype", "scalar", "_reconstruct", "_frombuffer"):
            return _Parts
        raise pickle.UnpicklingError(f"refused: it asks for {module}.{name}, which could run code")


class _Parts:
    """Stands in for what is called or set in a pickle of an array."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __setstate__(self, state: tuple) -> None:
        self.parts = state


def _content(value: Any) -> Any:
    """An array's bytes; a truth value as a tuple; else the value."""
    if isinstance(value, _Parts):
        return next(part for part in value.parts if isinstance(part, bytes | bytearray))
    return (value,) if isinstance(value, bool | int) else value
