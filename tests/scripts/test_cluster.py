"""Runs as jobs of a cluster, with stand-ins for SLURM's commands; tests/slurm/one_node.sh starts a real one."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

import scripts.cluster
from scripts.cluster import ClusterRun
from scripts.jobs import Job, job_slots, run_jobs
from util.runtime.errors import RunError, UsageError
from util.storage.folders import PretrainFolder

# A job is a process group; `requeue` ends it and starts its script again. SLURM's own commands do no more here.
COMMANDS = {
    "sbatch": """
grep -q -e '--partition=none' "$1" && echo "sbatch: error: invalid partition specified: none" >&2 && exit 1
id=$(($(ls "$QUEUE" | wc -l) + 1)); cp "$1" "$QUEUE/$id"; echo "Submitted batch job $id"
SLURM_JOB_ID=$id setsid job "$id" >"$QUEUE/.$id.log" 2>&1 </dev/null &""",
    "job": """
export SLURM_RESTART_COUNT=0 SLURM_CPUS_ON_NODE=3 SLURM_NTASKS=1 SLURM_PROCID=0
echo $$ >"$QUEUE/.$1.pid"
while touch "$QUEUE/.$1.waits"; rm -f "$QUEUE/.$1.again"; bash "$QUEUE/$1"; [ -f "$QUEUE/.$1.again" ]; do
  SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
done
rm "$QUEUE/.$1.waits" """,
    "srun": """
while [ "${1#-}" != "$1" ]; do case "$1" in --unbuffered) shift ;; *) shift 2 ;; esac; done
exec "$@" """,
    "squeue": """cd "$QUEUE"; for job in .*.waits; do job=${job#.}; echo "${job%.waits}"; done""",
    "scontrol": """touch "$QUEUE/.$2.again" """,
    "scancel": """echo "$1" >>"$QUEUE/.cancelled"; rm -f "$QUEUE/.$1.waits"; kill -- -"$(cat "$QUEUE/.$1.pid")" """,
}
# Runs of a second that count their starts, and end as they are told.
SCRIPT = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
folder.joinpath("starts").open("a").write(" ".join(sys.argv[2:]) + ";")
signal.signal(signal.SIGTERM, lambda *_: (folder.joinpath("saved").touch(), sys.exit(143)))
print("begun", flush=True)
if "long" in folder.name and "--resume" not in sys.argv:
    time.sleep(60)
if "bad" in folder.name:
    sys.exit("script.py: error: the weights are not finite")
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "queue").mkdir()
    for name, text in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text.strip()}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(tmp_path / "queue"))
    monkeypatch.setattr(scripts.cluster, "POLL", 0.2)
    return tmp_path / "queue"


@pytest.fixture
def make_jobs(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def make(*names: str) -> list[Job]:
        folders = [PretrainFolder(tmp_path / "runs" / name) for name in names]
        return [Job(folder.path.name, folder, str(script), [str(folder.path), "--overwrite"]) for folder in folders]

    return make


def wait_for(path) -> None:
    for _ in range(300):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"no {path}")


def pythons_of(group: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(folder.name)) == group and b"python" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    assert len(found) == 2  # submitit's, and the run
    return found


def on_slurm(sbatch: str = "") -> dict:
    return job_slots(Namespace(cluster="slurm", sbatch=sbatch), 3)


def test_each_run_is_a_job_that_goes_on_when_it_is_requeued(slurm, make_jobs):
    jobs = make_jobs("one", "bad", "long")
    ended = run_jobs(jobs, on_slurm("--partition=gpu --exclusive --time=60"))
    first = next(ended)
    wait_for(jobs[2].folder.path / "log.txt")
    script = (slurm / "3").read_text()
    for line in ("partition=gpu", "exclusive", "requeue", "job-name=long", "time=60"):
        assert [word for word in script.splitlines() if line.split("=")[0] in word] == [f"#SBATCH --{line}"]
    while not (jobs[2].folder.path / "log.txt").read_text():
        time.sleep(0.1)
    # What SLURM sends before the time is up, to every process of the job.
    for process in pythons_of(int((slurm / ".3.pid").read_text())):
        os.kill(process, signal.SIGUSR2)
    failures = {job.label: job.failure for job in (first, *ended)}
    assert failures == {"one": "", "bad": "the weights are not finite", "long": ""}
    assert (jobs[2].folder.path / "starts").read_text() == "--overwrite;--overwrite --resume;"
    assert (jobs[2].folder.path / "saved").exists()
    assert (jobs[2].folder.path / "log.txt").read_text() == "begun\nbegun\n"
    assert "script.py: error: the weights are not finite" in (jobs[1].folder.path / "log.txt").read_text()


def test_a_cancelled_job_fails_and_the_others_end_with_the_script(slurm, make_jobs):
    jobs = make_jobs("long 1", "long 2")
    ended = run_jobs(jobs, on_slurm())
    wait = subprocess.Popen(["bash", "-c", f"while ! [ -s '{jobs[0].folder.path}/log.txt' ]; do sleep 0.1; done; scancel 1"])
    assert next(ended).failure.startswith("job 1 ended without a result: cancelled, or killed by SLURM")
    assert wait.wait() == 0
    ended.close()
    assert (slurm / ".cancelled").read_text().split() == ["1", "2"]
    wait_for(jobs[0].folder.path / "saved")


def test_what_is_wrong_is_one_line(slurm, make_jobs, monkeypatch):
    with pytest.raises(RunError, match="sbatch refused a job: sbatch: error: invalid partition"):
        next(run_jobs(make_jobs("one"), on_slurm("--partition=none")))
    with pytest.raises(UsageError, match="'gpu' is not of the form --option=value"):
        on_slurm("--partition gpu")
    assert not [*run_jobs([], on_slurm())]
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    with pytest.raises(UsageError, match="there is no srun here"):
        next(run_jobs(make_jobs("one"), on_slurm()))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--sbatch=--time=3",), "--sbatch does nothing without --cluster slurm"),
        (("--cluster", "slurm", "--gpus", "0"), "--gpus does nothing with --cluster slurm"),
    ],
)
def test_options_of_the_other_place_are_refused(words, told, command):
    code, _, err = command("scripts/compare.py", "--output-dir", "nowhere", *words)
    assert code == 2 and told in err and len(err.splitlines()) == 1


def test_a_run_that_slurm_ends_has_no_result(tmp_path, monkeypatch):
    """SLURM starts it again, or has cancelled it; of the first it must not say that it has failed."""
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "1")
    stopped = ClusterRun(["sh", "-c", "kill $$"], tmp_path / "log.txt")
    with pytest.raises(SystemExit):
        stopped()
    assert ClusterRun(["sh", "-c", "kill -KILL $$"], tmp_path / "log.txt")() == f"exit code -{signal.SIGKILL.value}"
