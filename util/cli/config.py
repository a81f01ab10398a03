"""config.json: how a run was called and what it ran on; and the same call again, from that file."""

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from util.cli.arguments import plain_arguments
from util.runtime import distributed
from util.runtime.errors import UsageError
from util.runtime.files import read_json
from util.runtime.hardware import Hardware

PACKAGES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "safetensors")
# What a run that repeats another one is told anew.
NOT_REPEATED = {"config", "resume", "overwrite", "help"}


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="all arguments from a run's config.json; further ones still count"
    )


def with_config(argv: list[str], build: Callable[[list[str]], argparse.ArgumentParser]) -> list[str]:
    """`argv` with the words of its --config, if it has one, before it. `build` makes the parser for some words.

    Raises UsageError if the file is missing or of another script, RunError if it is damaged.
    """
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_config_argument(chooser)
    path = chooser.parse_known_args(argv)[0].config
    if path is None:
        return argv
    config = read_json(path)
    saved, script = config.get("arguments"), Path(sys.argv[0]).name
    if not isinstance(saved, dict) or config.get("script") != script:
        raise UsageError(f"--config {path}: not the config.json of a run of {script}, but of {config.get('script')}")
    _compare(path, config)
    method = [f"--method={saved['method']}"] if "method" in saved else []
    return [*words_of(saved, build(method)), *argv]


def words_of(saved: dict, parser: argparse.ArgumentParser) -> list[str]:
    """The command line that gives these arguments. Raises UsageError for one that the parser does not know."""
    words, unknown = [], saved.keys() - NOT_REPEATED
    for action in parser._actions:
        unknown.discard(action.dest)
        value = saved.get(action.dest)
        if value is None or action.dest in NOT_REPEATED:
            continue
        option = action.option_strings[0]
        if isinstance(action, argparse.BooleanOptionalAction):
            words.append(option if value else action.option_strings[1])
        elif isinstance(action, argparse._StoreTrueAction):
            words += [option] * bool(value)
        elif isinstance(action, argparse._AppendAction):
            words += [f"{option}={one}" for one in value]
        elif isinstance(value, list):
            words += [option, *map(str, value)]
        else:
            words.append(f"{option}={value}")
    if unknown:
        raise UsageError(f"--config: there is no option {min(unknown)!r} here; the file is of another version")
    return words


def _compare(path: Path, config: dict) -> None:
    """Tell in one line what may make a difference: versions of the packages and of this code."""
    here, there = (dict(found.get("packages") or {}) | found for found in (code_and_packages(), config))
    names = ("git_commit", "python", *PACKAGES)
    other = [f"{name} {there.get(name)}, here {here[name]}" for name in names if there.get(name) != here[name]]
    if other and not distributed.rank():
        print(f"warning: {path} was written with {'; '.join(other)}", file=sys.stderr)


def describe_run(args: argparse.Namespace, hardware: Hardware, images: torch.device) -> dict:
    """The content of config.json: every argument, package versions, git commit, device, seed, what auto came to."""
    return {
        "script": Path(sys.argv[0]).name,
        "arguments": plain_arguments(args),
        "seed": args.seed,
        "device": hardware.describe(),
        "processes": distributed.world_size(),
        "hardware": hardware.as_dict() | {"images": str(images)},
        **code_and_packages(),
    }


def code_and_packages() -> dict:
    """What code runs: versions of Python and the packages, and the commit of this repository."""
    return {
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "git_commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the code that runs, with "+" appended where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", root, *words], capture_output=True, text=True, check=True, env=environment, timeout=10
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("+" if run("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
