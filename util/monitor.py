"""What a run shows while it goes: a progress bar, and TensorBoard scalars.

Losses stay on the device; they are read back once an epoch, or every few seconds for the bar, never at every step.
"""

import sys
import time

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from util.errors import RunError

# Seconds between two looks at the losses for the progress bar: each look waits for the device.
REFRESH_SECONDS = 2.0


class Monitor:
    """Progress of one task (or of pre-training). `tag` heads its scalars, `label` its bar; use as a context manager."""

    def __init__(self, writer: SummaryWriter | None, tag: str, label: str, epochs: int, done: int = 0) -> None:
        self.writer, self.tag, self.label = writer, tag, label
        # On a terminal a live bar; in a log file nothing but what the scripts print.
        self.bar = tqdm(total=epochs, initial=done, desc=label, unit="epoch", disable=None, file=sys.stderr, leave=False)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def begin_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        self.epoch, self.steps = epoch, steps
        self.images = 0
        self.history: list[Tensor] = []
        self.names: list[str] = []
        self.started = self.refreshed = time.perf_counter()

    def step(self, losses: dict[str, Tensor], images: int) -> None:
        """Note one step's losses (scalars on the device) and its number of images."""
        self.names = list(losses)
        self.history.append(torch.stack([loss.detach().float() for loss in losses.values()]))
        self.images += images
        now = time.perf_counter()
        if not self.bar.disable and now - self.refreshed > REFRESH_SECONDS:
            self._show(self.history[-1].tolist(), now)
            self.refreshed = now

    def end_epoch(self, lr: float, metrics: dict[str, float]) -> dict[str, float]:
        """Log the epoch's mean losses. Raises RunError if any step's loss was not finite."""
        history = torch.stack(self.history)
        if not history.isfinite().all():
            step = int((~history.isfinite()).any(dim=1).nonzero()[0])
            # The total is their sum: a part that is at fault says more.
            bad = [part for part in range(len(self.names)) if not history[step, part].isfinite()]
            part = next((part for part in bad if self.names[part] != "total"), bad[0])
            raise RunError(
                f"{self.label}: the loss is not finite: part {self.names[part]!r} became {history[step, part].item()} in "
                f"epoch {self.epoch + 1}, step {step + 1}; lower --lr, or check the data; nothing of this epoch was kept"
            )
        means = dict(zip(self.names, history.mean(dim=0).tolist(), strict=True))
        now = time.perf_counter()
        scalars = {f"loss/{name}": value for name, value in means.items()} | metrics
        scalars |= {"lr": lr, "images_per_second": self.images / (now - self.started)}
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(f"{self.tag}/{name}", value, self.epoch + 1)
        self.bar.update(1)
        self._show(means.values(), now)
        return means

    def _show(self, values, now: float) -> None:
        losses = " ".join(f"{name} {value:.3f}" for name, value in zip(self.names, values, strict=True))
        self.bar.set_postfix_str(f"{losses} · {self.images / (now - self.started):.0f} images/s")
