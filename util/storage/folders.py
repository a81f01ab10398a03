"""The folders that scripts leave behind: whose they are, who may write to them, and what is replaced when.

Nothing is written into a folder that holds what this project did not make, and nothing in it is removed but the files of an
earlier run, by name, once the run that replaces them has finished.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from util.runtime import distributed
from util.runtime.errors import UsageError
from util.runtime.files import TEMPORARY_SUFFIX, file_lock, read_json, sha256

CONFIG = "config.json"  # names the script that made a folder
REPLACED = ".replaced"  # where a run lies until the one that replaces it has finished
LOCK = ".lock"  # whoever holds it is written in it
LOCK_CONTENT = re.compile(rb"|\w+\.py, process \d+ on .*")


def claim(path: Path, script: str) -> None:
    """Raise UsageError unless `script` may write to the folder `path`: a new or empty one, or one that it made itself.

    Folders of this project may lie in it: those of a comparison's runs do.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"--output-dir {path} is a file, not a folder")
    if not path.is_dir() or (maker := maker_of(path)) == script:
        return
    if maker:
        raise UsageError(f"{path} is a folder of {maker}: choose another --output-dir")
    foreign = sorted(entry.name for entry in path.iterdir() if not (_left_by_a_start(entry) or maker_of(entry)))
    if foreign:
        raise UsageError(f"{path} holds other files ({foreign[0]!r} first): choose an empty or a new --output-dir")


def _left_by_a_start(entry: Path) -> bool:
    """Whether it may lie in a folder before a run has begun there: its lock, and the log of whoever started it."""
    if entry.is_symlink() or not entry.is_file():
        return False
    return entry.name == "log.txt" or (entry.name == LOCK and LOCK_CONTENT.fullmatch(entry.read_bytes()) is not None)


def maker_of(path: Path) -> str | None:
    """The script that made the folder `path`, None where none of this project did."""
    for file in (path / CONFIG, path / REPLACED / CONFIG):
        with contextlib.suppress(OSError, ValueError):
            config = json.loads(file.read_bytes())
            if isinstance(config, dict) and {"script", "arguments", "packages"} <= config.keys():
                return str(config["script"])
    return None


def default_folder(script: str, checkpoint: Path, *files: Path, suffix: str = "") -> Path:
    """The default folder of what a script finds in a checkpoint: <script>-<run>-<checkpoint>-<beginnings of hashes>.

    `files` and `suffix` are what it depends on beside the checkpoint.
    """
    parent = checkpoint.absolute().parent
    run = parent.parent if parent.name in TASK_FILES else parent
    hashes = [sha256(file) for file in (checkpoint, *files)]
    hashes += [hashlib.sha256(os.fsencode(suffix)).hexdigest()] if suffix else []
    return Path("exps") / "-".join([script, run.name, checkpoint.stem, *(digest[:8] for digest in hashes)])


class OutputFolder:
    """A run's folder: `last` is where the run is, `results` what it has once it has achieved something."""

    script: str
    results_name: str
    # All files that a run leaves, but for its lock and log: patterns of their paths below the folder.
    outputs = (CONFIG, r"checkpoints/last\.pth", r"events\.out\.tfevents\.[^/]*")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG
        self.last = path / "checkpoints" / "last.pth"
        self.results = path / self.results_name

    @property
    def finished(self) -> bool:
        return self.results.exists()

    @property
    def has_run(self) -> bool:
        return self.results.exists() or self.last.exists() or bool(self.own_files(replaced=True))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, made if need be, until the block ends or the process dies, however it dies.

        Raises UsageError where it is not ours, or in use.
        """
        if distributed.rank():  # the first process alone looks at the folder and makes it
            yield
            return
        if not str(self.path).isprintable():
            raise UsageError(f"--output-dir {str(self.path)!r}: TensorBoard writes to no name that is not plain text")
        claim(self.path, self.script)
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self.path / LOCK
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(file_lock(lock, wait=False))
            except BlockingIOError:
                other = lock.read_text() or "another run"
                raise UsageError(f"{self.path} is in use by {other}; wait for it, or choose another --output-dir") from None
            lock.write_text(f"{self.script}, process {os.getpid()} on {socket.gethostname()}, {utc_now()}")
            held.callback(lock.write_text, "")
            yield

    def check_room(self, needed: int) -> None:
        """Raise UsageError unless `needed` bytes are free here."""
        if distributed.rank():
            return
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UsageError(f"{self.path}: the run needs about {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free")

    def own_files(self, replaced: bool = False) -> list[Path]:
        """The files that a run of this script has left here, or in the run that is set aside, and nothing else."""
        root = self.path / REPLACED if replaced else self.path
        folders = [root, *(path for path in root.glob("[!.]*/") if not path.is_symlink())] if root.is_dir() else []
        files = [file for folder in folders for file in folder.iterdir() if file.is_file()]
        return [file for file in sorted(files) if self._is_own(file.relative_to(root).as_posix())]

    def _is_own(self, name: str) -> bool:
        # Half a file, of a process that was killed, has its name and process in it: checkpoints/.last.pth.123.tmp
        whole = re.sub(rf"(^|/)\.([^/]*)\.\d+{re.escape(TEMPORARY_SUFFIX)}$", r"\1\2", name)
        return any(re.fullmatch(pattern, whole) for pattern in self.outputs)

    def set_aside(self) -> None:
        """Move what a run has left out of the way of the one that replaces it, until `discard`."""
        if distributed.rank():
            return
        if self.finished:
            self.discard()
        if not (own := self.own_files()):
            return
        if self.own_files(replaced=True):  # by an interrupted run, which is replaced in turn
            for file in own:
                file.unlink()
            return
        print(f"{self.path}: the earlier run is kept in {REPLACED} until this one has finished", flush=True)
        for file in own:
            target = self.path / REPLACED / file.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, target)

    def discard(self) -> None:
        """Remove the run that was set aside, and what killed processes have left: this one has finished."""
        if distributed.rank():
            return
        halves = [file for file in self.own_files() if file.suffix == TEMPORARY_SUFFIX]
        for file in (*self.own_files(replaced=True), *halves):
            file.unlink()
        replaced = self.path / REPLACED
        for folder in (*replaced.glob("*/"), replaced):
            with contextlib.suppress(OSError):  # not there, or holding what is not ours
                folder.rmdir()


class PretrainFolder(OutputFolder):
    """What train_pretrain.py leaves."""

    script = "train_pretrain.py"
    results_name = "checkpoint.pth"
    outputs = (*OutputFolder.outputs, r"checkpoint\.pth", r"published\.pth")


# What a task leaves, by kind: <kind>/task_<number><suffix>.
TASK_FILES = {
    "checkpoints": ".pth",
    "published": ".pth",  # the checkpoint once more, in the published layout
    "adapters": ".safetensors",
    "deposits": ".safetensors",
    "deletions": ".json",
}


class RunFolder(OutputFolder):
    """What train_forget.py leaves, and audits of it."""

    script = "train_forget.py"
    results_name = "results.json"
    outputs = (
        *OutputFolder.outputs,
        *(r"results\.json", r"table\.md", r"figure\.png", r"checkpoints/state_\d+\.pth"),
        *(rf"{kind}/task_\d+{re.escape(suffix)}" for kind, suffix in TASK_FILES.items()),
        *(r"deletions/task_\d+\.json\.sig", r"audit/audit\.(json|json\.sig|md|html)", r"audit/config\.json"),
    )

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
