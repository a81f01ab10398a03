"""What a run shows while it goes: a progress bar, and TensorBoard scalars.

Losses stay on the device; they are read back once an epoch, or every few seconds for the bar, never at every step.
"""

import contextlib
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from util import distributed
from util.errors import RunError

# Seconds between two looks at the losses for the progress bar: each look waits for the device.
REFRESH_SECONDS = 2.0


class NoWriter(contextlib.AbstractContextManager):
    """Takes what a SummaryWriter takes and writes nothing: for all processes of a run but the first."""

    def __exit__(self, *exception: object) -> None:
        pass

    def add_scalar(self, *_: object) -> None:
        pass

    def add_figure(self, *_: object, **__: object) -> None:
        pass


def open_writer(folder: Path) -> SummaryWriter | NoWriter:
    """TensorBoard events in `folder`; use as a context manager."""
    return NoWriter() if distributed.rank() else SummaryWriter(folder)


class Monitor:
    """Progress of one task (or of pre-training). `tag` heads its scalars, `label` its bar; use as a context manager."""

    def __init__(self, writer: SummaryWriter | NoWriter | None, tag: str, label: str, epochs: int, done: int = 0) -> None:
        self.writer, self.tag, self.label = writer, tag, label
        # On a terminal a live bar; in a log file nothing but what the scripts print.
        hidden = True if distributed.rank() else None
        self.bar = tqdm(total=epochs, initial=done, desc=label, unit="epoch", disable=hidden, file=sys.stderr, leave=False)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def begin_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        self.epoch, self.steps = epoch, steps
        self.images = 0
        self.steps_done = 0
        # The passes of an epoch may have other parts of the loss each: (step, values) by names of the parts.
        self.history: dict[tuple[str, ...], list[tuple[int, Tensor]]] = {}
        self.started = self.refreshed = time.perf_counter()

    def step(self, losses: dict[str, Tensor], images: int) -> None:
        """Note one step's losses (scalars on the device) and its number of images."""
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self.steps_done += 1
        self.history.setdefault(tuple(losses), []).append((self.steps_done, values))
        self.images += images
        now = time.perf_counter()
        if not self.bar.disable and now - self.refreshed > REFRESH_SECONDS:
            self._show(dict(zip(losses, values.tolist(), strict=True)), now)
            self.refreshed = now

    def end_epoch(self, lr: float, metrics: dict[str, float]) -> dict[str, float]:
        """Log the epoch's mean losses. Raises RunError if any step's loss was not finite."""
        means: dict[str, float] = {}
        faults = []
        for names, steps in self.history.items():
            values = torch.stack([value for _, value in steps])
            finite = values.isfinite()
            if not finite.all():
                row = int((~finite).any(dim=1).nonzero()[0])
                # The total is their sum: a part that is at fault says more.
                bad = [part for part in range(len(names)) if not finite[row, part]]
                part = next((part for part in bad if names[part] != "total"), bad[0])
                faults.append((steps[row][0], names[part], values[row, part].item()))
            means |= dict(zip(names, values.mean(dim=0).tolist(), strict=True))
        if faults:
            step, name, value = min(faults)
            raise RunError(
                f"{self.label}: the loss is not finite: part {name!r} became {value} in epoch {self.epoch + 1}, "
                f"step {step}; lower --lr, or check the data; nothing of this epoch was kept"
            )
        now = time.perf_counter()
        scalars = {f"loss/{name}": value for name, value in means.items()} | metrics
        scalars |= {"lr": lr, "images_per_second": self.images / (now - self.started)}
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(f"{self.tag}/{name}", value, self.epoch + 1)
        self.bar.update(1)
        self._show(means, now)
        return means

    def _show(self, losses: dict[str, float], now: float) -> None:
        shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self.bar.set_postfix_str(f"{shown} · {self.images / (now - self.started):.0f} images/s")
