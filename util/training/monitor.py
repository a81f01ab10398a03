"""What a run shows while it goes: a progress bar, and TensorBoard scalars. And it stops one whose loss is not finite.

Losses stay on the device; they are read back once an epoch, or every few seconds for the bar (on a CPU: at once).
"""

import contextlib
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from util.runtime import distributed
from util.runtime.errors import RunError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Seconds between two looks at the losses for the progress bar: each look waits for the device.
REFRESH_SECONDS = 2.0


def open_writer(folder: Path) -> "contextlib.AbstractContextManager[SummaryWriter | None]":
    """TensorBoard events in `folder`; None in all processes of a run but the first. Use as a context manager."""
    from torch.utils.tensorboard import SummaryWriter

    return contextlib.nullcontext() if distributed.rank() else SummaryWriter(folder)


def log_scalars(writer: "SummaryWriter | None", tag: str, values: dict[str, float | None], step: int) -> None:
    for name, value in values.items():
        if writer is not None and value is not None:
            writer.add_scalar(f"{tag}/{name}", value, step)


class Monitor:
    """Progress of one task (or of pre-training). `tag` heads its scalars, `label` its bar; use as a context manager."""

    def __init__(self, writer: "SummaryWriter | None", tag: str, label: str, epochs: int, done: int = 0) -> None:
        self.writer, self.tag, self.label = writer, tag, label
        # On a terminal a live bar; in a log file nothing but what the scripts print.
        hidden = True if distributed.rank() else None
        self.bar = tqdm(total=epochs, initial=done, desc=label, unit="epoch", disable=hidden, file=sys.stderr, leave=False)
        self.refreshed = time.perf_counter()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def begin_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Of epoch `epoch`, from 0, `first_step` steps were done before an interruption."""
        self.epoch, self.first_step, self.images, self.started = epoch, first_step, 0, time.perf_counter()
        # Names and values of each step's losses: on the device; read back and checked.
        self.unread: list[tuple[tuple[str, ...], Tensor]] = []
        self.losses: list[tuple[tuple[str, ...], Tensor]] = []

    def step(self, losses: dict[str, Tensor], images: int) -> None:
        """Note one step's losses (scalars on the device) and its number of images. Raises RunError as `check` does."""
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self.unread.append((tuple(losses), values))
        self.images += images
        now = time.perf_counter()
        due = not self.bar.disable and now - self.refreshed > REFRESH_SECONDS
        if due or values.is_cpu:
            self.check()
        if due:
            self._show(dict(zip(losses, self.losses[-1][1].tolist(), strict=True)))
            self.refreshed = now

    def check(self) -> None:
        """Raise RunError for the first step whose loss is not finite. Waits for the device once."""
        if not self.unread:
            return
        steps = [names for names, _ in self.unread]
        read = torch.cat([values for _, values in self.unread]).cpu().split([*map(len, steps)])
        self.unread = []
        for names, values in zip(steps, read, strict=True):
            self.losses.append((names, values))
            if values.isfinite().all():
                continue
            bad = {name: value for name, value in zip(names, values.tolist(), strict=True) if not math.isfinite(value)}
            # The total is their sum: a part that is at fault says more.
            name = next((name for name in bad if name != "total"), "total")
            raise RunError(
                f"{self.label}: the loss is not finite: part {name!r} became {bad[name]} in epoch {self.epoch + 1}, "
                f"step {self.first_step + len(self.losses)}; lower --lr, or check the data; what was saved before is kept"
            )

    def end_epoch(self, lr: float, metrics: dict[str, float]) -> dict[str, float]:
        """Log the epoch's mean losses, of a resumed epoch those since. Raises RunError as `check` does."""
        self.check()
        means: dict[str, float] = {}
        # The passes of an epoch may have other parts of the loss each.
        for names in dict.fromkeys(names for names, _ in self.losses):
            values = torch.stack([values for other, values in self.losses if other == names])
            means |= dict(zip(names, values.mean(dim=0).tolist(), strict=True))
        scalars = {f"loss/{name}": value for name, value in means.items()} | metrics
        scalars |= {"lr": lr, "images_per_second": self._speed()}
        log_scalars(self.writer, self.tag, scalars, self.epoch + 1)
        self.bar.update(1)
        self._show(means)
        return means

    def _speed(self) -> float:
        return self.images / (time.perf_counter() - self.started)

    def _show(self, losses: dict[str, float]) -> None:
        shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self.bar.set_postfix_str(f"{shown} · {self._speed():.0f} images/s")
