"""The options that scripts share. Their values are checked where they are parsed; what is wrong is one line."""

import argparse
import inspect
import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data import SYNTHETIC
from methods.base import SHARED_OPTIONS, Method, Option
from util.cli.ignored import given_options, refuse_ignored
from util.runtime import distributed
from util.runtime.errors import UsageError
from util.runtime.hardware import Hardware, choose_hardware

SCHEDULES = ("cosine", "cosine-by-epoch", "step")


class Parser(argparse.ArgumentParser):
    """Help with defaults, wide enough to read; wrong usage raises UsageError.

    manual: the script's docstring: what it is for, and its examples.
    """

    def __init__(self, manual: str = "", usage: str = "%(prog)s [options]", **kwargs: Any) -> None:
        kwargs["description"], _, kwargs["epilog"] = manual.partition("\n\n")
        wide = partial(HelpFormatter, max_help_position=32, width=110)
        # No abbreviations: a parser that looks for a single option (--config, --method) would miss its own.
        super().__init__(usage=usage, allow_abbrev=False, formatter_class=wide, **kwargs)

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:
        """Raises UsageError for an option that would do nothing as well (`util/cli/ignored.py`)."""
        found = super().parse_args(args)
        given = given_options(args)
        changed = [action for action in self.actions() if getattr(found, action.dest, None) != action.default]
        refuse_ignored(found, {name for action in changed for name in action.option_strings if name in given})
        return found

    def error(self, message: str) -> None:
        # "argument -x/--name: …" says no more than "--name …".
        raise UsageError(re.sub(r"^argument ([^:]+): ", r"\1: ", message))

    def actions(self) -> list[argparse.Action]:
        """The options, which argparse names in no public way."""
        return self._actions

    def use_defaults(self, values: dict[str, Any]) -> None:
        """Take these values, read from a file, as defaults. Raises UsageError for an option that is not here."""
        actions = {action.dest: action for action in self.actions()}
        for key, value in values.items():
            if key not in actions:
                raise UsageError(f"{option_name(key)} of the file is no option here; the file is of another version")
            if actions[key].type is not None and isinstance(value, int | float):
                value = str(value)  # argparse checks and converts a default that is text
            actions[key].default, actions[key].required = value, False


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        names = {"int": "N", "float": "F", "Path": "PATH", "str": "NAME"}
        kind = getattr(action.type, "__name__", "")
        return names.get(kind) or super()._get_default_metavar_for_optional(action)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        """No default where there is none to tell: those help texts say what happens without the option."""
        explained = action.default in (None, False, "auto", "", []) or "default:" in action.help
        text = action.help if explained else super()._get_help_string(action)
        many = isinstance(action.default, list)
        return text.replace("%(default)s", " ".join(map(str, action.default))) if many else text


def number(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite int or float from `low` to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or value in (-math.inf, math.inf):
            raise argparse.ArgumentTypeError(f"{text} is out of range: {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__  # for argparse's "invalid int value"
    return parse


def class_list(text: str) -> str:
    """An argparse type: a list of names as it is, or with `@FILE` the one in that file."""
    if not text.startswith("@"):
        return text
    try:
        lines = Path(text[1:]).read_text("utf-8-sig", "surrogateescape").splitlines()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text[1:]}: {error.strerror}") from None
    # A line is a name, also with a comma in it.
    return "\n".join(line if line.startswith('"') else '"' + line.strip().replace('"', '""') + '"' for line in lines)


NAMES = "names separated by commas; #13 is class id 13; @FILE has a name a line"


def add_data(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    help_text = f"folder with train/ and test/, insightface's FILE.rec, or {SYNTHETIC}"
    group.add_argument("--data", default=SYNTHETIC, metavar="DIR", help=help_text)
    group.add_argument("--cache-dir", type=Path, help="folder of decoded images (default: the user's cache folder)")
    group.add_argument("--identities", type=number(int, 2), default=100, help=f"number of classes, {SYNTHETIC}")
    group.add_argument("--train-per-identity", type=number(int, 1), default=24, help=f"training images a class, {SYNTHETIC}")
    group.add_argument("--test-per-identity", type=number(int, 1), default=6, help=f"test images a class, {SYNTHETIC}")
    group.add_argument("--data-seed", type=number(int, 0), default=0, help=f"seed of {SYNTHETIC}")
    help_text = "share of each class's training images to hold out, and to measure on instead of the test set"
    group.add_argument("--val-fraction", type=number(float, 1e-12, 1), help=help_text)


def add_pairs(group: argparse.ArgumentParser, when: str) -> None:
    help_text = "insightface's FILE.bin, or LFW's list with its folder of people, PAIRS.TXT:FOLDER"
    group.add_argument("--pairs", nargs="+", metavar="FILE", help=f"verification benchmarks {when}: {help_text}")


def add_published(group: argparse.ArgumentParser, head: bool = True) -> None:
    """What a published checkpoint does not tell."""
    if head:
        group.add_argument("--head", metavar="NAME", help="head of a published checkpoint (default: cosface)")
    help_text = "whether the weights of a published checkpoint contain its adapters (its authors' files do)"
    group.add_argument("--published-adapters", choices=("merged", "apart"), help=help_text)


def add_hardware(parser: Parser) -> None:
    """The options of every script that runs a model."""
    group = parser.add_argument_group("hardware")
    group.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda or cuda:N; auto takes a GPU if any")
    _add_choice(group, "precision", ("bf16", "fp32"), "precision of matrix products; auto takes bf16 where it is faster")
    help_text = "compute the last block for the class token alone; auto does where that token is the embedding"
    _add_choice(group, "cls-only-last-block", ("on", "off"), help_text)
    _add_choice(group, "images", ("device", "host"), "memory of the decoded images; auto takes the device's if they fit")


def add_fast_path(parser: Parser) -> None:
    """Further ones of the scripts that train."""
    group = parser.add_argument_group("fast path")
    _add_choice(group, "compile", ("on", "off"), "compile the backbone; auto does if the run is long enough to gain")
    _add_choice(group, "cuda-graphs", ("on", "off"), "use CUDA graphs; auto does where the backbone is compiled for CUDA")
    group.add_argument("--deterministic", action="store_true", help="repeat CUDA runs exactly, but slower (CPU runs do)")


def _add_choice(group: argparse.ArgumentParser, name: str, choices: tuple[str, str], help: str) -> None:
    group.add_argument(f"--{name}", choices=("auto", *choices), default="auto", help=help)


def start_hardware(args: argparse.Namespace) -> Hardware:
    """The hardware that the options above choose."""
    names = inspect.signature(choose_hardware).parameters
    choices = {name: getattr(args, name) for name in names if hasattr(args, name)}
    hardware = choose_hardware(**choices | {"device": distributed.start(args.device)})
    if getattr(args, "deterministic", False) and hardware.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts, which reads it
        torch.use_deterministic_algorithms(True)
    return hardware


def add_optimization(parser: Parser, fewest_epochs: int = 1, **defaults: Any) -> None:
    """`defaults` replace those below."""
    group = parser.add_argument_group("optimization")
    group.add_argument("--epochs", type=number(int, fewest_epochs), help="epochs, of each task where there are several")
    group.add_argument("--batch-size", type=number(int, 1), default=48, help="images of each stream in a step")
    help_text = "size of a stream's last batch: filled up from the next shuffle, or what is left"
    group.add_argument("--last-batch", choices=("full", "short"), default="full", help=help_text)
    group.add_argument("--lr", type=number(float, 1e-12), default=1e-4, help="peak learning rate")
    group.add_argument("--min-lr", type=number(float, 0), default=1e-5, help="learning rate at the end of the cosine")
    group.add_argument("--weight-decay", type=number(float, 0), default=0.05, help="weight decay")
    group.add_argument("--warmup-epochs", type=number(int, 0), default=0, help="epochs of linear warm-up")
    group.add_argument("--opt", default="adamw", metavar="NAME", help="optimizer of timm")
    group.add_argument("--sched", choices=SCHEDULES, default="cosine", help="learning-rate schedule")
    group.add_argument("--decay-on", choices=("matrices", "all"), default="matrices", help="parameters with weight decay")
    group.add_argument("--clip-grad", type=number(float, 1e-12), help="largest norm of the gradient (default: no limit)")
    group.add_argument("--seed", type=number(int, 0), default=1337, help="seed of class order, samples, batches and dropout")
    parser.set_defaults(**defaults)


def check_warmup(args: argparse.Namespace) -> None:
    if args.warmup_epochs > args.epochs:
        raise UsageError(f"--warmup-epochs {args.warmup_epochs} is out of range: at most --epochs, {args.epochs}")


def add_method(parser: Parser, method: type[Method], as_published: str | None) -> None:
    """The method's table of options; the published values as defaults with `as_published`, one of PRESETS."""
    group = parser.add_argument_group(method.title)
    for option in {option.name: option for option in (*SHARED_OPTIONS, *method.options)}.values():
        default = option.value(as_published)
        if option.help:
            group.add_argument(f"--{option.name.replace('_', '-')}", default=default, **_keywords(option))
        else:
            parser.set_defaults(**{option.dest: default})


def _keywords(option: Option) -> dict[str, Any]:
    values = option.published if isinstance(option.published, list) else [option.published]
    published = f" (default: %(default)s; published: {' '.join(map(str, values))})"
    keywords: dict[str, Any] = {"dest": option.dest, "help": option.help + published * (option.published is not None)}
    if option.choices is not None:
        return keywords | {"choices": option.choices}
    many = isinstance(option.default, list)
    kind = type(option.default[0] if many else option.default)
    checked = str if kind is str else number(kind, option.low, option.high)
    return keywords | {"type": checked} | ({"nargs": "+"} if many else {})


def plain_arguments(args: argparse.Namespace) -> dict:
    """Every argument, as JSON can hold it."""

    def plain(value: Any) -> Any:
        return [*map(plain, value)] if isinstance(value, list) else str(value) if isinstance(value, Path) else value

    return {key: plain(value) for key, value in vars(args).items()}


def option_name(dest: str) -> str:
    """lambda_ → --lambda"""
    return f"--{dest.strip('_').replace('_', '-')}"


def first_difference(saved: dict, args: argparse.Namespace, free: Collection[str]) -> str | None:
    """The first option, but for those in `free`, in which `args` are not the saved arguments: "--rank 4, now 8"."""
    now = plain_arguments(args)
    for key in sorted(saved.keys() | now.keys()):
        if key not in free and saved.get(key) != now.get(key):
            return f"{option_name(key)} {saved.get(key)}, now {now.get(key)}"
    return None
