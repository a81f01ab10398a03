"""Records of deletion: what a task was asked to forget, what it did, and how anyone can confirm it.

`deletions/task_<t>.json` holds SHA-256 hashes of the model before and after, of every image that the task has seen and
of the test set, the settings, and the accuracies. It names the hash of the record before it, so that none can be left
out or exchanged later without that showing. It is no proof that nothing of the classes is left in the weights: the
accuracies say what is known of that.
"""

import argparse
from pathlib import Path

from torch import nn

from data.image_set import ImageSet
from data.tasks import ForgettingTask
from util.cli.config import code_and_packages
from util.cli.options import plain_arguments
from util.runtime import distributed
from util.runtime.errors import RunError
from util.runtime.files import read_json, sha256, write_json
from util.runtime.hardware import Hardware
from util.storage.folders import RunFolder, utc_now
from util.storage.hashes import image_hashes, joint_hash, weights_sha256

SCHEMA = 1
SIZES = range(1, 1 << 14)  # of images, in pixels


class Recorder:
    """Notes what a task starts from; writes its record when it is done."""

    def __init__(self, args: argparse.Namespace, hardware: Hardware, data: tuple[ImageSet, ImageSet], resumed: bool) -> None:
        self.args, self.hardware, self.resumed = args, hardware, resumed
        self.train_set, test_set = data
        self.test_hash = joint_hash(test_set)

    def begin(self, model: nn.Module) -> None:
        """Before a task; `model` is the one that entered it."""
        self.started, self.before = utc_now(), weights_sha256(model)

    def write(self, folder: RunFolder, task: ForgettingTask, model: nn.Module, entry: dict, replay: ImageSet | None) -> None:
        """After a task whose checkpoint is written; `entry` is its part of results.json, `replay` are further images."""
        if distributed.rank():
            return  # the first process alone has written the files that are hashed here
        classes = self.train_set.classes
        begun = [folder] if self.args.resume_from is None else [folder, RunFolder(self.args.resume_from.parent.parent)]
        earlier = [run.task_file("deletions", task.number - 1) for run in begun]
        record = {
            "schema": SCHEMA,
            "task": task.number,
            "request": {
                "forget": {str(c): classes[c] for c in task.forget},
                "forgotten_before": {str(c): classes[c] for c in task.old},
                "remain": list(task.remain),
                "missing": list(task.missing),
                "named": self.args.forget_classes is not None,
            },
            "started": self.started,
            "finished": utc_now(),
            "resumed": self.resumed,
            "model": {
                "before": self.before,
                "after": weights_sha256(model),
                "pretrained_file": sha256(self.args.checkpoint),
                "after_file": sha256(folder.checkpoint(task.number)),
            },
            "images": {
                "size": self.train_set.image_size,
                "crop_pct": model.architecture.crop_pct,
                "forget": image_hashes(self.train_set, task.forget_indices),
                "remain": image_hashes(self.train_set, task.remain_indices),
                "test": self.test_hash,
            }
            | ({} if replay is None else {"replay": image_hashes(replay)}),
            "accuracies": {"before": entry["before"], "after": entry["after"]},
            "arguments": plain_arguments(self.args),
            "hardware": self.hardware.as_dict(),
            **code_and_packages(),
            "previous_record": next((sha256(file) for file in earlier if file.exists()), None),
        }
        write_json(folder.task_file("deletions", task.number), record)


def load_record(path: Path) -> dict:
    """Read a record. Raises UsageError if it is missing, RunError if it is none."""
    record = read_json(path)
    parts = ("request", "model", "images", "accuracies", "arguments", "hardware")
    whole = record.get("schema") == SCHEMA and all(isinstance(record.get(key), dict) for key in parts)
    # What the data set is built from, before the rest is looked at.
    whole = whole and isinstance(record["arguments"].get("data"), str) and record["images"].get("size") in SIZES
    crop_pct = record["images"].get("crop_pct", 1.0) if whole else None  # older records have none
    if not (isinstance(crop_pct, float) and 0 < crop_pct <= 1):
        raise RunError(f"{path}: not a record of deletion of schema {SCHEMA}")
    return record


def settings_of(record: dict) -> dict:
    """The data and the arithmetic of a record, or of a run's config.json, as defaults of our options."""
    keys = ("data", "val_fraction", "identities", "train_per_identity", "test_per_identity", "data_seed")
    keys += ("head", "published_adapters")
    settings = {key: record["arguments"][key] for key in keys if key in record["arguments"]}
    settings["precision"] = "bf16" if record["hardware"].get("bf16") else "fp32"
    settings["cls_only_last_block"] = "on" if record["hardware"].get("cls_only_last_block") else "off"
    return settings
