"""Arguments that the scripts share, and the frame every script runs in."""

import argparse
import errno
import inspect
import math
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from data import SYNTHETIC
from util.runtime import distributed
from util.runtime.errors import RunError, UsageError
from util.runtime.hardware import Hardware, choose_hardware, keep_freed_memory

CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help text, wide enough to read."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        """No default where there is none to tell: those help texts say what happens without the option."""
        empty = action.default is None or action.default is False
        return action.help if empty else super()._get_help_string(action)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", default=SYNTHETIC, metavar="DIR", help=f"folder with train/ and test/, or {SYNTHETIC} (drawn, no download)"
    )
    group.add_argument("--cache-dir", type=Path, help="where decoded images are kept (default: the user's cache folder)")
    group.add_argument("--identities", type=int, default=100, help=f"{SYNTHETIC}: number of classes")
    group.add_argument("--train-per-identity", type=int, default=24, help=f"{SYNTHETIC}: training images a class")
    group.add_argument("--test-per-identity", type=int, default=6, help=f"{SYNTHETIC}: test images a class")
    group.add_argument(
        "--val-fraction",
        type=float,
        help="train on less: hold this share of each class's training images out, and measure on it instead of the test set",
    )
    group.add_argument("--data-seed", type=int, default=0, help=f"{SYNTHETIC}: seed of the identities and their images")


def add_hardware_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every script that runs a model."""
    group = parser.add_argument_group("hardware")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    _add_choice(group, "precision", ("bf16", "fp32"), "auto: bf16 where the hardware has it")
    _add_choice(group, "attention", ("fused", "plain"), "auto: fused on CUDA, plain on a CPU")
    _add_choice(group, "cls-only-last-block", ("on", "off"), "auto: on, where the class token is the embedding")
    _add_choice(group, "keep-memory", ("on", "off"), "do not hand freed memory back to the system; auto: on, on a CPU")
    _add_choice(group, "images", ("device", "host"), "where the decoded images lie; auto: on the device if they fit")


def add_fast_path_arguments(parser: argparse.ArgumentParser) -> None:
    """Further ones of the scripts that train."""
    group = parser.add_argument_group("fast path")
    _add_choice(group, "compile", ("on", "off"), "torch.compile the blocks; auto: if the run is long enough to gain")
    _add_choice(group, "cuda-graphs", ("on", "off"), "auto: where blocks are compiled for CUDA")
    _add_choice(group, "dropout", ("fast", "torch"), "how masks are drawn; auto: fast on a CPU, torch's on CUDA")
    _add_choice(group, "fused-optimizer", ("on", "off"), "one kernel a step; auto: on, for the optimizers that have one")
    group.add_argument("--deterministic", action="store_true", help="on CUDA: the same bits every time, slower; a CPU's are")


def _add_choice(group: argparse._ArgumentGroup, name: str, choices: tuple[str, str], help: str) -> None:
    group.add_argument(f"--{name}", choices=("auto", *choices), default="auto", help=help)


def hardware_of(args: argparse.Namespace) -> Hardware:
    """The hardware that the arguments above choose. Sets the process's memory allocation up as well."""
    names = inspect.signature(choose_hardware).parameters
    choices = {name: getattr(args, name) for name in names if hasattr(args, name)}
    hardware = choose_hardware(**choices | {"device": distributed.start(args.device)})
    if getattr(args, "deterministic", False) and hardware.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts, which reads it
        torch.use_deterministic_algorithms(True)
    keep_freed_memory(hardware.device.type == "cpu" if args.keep_memory == "auto" else args.keep_memory == "on")
    return hardware


def add_optimization_arguments(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Optimisation options; `defaults` replace those below. None means: the method's own."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, help="epochs (of each task); none, to pre-train: 120,000 images in all")
    group.add_argument("--batch-size", type=int, help="images of each stream in a step")
    group.add_argument("--lr", type=float, help="peak learning rate; none: the method's own")
    group.add_argument("--min-lr", type=float, default=1e-5, help="learning rate at the end of the cosine")
    group.add_argument("--weight-decay", type=float, help="AdamW's weight decay; none: the method's own, 0.05")
    group.add_argument("--warmup-epochs", type=int, help="epochs of linear warm-up; none: 0 to forget, a tenth to pre-train")
    group.add_argument("--opt", help="optimizer, a name of timm's; none: the method's own, adamw")
    group.add_argument("--clip-grad", type=float, help="clip the gradient's norm to this (default: no clipping)")
    group.add_argument("--seed", type=int, default=1337, help="seeds class order, samples, batches and dropout")
    parser.set_defaults(**defaults)


def check_optimization(args: argparse.Namespace) -> None:
    """Raise UsageError for optimisation values that cannot work, and for numbers of any option that are not finite."""
    check_finite_arguments(args)
    if args.epochs < 1 or args.batch_size < 1:
        raise UsageError(f"--epochs {args.epochs} and --batch-size {args.batch_size} must be at least 1")
    if not args.lr > 0 or args.weight_decay < 0 or args.min_lr < 0:
        raise UsageError("--lr must be above 0, --weight-decay and --min-lr at least 0")
    if args.clip_grad is not None and not args.clip_grad > 0:
        raise UsageError(f"--clip-grad {args.clip_grad} is out of range: above 0")
    if not 0 <= args.warmup_epochs <= args.epochs:
        raise UsageError(f"--warmup-epochs {args.warmup_epochs} is out of range: 0 to --epochs ({args.epochs})")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed} is out of range: at least 0")


def check_finite_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError for an option that is, or holds, NaN or an infinity: argparse takes them for numbers."""
    for key, value in vars(args).items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, float) and not math.isfinite(one):
                raise UsageError(f"{option_name(key)} {one} is not a finite number")


def run_main(main: Callable[[list[str] | None], None]) -> None:
    """Run a script's main and end with one line instead of a traceback for what a user can cause.

    Exit code 2 for wrong usage, 1 for a failed run, 130 when interrupted.
    """
    name = Path(sys.argv[0]).name
    try:
        main(None)
        distributed.stop()
    except (UsageError, RunError) as error:
        _fail(name, str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail(name, "interrupted", 130)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(name, f"cannot write: {error.strerror}{where}; files already complete are kept", 1)


def _fail(name: str, message: str, code: int) -> None:
    if not distributed.rank():
        print(f"{name}: error: {message}", file=sys.stderr)
    sys.exit(code)


def plain_arguments(args: argparse.Namespace) -> dict:
    """Every argument, as JSON can hold it."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def option_name(key: str) -> str:
    """The option of an argument: lambda_ → --lambda."""
    return f"--{key.strip('_').replace('_', '-')}"


def first_difference(saved: dict, args: argparse.Namespace, free: Collection[str]) -> str | None:
    """The first option, but for those in `free`, in which `args` are not the saved arguments: "--rank 4, now 8"."""
    now = plain_arguments(args)
    for key in sorted(saved.keys() | now.keys()):
        if key not in free and saved.get(key) != now.get(key):
            return f"{option_name(key)} {saved.get(key)}, now {now.get(key)}"
    return None
