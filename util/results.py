"""results.json: what a run measured, as data (schema in the README)."""

from pathlib import Path

from data.image_set import ImageSet
from data.tasks import ForgettingTask
from util.arguments import read_json
from util.errors import RunError
from util.files import write_json, write_text
from util.folders import RunFolder
from util.tables import Comparison

SCHEMA = 1


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
