"""results.json: what a run measured, as data; and the folder that holds it (schema in the README)."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from data.image_set import ImageSet
from data.tasks import ForgettingTask
from util.arguments import read_json
from util.errors import RunError, UsageError
from util.files import write_json, write_text
from util.tables import Comparison

SCHEMA = 1


@dataclass(frozen=True)
class RunFolder:
    """The files of a run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

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
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.pth"

    def checkpoint(self, task: int) -> Path:
        return self.path / "checkpoints" / f"task_{task}.pth"

    def published(self, task: int) -> Path:
        return self.path / "published" / f"task_{task}.pth"

    def adapters(self, task: int) -> Path:
        return self.path / "adapters" / f"task_{task}.safetensors"

    def deposit(self, task: int) -> Path:
        return self.path / "deposits" / f"task_{task}.safetensors"

    def method_state(self, task: int, checkpoints: Path | None = None) -> Path:
        """What a method carries from this task to the next, beside the task's checkpoint."""
        return (checkpoints or self.last.parent) / f"state_{task}.pth"

    def prepare(self, overwrite: bool, resume: bool) -> None:
        """Make the folder ready for a new run, or leave an interrupted one for `--resume`.

        Raises UsageError if it holds another run's results and neither was asked for, or is no folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--output-dir {self.path} is a file, not a folder")
        if resume:
            return
        if self.results.exists() and not overwrite:
            raise UsageError(
                f"{self.path} holds a finished or interrupted run; use --resume to continue it, --overwrite to replace it"
            )
        for old in (self.config, self.results, self.table, self.figure):
            old.unlink(missing_ok=True)
        for events in self.path.glob("events.out.tfevents.*"):
            events.unlink()
        for file in (self.last, self.adapters(0), self.deposit(0), self.published(0)):
            shutil.rmtree(file.parent, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)


def new_results(
    method: str, seed: int, train_set: ImageSet, test_set: ImageSet, model: dict, pretrained: dict[str, float | None]
) -> dict:
    """The results of a run that has not finished any task."""
    return {
        "schema": SCHEMA,
        "method": method,
        "seed": seed,
        "dataset": {
            "name": train_set.name,
            "classes": len(train_set.classes),
            "train_images": len(train_set),
            "test_images": len(test_set),
        },
        "model": model,
        "pretrained": pretrained,
        "tasks": [],
    }


def task_entry(task: ForgettingTask, before: dict, after: dict, groups: dict | None, costs: dict[str, float]) -> dict:
    """One element of `tasks`; `costs` holds train_seconds, eval_seconds, images_per_second and peak_memory_mb."""
    return {
        "task": task.number,
        "setting": task.setting,
        "forget_classes": list(task.forget),
        "remain_classes": list(task.remain),
        "missing_classes": list(task.missing),
        "train_images": {"forget": len(task.forget_indices), "remain": len(task.remain_indices)},
        "before": before,
        "after": after,
        "groups": groups,
        **costs,
    }


def save_results(folder: RunFolder, results: dict, title: str) -> None:
    """Write results.json and table.md; `title` is the method's name in the table."""
    write_text(folder.table, Comparison([results], [title]).markdown() + "\n")
    write_json(folder.results, results)


def load_results(path: Path) -> dict:
    """Read a results.json. Raises UsageError if it is missing, RunError if it is not of this schema."""
    results = read_json(path)
    if results.get("schema") != SCHEMA or not isinstance(results.get("tasks"), list):
        raise RunError(f"{path}: not a results.json of schema {SCHEMA}")
    return results
