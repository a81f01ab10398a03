"""Is what a record of deletion says true, and the audit beside it? Measured anew, from the files that they name."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from backbone.recognizer import to_device
from data import build_unseen
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from util.audit.audit import audit
from util.audit.statistics import POWER
from util.evaluation.evaluate import accuracies_after, accuracies_before, predict
from util.runtime.files import read_json, readable, sha256
from util.runtime.hardware import Hardware
from util.storage.checkpoint import align_classes, load_checkpoint
from util.storage.folders import RunFolder
from util.storage.hashes import image_hashes, joint_hash, weights_sha256

Check = tuple[str, bool | None, str]  # what, whether it is so (None: cannot be told), details
TOLERANCE = 0.01  # points: the rounding of audit.json, and some


def verify_record(path: Path, record: dict, data: tuple[ImageSet, ImageSet], hardware: Hardware) -> list[Check]:
    """Recompute what `record` says, from the files beside it and the training and test set `data`."""
    folder = RunFolder(path.resolve().parent.parent)
    with readable(path, "damaged record"):
        checks = [*_files(folder, record), *_images(record, data), *_accuracies(folder, record, data[1], hardware)]
    return [*checks, *_audits(path, folder, data, hardware)]


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
        align_classes(checkpoint, [test_set], file)
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


def _audits(record: Path, folder: RunFolder, data: tuple[ImageSet, ImageSet], hardware: Hardware) -> Iterator[Check]:
    """Every request of the run's audit that was audited after the task of `record`, a record of deletion."""
    file = folder.path / "audit" / "audit.json"
    if not file.exists():
        yield "audit", None, f"no file {file}; run_audit.sh makes it"
        return
    content, digest = read_json(file), sha256(record)
    with readable(file, "damaged audit"):
        requests = [request for request in content["requests"] if request.get("record_sha256") == digest]
        if not requests:
            yield "audit", None, f"{file} is of other records"
        for request in requests:
            yield f"audit of request {request['task']}", *_measured_anew(request, content, folder, data, hardware)


def _measured_anew(
    request: dict, content: dict, folder: RunFolder, data: tuple[ImageSet, ImageSet], hardware: Hardware
) -> tuple[bool | None, str]:
    entries = {e["sha256"]: Path(e["file"]) for e in content["references"] + content["originals"]}
    for digest in (*request["references"], *(e["sha256"] for e in content["originals"])):
        if not entries[digest].exists() or sha256(entries[digest]) != digest:
            return None, f"{entries[digest]} is gone, or another model"
    arguments, classes = content["arguments"], data[0].classes
    own = argparse.Namespace(**arguments | {key: arguments[key] and Path(arguments[key]) for key in ("unseen", "cache_dir")})
    before, *originals = (load_checkpoint(Path(e["file"]), arguments["head"]).model for e in content["originals"])
    after = load_checkpoint(folder.checkpoint(request["after_task"]))
    gone = {c for task in after.forgotten for c in task}
    found = audit(
        before,
        after.model,
        [load_checkpoint(entries[digest], arguments["head"]).model for digest in request["references"]],
        data,
        [classes.index(name) for name in request["forget"]],
        build_unseen(own, data[0].image_size, hardware.device),
        hardware=hardware,
        originals=originals,
        remain=[c for c in range(len(classes)) if c not in gone],
        figures=arguments["figures"],
        seed=arguments["seed"],
    ).figures
    recorded = request["figures"]
    differing = [key for key in found if key not in recorded or not _alike(found[key], recorded[key])]
    powerless = [key for key, entry in found.items() if entry["power"] is not None and entry["power"] < POWER]
    told = f"not so: {', '.join(differing)}" if differing else f"all {len(found)} figures"
    return not differing, told + (f"; no power on these data: {', '.join(powerless)}" if powerless else "")


def _alike(found: dict, recorded: dict) -> bool:
    ours, theirs = (
        [e["value"] or 0.0, *e["references"], *e["originals"], float(e["value"] is None)] for e in (found, recorded)
    )
    same = len(ours) == len(theirs) and np.allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    return same and found["verdict"] == recorded["verdict"]
