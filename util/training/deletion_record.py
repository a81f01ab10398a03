"""Records of deletion: what a task was asked to forget, what it did, and how anyone can confirm it.

`deletions/task_<t>.json` holds SHA-256 hashes of the model before and after, of every image that the task has seen and
of the test set, the settings, and the accuracies. It names the hash of the record before it, so that none can be left
out or exchanged later without that showing. It is no proof that nothing of the classes is left in the weights: the
accuracies say what is known of that.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from backbone.recognizer import to_device
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from util.cli.config import code_and_packages
from util.cli.options import plain_arguments
from util.evaluation.evaluate import accuracies_after, accuracies_before, predict
from util.runtime import distributed
from util.runtime.errors import RunError
from util.runtime.files import read_json, readable, sha256, write_json
from util.runtime.hardware import Hardware
from util.storage.checkpoint import check_classes, load_checkpoint
from util.storage.folders import RunFolder, utc_now
from util.storage.hashes import image_hashes, joint_hash, weights_sha256
from util.training.audit_check import Check, check_audits

SCHEMA = 1


class Recorder:
    """Notes what a task starts from; writes its record when it is done."""

    def __init__(self, args: argparse.Namespace, hardware: Hardware, data: tuple[ImageSet, ImageSet], resumed: bool) -> None:
        self.args, self.hardware, self.resumed = args, hardware, resumed
        self.train_set, test_set = data
        self.test_hash = joint_hash(test_set)

    def begin(self, model: nn.Module) -> None:
        """Before a task; `model` is the one that entered it."""
        self.started, self.before = utc_now(), weights_sha256(model)

    def write(self, folder: RunFolder, task: ForgettingTask, model: nn.Module, entry: dict) -> None:
        """After a task whose checkpoint is written; `entry` is its part of results.json."""
        if distributed.rank():
            return  # the first process alone has written the files that are hashed here
        classes = self.train_set.classes
        earlier = folder.task_file("deletions", task.number - 1)
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
                "forget": image_hashes(self.train_set, task.forget_indices),
                "remain": image_hashes(self.train_set, task.remain_indices),
                "test": self.test_hash,
            },
            "accuracies": {"before": entry["before"], "after": entry["after"]},
            "arguments": plain_arguments(self.args),
            "hardware": self.hardware.as_dict(),
            **code_and_packages(),
            "previous_record": sha256(earlier) if earlier.exists() else None,
        }
        write_json(folder.task_file("deletions", task.number), record)


def load_record(path: Path) -> dict:
    """Read a record. Raises UsageError if it is missing, RunError if it is none."""
    record = read_json(path)
    parts = ("request", "model", "images", "accuracies", "arguments", "hardware")
    if record.get("schema") != SCHEMA or not all(isinstance(record.get(key), dict) for key in parts):
        raise RunError(f"{path}: not a record of deletion of schema {SCHEMA}")
    return record


def settings_of(record: dict) -> dict:
    """The data and the arithmetic of a record, or of a run's config.json, as defaults of our options."""
    keys = ("data", "val_fraction", "identities", "train_per_identity", "test_per_identity", "data_seed", "head")
    settings = {key: record["arguments"][key] for key in keys if key in record["arguments"]}
    settings["precision"] = "bf16" if record["hardware"].get("bf16") else "fp32"
    settings["cls_only_last_block"] = "on" if record["hardware"].get("cls_only_last_block") else "off"
    return settings


def verify_record(path: Path, record: dict, data: tuple[ImageSet, ImageSet], hardware: Hardware) -> list[Check]:
    """Recompute what `record` says, from the files beside it and the training and test set `data`."""
    folder = RunFolder(path.resolve().parent.parent)
    with readable(path, "damaged record"):
        checks = [*_files(folder, record), *_images(record, data), *_accuracies(folder, record, data[1], hardware)]
    return [*checks, *check_audits(path, folder, data, hardware)]


def _files(folder: RunFolder, record: dict) -> Iterator[Check]:
    number, model = record["task"], record["model"]
    before, after = folder.checkpoint(number - 1), folder.checkpoint(number)
    entered = record["arguments"]["checkpoint" if number == 1 else "resume_from"]
    if not before.exists() and entered is not None:
        before = Path(entered)
    if record["previous_record"] is None:
        yield "record before it", None, "it names none"
    else:
        yield _compare("record before it", folder.task_file("deletions", number - 1), record["previous_record"], sha256)
    yield _compare("file of the model after", after, model["after_file"], sha256)
    yield _compare("weights before", before, model["before"], lambda file: weights_sha256(load_checkpoint(file).model))
    yield _compare("weights after", after, model["after"], lambda file: weights_sha256(load_checkpoint(file).model))


def _compare(what: str, file: Path, expected: str, digest: Callable[[Path], str]) -> Check:
    if not file.exists():
        return what, None, f"no file {file}"
    found = digest(file)
    return what, found == expected, found[:16] if found == expected else f"{found[:16]}, recorded {expected[:16]}"


def _images(record: dict, data: tuple[ImageSet, ImageSet]) -> Iterator[Check]:
    (train_set, test_set), request, recorded = data, record["request"], record["images"]
    forget = [int(c) for c in request["forget"]]
    names = [train_set.classes[c] if c < len(train_set.classes) else None for c in forget]
    yield "names of the forgotten classes", names == [*request["forget"].values()], ", ".join(map(str, names))
    for group, classes in (("forget", forget), ("remain", request["remain"])):
        here = torch.isin(train_set.labels.cpu(), torch.tensor(classes)).nonzero()[:, 0]
        absent = len(set(recorded[group]) - set(image_hashes(train_set, here)))
        yield f"training images to {group}", absent == 0, f"{len(recorded[group]) - absent} of {len(recorded[group])} found"
    yield "test images", joint_hash(test_set) == recorded["test"], f"{len(test_set)} images"


def _accuracies(folder: RunFolder, record: dict, test_set: ImageSet, hardware: Hardware) -> Iterator[Check]:
    pretrained, after = Path(record["arguments"]["checkpoint"]), folder.checkpoint(record["task"])
    if not (after.exists() and pretrained.exists()):
        yield "accuracies", None, f"no file {pretrained if after.exists() else after}"
        return
    predictions = []
    for file, head in ((pretrained, record["arguments"].get("head")), (after, None)):
        checkpoint = load_checkpoint(file, head)
        check_classes(checkpoint, test_set, file)
        predictions.append(predict(to_device(checkpoint.model, hardware), test_set, hardware))
    groups = (tuple(int(c) for c in record["request"][key]) for key in ("forget", "remain", "forgotten_before", "missing"))
    none = torch.empty(0, dtype=torch.long)
    task = ForgettingTask(record["task"], *groups, none, none)
    found = {"before": accuracies_before(predictions[0], task)}
    found["after"] = accuracies_after(predictions[1], task, found["before"])
    for when, values in found.items():
        recorded = record["accuracies"][when]
        differing = [f"{key} {recorded.get(key)}, found {values[key]}" for key in values if values[key] != recorded.get(key)]
        yield f"accuracies {when}", not differing, ", ".join(differing) or f"all {len(values)}"
