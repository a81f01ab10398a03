"""Which classes are forgotten when, and which training images a method may see for it: the same after every restart."""

import csv
import difflib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.image_files import warn
from util.runtime.errors import UsageError

FEW_PHOTOS = 9  # with fewer photos of a person more of the person stays (docs/unseen.md)
FEW_TESTED = 5  # with fewer the audit of one person has hardly a metric with power


@dataclass(frozen=True)
class ForgettingTask:
    """One request to forget.

    Class ids: `forget` now, `remain` known afterwards (`missing` of them lend no images), `old` forgotten earlier.
    `forget_indices`, `remain_indices`: int64 positions in the training set that a method may see.
    """

    number: int
    forget: tuple[int, ...]
    remain: tuple[int, ...]
    old: tuple[int, ...]
    missing: tuple[int, ...]
    forget_indices: Tensor
    remain_indices: Tensor

    @property
    def setting(self) -> str:
        """Classes still known – classes forgotten now, as the paper writes it: `100-20`."""
        return f"{len(self.remain) + len(self.forget)}-{len(self.forget)}"


def class_order(num_classes: int, seed: int) -> list[int]:
    """The published order: Python's own generator, seeded, shuffles the class ids."""
    order = list(range(num_classes))
    random.Random(seed).shuffle(order)
    return order


def drawn_requests(num_classes: int, num_tasks: int, per_task: int, seed: int) -> list[list[int]]:
    """The protocol's requests: with k = `per_task`, task t keeps the classes `order[0 : C − t·k]` and forgets the next k."""
    if num_tasks * per_task >= num_classes:
        raise UsageError(f"{num_tasks} tasks of {per_task} classes: of {num_classes}, at least one must remain")
    order = class_order(num_classes, seed)
    return [order[num_classes - number * per_task :][:per_task] for number in range(1, num_tasks + 1)]


def named_requests(words: Sequence[str], classes: Sequence[str], earlier: Sequence[Sequence[int]]) -> list[list[int]]:
    """Requests by name, after the `earlier` ones: each of `words` lists the classes of one, read by `named_classes`."""
    task_of, requests = {}, [named_classes(word, classes) for word in words]
    for number, request in enumerate([*earlier, *requests], start=1):
        for c in request:
            if c in task_of:
                raise UsageError(f"task {task_of[c]} forgets {classes[c]!r} already")
            task_of[c] = number
    if len(task_of) == len(classes):
        raise UsageError(f"all {len(classes)} classes would be forgotten; at least one must remain")
    return requests


def named_classes(text: str, classes: Sequence[str]) -> list[int]:
    """Class ids from names, separated by commas or line ends; `#13` is class id 13, where no class has that name.

    A name with a comma in it stands in double quotes. Raises UsageError for a word that names nobody.
    """
    return [_class_id(name if name in classes else name.strip(), classes) for name in listed_names(text)]


def listed_names(text: str) -> list[str]:
    try:
        found = [name for row in csv.reader(io.StringIO(text, newline=""), skipinitialspace=True) for name in row]
    except csv.Error as error:
        raise UsageError(f"{text[:40]!r} is no list of names: {error}") from None
    if not any(map(str.strip, found)):
        raise UsageError("a list of names is empty")
    return [name for name in found if name.strip()]


def _class_id(name: str, classes: Sequence[str]) -> int:
    if name in classes:
        return classes.index(name)
    number = name.removeprefix("#")
    known = number.isascii() and number.isdecimal() and int(number) < len(classes)
    if known and name != number:
        return int(number)
    near = difflib.get_close_matches(name, classes, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"they are {classes[0]!r}, …, or #0 to #{len(classes) - 1}"
    if known:
        hint = f"class id {number} is written #{number} and is {classes[int(number)]!r}"
    raise UsageError(f"no class {name!r}; {hint}")


def name_list(ids: Sequence[int], classes: Sequence[str], most: int = 40) -> str:
    """Names for a line that is printed."""
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(classes[c] for c in ids[:most]) + more


def forgetting_tasks(
    labels: Tensor,
    num_classes: int,
    requests: Sequence[Sequence[int]],
    *,
    seed: int,
    data_ratio: float = 0.1,
    few_shot: int | None = None,
    num_missing: int = 0,
    earlier: int = 0,
) -> list[ForgettingTask]:
    """A task for each of `requests`, lists of class ids, over the training `labels` (N,).

    A method sees `few_shot` images of every class if given, else the share `data_ratio` of each class's images (at least
    one); none of the first `num_missing` classes that remain throughout, and none for the `earlier` tasks, which are done.
    """
    requested = {c for request in requests for c in request}
    staying = [c for c in class_order(num_classes, seed) if c not in requested]
    if not 0 <= num_missing < len(staying):
        raise UsageError(f"{num_missing} missing classes: of the {len(staying)} that remain, at least one must lend images")
    missing = tuple(sorted(staying[:num_missing]))
    by_class = _indices_by_class(labels, num_classes)

    def sample(classes: list[int], task: int) -> Tensor:
        """Draw the classes' images for one task; sorted, so that only the generator of the epoch orders batches."""
        parts = [np.empty(0, np.int64)]
        for c in classes:
            known = len(by_class[c])
            count = few_shot or max(1, round(data_ratio * known))
            if count > known:
                raise UsageError(f"class {c} has {known} training images, fewer than the {count} a class asked for")
            shuffled = np.random.default_rng([seed, task, c]).permutation(by_class[c])
            parts.append(np.sort(shuffled[:count]))
        return torch.from_numpy(np.concatenate(parts))

    tasks, old = [], set()
    for number, forget in enumerate(map(sorted, requests), start=1):
        remain = [c for c in range(num_classes) if c not in old and c not in forget]
        seen = ([], []) if number <= earlier else (forget, [c for c in remain if c not in missing])
        images = (sample(classes, number) for classes in seen)
        tasks.append(ForgettingTask(number, tuple(forget), tuple(remain), tuple(sorted(old)), missing, *images))
        old.update(forget)
    return tasks


def warn_of_few_photos(tasks: Sequence[ForgettingTask], labels: Tensor, test_labels: Tensor, classes: Sequence[str]) -> None:
    """Say of whom a method sees too few photos to forget them well, or an audit too few to decide."""
    seen = {c: int((labels[task.forget_indices] == c).sum()) for task in tasks for c in task.forget}
    tested = {c: int((test_labels == c).sum()) for c in seen}
    for counts, least, kind, then in (
        (seen, FEW_PHOTOS, "training", "the model may still know them afterwards"),
        (tested, FEW_TESTED, "test", "an audit will hardly decide"),
    ):
        if few := [f"{classes[c]} ({count})" for c, count in counts.items() if count < least]:
            warn(f"warning: fewer than {least} {kind} photos of {name_list(range(len(few)), few)}: {then}")


def pretraining_task(labels: Tensor, num_classes: int, without: Sequence[int] = ()) -> ForgettingTask:
    """Nothing to forget, every class and image to learn, but for the classes `without` (`old`): pre-training's task."""
    remain = tuple(c for c in range(num_classes) if c not in without)
    none, images = torch.empty(0, dtype=torch.long), torch.isin(labels, torch.tensor(remain)).nonzero()[:, 0]
    return ForgettingTask(0, (), remain, tuple(sorted({*without})), (), none, images)


def split_validation(labels: Tensor, num_classes: int, share: float) -> tuple[Tensor, Tensor]:
    """Positions of the images to train on and of those held out: `share` of each class, the same for every seed."""
    kept, held = [], []
    for label, indices in enumerate(_indices_by_class(labels, num_classes)):
        count = max(1, round(share * len(indices)))
        if count >= len(indices):
            raise UsageError(f"class {label} has {len(indices)} training images: too few to hold out {count} of them")
        shuffled = np.random.default_rng([label]).permutation(indices)
        held.append(shuffled[:count])
        kept.append(shuffled[count:])
    return tuple(torch.from_numpy(np.sort(np.concatenate(part))) for part in (kept, held))


def _indices_by_class(labels: Tensor, num_classes: int) -> list[np.ndarray]:
    values = labels.cpu().numpy()
    return np.split(np.argsort(values, kind="stable"), np.bincount(values, minlength=num_classes).cumsum()[:-1])
