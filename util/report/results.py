"""results.json: what a run measured, as data (schema in docs/files.md)."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pandas as pd

from data.image_set import ImageSet
from data.tasks import ForgettingTask
from methods import METHODS
from util.evaluation.metrics import MARGINS, METRICS
from util.runtime.errors import RunError
from util.runtime.files import read_json, readable

SCHEMA = 1
NUMBERS = ("tunable_ratio", "seconds", "value", "before", "zero_ratio")


def new_results(
    method: str, seed: int, train_set: ImageSet, test_set: ImageSet, model: dict, pretrained: dict[str, float | None]
) -> dict:
    """The results of a run that has not finished any task."""
    dataset = {"name": train_set.name, "classes": len(train_set.classes)}
    dataset |= {"train_images": len(train_set), "test_images": len(test_set)}
    run = {"schema": SCHEMA, "finished": False, "method": method, "seed": seed}
    return {**run, "dataset": dataset, "model": model, "pretrained": pretrained, "tasks": []}


def task_entry(task: ForgettingTask, before: dict, after: dict, groups: dict | None, costs: dict[str, float]) -> dict:
    """One element of `tasks`; `costs` holds train_seconds, eval_seconds, images_per_second and peak_memory_mb."""
    images = {"forget": len(task.forget_indices), "remain": len(task.remain_indices)}
    entry = {"task": task.number, "setting": task.setting}
    entry |= {f"{group}_classes": list(getattr(task, group)) for group in ("forget", "remain", "missing")}
    return {**entry, "train_images": images, "before": before, "after": after, "groups": groups, **costs}


def load_results(path: Path) -> dict:
    """Read a results.json. Raises UsageError if it is missing, RunError if it is damaged or not of this schema."""
    results = read_json(path)
    if results.get("schema") != SCHEMA:
        raise RunError(f"{path}: not a results.json of schema {SCHEMA}")
    with readable(path, "damaged results"):  # touch what readers rely on
        tasks = results["tasks"]
        names = [METHODS[results["method"]].title, results["dataset"]["name"], *(task["setting"] for task in tasks)]
        numbers = [results["seed"], results["dataset"]["classes"], *(task["task"] for task in tasks)]
        numbers += [c for task in tasks for c in task["forget_classes"] + task["remain_classes"]]
        if {*map(type, names)} != {str} or {*map(type, numbers)} != {int} or len({*names[2:]}) < len(tasks):
            raise ValueError("a name or a number is none, or there twice")
        results_frame([results], names[:1])
    return results


def results_frame(runs: Sequence[dict], labels: Sequence[str]) -> pd.DataFrame:
    """One row per run, margin, task (known by its setting) and metric: its `value`, and the pre-trained model's `before`.

    `runs` are contents of results.json. `seconds` are those of all tasks; NaN in a run with fewer tasks than others.
    """
    most = max(len(run["tasks"]) for run in runs)
    rows = []
    for run, label in zip(runs, labels, strict=True):
        about = {"label": label, "method": run["method"], "seed": run["seed"], **run["model"]}
        about["seconds"] = sum(task["train_seconds"] for task in run["tasks"]) if len(run["tasks"]) == most else None
        for margin, task, metric in product(MARGINS, run["tasks"], METRICS):
            row = about | {"margin": margin, "setting": task["setting"], "metric": metric}
            row |= {"value": task["after"][margin + metric], "before": task["before"].get(margin + metric)}
            rows.append(row | {"zero_ratio": task["groups"]["zero_ratio"] if task["groups"] else None})
    columns = ["label", "method", "seed", "margin", "setting", "metric", *NUMBERS]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(NUMBERS, float))
