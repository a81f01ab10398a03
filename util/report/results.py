"""results.json: what a run measured, as data (schema in the README)."""

import json
from pathlib import Path

from data.image_set import ImageSet
from data.tasks import ForgettingTask
from util.report.tables import READINGS, Comparison
from util.runtime.errors import RunError
from util.runtime.files import read_json, write_json, write_text
from util.storage.folders import RunFolder

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
    if results.get("schema") != SCHEMA:
        raise RunError(f"{path}: not a results.json of schema {SCHEMA}")
    try:
        _check(results, SHAPE, "")
    except ValueError as error:
        raise RunError(f"{path}: damaged results: {error}") from None
    return results


NUMBER, NUMBER_OR_NONE = (int, float), (int, float, type(None))
ACCURACIES = {"acc_remain": NUMBER_OR_NONE, "acc_forget": NUMBER_OR_NONE}
FURTHER = {"acc_old": NUMBER_OR_NONE, "acc_missing": NUMBER_OR_NONE, "h_mean": NUMBER_OR_NONE}
# What readers of results.json rely on: types, dicts of named entries, and lists of one kind of entry.
SHAPE = {
    "method": str,
    "seed": int,
    "dataset": {"name": str, "classes": int, "train_images": int, "test_images": int},
    "model": {"name": str, "parameters": int, "trainable": int, "tunable_ratio": NUMBER},
    "pretrained": {"acc": NUMBER_OR_NONE, "margin_acc": NUMBER_OR_NONE},
    "tasks": [
        {
            "task": int,
            "setting": str,
            **{f"{group}_classes": [int] for group in ("forget", "remain", "missing")},
            "before": {reading + key: kind for reading in READINGS for key, kind in ACCURACIES.items()},
            "after": {reading + key: kind for reading in READINGS for key, kind in (ACCURACIES | FURTHER).items()},
            "groups": (dict, type(None)),
            **dict.fromkeys(("train_seconds", "eval_seconds", "images_per_second", "peak_memory_mb"), NUMBER),
        }
    ],
}


def _check(value: object, shape: dict | list | type | tuple, where: str) -> None:
    """Raise ValueError, saying where, unless `value` has the shape. Entries that the shape does not name are left alone."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{where or 'it'} is no object")
        for key, inner in shape.items():
            if key not in value:
                raise ValueError(f"{where}.{key} is missing".lstrip("."))
            _check(value[key], inner, f"{where}.{key}".lstrip("."))
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} is no list")
        for number, inner in enumerate(value):
            _check(inner, shape[0], f"{where}[{number}]")
    elif not isinstance(value, shape) or isinstance(value, bool):
        raise ValueError(f"{where} is {json.dumps(value)[:40]}")
