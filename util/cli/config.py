"""config.json: how a run was called and what it ran on; and the same call again, from that file."""

import argparse
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from util.cli.options import Parser, plain_arguments
from util.runtime import distributed
from util.runtime.errors import UsageError
from util.runtime.files import read_json
from util.runtime.hardware import Hardware

PACKAGES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "safetensors")
# What a run that repeats another one is told anew.
NOT_REPEATED = {"config", "resume", "overwrite"}


def add_config_option(parser: Parser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.json of a run, for all options not given")


def saved_arguments(argv: list[str], script: str) -> dict:
    """The arguments in the file that `--config` of `argv` names, a run's of `script`; empty without one.

    Raises UsageError if the file is missing or of another script, RunError if it is damaged.
    """
    parser = Parser(add_help=False)
    add_config_option(parser)
    path = parser.parse_known_args(argv)[0].config
    if path is None:
        return {}
    config = read_json(path)
    saved = config.get("arguments")
    if not isinstance(saved, dict) or config.get("script") != script:
        raise UsageError(f"--config {path}: not the config.json of a run of {script}, but of {config.get('script')}")
    _warn_of_other_versions(path, config)
    return {key: value for key, value in saved.items() if key not in NOT_REPEATED}


def _warn_of_other_versions(path: Path, config: dict) -> None:
    here, there = (dict(found.get("packages") or {}) | found for found in (code_and_packages(), config))
    names = ("git_commit", "python", *PACKAGES)
    other = [f"{name} {there.get(name)}, here {here[name]}" for name in names if there.get(name) != here[name]]
    if other and not distributed.rank():
        print(f"warning: {path} was written with {'; '.join(other)}", file=sys.stderr)


def describe_command(args: argparse.Namespace, script: str) -> dict:
    """The content of config.json: whose folder it is, every argument, versions, git commit."""
    return {"script": script, "arguments": plain_arguments(args), **code_and_packages()}


def describe_run(args: argparse.Namespace, script: str, hardware: Hardware, images: torch.device) -> dict:
    """The same of a run: device, seed, and what auto came to as well."""
    return describe_command(args, script) | {
        "seed": args.seed,
        "device": hardware.describe(),
        "processes": distributed.world_size(),
        "hardware": hardware.as_dict() | {"images": str(images)},
    }


def code_and_packages() -> dict:
    """What code runs: versions of Python and the packages, and the commit of this repository."""
    return {
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the code that runs, with "+" appended where files differ from it; None outside a checkout."""
    words = ["git", "--no-optional-locks", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
