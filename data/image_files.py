"""The image files of a data folder: listed, and hashed; none is decoded here.

- Links are followed. Those that lead out of the folder are counted on stderr; two classes that share a folder are refused.
- What is there twice (as by a link back), hidden or no image of a class, and empty classes are skipped and counted.
"""

import hashlib
import os
import stat
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from util.runtime.errors import RunError, UsageError
from util.runtime.files import sha256, write_text

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "JPEG2000", "ICO")  # none that PIL leaves to a program
EXTENSIONS = tuple(extension for extension, name in Image.registered_extensions().items() if name in FORMATS)
IMAGES_PER_JOB = 32
DAMAGED_SHOWN = 5
NO_IMAGES = "files that are hidden or no image of a class"


@dataclass(frozen=True)
class ImageFiles:
    """Image files: the training images first, each split sorted by class, folder and name.

    files:  paths below `root`; labels: indices into `classes`, the sorted class names; train: how many are training images.
    states: of each file its whole path, size and time of change: what is known of the files holds as long as these stay.
    """

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]
    train: int
    states: list[tuple[str, int, int]]


def list_images(root: str | os.PathLike, split: bool = True) -> ImageFiles:
    """The images `{train,test}/<class>/<image>` of `root`, or `<class>/<image>` without a split.

    The classes are those with training images.
    """
    root = Path(root).resolve()
    walk, top = _Walk(str(root)), "train" if split else ""
    try:
        train, test = walk.classes(top), walk.classes("test") if split else {}
        names = tuple(name for name, found in train.items() if found)
        files = [(path, c) for part in (train, test) for c, name in enumerate(names) for path in part.get(name, ())]
        states = [_state(os.path.join(root, path)) for path, _ in files]
    except OSError as error:
        layout = "{train,test}/<class>/<image>" if split else "<class>/<image>"
        raise UsageError(one_line(f"{root}: cannot be read as {layout}: {error}")) from error
    walk.skipped["class folders without images"] += [os.path.join(top, name) for name in train if name not in names]
    walk.tell()
    least = 2 if split else 1
    if len(names) < least:
        few = f"{len(names)} class folders; at least {least} are needed, <class>/<image>"
        raise UsageError(one_line(f"{root / top}: {few}"))
    if split:
        _check_test(root, train, test, names)
    paths, labels = zip(*files, strict=True)
    return ImageFiles(root, names, paths, labels, sum(map(len, train.values())), states)


def _check_test(root: Path, train: dict[str, list[str]], test: dict[str, list[str]], names: tuple[str, ...]) -> None:
    # Whoever was erased may have left an empty folder in both.
    unknown = [name for name, found in test.items() if name not in names and (found or name not in train)]
    if unknown:
        found = f"no class of that name in train/ ({len(unknown)} such class folders)"
        raise UsageError(one_line(f"{root}/test/{unknown[0]}: {found}"))
    untested = [name for name in names if not test.get(name)]
    if len(untested) == len(names):
        raise UsageError(one_line(f"{root}/test: no images"))
    if untested:
        tell(f"warning: {root}: {len(untested)} classes have no test images, {untested[0]} first")


class _Walk:
    """Goes through the folders below `root`; notes what it skips, and which links lead out."""

    def __init__(self, root: str) -> None:
        self.root, self.skipped, self.outside = root, defaultdict(list), []

    def classes(self, top: str) -> dict[str, list[str]]:
        """The class folders in `top` → their images, as paths below the root; both sorted."""
        owners, found, pending = {}, {}, [(top, self._followed(top), "")]
        for folder, real, owner in pending:  # it grows by what is found there
            with os.scandir(os.path.join(self.root, folder)) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
            for entry in entries:
                path, target = os.path.join(folder, entry.name), os.path.join(real, entry.name)
                if entry.name.startswith("."):
                    self.skipped[NO_IMAGES].append(path)
                    continue
                if entry.is_symlink():
                    target = self._followed(path)
                if os.path.isdir(target) if entry.is_symlink() else entry.is_dir():
                    if self._is_new(path, target, real, owner or entry.name, owners):
                        found.setdefault(owner or entry.name, [])
                        pending.append((path, target, owner or entry.name))
                elif owner and entry.name.lower().endswith(EXTENSIONS):
                    found[owner].append((folder, entry.name))  # a dead link is named with what else is damaged
                elif os.path.exists(target):
                    self.skipped[NO_IMAGES].append(path)
                else:
                    dead = f"a link to {target}, which cannot be reached; mend or remove it"
                    raise UsageError(one_line(f"{self.root}/{path}: {dead}"))
        return {name: [os.path.join(*parts) for parts in sorted(images)] for name, images in found.items()}

    def _is_new(self, path: str, target: str, parent: str, owner: str, owners: dict[str, tuple[str, str]]) -> bool:
        first, first_owner = owners.setdefault(target, (path, owner))
        back = _within(parent, target)
        if first_owner != owner and not back:
            raise UsageError(one_line(f"{self.root}: {first} and {path} are one folder: one person under two names"))
        if back or first != path:
            self.skipped["folders that are there twice"].append(path)
        return not back and first == path

    def _followed(self, path: str) -> str:
        """Where it really lies, noted if that is outside."""
        target = os.path.realpath(os.path.join(self.root, path))
        if not _within(target, self.root):
            self.outside.append((path, target))
        return target

    def tell(self) -> None:
        found = {kind: paths for kind, paths in self.skipped.items() if paths}
        kinds = [f"{len(paths)} {kind} ({paths[0]}{', …' * (len(paths) > 1)})" for kind, paths in found.items()]
        if kinds:
            tell(f"{self.root}: skipped {', '.join(kinds)}")
        if self.outside:
            tell(f"{self.root}: {len(self.outside)} links lead out of this folder, {' to '.join(self.outside[0])} first")


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


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
    found = [""] * len(listed.files)

    def digest(index: int, path: str) -> None:
        found[index] = sha256(Path(path))

    for_all(digest, listed, "hashing", cache_dir)
    with suppress(OSError):  # the cache of the images says that it cannot be written
        write_text(kept, "\n".join(found))
    return tuple(found)


def for_all(work: Callable[[int, str], None], listed: ImageFiles, doing: str, cache_dir: Path) -> None:
    """`work(index, path)` for every file; RunError names those where it raised, and a file in the cache folder lists all.

    In threads, because PIL and hashing do without Python's lock and a process would have to import torch again.
    """

    def complaint(index: int) -> str | None:
        path = listed.states[index][0]
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise OSError("not a regular file")  # opening a pipe would wait
            work(index, path)
        except Exception as error:  # a damaged file can make PIL raise anything
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
            return one_line(f"{listed.files[index]} ({reason or type(error).__name__})")

    count, name = len(listed.files), listed.root.name
    with ThreadPool(min(os.cpu_count() or 1, 8)) as pool:
        done = pool.imap(complaint, range(count), IMAGES_PER_JOB)
        bar = tqdm(done, f"{doing} {name}", count, unit=" images", disable=None)  # None: only on a terminal
        damaged = [line for line in bar if line]
    if damaged:
        more, whole = len(damaged) - DAMAGED_SHOWN, cache_dir / f"damaged-{name}.txt"
        shown = ", ".join(damaged[:DAMAGED_SHOWN]) + f" and {more} more" * (more > 0)
        with suppress(OSError):
            write_text(whole, "\n".join([*damaged, ""]))
            shown += f", all in {whole}" * (more > 0)
        named = f"{len(damaged)} of {count} images cannot be decoded: {shown}; replace or remove them"
        raise RunError(one_line(f"{listed.root}: {named}"))


def one_line(text: str) -> str:
    """Names may hold line breaks, and bytes that are no text: as Python writes them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def tell(text: str) -> None:
    print(one_line(text), file=sys.stderr)
