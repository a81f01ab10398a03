"""Which classes are forgotten when, and which training images a method may see for it.

Everything here is a pure function of its arguments: the same on every rank, after every restart.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from util.errors import UsageError


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


def forgetting_tasks(
    labels: Tensor,
    num_classes: int,
    *,
    num_tasks: int,
    per_task: int,
    seed: int,
    data_ratio: float = 0.1,
    few_shot: int | None = None,
    num_missing: int = 0,
) -> list[ForgettingTask]:
    """The sequence of tasks over the training `labels` (N,).

    With k = `per_task`, task t keeps the classes `order[0 : C − t·k]` and forgets the next k. A method sees `few_shot`
    images of every class if given, else the share `data_ratio` of each class's images (at least one). The first
    `num_missing` classes of the order, which remain throughout, lend none.
    Raises UsageError for counts that leave no class, or classes without enough images.
    """
    _check_counts(num_classes, num_tasks, per_task, data_ratio, few_shot, num_missing)
    order = class_order(num_classes, seed)
    by_class = _indices_by_class(labels, num_classes)
    missing = tuple(sorted(order[:num_missing]))
    tasks = []
    for number in range(1, num_tasks + 1):
        kept = num_classes - number * per_task
        remain, forget = sorted(order[:kept]), sorted(order[kept : kept + per_task])
        seen = [c for c in remain if c not in missing]
        draw = [(forget, "forget_indices"), (seen, "remain_indices")]
        samples = {
            key: np.concatenate([_sample(by_class[c], c, number, seed, data_ratio, few_shot) for c in classes])
            for classes, key in draw
        }
        tasks.append(
            ForgettingTask(
                number=number,
                forget=tuple(forget),
                remain=tuple(remain),
                old=tuple(sorted(order[kept + per_task :])),
                missing=missing,
                **{key: torch.from_numpy(indices) for key, indices in samples.items()},
            )
        )
    return tasks


def split_validation(labels: Tensor, num_classes: int, share: float) -> tuple[Tensor, Tensor]:
    """Positions (in order) of the images to train on and of those held out: `share` of each class, at least one.

    The split depends on nothing else, so that what pre-training held out, forgetting holds out too.
    Raises UsageError if a class has too few images for both.
    """
    if not 0 < share < 1:
        raise UsageError(f"--validation-share {share} is out of range: between 0 and 1")
    kept, held = [], []
    for label, indices in enumerate(_indices_by_class(labels, num_classes)):
        count = max(1, round(share * len(indices)))
        if count >= len(indices):
            raise UsageError(f"class {label} has {len(indices)} training images: too few to hold out {count} of them")
        shuffled = np.random.default_rng([label]).permutation(indices)
        held.append(shuffled[:count])
        kept.append(shuffled[count:])
    return tuple(torch.from_numpy(np.sort(np.concatenate(part))) for part in (kept, held))


def _check_counts(
    num_classes: int, num_tasks: int, per_task: int, data_ratio: float, few_shot: int | None, num_missing: int
) -> None:
    if num_tasks < 1 or per_task < 1:
        raise UsageError(f"--num-tasks {num_tasks} and --forget-per-task {per_task} must both be at least 1")
    left = num_classes - num_tasks * per_task
    if left < 1:
        raise UsageError(
            f"{num_tasks} tasks of {per_task} classes forget {num_tasks * per_task} of {num_classes}: at least one must "
            f"remain; lower --num-tasks or --forget-per-task"
        )
    if not 0 <= num_missing < left:
        raise UsageError(
            f"--missing-classes {num_missing} is out of range: {left} classes remain after the last task, and at least "
            f"one of them must lend images"
        )
    if not 0 < data_ratio <= 1:
        raise UsageError(f"--data-ratio {data_ratio} is out of range: above 0, at most 1")
    if few_shot is not None and few_shot < 1:
        raise UsageError(f"--few-shot {few_shot} is out of range: at least 1 image a class")


def _indices_by_class(labels: Tensor, num_classes: int) -> list[np.ndarray]:
    values = labels.cpu().numpy()
    order = np.argsort(values, kind="stable")
    return np.split(order, np.searchsorted(values[order], np.arange(1, num_classes)))


def _sample(
    indices: np.ndarray, label: int, task: int, seed: int, data_ratio: float, few_shot: int | None
) -> np.ndarray:
    """Draw a class's images for one task; sorted, so that only the generator of the epoch orders batches."""
    count = few_shot if few_shot is not None else max(1, round(data_ratio * len(indices)))
    if count > len(indices):
        raise UsageError(f"class {label} has {len(indices)} training images, fewer than the {count} a class asked for")
    generator = np.random.default_rng([seed, task, label])
    return np.sort(generator.permutation(indices)[:count])
