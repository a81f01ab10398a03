"""`checkpoints/last.pth`: where a run is, saved while it goes, so that it can be interrupted anywhere."""

import argparse
import math
import time
from pathlib import Path

import torch

from backbone.recognizer import Recognizer
from data.image_set import ImageSet
from util.cli.options import first_difference, number, option_name
from util.runtime import distributed
from util.runtime.errors import RunError, UsageError
from util.runtime.files import read_json, readable, sha256
from util.storage.checkpoint import torch_load, torch_save
from util.storage.folders import OutputFolder
from util.training.engine import Trainer

# Options that may differ between an interrupted run and the one that continues it. Files and data are known by their hashes.
FREE_ON_RESUME = {"output_dir", "cache_dir", "device", "overwrite", "resume", "save_every", "eval_every", "config"}
FREE_ON_RESUME |= {"checkpoint", "resume_from", "weights", "data"}


def add_resume_options(group: argparse._ArgumentGroup) -> None:
    help_text = "seconds of training between two saves for --resume, each at an epoch's end; 0: every epoch"
    group.add_argument("--save-every", type=number(float, 0), default=60, help=help_text)
    group.add_argument("--overwrite", action="store_true", help="replace the run in --output-dir")
    group.add_argument("--resume", action="store_true", help="continue the run; with --overwrite, replace a finished one")


def identity_of(args: argparse.Namespace, train_set: ImageSet) -> dict[str, str | None]:
    """What a run reads, by content: entries of config.json, wherever the files lie."""
    files = {key: getattr(args, key, None) for key in ("checkpoint", "resume_from", "weights")}
    hashes = {f"{key}_sha256": path and sha256(path) for key, path in files.items() if hasattr(args, key)}
    return hashes | {"data_sha256": train_set.content_sha256}


def difference_to(config: dict, args: argparse.Namespace, identity: dict[str, str | None]) -> str | None:
    """The first option, or what it names, in which the run of a config.json is another than that of `args`."""
    difference = first_difference(config.get("arguments", {}), args, FREE_ON_RESUME)
    other = [key.removesuffix("_sha256") for key, value in identity.items() if config.get(key, value) != value]
    return difference or (f"{option_name(other[0])} has other content now" if other else None)


def should_resume(
    folder: OutputFolder, args: argparse.Namespace, identity: dict, model: Recognizer, checkpoints: int = 1
) -> bool:
    """Whether the run of `args`, known by `identity_of`, goes on with one in the locked folder. Nothing is changed.

    With both --resume and --overwrite a run that was interrupted is continued, and any other replaced.
    Raises UsageError where the folder's run is another one or would be replaced unasked, where the run reads what it
    replaces, or where there is no room for so many checkpoints of the model.
    """
    resume = args.resume and folder.config.exists()
    if resume:
        difference = difference_to(read_json(folder.config), args, identity)
        if args.overwrite:
            resume = difference is None and folder.last.exists() and not folder.finished
        elif difference is not None:
            message = f"--resume: {folder.path} was started with other options: {difference}; repeat the first command"
            raise UsageError(f"{message}, or choose another --output-dir (--overwrite replaces the run)")
    if not resume and folder.has_run and not args.overwrite:
        message = "--resume continues it, another --output-dir keeps it, --overwrite replaces it"
        raise UsageError(f"{folder.path} holds a run: {message}")
    replaced = {file.resolve() for file in [*folder.own_files(replaced=True), *([] if resume else folder.own_files())]}
    for key, value in vars(args).items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path) and path.resolve() in replaced:
                message = f"{option_name(key)} {path} lies in the run that would be replaced"
                raise UsageError(f"{message}: choose another --output-dir")
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    folder.check_room(weights * (checkpoints + 2 * 3))  # the last state has the optimizer's too, and lies there twice
    return distributed.all_processes(resume)


class LastState:
    """`checkpoints/last.pth` of a run that begins anew, or is resumed."""

    def __init__(self, path: Path, save_every: float, resume: bool) -> None:
        self.path, self.save_every, self.resume = path, save_every, resume
        self.saved = -math.inf

    def save(self, trainer: Trainer) -> None:
        """Raises RunError instead of replacing a good state by weights that are not finite."""
        if not torch.stack([parameter.isfinite().all() for parameter in trainer.parameters]).all():
            where = f"after epoch {trainer.position.epoch}"
            raise RunError(f"the weights are not finite {where}; lower --lr; {self.path} is kept")
        torch_save(self.path, trainer.state_dict())
        self.saved = time.monotonic()

    def after_epoch(self, trainer: Trainer) -> None:
        """Save after the run's first epoch, `save_every` seconds after the last save, and after a task's last epoch.

        The first process alone, by its own clock: none waits for another here.
        """
        due = time.monotonic() - self.saved >= self.save_every or trainer.position.epoch == trainer.epochs
        if due and not distributed.rank():
            self.save(trainer)

    def restore(self, trainer: Trainer) -> None:
        """Take `trainer` to where its task was when it was last saved; a task that was never saved starts anew."""
        if self.resume and self.path.exists():
            with readable(self.path, "damaged, or of another run (--overwrite starts anew)"):
                state = torch_load(self.path)
                if state["task"] == trainer.task.number:
                    trainer.load_state_dict(state)
