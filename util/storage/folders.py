"""The folders that runs leave behind, and who may write to them."""

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from util.runtime import distributed
from util.runtime.errors import UsageError
from util.runtime.files import TEMPORARY_SUFFIX, read_json, write_text


class OutputFolder:
    """A run's folder: `last` is where the run is, `results` what it has once it has achieved something."""

    results_name: str
    # Patterns of all that a run leaves, but for its lock and log.
    outputs = ("config.json", "checkpoints", "events.out.tfevents.*")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.last = path / "checkpoints" / "last.pth"
        self.results = path / self.results_name

    @property
    def finished(self) -> bool:
        return self.results.exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, made if need be, until the block ends or the process dies, however it dies."""
        if distributed.rank():
            yield
            return
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--output-dir {self.path} is a file, not a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        holder = self.path / ".lock.holder"
        try:
            lock = FileLock(self.path / ".lock", timeout=0).acquire()
        except Timeout:
            other = holder.read_text() if holder.exists() else "another run"
            raise UsageError(f"{self.path} is in use by {other}; wait for it, or choose another --output-dir") from None
        except NotImplementedError:  # a file system without locks, where two runs in one folder go unnoticed
            lock = contextlib.nullcontext()
        with lock:
            write_text(holder, f"{Path(sys.argv[0]).name}, process {os.getpid()} on {socket.gethostname()}, {utc_now()}")
            try:
                yield
            finally:
                holder.unlink(missing_ok=True)

    def prepare(self, overwrite: bool, resume: bool, needed: int) -> None:
        """Make the folder, which is locked, ready for a new run of `needed` bytes, or for an interrupted one to go on."""
        if distributed.rank():
            return
        if (self.results.exists() or self.last.exists()) and not (overwrite or resume):
            raise UsageError(f"{self.path} holds a run; use --resume to continue it, --overwrite to replace it")
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UsageError(f"{self.path}: the run needs about {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free")
        # Nobody else writes here: these are of processes that were killed.
        for temporary in self.path.rglob(f".*{TEMPORARY_SUFFIX}"):
            temporary.unlink(missing_ok=True)
        if not resume:
            for pattern in self.outputs:
                for path in self.path.glob(pattern):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


class PretrainFolder(OutputFolder):
    """What train_pretrain.py leaves."""

    results_name = "checkpoint.pth"
    outputs = (*OutputFolder.outputs, "checkpoint.pth", "published.pth")


# What a task leaves, by kind: <kind>/task_<number><suffix>.
TASK_FILES = {
    "checkpoints": ".pth",
    "published": ".pth",  # the checkpoint once more, in the published layout
    "adapters": ".safetensors",
    "deposits": ".safetensors",
    "deletions": ".json",
}


class RunFolder(OutputFolder):
    """What train_forget.py leaves."""

    results_name = "results.json"
    outputs = (*OutputFolder.outputs, "results.json", "table.md", "figure.png", "audit", *TASK_FILES)

    @property
    def finished(self) -> bool:
        return self.results.exists() and read_json(self.results).get("finished") is True

    def task_file(self, kind: str, task: int) -> Path:
        return self.path / kind / f"task_{task}{TASK_FILES[kind]}"

    def checkpoint(self, task: int) -> Path:
        return self.task_file("checkpoints", task)

    def method_state(self, task: int, checkpoints: Path | None = None) -> Path:
        """What a method carries from this task to the next, beside the task's checkpoint."""
        return (checkpoints or self.last.parent) / f"state_{task}.pth"


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def claim(path: Path, script: str) -> None:
    """Stand-in."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, not a folder")
    config = path / "config.json"
    made = read_json(config).get("script") if config.exists() else None
    if path.exists() and any(path.iterdir()) and made != script:
        raise UsageError(f"{path} is not empty, and not of {script}: choose another folder")
