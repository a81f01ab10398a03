"""A run of forgetting, or two checkpoints, with the data and models that their audit needs."""

import argparse
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from math import isfinite
from pathlib import Path

import torch

from backbone.recognizer import Recognizer, to_device
from data import build_datasets, build_strangers
from data.cache import cache_folder
from data.image_set import ImageSet
from data.pairs import FacePairs, load_pairs
from data.tasks import named_classes
from methods import METHODS
from scripts.jobs import Job
from scripts.references import DATA_OPTIONS, pretraining_recipe, reference_job
from util.audit.audit import Audit, audit, check_originals, check_references
from util.audit.inputs import AuditTask
from util.audit.strangers import choose_strangers
from util.audit.utility import PAIRS_OF
from util.cli import options
from util.evaluation.verification import pair_benchmark
from util.report.results import load_results
from util.runtime.errors import UsageError
from util.runtime.files import sha256, state_mismatch
from util.runtime.hardware import Hardware
from util.storage.checkpoint import Checkpoint, align_classes, load_checkpoint
from util.storage.folders import RunFolder, default_folder
from util.storage.hashes import check_strangers

YARDSTICKS = {"references": [False], "strangers": [True], "both": [False, True]}  # whether strangers, of each comparison
# What data depend on, besides DATA_OPTIONS.
FURTHER_OPTIONS = ("strangers", "images", "before", "head", "published_adapters")


@dataclass
class AuditedRequest:
    """One request, after one of the tasks: class ids `forget` are audited in the checkpoint `after`.

    `forgotten` are all that it was to forget by then: references never saw any of them.
    """

    after: Path
    task: int
    after_task: int
    forget: list[int]
    forgotten: list[int]


@lru_cache(maxsize=1)
def load_data(
    where: tuple[tuple[str, object], ...], classes: tuple[str, ...], forgotten: tuple[int, ...], device: torch.device
) -> tuple[tuple[ImageSet, ImageSet], ImageSet | None, dict[str, FacePairs]]:
    """Training and test set, people in none of them, and the benchmarks of --pairs; runs of one data set share them.

    With the class ids of the pre-trained model; `classes` are its, if it names none. `forgotten` ones may have no images.
    """
    args = argparse.Namespace(**dict(where))
    checkpoint = load_once(args.before, args.head, args.published_adapters)
    a = checkpoint.model.architecture
    data = build_datasets(args, a.image_size, device, crop_pct=a.crop_pct)
    stranger_set = build_strangers(args, a.image_size, device, a.crop_pct)
    data = align_classes(replace(checkpoint, classes=checkpoint.classes or classes), data, args.before, forgotten)
    if stranger_set is not None:
        check_strangers(stranger_set, data[0])
    return data, stranger_set, load_pairs(args.pairs, a.image_size, args.cache_dir, a.crop_pct)


load_once = lru_cache(maxsize=16)(load_checkpoint)  # runs share the pre-trained model and the references


@lru_cache(maxsize=16)
def benchmark_once(model: Recognizer, pairs: tuple[tuple[str, FacePairs], ...], hardware: Hardware) -> dict[str, float]:
    """The accuracy on each of the benchmarks, in percent, as part of `Audit.utility`."""
    found = pair_benchmark(to_device(model, hardware), dict(pairs), hardware)
    return {f"{PAIRS_OF}{name}": one["accuracy"] for name, one in found.items()}


class AuditedRun:
    """A run, or two checkpoints, with data and models loaded: what becomes one audit.json."""

    def __init__(self, args: argparse.Namespace, folder: RunFolder | None = None) -> None:
        self.args, self.folder, self.hardware = args, folder, options.start_hardware(args)
        self.results = load_results(folder.results) if folder else None
        self.label = METHODS[self.results["method"]].title if folder else args.after.stem
        self.seed = self.results["seed"] if folder else None  # says who is forgotten
        if folder and not self.results["tasks"]:
            raise UsageError(f"{folder.path} has finished no task")
        after = self._load(folder.checkpoint(self.results["tasks"][-1]["task"]) if folder else args.after)
        self.requests = self._requests_of_run(after.forgotten) if folder else []
        self.before = self._load(args.before)
        own = folder.path / "audit" if folder else default_folder("audit", args.after, suffix=args.forget_classes)
        self.output = args.output_dir or own
        forgotten = tuple(sorted({*chain(*after.forgotten)}))
        where = tuple((key, getattr(args, key)) for key in (*DATA_OPTIONS, *FURTHER_OPTIONS))
        where += (("pairs", tuple(args.pairs or ())),)
        self.data, self.stranger_set, self.pairs = load_data(where, after.classes, forgotten, self.hardware.device)
        self.classes = self.data[0].classes
        if not folder:
            forget = [*dict.fromkeys(named_classes(args.forget_classes, self.classes))]
            self.requests = [AuditedRequest(args.after, 1, 1, forget, sorted(forget))]
        self.recipe, self.yardsticks = None, YARDSTICKS[args.compare_with or "references"]
        if args.recipe is not None or (args.references is None and False in self.yardsticks):
            try:
                self.recipe = pretraining_recipe(self.before, args.before, args.recipe)
            except UsageError as error:
                if args.strangers is None or args.compare_with or args.recipe is not None:
                    raise
                print(f"compared with strangers: {error}", file=sys.stderr)
                self.yardsticks = YARDSTICKS["strangers"]
        for request in self.requests:
            self._check(request)

    def _check(self, request: AuditedRequest) -> None:
        """Find what is wrong before references are trained."""
        self.load(request.after)
        people = tuple(sorted(request.forget)), tuple(self._remain(request))
        task = AuditTask(*self.data, *people, self.stranger_set, None, (), self.hardware)
        task.check()
        if True in self.yardsticks:
            choose_strangers(task)
        known = [self.before.model, *(self.load(path).model for path in self.args.originals)]
        check_originals(known, request.forget, self.classes)
        if self.args.references is not None:
            never = [self.load(path).model for path in dict.fromkeys(self.args.references)]
            check_references(never, request.forget, self.classes)

    def _requests_of_run(self, forgotten: list[list[int]]) -> list[AuditedRequest]:
        """Of the run's own tasks; `forgotten` are the class ids of these and of those before them."""
        own = [task["task"] for task in self.results["tasks"]]
        wanted = [*dict.fromkeys(self.args.requests or own[:1])]
        moments = [(number, number) for number in (own if "all" in wanted else wanted)]
        if "all" in wanted:
            moments += [(number, own[-1]) for number in own[:-1]]
        elif strange := [number for number in wanted if number not in own]:
            raise UsageError(f"--requests {strange[0]}: {self.folder.path} has finished {', '.join(map(str, own))}")
        requests = []
        for task, after in moments:
            gone = sorted(chain(*forgotten[:after]))
            requests.append(AuditedRequest(self.folder.checkpoint(after), task, after, forgotten[task - 1], gone))
        return requests

    def _remain(self, request: AuditedRequest) -> list[int]:
        """Whom all models know. One set of given references may serve many requests: it lacks the people of all of them."""
        never = [self.load(path).model.head.absent.nonzero()[:, 0].tolist() for path in self.args.references or ()]
        return [c for c in range(len(self.classes)) if c not in {*request.forgotten}.union(*never)]

    def reference_jobs(self, request: AuditedRequest) -> tuple[list[Job], list[Job]]:
        """The references and the further originals to train."""
        args = self.args
        if self.recipe is None or args.references is not None:
            return [], []
        # From 1 on, without the pre-trained model's own.
        seeds = [s for s in range(1, args.num_references + args.num_originals + 1) if s != self.before.info.get("seed")]

        def jobs(without: list[int], count: int) -> list[Job]:
            return [reference_job(args, self.recipe, self.data[0], without, seed) for seed in seeds[:count]]

        return jobs(request.forgotten, args.num_references), jobs([], args.num_originals - 1)

    def _load(self, path: Path) -> Checkpoint:
        return load_once(path, self.args.head, self.args.published_adapters)

    def load(self, path: Path) -> Checkpoint:
        """A checkpoint that can be measured beside the pre-trained one: of the same classes, image size and kind of rows."""
        checkpoint = self._load(path)
        align_classes(checkpoint, self.data, path)
        known, own = self.before.model, checkpoint.model
        size, expected = own.architecture.image_size, known.architecture.image_size
        if problems := state_mismatch(own.head.state_dict(), known.head.state_dict()):
            raise UsageError(f"{path} is no model like {self.args.before}: in its head {problems}")
        if size != expected:
            raise UsageError(f"{path} was trained on images of {size} pixels, {self.args.before} on images of {expected}")
        return checkpoint

    def audit(self, request: AuditedRequest, strangers: bool) -> tuple[Audit, list[dict], list[dict]]:
        """The audit of one case, beside references or strangers, and what its references and originals are."""
        args, files = self.args, [[], []]
        if not strangers and args.references is None:
            files = [[job.folder.results for job in group] for group in self.reference_jobs(request)]
        elif not strangers:
            files = [args.references, args.originals]
        never, known = ({path: self.load(path) for path in group} for group in files)
        references, originals = ([checkpoint.model for checkpoint in group.values()] for group in (never, known))
        models = self.before.model, self.load(request.after).model
        people = self.data, request.forget, self.stranger_set
        settings = {"remain": self._remain(request), "metrics": args.metrics, "seed": args.seed, "hardware": self.hardware}
        settings |= {"originals": originals, "cache": (args.cache_dir or cache_folder()) / "audits"}
        found = audit(*models, None if strangers else references, *people, **settings)
        useful = found.utility
        for entry, model in zip([useful["before"], useful, *useful["references"]], [*models, *references], strict=True):
            entry |= benchmark_once(model, tuple(self.pairs.items()), self.hardware)
        known = {args.before: self.before, **known}
        return found, *([describe(*entry, self.data[0]) for entry in group.items()] for group in (never, known))


def describe(path: Path, checkpoint: Checkpoint, train_set: ImageSet) -> dict:
    absent = checkpoint.model.head.absent
    info = {key: value for key, value in checkpoint.info.items() if isinstance(value, int | float) and isfinite(value)}
    # Whoever has no images is in no model that is trained now.
    without = [c for c in train_set.labels.unique().tolist() if absent[c]]
    about = {"seed": info.get("seed"), "sha256": sha256(path), "acc_remain": info.get("acc")}
    return about | {"without": [train_set.classes[c] for c in without], "file": str(path.resolve())}
