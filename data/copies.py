"""Photos of one person under another person's name: whoever is forgotten stays known there."""

import sys
from collections import defaultdict
from collections.abc import Sequence

from data.image_set import ImageSet
from data.tasks import ForgettingTask
from util.runtime.errors import UsageError

SHOWN = 3  # pairs of people


def copies(data: Sequence[ImageSet], forgotten: set[int], kept: set[int]) -> dict[tuple[int, int], list[tuple[str, str]]]:
    """Images with the same content: (forgotten person, kept person) → their files, in pairs."""
    known = defaultdict(list)
    for images in data:
        for c, file, digest in zip(images.labels.tolist(), images.files, images.digests, strict=True):
            known[digest].append((c, file))
    found = defaultdict(list)
    for same in known.values():
        for c, file in same if len(same) > 1 else ():
            for other, its in same:
                if c in forgotten and other in kept:
                    found[c, other].append((file, its))
    return dict(found)


def check_copies(data: Sequence[ImageSet], tasks: Sequence[ForgettingTask], refuse: bool) -> None:
    """Name the photos of people whom `tasks` forget that stay under the name of somebody who is kept.

    Raises UsageError with `refuse`, else it is a warning.
    """
    if not all(images.digests for images in data):
        return
    forgotten, kept, classes = {c for task in tasks for c in task.forget}, {*tasks[-1].remain}, data[0].classes
    if not (found := copies(data, forgotten, kept)):
        return
    told = [
        f"{len(files)} of the photos of {classes[c]} are kept as {classes[other]}'s ({files[0][0]} is {files[0][1]})"
        for (c, other), files in [*found.items()][:SHOWN]
    ]
    told += [f"and {len(found) - SHOWN} more such pairs of people"] * (len(found) > SHOWN)
    message = f"{data[0].name}: {'; '.join(told)}"
    if refuse:
        raise UsageError(f"{message}: remove them there, name both people, or add --allow-copies")
    print(f"warning: {message}", file=sys.stderr)
