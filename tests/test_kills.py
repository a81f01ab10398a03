"""Runs that are killed at any moment, and resumed, end as if nothing had happened."""

import json
import os
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import ROOT, SMALL

# By SIGKILL, for each; more for a longer hunt, of five: KILLS=100 pytest -rP tests/test_kills.py
KILLS = int(os.environ.get("KILLS", "1"))
# The methods with the most state: a second network; prototypes and an average; importances; an average and two passes.
METHODS = {
    "lirf": ("--lr", "1e-3"),
    "gs_lora_pp": ("--bound", "30", "--ema-start", "1"),
    "ewc": ("--lr", "1e-3"),
    "scrub_s": ("--lr", "1e-3"),
}
if KILLS == 1:  # the others are stopped between tasks in test_method_runs.py
    METHODS = {"lirf": METHODS["lirf"]}


@pytest.fixture(scope="module")
def hunts(tmp_path_factory):
    """Start all hunts, two at a time, each on one thread: name → its counts, when they are known."""
    with ThreadPoolExecutor(2) as pool:
        waiting = {}

        def begin(trained, colours) -> dict:
            if not waiting:
                shared = ("--checkpoint", trained, "--num-tasks", 2, "--data-ratio", 0.5, "--epochs", 6, "--batch-size", 8)
                words = {name: ("train_forget.py", "--method", name, *shared, *own) for name, own in METHODS.items()}
                sizes = (*SMALL, "--epochs", 12, "--batch-size", 24, "--drop-rate", 0.1)
                words["pretrain"] = ("train_pretrain.py", *sizes)
                for name, own in words.items():
                    scratch = tmp_path_factory.mktemp("kills") / name
                    further = (*own, "--data", colours, "--device", "cpu", "--precision", "fp32", "--save-every", 0.05)
                    waiting[name] = pool.submit(hunt, scratch, *further)
            return waiting

        yield begin


def hunt(scratch, *words: object) -> dict:
    command = [sys.executable, ROOT / "tests" / "kills.py", scratch, KILLS, zlib.crc32(scratch.name.encode()), "--", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=scratch.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [*METHODS, "pretrain"])
def test_killed_runs_end_as_if_nothing_had_happened(name, trained, colours, hunts):
    found = hunts(trained, colours)[name].result()
    print(name, found)  # shown by pytest -rP
    assert found["by"]["SIGKILL"] >= KILLS
    assert found["files"] >= (1 if name == "pretrain" else 5)  # results, two checkpoints, two records
