"""Runs that are killed at any moment, and resumed, end as if nothing had happened."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, SMALL

# More for a longer hunt: KILLS=100 pytest tests/test_kills.py
KILLS = int(os.environ.get("KILLS", "5"))
# The methods with the most state: importances, an average and two passes, a second network, prototypes and an average.
METHODS = {
    "ewc": ("--lr", "1e-3"),
    "scrub_s": ("--lr", "1e-3"),
    "lirf": ("--lr", "1e-3"),
    "gs_lora_pp": ("--bound", "30", "--ema-start", "1"),
}


def hunt(scratch, kills: int, *words: object) -> dict:
    command = [sys.executable, ROOT / "tests" / "kills.py", scratch, kills, 5, "--", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=scratch.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", METHODS)
def test_killed_runs_end_as_if_nothing_had_happened(name, trained, colours, tmp_path):
    shared = ("--checkpoint", trained, "--data", colours, "--num-tasks", 2, "--data-ratio", 0.5, "--device", "cpu")
    sizes = ("--epochs", 12, "--batch-size", 8, "--save-every", 2)
    found = hunt(tmp_path / name, KILLS, "train_forget.py", "--method", name, *shared, *sizes, *METHODS[name])
    assert found["kills"] >= KILLS
    assert found["files"] >= 5  # results, two checkpoints, two records


def test_killed_pre_training_too(colours, tmp_path):
    words = ("--data", colours, *SMALL, "--epochs", 24, "--batch-size", 24, "--save-every", 3, "--drop-rate", 0.1)
    found = hunt(tmp_path / "pretrain", KILLS, "train_pretrain.py", *words, "--device", "cpu")
    assert found["kills"] >= KILLS
