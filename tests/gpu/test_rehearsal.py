"""The rehearsal on a device without a GPU, in a process of its own: torch keeps a device, once registered, for good."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, results_of
from tests.util.runtime.test_distributed import torchrun

HERE = Path(__file__).parent


def test_all_that_trains_and_measures_runs_on_a_device():
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "rehearsal.py")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout


def test_two_processes_train_where_no_collective_takes_a_tensor_of_the_cpu(trained, colours, tmp_path):
    words = ["--method", "ewc", "--checkpoint", trained, "--data", colours, "--num-tasks", 1, "--epochs", 1]
    words += ["--batch-size", 12, "--data-ratio", 1, "--precision", "fp32", "--output-dir", tmp_path]
    done = torchrun(HERE / "distributed_worker.py", *words)
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path)["finished"]
    assert "2 processes" in done.stdout
