"""Image folders, `{train,test}/<class>/<image>`, as two ImageSets: decoded once, in parallel, into the cache.

Images are resized on the shorter side (bicubic) and centre-cropped; what becomes of unusual ones: docs/data.md.
"""

import hashlib
import math
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from data.cache import cached_images, partly_cached
from data.image_files import FORMATS, ImageFiles, file_digests, for_all, list_images, printable, warn
from data.image_set import ImageSet, no_decoding
from data.records import is_record_file, list_records
from util.runtime.errors import UsageError

VERSION = 1  # of the decoding: to be raised with every change of its pixels, so that cached ones lapse


def image_folder(
    root: str | os.PathLike,
    image_size: int,
    cache_dir: Path,
    val_fraction: float | None = None,
    on_demand: bool = False,
    crop_pct: float = 1.0,
) -> tuple[ImageSet, ImageSet]:
    """The training and the test images of `root`, as square RGB images of `image_size` pixels a side.

    Of a .rec, `val_fraction` of each class's images are held out. With `on_demand` no training image is decoded until
    `ImageSet.decode` asks for it. `crop_pct`, of timm's, is the share of the shorter side that is seen.
    Raises UsageError where `list_images` or `list_records` does, RunError for damaged images.
    """
    if is_record_file(root) and val_fraction is None:
        raise UsageError(f"{root} has no test images: hold some of each class out, with --val-fraction 0.1")
    listed = list_records(Path(root), val_fraction) if is_record_file(root) else list_images(root)
    whole = _image_set(listed, image_size, cache_dir, on_demand, crop_pct)
    train, test = whole.subset(slice(listed.train)), whole.subset(slice(listed.train, None))
    test.decode(torch.arange(len(test)))
    first = dict(zip(reversed(train.digests), reversed(train.files), strict=True))  # of several, the first stays
    shared = [(file, first[digest]) for file, digest in zip(test.files, test.digests, strict=True) if digest in first]
    if shared:
        found = f"{len(shared)} of {len(test)} test images are training images as well ({' is '.join(shared[0])})"
        warn(f"warning: {listed.root}: {found}: accuracies on them say nothing about new images")
    return train, test


def flat_folder(root: str | os.PathLike, image_size: int, cache_dir: Path, crop_pct: float = 1.0) -> ImageSet:
    """The images of `root`, `<class>/<image>`, without a split; everything else as `image_folder`."""
    return _image_set(list_images(root, split=False), image_size, cache_dir, crop_pct=crop_pct)


def _image_set(
    listed: ImageFiles, image_size: int, cache_dir: Path, on_demand: bool = False, crop_pct: float = 1.0
) -> ImageSet:
    """All listed images, from the cache where these files are known."""
    known = (VERSION, image_size, *([crop_pct] if crop_pct < 1 else []), listed.states)
    digest = hashlib.sha256(repr(known).encode()).hexdigest()[:32]
    shape = (len(listed.files), 3, image_size, image_size)
    key = f"{listed.root.name}-{image_size}-{digest}"

    def fill(array: np.ndarray, rows: Sequence[int] | None = None) -> None:
        decode_all(listed, cache_dir, array, rows, crop_pct)

    if on_demand:
        images, decode = partly_cached(key, shape, fill, cache_dir)
    else:
        images, decode = cached_images(key, shape, fill, cache_dir), no_decoding
    about = torch.tensor(listed.labels), listed.classes, listed.files, file_digests(listed, cache_dir)
    return ImageSet(printable(listed.root.name), images, *about, decode=decode)


def decode_all(
    listed: ImageFiles, cache_dir: Path, array: np.ndarray, rows: Sequence[int] | None = None, crop_pct: float = 1.0
) -> None:
    """Decode the listed images (those at `rows`) into `array`, uint8 (N, 3, S, S). Raises RunError for damaged ones."""

    def decode(index: int, file: BinaryIO) -> None:
        array[index] = decode_image(file, array.shape[-1], crop_pct)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for_all(decode, listed, "decoding", cache_dir, rows)


def decode_image(file: BinaryIO, image_size: int, crop_pct: float = 1.0) -> np.ndarray:
    """uint8 (3, image_size, image_size), RGB. Raises whatever PIL raises on a damaged file.

    timm's evaluation resizes the shorter side to ⌊image_size / crop_pct⌋ and cuts the centre out: here in one resize.
    """
    shorter = math.floor(image_size / crop_pct)
    with Image.open(file, formats=FORMATS) as image:
        # A JPEG far too large is decoded at a fraction of its size, which may end within a pixel.
        drafted = image.draft(None, (2 * shorter, 2 * shorter))
        image.load()  # size and mode are final only now
        width, height = drafted[1][2:] if drafted else image.size
        side = min(width, height) * image_size / shorter
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        square = _as_rgb(image).resize((image_size, image_size), Image.Resampling.BICUBIC, box)
        with suppress(Exception):  # EXIF that cannot be read, or is not there, spoils no pixel
            square.getexif()[ExifTags.Base.Orientation] = image.getexif()[ExifTags.Base.Orientation]
            square = ImageOps.exif_transpose(square)
    return np.asarray(square).transpose(2, 0, 1)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        pixels, limit = np.asarray(image), 1 if image.mode == "F" else 65535
        if not (pixels.min() >= 0 and pixels.max() <= limit):  # NaN fails both
            raise ValueError(f"pixel values outside 0 to {limit}")
        image = Image.fromarray(np.round(pixels * np.float32(255 / limit)).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        opaque = Image.new("RGB", image.size)
        opaque.paste(image, mask=image)
        return opaque
    return image.convert("RGB")
