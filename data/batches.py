"""Index tensors → batches on the device.

An epoch is one or more passes; a pass runs one or more streams of training images side by side, each a tensor of positions
in the training set. By default every batch holds as many images of each stream, so that shapes never change within a pass.
"""

import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.image_set import ImageSet


@dataclass(frozen=True)
class Pass:
    """One pass of an epoch over `streams` (name → positions in the training set), `batch_size` images of each a step.

    It lasts as long as the stream `over`, or the longest one, at most `most_steps`; shorter ones start over in a new order.
    The last batch of a stream's round is filled up from the next one, or with `last_batch` "short" holds what is left.
    """

    streams: dict[str, Tensor]
    batch_size: int
    name: str = "train"
    over: str = "longest"
    most_steps: int = sys.maxsize
    last_batch: str = "full"

    @property
    def steps(self) -> int:
        steps = {name: -(-len(indices) // self.sizes[name]) for name, indices in self.streams.items()}
        return min(self.most_steps, steps.get(self.over, max(steps.values())))

    @property
    def sizes(self) -> dict[str, int]:
        """Images of each stream in one batch: the batch size, or the whole stream where that is smaller."""
        return {name: min(self.batch_size, len(indices)) for name, indices in self.streams.items()}

    def sizes_at(self, step: int) -> dict[str, int]:
        """The sizes of the batch of `step`, from 0."""
        sizes = self.sizes
        if self.last_batch == "short":
            for name, indices in self.streams.items():
                done = step * sizes[name] % (-(-len(indices) // sizes[name]) * sizes[name])
                sizes[name] = min(sizes[name], len(indices) - done)
        return sizes

    def schedule(self, generator: torch.Generator) -> Tensor:
        """Shuffle: (steps, sum of sizes) positions, the streams one after another in every row; −1 after a short batch."""
        sizes, columns = [self.sizes_at(step) for step in range(self.steps)], []
        for name, indices in self.streams.items():
            counts = [size[name] for size in sizes]
            rounds = -(-sum(counts) // len(indices))
            shuffled = [indices[torch.randperm(len(indices), generator=generator)] for _ in range(rounds)]
            columns.append(torch.cat(shuffled)[: sum(counts)].split(counts))
        return pad_sequence([torch.cat(row) for row in zip(*columns, strict=True)], batch_first=True, padding_value=-1)


@dataclass(frozen=True)
class Batch:
    """One step's images: uint8 (B, 3, H, W), labels (B,), positions in the training set (B,), all on the device."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    sizes: dict[str, int]
    pass_name: str

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Split (B, …) into the pass's streams, by name."""
        return dict(zip(self.sizes, rows.split(list(self.sizes.values())), strict=True))


def batches(
    train_set: ImageSet, plan: Pass, generator: torch.Generator, device: torch.device, start: int = 0
) -> Iterator[Batch]:
    """The pass's batches from step `start` on. A set on the device is gathered there; else batches travel, pinned."""
    image_device = train_set.images.device
    sizes = [plan.sizes_at(step) for step in range(start, plan.steps)]
    rows = plan.schedule(generator)[start:]
    if image_device.type != "cpu":  # pinned, so that the host does not wait for the copy
        rows = rows.pin_memory().to(image_device, non_blocking=True)
    schedule = [row[: sum(size.values())] for row, size in zip(rows, sizes, strict=True)]
    if image_device.type == device.type:
        gathered = ((train_set.images[rows], train_set.labels[rows], rows) for rows in schedule)
    else:
        gathered = gathered_ahead(train_set, schedule, pin=True)
    for parts, size in zip(gathered, sizes, strict=True):
        yield Batch(*(part.to(device, non_blocking=True) for part in parts), size, plan.name)


def gathered_ahead(train_set: ImageSet, schedule: Iterable[Tensor], pin: bool) -> Iterator[tuple[Tensor, ...]]:
    """Images, labels and positions of each row of `schedule`, in host memory; the next ones are gathered meanwhile."""

    def begin(rows: Tensor) -> tuple[Future, Tensor, Tensor]:
        # Allocated out here, so that the thread calls no CUDA. torch reuses pinned memory once copies from it have ended.
        images = torch.empty(rows.shape + train_set.images.shape[1:], dtype=train_set.images.dtype, pin_memory=pin)
        labels, positions = (part.pin_memory() if pin else part for part in (train_set.labels[rows], rows))
        return pool.submit(torch.index_select, train_set.images, 0, rows, out=images), labels, positions

    with ThreadPoolExecutor(1) as pool:
        for (images, labels, positions), _ in pairwise(chain(map(begin, schedule), [None])):
            yield images.result(), labels, positions


def random_flip(images: Tensor) -> Tensor:
    """Mirror each image left to right with probability one half: (B, 3, H, W) → the same."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)
