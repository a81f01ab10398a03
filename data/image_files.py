"""The image files of a data folder: listed, and hashed; none is decoded here. What is unusual: docs/data.md."""

import hashlib
import io
import os
import stat
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from util.runtime.errors import RunError, UsageError
from util.runtime.files import write_text

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "JPEG2000", "ICO")  # none that PIL leaves to a program
EXTENSIONS = tuple(extension for extension, name in Image.registered_extensions().items() if name in FORMATS)
IMAGES_PER_JOB = 32
DAMAGED_SHOWN = 5
NO_IMAGES = "files that are hidden or no image of a class"


@dataclass(frozen=True)
class ImageFiles:
    """Image files: the training images first, each split sorted by class, folder and name."""

    root: Path
    classes: tuple[str, ...]  # sorted
    files: tuple[str, ...]  # paths below `root`
    labels: tuple[int, ...]  # indices into `classes`
    train: int  # how many are training images
    states: list[tuple[str, int, int]]  # whole path, size and time of change: what is known of a file holds while they stay
    read: Callable[[int], bytes] | None = None  # the encoded image at a position, where it is no file of its own

    def open(self, index: int) -> BinaryIO:
        """The encoded image at position `index`. Raises OSError where it is no regular file: opening a pipe would wait."""
        if self.read is not None:
            return io.BytesIO(self.read(index))
        path = self.states[index][0]
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("not a regular file")
        return open(path, "rb")


def list_images(root: str | os.PathLike, split: bool = True) -> ImageFiles:
    """The images `{train,test}/<class>/<image>` of `root`, or `<class>/<image>` without a split.

    The classes are those with training images.
    """
    root = Path(root).resolve()
    skipped, top = defaultdict(list), "train" if split else ""
    try:
        train, test = _images(root, top, skipped), _images(root, "test", skipped) if split else {}
        names = tuple(name for name, found in train.items() if found)
        files = [(path, c) for part in (train, test) for c, name in enumerate(names) for path in part.get(name, ())]
        states = [_state(os.path.join(root, path)) for path, _ in files]
    except OSError as error:
        layout = "{train,test}/<class>/<image>" if split else "<class>/<image>"
        raise UsageError(printable(f"{root}: cannot be read as {layout}: {error}")) from error
    if empty := [os.path.join(top, name) for name in train if name not in names]:
        skipped["class folders without images"] = empty
    if skipped:
        kinds = [f"{len(paths)} {kind} ({paths[0]}{', …' * (len(paths) > 1)})" for kind, paths in skipped.items()]
        warn(f"{root}: skipped {', '.join(kinds)}")
    least = 2 if split else 1
    if len(names) < least:
        few = f"{len(names)} class folders; at least {least} are needed, <class>/<image>"
        raise UsageError(printable(f"{root / top}: {few}"))
    if split:
        _check_test(root, train, test, names)
    paths, labels = zip(*files, strict=True)
    return ImageFiles(root, names, paths, labels, sum(map(len, train.values())), states)


def _images(root: Path, top: str, skipped: dict[str, list[str]]) -> dict[str, list[str]]:
    """The class folders in `top` → their images, as paths below the root; both sorted. Adds what it skips to `skipped`."""
    owners, found, pending = {}, {}, [(top, os.path.realpath(root / top), "")]
    for folder, real, owner in pending:  # it grows by what is found there
        for entry in sorted(os.scandir(real), key=lambda entry: entry.name):
            path, name = os.path.join(folder, entry.name), owner or entry.name
            if entry.name.startswith("."):
                skipped[NO_IMAGES].append(path)
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                target = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                leads_back = os.path.commonpath([real, target]) == target
                first, first_name = owners.setdefault(target, (path, name))
                if leads_back or (first_name == name and first != path):
                    skipped["folders that are there twice"].append(path)
                elif first_name != name:
                    raise UsageError(printable(f"{root}: {first} and {path} are one folder: one person under two names"))
                else:
                    found.setdefault(name, [])
                    pending.append((path, target, name))
            elif owner and entry.name.lower().endswith(EXTENSIONS):
                found[owner].append((folder, entry.name))  # a dead link is named with what else is damaged
            elif not os.path.exists(entry.path):
                raise UsageError(printable(f"{root}/{path}: a link that leads nowhere; mend or remove it"))
            else:
                skipped[NO_IMAGES].append(path)
    return {name: [os.path.join(*parts) for parts in sorted(images)] for name, images in found.items()}


def _check_test(root: Path, train: dict[str, list[str]], test: dict[str, list[str]], names: tuple[str, ...]) -> None:
    # Whoever was erased may have left an empty folder in both.
    if unknown := [name for name, found in test.items() if name not in names and (found or name not in train)]:
        found = f"no class of that name in train/ ({len(unknown)} such class folders)"
        raise UsageError(printable(f"{root}/test/{unknown[0]}: {found}"))
    untested = [name for name in names if not test.get(name)]
    if len(untested) == len(names):
        raise UsageError(printable(f"{root}/test: no images"))
    if untested:
        warn(f"warning: {root}: {len(untested)} classes have no test images, {untested[0]} first")


def _state(path: str) -> tuple[str, int, int]:
    found = os.stat(path, follow_symlinks=os.path.exists(path))  # a dead link stands for itself
    return path, found.st_size, found.st_mtime_ns


def file_digests(listed: ImageFiles, cache_dir: Path) -> tuple[str, ...]:
    """The SHA-256 of each file, from the cache where these files are known. RunError names those that cannot be read."""
    states = hashlib.sha256(repr(listed.states).encode()).hexdigest()[:32]
    kept = cache_dir / f"{listed.root.name}-{states}.sha256"
    with suppress(OSError, ValueError):
        digests = tuple(kept.read_text().split())
        if {*map(len, digests)} == {64} and len(digests) == len(listed.files):
            return digests
    digests = for_all(lambda index, file: digest_of(file), listed, "hashing", cache_dir)
    with suppress(OSError):  # the cache of the images says that it cannot be written
        write_text(kept, "\n".join(digests))
    return tuple(digests)


def digest_of(file: BinaryIO) -> str:
    return hashlib.sha256(file.read()).hexdigest()


def for_all(
    work: Callable[[int, BinaryIO], Any],
    listed: ImageFiles,
    doing: str,
    cache_dir: Path,
    indices: Sequence[int] | None = None,
) -> list:
    """What `work(index, file)` gives for every image (for those at `indices`); RunError names those where it raised.

    A file in the cache folder lists all of them.

    In threads, because PIL and hashing do without Python's lock and a process would have to import torch again.
    """
    damaged = {}

    def attempt(index: int) -> Any:
        try:
            with listed.open(index) as file:
                return work(index, file)
        except Exception as error:  # a damaged file can make PIL raise anything
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
            damaged[index] = printable(f"{listed.files[index]} ({reason or type(error).__name__})")

    indices = range(len(listed.files)) if indices is None else indices
    count, name = len(indices), listed.root.name
    with ThreadPool(min(os.cpu_count() or 1, 8)) as pool:
        done = pool.imap(attempt, indices, IMAGES_PER_JOB)
        found = [*tqdm(done, f"{doing} {name}", count, unit=" images", disable=None)]  # None: only on a terminal
    if damaged:
        lines = [line for _, line in sorted(damaged.items())]
        more, whole = len(lines) - DAMAGED_SHOWN, cache_dir / f"damaged-{name}.txt"
        shown = ", ".join(lines[:DAMAGED_SHOWN]) + f" and {more} more" * (more > 0)
        with suppress(OSError):
            write_text(whole, "\n".join([*lines, ""]))
            shown += f", all in {whole}" * (more > 0)
        named = f"{len(lines)} of {count} images cannot be decoded: {shown}; replace or remove them"
        raise RunError(printable(f"{listed.root}: {named}"))
    return found


def printable(text: str) -> str:
    """Names may hold line breaks, and bytes that are no text: as Python writes them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def warn(text: str) -> None:
    print(printable(text), file=sys.stderr)
