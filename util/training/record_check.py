"""Is what a record of deletion says true? Recomputed from the files that it names; an audit's files are compared by hash."""

import glob
import re
import subprocess
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from backbone.recognizer import to_device
from data.image_set import ImageSet
from data.tasks import ForgettingTask, name_list
from util.evaluation.evaluate import Predictions, accuracies_after, accuracies_before, predict
from util.runtime.errors import RunError, UsageError
from util.runtime.files import read_json, readable, sha256
from util.runtime.hardware import Hardware
from util.storage.checkpoint import align_classes, load_checkpoint
from util.storage.folders import RunFolder
from util.storage.hashes import image_hashes, joint_hash, weights_sha256

Check = tuple[str, bool | None, str]  # what, whether it is so (None: cannot be told), details
NAMESPACE = "file"  # of signatures, as ssh-keygen's manual names it for files


def verify_record(
    path: Path, record: dict, data: tuple[ImageSet, ImageSet], hardware: Hardware, pretrained: Path | None = None
) -> list[Check]:
    """Recompute what `record` says, from the files beside it and the training and test set `data`.

    pretrained: where the pre-trained recognizer lies now, by default where it was.
    The images of whole classes may be gone, as the law asks for: what they alone can show is not checked.
    """
    with readable(path, "damaged record"):
        files = _Files(path, record, pretrained or Path(record["arguments"]["checkpoint"]))
        return [*files.compared(), *_measured(files, data, hardware), *files.audits()]


def signatures(path: Path, signers: Path | None) -> Iterator[Check]:
    """Of the record at `path` and the audit beside it, if they are signed; with OpenSSH's allowed `signers` both must be."""
    for file in filter(Path.exists, (path, path.resolve().parent.parent / "audit" / "audit.json")):
        if (signature := file.with_name(f"{file.name}.sig")).exists():
            yield f"signature of {file.name}", *_signed(file, signature, signers)
        elif signers:
            yield f"signature of {file.name}", False, f"no file {signature}"


def _signed(file: Path, signature: Path, signers: Path | None) -> tuple[bool | None, str]:
    def ssh_keygen(*words: str | Path) -> subprocess.CompletedProcess:
        return subprocess.run(["ssh-keygen", "-Y", *words, "-s", signature], input=file.read_bytes(), capture_output=True)

    try:
        if signers is None:
            done = ssh_keygen("check-novalidate", "-n", NAMESPACE)
        elif not (done := ssh_keygen("find-principals", "-f", signers)).returncode:
            who = re.split("[,\n]", done.stdout.decode())[0]  # of several names of the key, the first
            done = ssh_keygen("verify", "-f", signers, "-I", who, "-n", NAMESPACE)
    except FileNotFoundError:
        return None, "no ssh-keygen here: install OpenSSH"
    message = done.stderr if done.returncode else done.stdout
    return not done.returncode, message.decode().strip().partition("\n")[0]


class _Files:
    """A record and the files that it names."""

    def __init__(self, path: Path, record: dict, pretrained: Path) -> None:
        self.path, self.record, self.number, self.hashes = path, record, record["task"], record["model"]
        self.folder = RunFolder(path.resolve().parent.parent)
        # Ours first: it names the classes, which a published one before it does not.
        self.models = {"after": self.folder.checkpoint(self.number), "before": pretrained}
        layout = record["arguments"].get("head"), record["arguments"].get("published_adapters")
        self.load = cache(lambda file: load_checkpoint(file, *(layout if file == pretrained else ())))

    def weights(self, file: Path) -> str:
        return weights_sha256(self.load(file).model)

    def compared(self) -> Iterator[Check]:
        after, before = self.models.values()
        entered = before if self.number == 1 else self.entered()
        if self.record["previous_record"] is None:
            yield "record before it", None, "it names none"
        else:
            earlier = RunFolder(entered.parent.parent).task_file("deletions", self.number - 1)
            yield _compare("record before it", {earlier: self.record["previous_record"]})
        yield _compare("file of the pre-trained model", {before: self.hashes["pretrained_file"]})
        yield _compare("file of the model after", {after: self.hashes["after_file"]})
        yield _compare("weights before", {entered: self.hashes["before"]}, self.weights)
        yield _compare("weights after", {after: self.hashes["after"]}, self.weights)

    def entered(self) -> Path:
        """The checkpoint that a later task began with; what another run left is looked for here if it has moved."""
        own, named = self.folder.checkpoint(self.number - 1), self.record["arguments"]["resume_from"]
        if own.exists() or named is None:
            return own
        name, run = glob.escape(Path(named).name), self.folder.path
        for file in [Path(named), *run.rglob(name), *run.parent.glob(f"*/checkpoints/{name}")]:
            with suppress(UsageError, RunError):  # no such file, or another one of that name
                if self.weights(file) == self.hashes["before"]:
                    return file
        return Path(named)

    def audits(self) -> Iterator[Check]:
        """Are the files that the audit measured, after the task of this record, still the same?"""
        file, known = self.folder.path / "audit" / "audit.json", self.hashes["pretrained_file"]
        if not file.exists():
            yield "audit", None, f"no file {file}; run_audit.sh makes it"
            return
        content = read_json(file)
        with readable(file, "damaged audit"):
            others = {entry["sha256"]: Path(entry["file"]) for entry in content["references"] + content["originals"]}
            others |= {known: self.models["before"]} if known in others else {}
            requests = [request for request in content["requests"] if request["after_task"] == self.number]
            if not requests:
                yield "audit", None, f"{file} has none after task {self.number}"
            for request in requests:
                hashes = {self.path: request["record_sha256"], self.models["after"]: request["after_sha256"]}
                used = (*request["references"], *(entry["sha256"] for entry in content["originals"]))
                yield _compare(f"audit of request {request['task']}", hashes | {others[digest]: digest for digest in used})


def _compare(what: str, hashes: dict[Path, str], digest: Callable[[Path], str] = sha256) -> Check:
    there = [file for file in hashes if file.exists()]
    if changed := [str(file) for file in there if digest(file) != hashes[file]]:
        return what, False, f"another file: {', '.join(changed)}"
    if missing := [str(file) for file in hashes if file not in there]:
        return what, None, f"no file {', '.join(missing)}"
    return what, True, f"all {len(hashes)} files" if len(hashes) > 1 else next(iter(hashes.values()))[:16]


def _measured(files: _Files, data: tuple[ImageSet, ImageSet], hardware: Hardware) -> Iterator[Check]:
    """What images show, of the record and of those models that are what they were."""
    record, here = files.record, data[0].classes
    recorded = {"before": files.hashes["pretrained_file"], "after": files.hashes["after_file"]}
    models = {when: files.load(f) for when, f in files.models.items() if f.exists() and sha256(f) == recorded[when]}
    for when, checkpoint in models.items():
        data = align_classes(checkpoint, data, files.models[when], range(checkpoint.model.architecture.num_classes))
    erased = _MissingImages(data[0].classes, here)
    count = sum(len(record["request"][key]) for key in ("forget", "forgotten_before", "remain"))
    if not models and len(here) != count:
        yield "images and accuracies", None, "classes are gone, and no model is left that names them"
    elif erased.ids and record["arguments"].get("val_fraction") is not None:
        yield "images and accuracies", None, f"{erased}; the images held out depend on them"
    else:
        yield from _images(record, data, erased)
        for when in ("before", "after"):
            if when in models:
                predictions = predict(to_device(models[when].model, hardware), data[1], hardware)
                yield from _accuracies(record, when, predictions, erased)
            else:
                yield f"accuracies {when}", None, f"{files.models[when]} is gone, or another file"


class _MissingImages:
    """The ids of those of the classes that have no images here, and how to say so."""

    def __init__(self, classes: tuple[str, ...], here: tuple[str, ...]) -> None:
        self.classes = classes
        self.ids = {c for c, name in enumerate(classes) if name not in here}

    def __str__(self) -> str:
        names = name_list(sorted(self.ids), self.classes, most=5)
        return f"images of {len(self.ids)} class{'es' * (len(self.ids) > 1)} are gone: {names}"

    def check(self, what: str, so: bool, found: str, classes: Collection[int]) -> Check:
        """What the images of these classes show."""
        return (what, None, f"{found}; {self}") if self.ids.intersection(classes) else (what, so, found)


def _images(record: dict, data: tuple[ImageSet, ImageSet], erased: _MissingImages) -> Iterator[Check]:
    (train_set, test_set), request, recorded = data, record["request"], record["images"]
    classes, forget = train_set.classes, [int(c) for c in request["forget"]]
    names = [classes[c] if c < len(classes) else None for c in forget]
    so = names == [*request["forget"].values()]
    yield erased.check("names of the forgotten classes", so, ", ".join(map(str, names)), forget if so else ())
    for group, members in (("forget", forget), ("remain", request["remain"])):
        here = torch.isin(train_set.labels.cpu(), torch.tensor(members)).nonzero()[:, 0]
        absent, count = len(set(recorded[group]) - set(image_hashes(train_set, here))), len(recorded[group])
        yield erased.check(f"training images to {group}", absent == 0, f"{count - absent} of {count} found", members)
    if replayed := recorded.get("replay"):
        yield "images of --replay", None, f"{len(replayed)} images of other people"
    yield erased.check("test images", joint_hash(test_set) == recorded["test"], f"{len(test_set)} images", erased.ids)


def _accuracies(record: dict, when: str, predictions: Predictions, erased: _MissingImages) -> Iterator[Check]:
    request, recorded, none = record["request"], record["accuracies"], torch.empty(0, dtype=torch.long)
    groups = [tuple(int(c) for c in request[key]) for key in ("forget", "remain", "forgotten_before", "missing")]
    task = ForgettingTask(record["task"], *groups, none, none)
    if when == "before":
        found = accuracies_before(predictions, task)
    else:
        found = accuracies_after(predictions, task, recorded["before"])
    untold = {key for key in ("forget", "remain", "old", "missing") if erased.ids.intersection(getattr(task, key))}
    untold |= {"mean"} if untold & {"forget", "remain"} else set()  # H
    values = {key: value for key, value in found.items() if key.rsplit("_", 1)[1] not in untold}
    differing = [f"{key} {recorded[when].get(key)}, found {v}" for key, v in values.items() if v != recorded[when].get(key)]
    yield f"accuracies {when}", not differing, ", ".join(differing) or f"all {len(values)}"
    if others := [key for key in found if key not in values]:
        yield f"accuracies {when}: {', '.join(others)}", None, str(erased)
