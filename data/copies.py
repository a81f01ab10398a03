"""Photos of one person under another person's name: whoever is forgotten stays known there."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

from data.image_files import warn
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from util.runtime.errors import UsageError

SHOWN = 3  # pairs of people
DIGITS = 16  # of a digest, kept in checkpoints


def find_copies(
    data: Sequence[ImageSet], forgotten: set[int], kept: set[int]
) -> dict[tuple[int, int], list[tuple[str, str]]]:
    """Images with the same content: (forgotten person, kept person) → their files, in pairs."""
    known, found = defaultdict(list), defaultdict(list)
    for c, file, digest in _images(data):
        if c in kept:
            known[digest].append((c, file))
    for c, file, digest in _images(data):
        for other, its in known.get(digest, ()) if c in forgotten else ():
            found[c, other].append((file, its))
    return dict(found)


def check_copies(data: Sequence[ImageSet], tasks: Sequence[ForgettingTask], refuse: bool) -> None:
    """Name the photos of people whom `tasks` forget that stay under the name of somebody who is kept.

    Raises UsageError with `refuse`, else it is a warning; so it is where that person is forgotten by a later task.
    """
    classes, last, found = data[0].classes, {*tasks[-1].remain}, {}
    for task in tasks:
        found |= find_copies(data, {*task.forget}, {*task.remain})
    for kept in (True, False):
        findings = [
            f"{len(files)} of the photos of {classes[c]} are kept as {classes[other]}'s ({files[0][0]} is {files[0][1]})"
            for (c, other), files in found.items()
            if (other in last) == kept
        ]
        _warn_or_raise(data[0].name, findings, refuse and kept)


def check_forgotten(data: Sequence[ImageSet], task: ForgettingTask, known: Collection[str], refuse: bool) -> None:
    """The same of photos that earlier runs have forgotten: `known` are the beginnings of their files' digests."""
    found = defaultdict(list)
    for c, file, digest in _images(data):
        if digest[:DIGITS] in known and c not in task.old:
            found[data[0].classes[c]].append(file)
    findings = [
        f"{len(files)} photos that were forgotten before are {name}'s now ({files[0]})" for name, files in found.items()
    ]
    _warn_or_raise(data[0].name, findings, refuse)


def _images(data: Sequence[ImageSet]) -> Iterator[tuple[int, str, str]]:
    """Class, file and digest of every image."""
    for images in data:
        yield from zip(images.labels.tolist(), images.files, images.digests, strict=False)  # none: images that are no files


def _warn_or_raise(name: str, findings: list[str], refuse: bool) -> None:
    more = [f"and {len(findings) - SHOWN} more such pairs of people"] * (len(findings) > SHOWN)
    message = f"{name}: {'; '.join(findings[:SHOWN] + more)}"
    if findings and refuse:
        raise UsageError(f"{message}: remove them there, name both people, or add --allow-copies")
    if findings:
        warn(f"warning: {message}")
