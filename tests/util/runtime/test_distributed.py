"""Two processes on a CPU compute what one computes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from methods import METHODS
from tests.conftest import ROOT, SMALL, results_of


def torchrun(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


@pytest.fixture(scope="module")
def comparisons() -> dict[str, dict]:
    done = torchrun(Path(__file__).with_name("distributed_worker.py"))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", ["pretrain", *(name for name in METHODS if name != "ssd")])
def test_losses_are_those_of_one_process(comparisons, name):
    found = comparisons[name]
    assert len(found["together"]) >= 3
    for together, alone in zip(found["together"], found["alone"], strict=True):
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-4)
    totals = {step["total"] for step in found["alone"]}
    assert len(totals) > 1
    assert all(map(math.isfinite, totals))
    assert found["weights"] < 1e-3
    assert found["predictions"]


@pytest.mark.parametrize("dropout", ["torch", "fast"])
def test_processes_draw_their_own_dropout_and_common_wrong_labels(comparisons, dropout):
    found = comparisons[f"dropout {dropout}"]
    assert found["losses"][0] == found["losses"][1]
    assert found["same_generators"]
    assert found["same_weights"]
    assert 0.4 < found["kept_alike"] < 0.6  # of independent masks with p = 1/2


def test_a_run_of_two_processes_leaves_what_one_leaves(trained, colours, command, tmp_path):
    words = ["train_forget.py", "--method", "ewc", "--checkpoint", trained, "--data", colours, "--num-tasks", 2]
    words += ["--epochs", 3, "--batch-size", 7, "--data-ratio", 1, "--save-every", 0]
    words += ["--device", "cpu", "--precision", "fp32", "--output-dir"]
    done = torchrun(*words, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    code, out, err = command(*words, tmp_path / "one")
    assert code == 0, err
    assert done.stdout.count("task 1/2") == out.count("task 1/2") == 1
    folders = (tmp_path / "one", tmp_path / "two")
    files = [sorted(str(file.relative_to(folder)) for file in folder.rglob("*")) for folder in folders]
    kept = [[file for file in names if "tfevents" not in file] for names in files]
    assert kept[0] == kept[1]
    assert [len(names) for names in files] == [len(kept[0]) + 1] * 2
    tasks = [results_of(folder)["tasks"] for folder in folders]
    assert [task["after"] for task in tasks[0]] == [task["after"] for task in tasks[1]]
    assert [json.loads((folder / "config.json").read_text())["processes"] for folder in folders] == [1, 2]


def test_pre_training_in_two_processes(colours, tmp_path):
    options = ["--data", colours, *SMALL, "--epochs", 1, "--batch-size", 24, "--device", "cpu", "--precision", "fp32"]
    done = torchrun("train_pretrain.py", *options, "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1
    assert (tmp_path / "checkpoint.pth").exists()


def test_wrong_usage_is_said_once(colours, tmp_path):
    done = torchrun("train_pretrain.py", "--data", colours, "--device", "cuda:0", "--output-dir", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("train_pretrain.py: error: device cuda:0: torchrun gives each process its own") == 1
    assert not (tmp_path / "run").exists()
