"""References of the audit: models trained by the pre-training recipe, without the forgotten classes or with other seeds.

They lie in the user's cache folder, keyed by all that they depend on: training images, recipe, classes left out, seed.
What is there is not trained again; what was interrupted is continued.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from itertools import chain
from math import ceil
from pathlib import Path

import torch

from backbone.recognizer import build_recognizer
from backbone.sources import find_source
from data.cache import cache_folder
from data.image_set import ImageSet
from scripts.jobs import Job, job_slots, run_jobs
from train_pretrain import RECIPE, RECIPE_OF_WEIGHTS, recipe_in
from util.cli.options import option_name
from util.runtime.errors import RunError, UsageError
from util.runtime.files import file_lock, read_json, readable, sha256, state_mismatch
from util.runtime.interrupt import end_on_sigterm
from util.storage.checkpoint import Checkpoint
from util.storage.folders import PretrainFolder
from util.storage.hashes import data_sha256
from util.training.start import describe_model

# Options that say where the images come from, and on what to run: a reference gets the audit's.
DATA_OPTIONS = ("data", "cache_dir", "identities", "train_per_identity", "test_per_identity", "data_seed", "val_fraction")
PASSED_ON = (*DATA_OPTIONS, "device", "precision", "cls_only_last_block", "images")


def pretraining_recipe(checkpoint: Checkpoint, path: Path, config: Path | None) -> dict:
    """How the pre-trained model was trained, from the checkpoint or the config.json of its run.

    Raises UsageError where neither tells, where that is another model's, or where the weights it began with are gone.
    """
    recipe = read_json(config).get("arguments") if config else checkpoint.info.get("recipe")
    if not isinstance(recipe, dict) or not {*RECIPE} <= recipe.keys():
        where = f"{config} has" if config else f"{path} names"
        raise UsageError(
            f"{where} no recipe of pre-training, and references are trained by the same: give the config.json of its run "
            f"with --recipe, references with --references, or people in no training set with --strangers"
        )
    recipe = recipe_in(recipe)
    with readable(config or path, "no recipe of pre-training"):
        asked = RECIPE_OF_WEIGHTS | recipe
        asked["weights"] = recipe["weights"] and Path(recipe["weights"])
        asked, classes = argparse.Namespace(**asked), checkpoint.model.architecture.num_classes
        architecture = describe_model(asked, find_source(recipe["model"]), classes)
        with torch.device("meta"):
            model = build_recognizer(architecture)
        if recipe["epochs"] == 0:
            raise UsageError(f"{path} was enrolled, not trained here, so no reference can be: audit it with --strangers DIR")
        range(recipe["warmup_epochs"], recipe["epochs"], recipe["epochs"])  # raises where they are no such numbers
        if problems := state_mismatch(checkpoint.model.state_dict(), model.state_dict()):
            raise UsageError(f"{path} was not trained by the recipe in {config or path}: {problems}")
        if recipe["weights"] and not Path(recipe["weights"]).is_file():
            raise UsageError(
                f"no file {recipe['weights']}, whose weights {path} was trained from: a copy of its run's config.json that "
                f"says where it lies now can be given with --recipe"
            )
    return recipe


def reference_job(args: argparse.Namespace, recipe: dict, train_set: ImageSet, without: Sequence[int], seed: int) -> Job:
    """The run that trains the reference of these classes and this seed; finished where the cache has it."""
    left = (~torch.isin(train_set.labels.cpu(), torch.tensor([*without], dtype=torch.long))).sum().item()
    # As many images are shown as to the pre-trained model.
    longer = recipe["epochs"] * len(train_set) / max(1, left)
    recipe = recipe | {"epochs": round(longer), "warmup_epochs": round(longer * recipe["warmup_epochs"] / recipe["epochs"])}
    names = sorted(train_set.classes[c] for c in without)
    known = recipe | {"weights": recipe["weights"] and sha256(Path(recipe["weights"]))}  # wherever they lie
    key = hashlib.sha256(json.dumps([data_sha256(train_set), known, names, seed]).encode()).hexdigest()[:16]
    folder = PretrainFolder((args.cache_dir or cache_folder()) / "references" / f"{train_set.name}-{key}")
    arguments = ["--seed", str(seed), "--output-dir", str(folder.path), "--resume", "--overwrite"]
    if without:  # by id: a name may hold anything
        arguments += ["--without-classes", ",".join(f"#{c}" for c in sorted(without))]
    present = {*train_set.labels.tolist()}
    if absent := [name.replace('"', '""') for c, name in enumerate(train_set.classes) if c not in present]:
        arguments += ["--absent-classes", ",".join(f'"{name}"' for name in absent)]
    for name, value in (recipe | {name: getattr(args, name) for name in PASSED_ON}).items():
        if value is True:
            arguments.append(option_name(name))
        elif value is not None and value is not False:
            arguments += [option_name(name), *map(str, value if isinstance(value, list) else [value])]
    label = f"{train_set.name} without {len(without)} classes, seed {seed}"
    return Job(label, folder, "train_pretrain.py", arguments, finished=folder.finished)


def train_references(jobs: Sequence[Job], args: argparse.Namespace) -> None:
    """Train what the cache does not have, side by side where `args` says (`add_job_options`)."""
    jobs = [*{job.folder.path: job for job in jobs}.values()]
    missing, start = [job for job in jobs if not job.finished], time.perf_counter()
    if not missing:
        return
    print(f"references: {len(jobs)} needed, {len(jobs) - len(missing)} in the cache", flush=True)
    at_once = len(missing) if args.cluster == "slurm" else len(job_slots(args, len(missing)))
    with end_on_sigterm(), closing(_trained(missing, args)) as trained:
        for done, job in enumerate(trained, start=1):
            if job.failure:
                raise RunError(f"reference {job.label}: {job.failure} (see {job.folder.path / 'log.txt'})")
            seconds = time.perf_counter() - start
            left = seconds * (ceil(len(missing) / at_once) / ceil(done / at_once) - 1)  # in rounds of so many side by side
            message = f"{_clock(seconds)}, about {_clock(left)} left"
            print(f"reference {done} of {len(missing)}: {job.label} · {message}", flush=True)


def _trained(jobs: list[Job], args: argparse.Namespace) -> Iterator[Job]:
    """Yield each job as its reference is there. What another audit trains is waited for, and trained if that one dies."""
    while jobs:
        with ExitStack() as held:
            locks = {job.folder.path: held.enter_context(lock) for job in jobs if (lock := _reserve(job))}
            idle, there = not locks, [job for job in jobs if job.folder.finished]
            todo = [job for job in jobs if job.folder.path in locks and job not in there]
            for job in chain(there, held.enter_context(closing(run_jobs(todo, job_slots(args, len(todo)))))):
                locks.pop(job.folder.path, ExitStack()).close()
                if job.failure and not _reserve(job):
                    job.failure = ""  # one that an audit has left behind when it was killed goes on
                    continue
                jobs = [other for other in jobs if other is not job]
                yield job
        if jobs and idle:
            print(f"waiting for another audit, which trains {jobs[0].label}", flush=True)
            for lock in _locks(jobs[0]):
                with file_lock(lock):
                    pass


def _reserve(job: Job) -> ExitStack | None:
    """Keep other audits from training this reference until the result is closed; None where another one does."""
    audits, runs = _locks(job)
    with ExitStack() as held, suppress(BlockingIOError):
        held.enter_context(file_lock(audits, wait=False))
        with file_lock(runs, wait=False):
            return held.pop_all()


def _locks(job: Job) -> tuple[Path, Path]:
    """That of the audits, and the run's own, which outlives an audit that is killed."""
    folder = job.folder.path
    folder.mkdir(parents=True, exist_ok=True)
    return folder.with_name(f".{folder.name}.lock"), folder / ".lock"


def _clock(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"
