"""The folders that runs leave behind, and who may write to them."""

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from util.runtime import distributed
from util.runtime.errors import UsageError
from util.runtime.files import TEMPORARY_SUFFIX

try:
    import fcntl
except ImportError:  # not on Windows, where two runs in one folder go unnoticed
    fcntl = None


@dataclass(frozen=True)
class OutputFolder:
    """A run's folder: config.json, TensorBoard events, checkpoints/last.pth."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def last(self) -> Path:
        """Where the run is."""
        return self.path / "checkpoints" / "last.pth"

    @property
    def results(self) -> Path:
        """What a run has once it has achieved something."""
        raise NotImplementedError

    @property
    def finished(self) -> bool:
        return self.results.exists()

    def leftovers(self) -> list[Path]:
        """Everything a run leaves, but for its folder, lock and log."""
        return [self.config, self.results, self.last.parent, *self.path.glob("events.out.tfevents.*")]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, made if need be, until the block ends or the process dies, however it dies.

        Raises UsageError, naming the run that holds it, and where it cannot be a folder.
        """
        if distributed.rank():
            yield
            return
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--output-dir {self.path} is a file, not a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "a+") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.seek(0)
                    holder = file.readline().strip() or "another run"
                    raise UsageError(
                        f"{self.path} is in use by {holder}; wait for it, or choose another --output-dir"
                    ) from None
                except OSError:  # a file system without locks
                    pass
            file.truncate(0)
            file.write(f"{Path(sys.argv[0]).name}, process {os.getpid()} on {socket.gethostname()}, {utc_now()}\n")
            file.flush()
            yield

    def prepare(self, overwrite: bool, resume: bool, needed: int) -> None:
        """Make the folder, which is locked, ready for a new run, or leave an interrupted one for `--resume`.

        Raises UsageError if it holds another run and neither was asked for, or if the disk lacks the `needed` bytes.
        """
        if distributed.rank():
            return
        started = self.results.exists() or self.last.exists()
        if started and not (overwrite or resume):
            raise UsageError(
                f"{self.path} holds a finished or interrupted run; use --resume to continue it, --overwrite to replace it"
            )
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UsageError(
                f"--output-dir {self.path}: the run needs about {needed / 1e6:.0f} MB there, {free / 1e6:.0f} MB are free"
            )
        # Nobody else writes here: these are of processes that were killed.
        for temporary in self.path.rglob(f".*{TEMPORARY_SUFFIX}"):
            temporary.unlink(missing_ok=True)
        if not resume:
            for path in self.leftovers():
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class PretrainFolder(OutputFolder):
    """What train_pretrain.py leaves."""

    @property
    def results(self) -> Path:
        return self.path / "checkpoint.pth"

    @property
    def published(self) -> Path:
        return self.path / "published.pth"

    def leftovers(self) -> list[Path]:
        return [*super().leftovers(), self.published]


class RunFolder(OutputFolder):
    """What train_forget.py leaves."""

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def table(self) -> Path:
        return self.path / "table.md"

    @property
    def figure(self) -> Path:
        return self.path / "figure.png"

    @property
    def finished(self) -> bool:
        return self.figure.exists()  # drawn last

    def checkpoint(self, task: int) -> Path:
        return self.path / "checkpoints" / f"task_{task}.pth"

    def published(self, task: int) -> Path:
        return self.path / "published" / f"task_{task}.pth"

    def task_file(self, kind: str, task: int) -> Path:
        return self.path / kind / f"task_{task}.safetensors"

    def adapters(self, task: int) -> Path:
        return self.path / "adapters" / f"task_{task}.safetensors"

    def deposit(self, task: int) -> Path:
        return self.path / "deposits" / f"task_{task}.safetensors"

    def record(self, task: int) -> Path:
        return self.path / "deletions" / f"task_{task}.json"

    def method_state(self, task: int, checkpoints: Path | None = None) -> Path:
        """What a method carries from this task to the next, beside the task's checkpoint."""
        return (checkpoints or self.last.parent) / f"state_{task}.pth"

    def leftovers(self) -> list[Path]:
        folders = (self.adapters(0), self.deposit(0), self.published(0), self.record(0))
        return [*super().leftovers(), self.table, self.figure, *(path.parent for path in folders)]


def utc_now() -> str:
    """The time, as ISO 8601 writes it, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
