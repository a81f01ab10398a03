"""Is what a record of deletion says true? Recomputed from the files that it names; an audit's files are compared by hash."""

import glob
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from backbone.recognizer import to_device
from data.image_set import ImageSet
from data.tasks import ForgettingTask
from util.evaluation.evaluate import accuracies_after, accuracies_before, predict
from util.runtime.errors import RunError, UsageError
from util.runtime.files import read_json, readable, sha256
from util.runtime.hardware import Hardware
from util.storage.checkpoint import Checkpoint, align_classes, load_checkpoint
from util.storage.folders import RunFolder
from util.storage.hashes import image_hashes, joint_hash, weights_sha256

Check = tuple[str, bool | None, str]  # what, whether it is so (None: cannot be told), details
Load = Callable[[Path], Checkpoint]
NAMES_SHOWN = 5


def verify_record(
    path: Path, record: dict, data: tuple[ImageSet, ImageSet], hardware: Hardware, pretrained: Path | None = None
) -> list[Check]:
    """Recompute what `record` says, from the files beside it and the training and test set `data`.

    pretrained: where the pre-trained recognizer lies now, by default where it was.
    The images of whole classes may be gone, as the law asks for: what they alone can show is not checked.
    """
    folder = RunFolder(path.resolve().parent.parent)
    with readable(path, "damaged record"):
        arguments, hashes = record["arguments"], record["model"]
        pretrained = pretrained or Path(arguments["checkpoint"])
        told = arguments.get("head"), arguments.get("published_adapters")
        load = cache(lambda file: load_checkpoint(file, *(told if file == pretrained else ())))
        files = {"after": folder.checkpoint(record["task"]), "before": pretrained}
        recorded = {"after": hashes["after_file"], "before": hashes["pretrained_file"]}
        models = {w: load(f) for w, f in files.items() if f.exists() and sha256(f) == recorded[w]}
        checks = [*_files(folder, record, pretrained, load), *_measured(record, data, models, files, hardware)]
    return [*checks, *_audits(path, folder, record, pretrained)]


def _files(folder: RunFolder, record: dict, pretrained: Path, load: Load) -> Iterator[Check]:
    number, model, after = record["task"], record["model"], folder.checkpoint(record["task"])

    def weights(file: Path) -> str:
        return weights_sha256(load(file).model)

    if record["previous_record"] is None:
        yield "record before it", None, "it names none"
    else:
        yield _compare("record before it", folder.task_file("deletions", number - 1), record["previous_record"], sha256)
    yield _compare("file of the pre-trained model", pretrained, model["pretrained_file"], sha256)
    yield _compare("file of the model after", after, model["after_file"], sha256)
    before = pretrained if number == 1 else _entered(folder, record, weights)
    yield _compare("weights before", before, model["before"], weights)
    yield _compare("weights after", after, model["after"], weights)


def _entered(folder: RunFolder, record: dict, weights: Callable[[Path], str]) -> Path:
    """The checkpoint that a later task began with; what another run left is looked for here if it has moved."""
    own, named = folder.checkpoint(record["task"] - 1), record["arguments"]["resume_from"]
    if own.exists() or named is None:
        return own
    name = glob.escape(Path(named).name)
    for file in [Path(named), *folder.path.rglob(name), *folder.path.parent.glob(f"*/checkpoints/{name}")]:
        with suppress(UsageError, RunError):  # no such file, or another one of that name
            if weights(file) == record["model"]["before"]:
                return file
    return Path(named)


def _compare(what: str, file: Path, expected: str, digest: Callable[[Path], str]) -> Check:
    if not file.exists():
        return what, None, f"no file {file}"
    found = digest(file)
    return what, found == expected, found[:16] if found == expected else f"{found[:16]}, recorded {expected[:16]}"


def _measured(
    record: dict, data: tuple[ImageSet, ImageSet], models: dict[str, Checkpoint], files: dict[str, Path], hardware: Hardware
) -> Iterator[Check]:
    """What images show, of the record and of `models`, those of its `files` that are what they were."""
    here, request = data[0].classes, record["request"]
    for when, checkpoint in models.items():
        data = align_classes(checkpoint, data, files[when], range(checkpoint.model.architecture.num_classes))
    classes = data[0].classes
    reason, erased = "", {c for c, name in enumerate(classes) if name not in here}
    if not models and len(here) != sum(len(request[key]) for key in ("forget", "forgotten_before", "remain")):
        reason = "classes are gone, and no model is left that names them"
    elif erased and record["arguments"].get("val_fraction") is not None:
        reason = f"{_gone(erased, classes)}; the images held out depend on them"
    if reason:
        yield "images and accuracies", None, reason
        return
    yield from _images(record, data, erased)
    for when in ("before", "after"):
        if when in models:
            yield from _accuracies(record, when, to_device(models[when].model, hardware), data[1], erased, hardware)
        else:
            yield f"accuracies {when}", None, f"{files[when]} is gone, or another file"


def _gone(erased: set[int], classes: tuple[str, ...]) -> str:
    names = [classes[c] for c in sorted(erased)]
    more = ", …" if len(names) > NAMES_SHOWN else ""
    return f"images of {len(names)} class{'es' * (len(names) > 1)} are gone: {', '.join(names[:NAMES_SHOWN])}{more}"


def _images(record: dict, data: tuple[ImageSet, ImageSet], erased: set[int]) -> Iterator[Check]:
    (train_set, test_set), request, recorded = data, record["request"], record["images"]
    classes, forget = train_set.classes, [int(c) for c in request["forget"]]

    def judged(so: bool, found: str, gone: set[int]) -> tuple[bool | None, str]:
        return (None, f"{found}; {_gone(gone, classes)}") if gone else (so, found)

    names = [classes[c] if c < len(classes) else None for c in forget]
    so = names == [*request["forget"].values()]
    yield "names of the forgotten classes", *judged(so, ", ".join(map(str, names)), erased & {*forget} if so else set())
    for group, members in (("forget", forget), ("remain", request["remain"])):
        here = torch.isin(train_set.labels.cpu(), torch.tensor(members)).nonzero()[:, 0]
        absent, count = len(set(recorded[group]) - set(image_hashes(train_set, here))), len(recorded[group])
        yield f"training images to {group}", *judged(absent == 0, f"{count - absent} of {count} found", erased & {*members})
    yield "test images", *judged(joint_hash(test_set) == recorded["test"], f"{len(test_set)} images", erased)


def _accuracies(
    record: dict, when: str, model: torch.nn.Module, test_set: ImageSet, erased: set[int], hardware: Hardware
) -> Iterator[Check]:
    request, recorded, none = record["request"], record["accuracies"], torch.empty(0, dtype=torch.long)
    groups = [tuple(int(c) for c in request[key]) for key in ("forget", "remain", "forgotten_before", "missing")]
    task, predictions = ForgettingTask(record["task"], *groups, none, none), predict(model, test_set, hardware)
    if when == "before":
        found = accuracies_before(predictions, task)
    else:
        found = accuracies_after(predictions, task, recorded["before"])
    untold = {key for key in ("forget", "remain", "old", "missing") if erased & {*getattr(task, key)}}
    untold |= {"mean"} if untold & {"forget", "remain"} else set()  # H
    values = {key: value for key, value in found.items() if key.rsplit("_", 1)[1] not in untold}
    differing = [f"{key} {recorded[when].get(key)}, found {v}" for key, v in values.items() if v != recorded[when].get(key)]
    yield f"accuracies {when}", not differing, ", ".join(differing) or f"all {len(values)}"
    if others := [key for key in found if key not in values]:
        yield f"accuracies {when}: {', '.join(others)}", None, _gone(erased, test_set.classes)


def _audits(path: Path, folder: RunFolder, record: dict, pretrained: Path) -> Iterator[Check]:
    """Are the files that the audit measured, after the task of this record, still the same?"""
    file, number, known = folder.path / "audit" / "audit.json", record["task"], record["model"]["pretrained_file"]
    if not file.exists():
        yield "audit", None, f"no file {file}; run_audit.sh makes it"
        return
    content = read_json(file)
    with readable(file, "damaged audit"):
        others = {entry["sha256"]: Path(entry["file"]) for entry in content["references"] + content["originals"]}
        others |= {known: pretrained} if known in others else {}
        requests = [request for request in content["requests"] if request["after_task"] == number]
        if not requests:
            yield "audit", None, f"{file} has none after task {number}"
        for request in requests:
            hashes = {path: request["record_sha256"], folder.checkpoint(number): request["after_sha256"]}
            used = (*request["references"], *(entry["sha256"] for entry in content["originals"]))
            yield f"audit of request {request['task']}", *_unchanged(hashes | {others[digest]: digest for digest in used})


def _unchanged(hashes: dict[Path, str]) -> tuple[bool | None, str]:
    there = [file for file in hashes if file.exists()]
    if changed := [str(file) for file in there if sha256(file) != hashes[file]]:
        return False, f"another file: {', '.join(changed)}"
    if gone := [str(file) for file in hashes if file not in there]:
        return None, f"no file {', '.join(gone)}"
    return True, f"all {len(hashes)} files"
