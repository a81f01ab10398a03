"""Image folders, `{train,test}/<class>/<image>`, as two ImageSets: decoded once, in parallel, into the cache.

What becomes of unusual files:
- grey, palette, CMYK and two-tone images become RGB; 16-bit ones are scaled to 8 bits; float pixels must lie in [0, 1];
- transparent pixels are laid over black; of an animation the first frame is taken; an EXIF rotation is carried out
  (unreadable EXIF: the image is taken as upright);
- any size is resized on the shorter side (bicubic) and centre-cropped, so a 1×1 image becomes one flat colour;
- links are followed, out of the folder too; a broken link with an image's name counts as a damaged image;
- hidden files, files whose extension is no image format of PIL's, and folders inside class folders are skipped and
  counted on stderr; EPS is skipped as well, since PIL would hand it to Ghostscript;
- test images that are training images as well, by the content of their files, are counted on stderr at every run, and kept;
- damaged images, and images of more pixels than `PIL.Image.MAX_IMAGE_PIXELS` (89 million), end the run: all of them
  are found first, of training and test images together;
- bytes of a name that are not UTF-8 appear as `\\xNN` in class names and messages.
"""

import functools
import hashlib
import os
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from data.cache import cached_images
from data.image_set import ImageSet
from data.shared_images import shared_images
from util.runtime.errors import RunError, UsageError

VERSION = 1  # of the decoding: a change of the pixels it yields needs another number, so that old cache files lapse
SPLITS = ("train", "test")
NOT_DECODED = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # by Ghostscript, or known to PIL by name only
IMAGES_PER_JOB = 32
DAMAGED_SHOWN = 5


@dataclass(frozen=True)
class Listing:
    """The images of a folder, training images first, each split sorted by class and name."""

    root: Path
    classes: tuple[str, ...]
    paths: list[str]
    labels: list[int]
    stamps: list[tuple[int, int]]  # size in bytes and modification time in ns; (-1, -1) where the file cannot be found
    num_train: int
    skipped: list[str]


def image_folder(
    root: str | os.PathLike,
    image_size: int,
    cache_dir: str | os.PathLike | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> tuple[ImageSet, ImageSet]:
    """The training and the test images of `root`, as square RGB images of `image_size` pixels a side.

    The classes are the training folders' names, sorted. Both sets share one cache file, keyed by the folder's place,
    every image's name, size and modification time, and `image_size`.

    workers:  decoding threads; default one per core, at most 8.
    progress: show a progress bar on stderr while decoding, where that is a terminal.

    Raises UsageError where the folder is not laid out as above, RunError where images are damaged.
    """
    if image_size < 1:
        raise UsageError(f"image size {image_size}: must be at least 1 pixel")
    try:
        listing = list_images(Path(root))
    except OSError as error:
        raise UsageError(f"{printable(error.filename)}: cannot be listed ({error.strerror})") from error
    _report(listing)

    def fill(array: np.ndarray) -> None:
        _decode_all(listing, array, workers, progress)

    shape = (len(listing.paths), 3, image_size, image_size)
    images = cached_images(_cache_key(listing, image_size), shape, fill, cache_dir)
    labels = torch.tensor(listing.labels)
    name, cut = printable(listing.root.name), listing.num_train
    return (
        ImageSet(name, images[:cut], labels[:cut], listing.classes),
        ImageSet(name, images[cut:], labels[cut:], listing.classes),
    )


def list_images(root: Path) -> Listing:
    """Find the images of `root` and their classes without opening any. Raises UsageError, OSError."""
    if not root.is_dir():
        raise UsageError(f"{printable(root)}: no such folder of images")
    missing = [split for split in SPLITS if not (root / split).is_dir()]
    if missing:
        raise UsageError(f"{printable(root)}: has no folder {missing[0]}/; expected {{train,test}}/<class>/<image>")
    root, skipped = root.resolve(), []
    train, test = (_list_split(root / split, skipped) for split in SPLITS)
    _check_classes(root, train, test)
    names = sorted(train)
    paths, labels, stamps = [], [], []
    for split, found in zip(SPLITS, (train, test), strict=True):
        for label, name in enumerate(names):
            for image, stamp in sorted(found.get(name, {}).items()):
                paths.append(os.path.join(split, name, image))
                labels.append(label)
                stamps.append(stamp)
    num_train = sum(len(images) for images in train.values())
    return Listing(root, tuple(map(printable, names)), paths, labels, stamps, num_train, skipped)


def _list_split(folder: Path, skipped: list[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """Per class folder the images and their stamps; what is neither joins `skipped`."""
    extensions, classes = _formats()[0], {}
    for class_entry in os.scandir(folder):
        if class_entry.name.startswith(".") or not class_entry.is_dir():
            skipped.append(class_entry.path)
            continue
        images = classes[class_entry.name] = {}
        for entry in os.scandir(class_entry.path):
            name = entry.name
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in extensions:
                skipped.append(entry.path)
            elif entry.is_file():
                status = entry.stat()
                images[name] = status.st_size, status.st_mtime_ns
            elif entry.is_symlink() and not os.path.exists(entry.path):
                images[name] = -1, -1
            else:
                skipped.append(entry.path)
    return classes


def _check_classes(root: Path, train: dict, test: dict) -> None:
    where = printable(root)
    if len(train) < 2:
        raise UsageError(f"{where}/train: {len(train)} class folders; at least 2 are needed, <class>/<image>")
    empty = sorted(name for name, images in train.items() if not images)
    if empty:
        raise UsageError(f"{where}/train/{printable(empty[0])}: no images ({len(empty)} such class folders)")
    unknown = sorted(set(test) - set(train))
    if unknown:
        raise UsageError(
            f"{where}/test/{printable(unknown[0])}: no class of that name in train/ ({len(unknown)} such class folders)"
        )
    if not any(test.values()):
        raise UsageError(f"{where}/test: no images")


def _report(listing: Listing) -> None:
    where = printable(listing.root)
    if listing.skipped:
        first = printable(min(listing.skipped))
        print(f"{where}: skipped {len(listing.skipped)} entries that are not images, {first} first", file=sys.stderr)
    tested = set(listing.labels[listing.num_train :])
    untested = [name for label, name in enumerate(listing.classes) if label not in tested]
    if untested:
        print(f"warning: {where}: {len(untested)} classes have no test images, {untested[0]} first", file=sys.stderr)
    shared = shared_images(listing.root, listing.paths, [size for size, _ in listing.stamps], listing.num_train)
    if shared:
        test, train = min(shared.items())
        print(
            f"warning: {where}: {len(shared)} of {len(listing.paths) - listing.num_train} test images are training images "
            f"as well ({printable(test)} is {printable(train)}): accuracies on them say nothing about new images",
            file=sys.stderr,
        )


def _cache_key(listing: Listing, image_size: int) -> str:
    content = hashlib.sha256(repr((VERSION, image_size)).encode())
    # The place is part of the key: two data sets can agree in all names, sizes and times (raw formats, unpacked
    # archives), and nothing else would tell them apart.
    content.update(os.fsencode(listing.root))
    for path, (size, time_ns) in zip(listing.paths, listing.stamps, strict=True):
        content.update(b"\0%s\0%d\0%d" % (os.fsencode(path), size, time_ns))
    name = re.sub(r"[^A-Za-z0-9._-]", "_", listing.root.name)[:60]
    return f"{name}-{image_size}-{content.hexdigest()[:32]}"


def _decode_all(listing: Listing, array: np.ndarray, workers: int | None, progress: bool) -> None:
    """Decode every image into its place in `array`; raise RunError naming the damaged ones.

    Threads, because PIL decodes and resizes without Python's lock and a process would have to import torch again.
    """
    damaged: dict[int, str] = {}
    size = array.shape[-1]

    def decode(start: int) -> int:
        indices = range(start, min(start + IMAGES_PER_JOB, len(array)))
        for index in indices:
            try:
                pixels = decode_image(listing.root / listing.paths[index], size)
            except Exception as error:  # a damaged file can make PIL's plugins raise anything
                damaged[index] = _reason(error)
            else:
                array[index] = pixels
        return len(indices)

    jobs = range(0, len(array), IMAGES_PER_JOB)
    quiet = None if progress else True  # None: tqdm decides by whether stderr is a terminal
    bar = tqdm(desc=f"decoding {listing.root.name}", total=len(array), unit=" images", file=sys.stderr, disable=quiet)
    pool = ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 8))
    with bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            for done in pool.map(decode, jobs):
                bar.update(done)
        finally:
            pool.shutdown(cancel_futures=True)
    if damaged:
        _raise_damaged(listing, damaged)


def decode_image(path: str | os.PathLike, image_size: int) -> np.ndarray:
    """uint8 (3, image_size, image_size), RGB, or (1, image_size, image_size) where the file is grey.

    Raises whatever PIL raises on a damaged file, and ValueError for pixels without a known range.
    """
    with Image.open(path, formats=_formats()[1]) as image:
        # A JPEG far too large is decoded at a fraction of its size, which may end within a pixel.
        drafted = image.draft(None, (2 * image_size, 2 * image_size))
        image.load()  # size and mode are final only now
        width, height = drafted[1][2:] if drafted else image.size
        side, left, top = min(width, height), max(width - height, 0) / 2, max(height - width, 0) / 2
        square = _as_grey_or_rgb(image).resize(
            (image_size, image_size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
        )
        with suppress(Exception):  # EXIF that cannot be read, or is not there, spoils no pixel
            square.getexif()[ExifTags.Base.Orientation] = image.getexif()[ExifTags.Base.Orientation]
            square = ImageOps.exif_transpose(square)
    pixels = np.asarray(square)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _as_grey_or_rgb(image: Image.Image) -> Image.Image:
    """8-bit, mode L or RGB, of whatever mode PIL gives."""
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        opaque = Image.new("RGB", image.size)
        opaque.paste(image, mask=image.getchannel("A"))
        return opaque
    if image.mode in ("1", "L"):
        return image.convert("L")
    return image.convert("RGB")


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    limit = 1 if pixels.dtype.kind == "f" else 65535
    if not (pixels.min() >= 0 and pixels.max() <= limit):  # NaN fails both
        raise ValueError(f"pixel values outside 0 to {limit}")
    return np.round(pixels * np.float32(255 / limit)).astype(np.uint8)


@functools.cache
def _formats() -> tuple[frozenset[str], tuple[str, ...]]:
    """The file extensions, lower case, and the names of the formats that are decoded."""
    by_extension = Image.registered_extensions()
    formats = [name for name in Image.ID if name in by_extension.values() and name not in NOT_DECODED]
    formats.sort(key=lambda name: name not in ("JPEG", "PNG"))  # PIL tries them in this order
    return frozenset(extension for extension, name in by_extension.items() if name in formats), tuple(formats)


def _raise_damaged(listing: Listing, damaged: dict[int, str]) -> None:
    shown = sorted(damaged)[:DAMAGED_SHOWN]
    names = ", ".join(f"{printable(listing.paths[index])} ({damaged[index]})" for index in shown)
    more = f" and {len(damaged) - DAMAGED_SHOWN} more" if len(damaged) > DAMAGED_SHOWN else ""
    raise RunError(
        f"{printable(listing.root)}: {len(damaged)} of {len(listing.paths)} images cannot be decoded: {names}{more}; "
        "replace or remove them"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def printable(name: str | os.PathLike) -> str:
    """The name of a file or folder on one line of valid UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace").replace("\n", "\\n")
