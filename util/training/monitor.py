"""What a run shows while it goes: a progress bar, and TensorBoard scalars. And it stops one whose loss is not finite.

Losses stay on the device; they are read back once an epoch, or every few seconds for the bar. Whether they are finite is
looked at for every step, on CUDA without waiting for the device: a few steps later there.
"""

import contextlib
import math
import sys
import time
from collections import deque
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from util.runtime import distributed
from util.runtime.errors import RunError

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

    def begin_epoch(self, epoch: int, first_step: int = 0) -> None:
        """`first_step`: steps of the epoch that an interrupted run has done before."""
        self.epoch, self.first_step = epoch, first_step
        self.images = 0
        self.steps_done = 0
        # The passes of an epoch may have other parts of the loss each: (step, values) by names of the parts.
        self.history: dict[tuple[str, ...], list[Tensor]] = {}
        # Steps whose losses nobody has looked at: number, names, values, and whether all are finite, with the event after
        # which that flag has come from the device.
        self.unseen: deque[tuple[int, tuple[str, ...], Tensor, Tensor, torch.cuda.Event | None]] = deque()
        self.started = self.refreshed = time.perf_counter()

    def step(self, losses: dict[str, Tensor], images: int) -> None:
        """Note one step's losses (scalars on the device) and its number of images. Raises RunError as `check` does."""
        names, values = tuple(losses), torch.stack([loss.detach().float() for loss in losses.values()])
        self.steps_done += 1
        self.history.setdefault(names, []).append(values)
        self.images += images
        finite = values.isfinite().all().to("cpu", non_blocking=True)
        event = None
        if values.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self.unseen.append((self.first_step + self.steps_done, names, values, finite, event))
        self.check()
        now = time.perf_counter()
        if not self.bar.disable and now - self.refreshed > REFRESH_SECONDS:
            self._show(dict(zip(losses, values.tolist(), strict=True)), now)
            self.refreshed = now

    def check(self, wait: bool = False) -> None:
        """Raise RunError for the first step whose loss is not finite; of those that the device has done, or of all."""
        while self.unseen and (wait or self.unseen[0][-1] is None or self.unseen[0][-1].query()):
            step, names, values, finite, event = self.unseen.popleft()
            if event is not None:
                event.synchronize()
            if finite:
                continue
            bad = {name: value for name, value in zip(names, values.tolist(), strict=True) if not math.isfinite(value)}
            # The total is their sum: a part that is at fault says more.
            name = next((name for name in bad if name != "total"), "total")
            raise RunError(
                f"{self.label}: the loss is not finite: part {name!r} became {bad[name]} in epoch {self.epoch + 1}, "
                f"step {step}; lower --lr, or check the data; what was saved before is kept"
            )

    def end_epoch(self, lr: float, metrics: dict[str, float]) -> dict[str, float]:
        """Log the epoch's mean losses, of a resumed epoch those since. Raises RunError as `check` does."""
        self.check(wait=True)
        means: dict[str, float] = {}
        for names, values in self.history.items():
            means |= dict(zip(names, torch.stack(values).mean(dim=0).tolist(), strict=True))
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
