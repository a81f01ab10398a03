"""Where runs go that share a machine."""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch

from scripts.jobs import Job, job_slots, run_jobs
from tests.conftest import ROOT
from util.storage.folders import PretrainFolder


@pytest.mark.parametrize(
    ("gpus", "jobs_per_gpu", "cuda", "expected"),
    [
        ([], None, False, ["", "", ""]),  # a core each, of seven; no more than there are runs
        ([], 2, False, ["", ""]),
        ([], None, True, [""]),
        ([], 2, True, ["", ""]),
        (["0"], None, True, ["0"]),
        (["0", "1"], 2, True, ["0", "1", "0", "1"]),
    ],
)
def test_devices_or_cores_are_shared_out(monkeypatch, gpus, jobs_per_gpu, cuda, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert job_slots(Namespace(gpus=gpus, jobs_per_gpu=jobs_per_gpu, cluster="local"), 3) == expected


WAVES = [(2, 3, 3), (2, 4, 2), (2, 13, 2), (2, 1, 1), (1, 3, 1), (1, 1, 1), (8, 13, 13)]


@pytest.mark.parametrize(("cores", "runs", "at_once"), WAVES)
def test_a_wave_that_would_leave_cores_idle_joins_the_one_before(monkeypatch, cores, runs, at_once):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert job_slots(Namespace(gpus=[], jobs_per_gpu=None, cluster="local"), runs) == [""] * at_once


@pytest.mark.parametrize(("own", "threads", "cuda"), [(None, "3", False), (None, "3", True), ("5", "5", True)])
def test_runs_side_by_side_share_the_cores_and_see_one_gpu(monkeypatch, tmp_path, own, threads, cuda):
    script = tmp_path / "script.py"
    script.write_text("import os; print(os.environ['OMP_NUM_THREADS'], os.environ.get('CUDA_VISIBLE_DEVICES'))")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if own:  # what the user says counts
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    jobs = [Job(name, PretrainFolder(tmp_path / name), str(script), []) for name in ("one", "two", "three")]
    done = {job.label: (job.folder.path / "log.txt").read_text().split() for job in run_jobs(jobs, ["", "4"])}
    assert done.keys() == {"one", "two", "three"}
    assert {seen[0] for seen in done.values()} == {threads}
    assert {seen[1] for seen in done.values()} == {"None", "4"}


def test_what_a_run_says_is_logged_whatever_it_is(tmp_path):
    """Names of files that are no text, in any encoding."""
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.stdout.buffer.write(b'out\\xff'); sys.stderr.buffer.write(b'err\\xfe'); sys.exit(1)")
    job = Job("odd", PretrainFolder(tmp_path / "odd"), str(script), [])
    with job.open_log() as log:
        log.write("\udcfd ")
    assert [done.failure for done in run_jobs([job], [""])] == ["err\\xfe"]
    assert (tmp_path / "odd" / "log.txt").read_bytes() == b"\\udcfd out\xfferr\\xfe"


def test_a_run_begins_with_the_libraries_imported_and_no_gpu_touched(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; t = sys.modules['torch']; print('timm' in sys.modules, t.cuda.is_initialized(), *sys.argv[1:])"
    )
    job = Job("warm", PretrainFolder(tmp_path / "warm"), str(script), ["--lr", "1"])
    assert [done.failure for done in run_jobs([job], [""])] == [""]
    assert (tmp_path / "warm" / "log.txt").read_text() == "True False --lr 1\n"


@pytest.mark.parametrize(
    ("ends", "said"), [("sys.exit('script.py: error: no room')", "no room"), ("os.kill(os.getpid(), 9)", "exit code -9")]
)
def test_a_run_that_fails_says_why_in_one_line(tmp_path, ends, said):
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys; {ends}")
    job = Job("bad", PretrainFolder(tmp_path / "bad"), str(script), [])
    assert [done.failure for done in run_jobs([job], [""])] == [said]


@pytest.mark.parametrize("threads", ["1,1", "", "0"])
def test_whatever_openmp_takes_as_a_number_of_threads(tmp_path, monkeypatch, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    script = tmp_path / "script.py"
    script.write_text("import torch; print(torch.get_num_threads() > 0)")
    job = Job("odd", PretrainFolder(tmp_path / "odd"), str(script), [])
    assert [done.failure for done in run_jobs([job], [""])] == [""]


def test_after_one_that_is_not_taken_none_begins_and_what_runs_saves(tmp_path):
    """As `train_references` ends at the first that fails."""
    script = tmp_path / "script.py"
    script.write_text(SAVES)
    jobs = [
        Job(name, PretrainFolder(tmp_path / name), str(script), [str(tmp_path / name)]) for name in ("bad", "long", "later")
    ]
    ended = run_jobs(jobs, ["", ""])
    assert next(ended).label == "bad"
    ended.close()
    assert (tmp_path / "long" / "saved").exists()
    assert not (tmp_path / "later").exists()


SAVES = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), folder.joinpath("saved").touch(), sys.exit(143)))
folder.joinpath("begun").touch()
while folder.name == "bad" and not (folder.parent / "long" / "begun").exists():
    time.sleep(0.01)
time.sleep(60 * (folder.name == "long"))
sys.exit("no")
"""
PARENT = """
import sys
from scripts.jobs import Job, run_jobs
from util.runtime.interrupt import end_on_sigterm
from util.storage.folders import PretrainFolder
from pathlib import Path
folder = Path(sys.argv[1])
with end_on_sigterm():
    print("here", flush=True)
    list(run_jobs([Job("long", PretrainFolder(folder), sys.argv[2], [str(folder)])], [""]))
"""


@pytest.mark.parametrize("when", ["while the libraries are imported", "while it runs"])
def test_a_signal_to_all_processes_is_followed_by_what_has_begun_alone(tmp_path, when):
    (tmp_path / "script.py").write_text(SAVES)
    words = [sys.executable, "-c", PARENT, tmp_path / "long", tmp_path / "script.py"]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as parent:
        parent.stdout.readline()
        for _ in range(600):
            if when == "while the libraries are imported" or (tmp_path / "long" / "begun").exists():
                break
            time.sleep(0.1)
        os.killpg(parent.pid, signal.SIGTERM)  # as `timeout` and schedulers do
        begun = time.monotonic()
        parent.wait()
        assert time.monotonic() - begun < 30
    assert (tmp_path / "long" / "saved").exists() == (when == "while it runs")
