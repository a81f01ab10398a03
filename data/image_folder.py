"""Image folders, `{train,test}/<class>/<image>`, as two ImageSets: decoded once, in parallel, into the cache.

- Grey, palette, CMYK and two-tone images become RGB; 16-bit ones are scaled to 8 bits; float pixels must lie in [0, 1].
- Transparent pixels are laid over black; of an animation the first frame is taken; an EXIF rotation is carried out.
- Images are resized on the shorter side (bicubic) and centre-cropped.
- Hidden files and those whose extension is no image's are skipped and counted on stderr.
- Damaged images, and those of more than `PIL.Image.MAX_IMAGE_PIXELS` (89 million), end the run, all named together.
"""

import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import make_dataset
from tqdm import tqdm

from data.cache import cached_images
from data.image_set import ImageSet
from data.shared_images import shared_images
from util.runtime.errors import RunError, UsageError

VERSION = 1  # of the decoding: to be raised with every change of its pixels, so that cached ones lapse
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "JPEG2000", "ICO")  # none that PIL leaves to a program
EXTENSIONS = tuple(extension for extension, name in Image.registered_extensions().items() if name in FORMATS)
IMAGES_PER_JOB = 32
DAMAGED_SHOWN = 5


def image_folder(root: str | os.PathLike, image_size: int, cache_dir: Path) -> tuple[ImageSet, ImageSet]:
    """The training and the test images of `root`, as square RGB images of `image_size` pixels a side.

    The classes are the training folders' names, sorted. Both sets share one cache file, keyed by every image's path, size
    and modification time, and by `image_size`.
    """
    root = Path(root).resolve()
    with _readable(root, "{train,test}/<class>/<image>"):
        classes, train, test = _list_images(root)
        paths, cut = [Path(path) for path, _ in train + test], len(train)
        images = _decoded(root, paths, image_size, cache_dir)
    shared = shared_images(paths[:cut], paths[cut:])
    if shared:
        first, twin = (path.relative_to(root) for path in min(shared.items()))
        found = f"{len(shared)} of {len(test)} test images are training images as well ({first} is {twin})"
        print(f"warning: {root}: {found}: accuracies on them say nothing about new images", file=sys.stderr)
    labels = torch.tensor([label for _, label in train + test])
    whole = ImageSet(root.name, images, labels, classes)
    return whole.subset(slice(cut)), whole.subset(slice(cut, None))


def flat_folder(root: str | os.PathLike, image_size: int, cache_dir: Path) -> ImageSet:
    """The images of `root`, `<class>/<image>`, without a split; everything else as `image_folder`."""
    root, skipped = Path(root).resolve(), []
    with _readable(root, "<class>/<image>"):
        classes = _folders(root)
        if not classes:
            raise UsageError(f"{root}: no class folders; <class>/<image> is needed")
        found = make_dataset(root, {name: c for c, name in enumerate(classes)}, is_valid_file=_is_image(root, skipped))
        images = _decoded(root, [Path(path) for path, _ in found], image_size, cache_dir)
    _tell_skipped(root, skipped)
    return ImageSet(root.name, images, torch.tensor([label for _, label in found]), tuple(classes))


@contextmanager
def _readable(root: Path, layout: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{root}: cannot be read as {layout}: {error}") from error


def _decoded(root: Path, paths: list[Path], image_size: int, cache_dir: Path) -> Tensor:
    """uint8 (N, 3, H, W), from the cache where these files are known."""
    # A broken link stands for itself: decoding names it with what else is damaged.
    stats = [path.stat(follow_symlinks=path.exists()) for path in paths]
    files = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]
    digest = hashlib.sha256(repr((VERSION, image_size, files)).encode()).hexdigest()[:32]
    key, shape = f"{root.name}-{image_size}-{digest}", (len(paths), 3, image_size, image_size)
    return cached_images(key, shape, lambda array: _decode_all(root, paths, array), cache_dir)


def _is_image(root: Path, skipped: list[str]) -> Callable[[str], bool]:
    """Whether a file is taken; those that are not are added to `skipped`."""

    def is_image(path: str) -> bool:
        found = path.lower().endswith(EXTENSIONS) and f"{os.sep}." not in path.removeprefix(str(root))
        if not found:
            skipped.append(path)
        return found

    return is_image


def _tell_skipped(root: Path, skipped: list[str]) -> None:
    if skipped:
        print(f"{root}: skipped {len(skipped)} files that are not images, {min(skipped)} first", file=sys.stderr)


def _list_images(root: Path) -> tuple[tuple[str, ...], list[tuple[str, int]], list[tuple[str, int]]]:
    """The classes, and the training and the test images with their labels, sorted by class and name; none is opened."""
    classes, tested = _folders(root / "train"), _folders(root / "test")
    if len(classes) < 2:
        raise UsageError(f"{root}/train: {len(classes)} class folders; at least 2 are needed, <class>/<image>")
    unknown = sorted(set(tested) - set(classes))
    if unknown:
        raise UsageError(f"{root}/test/{unknown[0]}: no class of that name in train/ ({len(unknown)} such class folders)")

    skipped = []
    is_image = _is_image(root, skipped)
    label_of = {name: label for label, name in enumerate(classes)}
    train = make_dataset(root / "train", label_of, is_valid_file=is_image)  # raises for a class without images
    test = make_dataset(root / "test", label_of, is_valid_file=is_image, allow_empty=True)
    if not test:
        raise UsageError(f"{root}/test: no images")
    _tell_skipped(root, skipped)
    untested = sorted({*range(len(classes))} - {label for _, label in test})
    if untested:
        print(f"warning: {root}: {len(untested)} classes have no test images, {classes[untested[0]]} first", file=sys.stderr)
    return tuple(classes), train, test


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _decode_all(root: Path, paths: list[Path], array: np.ndarray) -> None:
    """Decode every image into its place in `array`; RunError names the damaged ones.

    In threads, because PIL decodes and resizes without Python's lock and a process would have to import torch again.
    """

    def decode(index: int) -> str | None:
        try:
            array[index] = decode_image(paths[index], array.shape[-1])
        except Exception as error:  # a damaged file can make PIL raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else reason
            return f"{paths[index].relative_to(root)} ({reason})"

    with ThreadPool(min(os.cpu_count() or 1, 8)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        done = pool.imap(decode, range(len(paths)), IMAGES_PER_JOB)
        bar = tqdm(done, f"decoding {root.name}", len(paths), unit=" images", disable=None)  # None: only on a terminal
        damaged = [reason for reason in bar if reason]
    if damaged:
        more = f" and {len(damaged) - DAMAGED_SHOWN} more" if len(damaged) > DAMAGED_SHOWN else ""
        named = f"{len(damaged)} of {len(paths)} images cannot be decoded: {', '.join(damaged[:DAMAGED_SHOWN])}{more}"
        raise RunError(f"{root}: {named}; replace or remove them")


def decode_image(path: Path, image_size: int) -> np.ndarray:
    """uint8 (3, image_size, image_size), RGB. Raises whatever PIL raises on a damaged file."""
    with Image.open(path, formats=FORMATS) as image:
        # A JPEG far too large is decoded at a fraction of its size, which may end within a pixel.
        drafted = image.draft(None, (2 * image_size, 2 * image_size))
        image.load()  # size and mode are final only now
        width, height = drafted[1][2:] if drafted else image.size
        side, left, top = min(width, height), max(width - height, 0) / 2, max(height - width, 0) / 2
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
