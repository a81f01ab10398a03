"""The audit of one request: each metric of the unlearned model, beside models that never saw the person and that did."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from backbone import heads
from backbone.recognizer import Recognizer, with_rows
from data.image_set import ImageSet
from util.audit import AUDIT_METRICS, AuditMetric
from util.audit.inputs import AuditedModel, AuditTask
from util.audit.statistics import Statistic, bootstrap_interval, compare, rounded, value_of
from util.audit.strangers import choose_strangers, metrics_against_strangers
from util.audit.utility import recognition, utility
from util.audit.verdict import judge
from util.runtime.errors import UsageError
from util.runtime.files import read_json, write_json
from util.runtime.hardware import Hardware
from util.storage.hashes import check_strangers, data_sha256, weights_sha256

MIN_REFERENCES = 3
# What was measured by other code is measured again. As it was when this process began, which may run for hours.
CODE = [path.read_text() for path in sorted([*Path(__file__).parent.glob("*.py"), Path(heads.__file__)])]


@dataclass
class Audit:
    """What was found of one request; `task` and `after` are what pictures are drawn from.

    metrics: by key, {"family", "value", "interval", "references", "originals", "known", "resolution", "delta", "z", "p",
    "rho", "power", "significant", "verdict"}, in percent but for z, p, rho and power; None, with a "reason", where unknown.
    "known" is the originals' mean, "resolution" what one image is worth.
    utility: of the unlearned model, "before" of the pre-trained one, "references" of each reference.
    strangers: of an audit beside strangers, {"people", "photos" that each enrols and tests with, "left_out"}.
    """

    task: AuditTask
    after: AuditedModel
    metrics: dict[str, dict]
    utility: dict
    curves: dict[str, dict]
    strangers: dict | None = None

    @property
    def verdict(self) -> str:
        return judge(self.metrics, self.strangers)["verdict"]

    def as_dict(self) -> dict:
        """One of the `requests` of audit.json."""
        names = [self.task.train_set.classes[c] for c in self.task.forget]
        about = {"forget": names, "images": len(self.task.forget_test), **judge(self.metrics, self.strangers)}
        about |= {"strangers": self.strangers}
        return about | {"utility": self.utility, "figures": self.metrics, "curves": self.curves}


def audit(
    before: Recognizer,
    after: Recognizer,
    references: Sequence[Recognizer] | None,
    data: tuple[ImageSet, ImageSet],
    forget: Sequence[int],
    stranger_set: ImageSet | None = None,
    *,
    hardware: Hardware,
    originals: Sequence[Recognizer] = (),
    remain: Sequence[int] | None = None,
    metrics: Sequence[str] = tuple(AUDIT_METRICS),
    seed: int = 0,
    cache: Path | None = None,
) -> Audit:
    """Does `after` still know the identities `forget` of `data`, a training and a test set? The models move to the device.

    before: the pre-trained model; `originals`, others trained like it with other seeds.
    references: three models or more that were trained like it on the images of everybody but `forget`. None: the forgotten
    are compared with strangers, as `util/audit/strangers.py` says.
    stranger_set: people in no training set, for TPIR and the marker.
    remain: class ids that the model is to know; by default all but `forget`.
    cache: a folder that keeps what was measured of references and originals, which many audits share.
    Raises UsageError if a reference has seen the forgotten, strangers are in the training set, or references or images lack.
    """
    remain = [c for c in range(len(data[0].classes)) if c not in forget] if remain is None else remain
    if references is None:
        remain = [c for c in remain if not after.head.absent[c]]  # who has no row is not kept
    whole = AuditTask(*data, tuple(sorted(forget)), tuple(sorted(remain)), stranger_set, None, (), hardware)
    _check(whole, references, [before, *originals])
    data, present = with_images(*data)
    rest = *data, stranger_set, hardware
    audited = AuditedModel(with_rows(after, present), *rest)
    known = [cached_model(model, weights_sha256(model), present, *rest, True) for model in (before, *originals)]
    never = tuple(cached_model(model, weights_sha256(model), present, *rest, False) for model in references or ())
    people = (tuple(place for place, c in enumerate(present) if c in group) for group in (forget, remain))
    task = AuditTask(*data, *people, stranger_set, known[0], never, hardware, seed)
    theirs = [recognition(reference, task) for reference in never]  # whose templates are their own
    useful = utility(audited, task) | {"before": utility(known[0], task), "references": theirs}
    if references is None:
        strangers = choose_strangers(task)
        entries = metrics_against_strangers(strangers, audited, task, metrics)
        return Audit(task, audited, entries, rounded(useful), {}, strangers.about)
    entries, curves = _compare_models(audited, task, known, metrics, MeasurementCache(cache, task))
    return Audit(task, audited, entries, rounded(useful), curves)


def _check(task: AuditTask, references: Sequence[Recognizer] | None, originals: Sequence[Recognizer]) -> None:
    if references is not None:
        check_references(references, task.forget, task.train_set.classes)
    check_originals(originals, task.forget, task.train_set.classes)
    task.check()
    if task.stranger_set is not None:
        check_strangers(task.stranger_set, task.train_set)


def _compare_models(
    audited: AuditedModel,
    task: AuditTask,
    known: Sequence[AuditedModel],
    metrics: Sequence[str],
    measurements: "MeasurementCache",
) -> tuple[dict[str, dict], dict[str, dict]]:
    entries, curves = {}, {}
    for metric in tqdm([AUDIT_METRICS[name] for name in metrics], "metrics", leave=False, disable=None):
        of_references = [measurements.measured(model, metric) for model in task.references]
        of_known = [measurements.measured(model, metric) for model in known]
        found = metric.measure(audited, task)
        for key, statistic in found.statistics.items():
            entries[key] = rounded(_entry(key, metric, statistic, task, of_references, of_known))
        for key, curve in found.curves.items():
            drawn = [measured["curves"][key] for measured in of_references]
            curves[key] = {"after": curve, "before": of_known[0]["curves"][key], "references": drawn}
    return entries, curves


def _entry(
    key: str, metric: AuditMetric, statistic: Statistic | str, task: AuditTask, references: list[dict], originals: list[dict]
) -> dict:
    """One of an audit's `metrics`; of references and originals what was measured."""
    value, resolution = value_of(statistic, task.num_groups), task.resolution(key)
    never, known = ([measured["values"][key] for measured in group] for group in (references, originals))
    if reasons := [text for text in (value, *never, *known) if isinstance(text, str)]:
        return metric.unmeasured() | {"reason": reasons[0]}
    entry = metric.unmeasured() | {"value": value, "references": never, "originals": known}
    if not metric.family:
        return entry | {"reason": "a picture of where, no verdict"}
    scale = [measured["values"][metric.scale_from.get(key, key)] for measured in originals]
    interval = bootstrap_interval(statistic, task.num_groups, task.seed)
    entry |= {"interval": interval, "known": sum(scale) / len(scale), "resolution": resolution}
    return entry | compare(value, never, scale, resolution, key in metric.lower_if_known)


@lru_cache(maxsize=16)
def cached_model(model: Recognizer, _weights_sha256: str, present: tuple[int, ...], *rest: Any) -> AuditedModel:
    """The next audit in this process, of another model beside the same ones, finds them embedded."""
    return AuditedModel(with_rows(model, present), *rest)


@lru_cache(maxsize=1)
def with_images(train_set: ImageSet, test_set: ImageSet) -> tuple[tuple[ImageSet, ImageSet], tuple[int, ...]]:
    """The sets with the classes alone that have training images, numbered anew, and their ids of before.

    Whoever asked to be forgotten may have had all images erased: such people take no part in any metric.
    """
    present = train_set.labels.unique()
    names, data = tuple(train_set.classes[c] for c in present), (train_set, test_set)
    if len(names) < len(train_set.classes):
        data = tuple(replace(s, labels=torch.searchsorted(present, s.labels), classes=names) for s in data)
    return data, tuple(present.tolist())


def check_references(references: Sequence[Recognizer], forget: Sequence[int], classes: Sequence[str]) -> None:
    if len(references) < MIN_REFERENCES:
        raise UsageError(f"{len(references)} references: their spread cannot be told from fewer than {MIN_REFERENCES}")
    if len({weights_sha256(model) for model in references}) < len(references):
        raise UsageError("two references are the same model: give each once")
    for number, model in enumerate(references, start=1):
        if seen := [c for c in forget if not model.head.absent[c]]:
            raise UsageError(
                f"reference {number} was trained with {len(seen)} of the {len(forget)} forgotten identities, "
                f"{classes[seen[0]]!r} first: it cannot tell what never seen means"
            )


def check_originals(originals: Sequence[Recognizer], forget: Sequence[int], classes: Sequence[str]) -> None:
    for number, model in enumerate(originals):
        if lacking := [c for c in forget if model.head.absent[c]]:
            which = f"original {number}" if number else "the pre-trained model"
            raise UsageError(f"{which} was trained without {classes[lacking[0]]!r}: it cannot tell what known means")


class MeasurementCache:
    """Measurements of references and originals, kept by all that they depend on."""

    def __init__(self, folder: Path | None, task: AuditTask) -> None:
        self.folder, self.task = folder, task
        if folder is not None:
            images = [data_sha256(s) for s in (task.train_set, task.test_set, task.stranger_set) if s is not None]
            asked = [task.forget, task.remain, task.seed, task.hardware.bf16, weights_sha256(task.before.model)]
            self.key = json.dumps([images, asked, CODE])

    def measured(self, audited: AuditedModel, metric: AuditMetric) -> dict:
        """{"values": {key: %, or why there is none}, "curves"}"""
        if self.folder is None or not metric.family:  # what is not judged depends on the references there are
            return self._measure(audited, metric)
        key = f"{self.key} {weights_sha256(audited.model)} {audited.original} {metric.name}"
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        if not path.exists():
            write_json(path, self._measure(audited, metric))
        return read_json(path)

    def _measure(self, audited: AuditedModel, metric: AuditMetric) -> dict:
        found = metric.measure(audited, self.task)
        values = {key: value_of(statistic, self.task.num_groups) for key, statistic in found.statistics.items()}
        return {"values": values, "curves": found.curves}
