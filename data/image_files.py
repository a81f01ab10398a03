"""The image files of a data folder: listed, and hashed; none is decoded here.

- Links are followed. Those that lead out of the folder are counted on stderr, those that lead back are skipped, and two
  classes that share a folder are refused.
- Hidden files and folders, files of other formats, files outside class folders and empty classes are skipped and counted.
"""

import hashlib
import os
import stat
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
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
    if len(names) < (2 if split else 1):
        few = f"{len(names)} class folders; at least 2 are needed, <class>/<image>"
        raise UsageError(one_line(f"{root / top}: {few if split else 'no class folders; <class>/<image> is needed'}"))
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
    if not any(test.values()):
        raise UsageError(one_line(f"{root}/test: no images"))
    untested = [name for name in names if not test.get(name)]
    if untested:
        tell(f"warning: {root}: {len(untested)} classes have no test images, {untested[0]} first")


class _Walk:
    """Goes through the folders below `root`; notes what it skips, and which links lead out."""

    def __init__(self, root: str) -> None:
        self.root, self.skipped, self.outside = root, defaultdict(list), []

    def classes(self, top: str) -> dict[str, list[str]]:
        """The class folders in `top` → their images, as paths below the root; both sorted."""
        self.owners, folders, real = {}, {}, os.path.realpath(os.path.join(self.root, top))
        self._note_outside(top, real)
        for name, path, target in self._entries(top, real):
            if target:
                folders[name] = path, target
            else:
                self.skipped["outside the class folders"].append(path)
        return {name: self._images(*folder, name) for name, folder in folders.items()}

    def _images(self, folder: str, real: str, owner: str) -> list[str]:
        pending, found = [(folder, real)], []
        while pending:
            folder, real = pending.pop()
            for name, path, target in self._entries(folder, real, owner):
                if target:
                    pending.append((path, target))
                elif _is_image(name):
                    found.append((folder, name))
                else:
                    self.skipped["without an image's extension"].append(path)
        return [os.path.join(*parts) for parts in sorted(found)]

    def _entries(self, folder: str, real: str, owner: str | None = None) -> Iterator[tuple[str, str, str | None]]:
        """What is to be looked at in a folder of the class `owner`: name, path below the root, real path of a folder."""
        with os.scandir(os.path.join(self.root, folder)) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
        for entry in entries:
            path, target = os.path.join(folder, entry.name), os.path.join(real, entry.name)
            if entry.name.startswith("."):
                self.skipped["hidden"].append(path)
                continue
            if entry.is_symlink():
                target = os.path.realpath(target)
                self._note_outside(path, target)
                # A dead link that stands for an image is named with what else is damaged.
                if not os.path.exists(target) and not (owner and _is_image(entry.name)):
                    dead = f"a link to {target}, which cannot be reached; mend or remove it"
                    raise UsageError(one_line(f"{self.root}/{path}: {dead}"))
            if not (os.path.isdir(target) if entry.is_symlink() else entry.is_dir()):
                yield entry.name, path, None
            elif self._is_new(path, target, real, owner or entry.name):
                yield entry.name, path, target

    def _is_new(self, path: str, target: str, parent: str, owner: str) -> bool:
        first, first_owner = self.owners.setdefault(target, (path, owner))
        if _within(parent, target):
            self.skipped["links back to a folder they lie in"].append(path)
        elif first_owner != owner:
            raise UsageError(one_line(f"{self.root}: {first} and {path} are one folder: one person under two names"))
        elif first != path:
            self.skipped["folders that are there twice"].append(path)
        else:
            return True
        return False

    def _note_outside(self, path: str, target: str) -> None:
        if not _within(target, self.root):
            self.outside.append((path, target))

    def tell(self) -> None:
        found = {kind: paths for kind, paths in self.skipped.items() if paths}
        kinds = [f"{len(paths)} {kind} ({paths[0]}{', …' * (len(paths) > 1)})" for kind, paths in found.items()]
        if kinds:
            tell(f"{self.root}: skipped {', '.join(kinds)}")
        if self.outside:
            tell(f"{self.root}: {len(self.outside)} links lead out of this folder, {' to '.join(self.outside[0])} first")


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _state(path: str) -> tuple[str, int, int]:
    try:
        found = os.stat(path)
    except OSError:  # a dead link stands for itself
        found = os.lstat(path)
    return path, found.st_size, found.st_mtime_ns


def file_digests(listed: ImageFiles, cache_dir: Path) -> tuple[str, ...]:
    """The SHA-256 of each file, from the cache where these files are known. RunError names those that cannot be read."""
    kept = cache_dir / f"{listed.root.name}-{_sha256(repr(listed.states))[:32]}.sha256"
    with suppress(OSError, ValueError):
        seal, digests = kept.read_text().split("\n", 1)
        if seal == _sha256(digests):
            return tuple(digests.split())
    found = [""] * len(listed.files)

    def digest(index: int, path: str) -> None:
        found[index] = sha256(Path(path))

    for_all(digest, listed, "hashing", cache_dir)
    digests = "\n".join(found)
    with suppress(OSError):  # the cache of the images says that it cannot be written
        write_text(kept, f"{_sha256(digests)}\n{digests}")
    return tuple(found)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
