"""Runs as jobs of a SLURM cluster, one job a run, through submitit. What a node runs is here too, without torch."""

import contextlib
import getpass
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from util.runtime.errors import RunError, UsageError, one_line

if TYPE_CHECKING:  # where nothing goes to a cluster it is not imported
    import submitit

ROOT = Path(__file__).resolve().parent.parent
TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}  # names of files may be no text
POLL = 5.0  # seconds between two looks at the queue
MINUTES = 240  # of a job, without --time; a run that takes longer is requeued


class Run:
    """A command. What it says is appended to the file `log`."""

    command: list[str]
    log: Path

    def open_log(self) -> TextIO:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        return self.log.open("a", **TEXT)

    def reason(self, code: int, errors: str) -> str:
        """What went wrong in one line, from the exit code and what was said on stderr."""
        if not code:
            return ""
        last = (errors.strip().splitlines() or [f"exit code {code}"])[-1]
        return last.removeprefix(f"{Path(self.command[1]).name}: error: ")


@dataclass
class ClusterRun(Run):
    """A process on a node. It ends without a result where SLURM ends it, and goes on when SLURM starts it again."""

    command: list[str]
    log: Path
    process: subprocess.Popen | None = field(default=None, repr=False)

    def __call__(self) -> str:
        """Run it to its end; the last line of what went wrong, or ""."""
        if int(os.environ.get("SLURM_RESTART_COUNT", 0)) and "--resume" not in self.command:
            self.command.append("--resume")  # beside --overwrite: if it can
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", os.environ["SLURM_CPUS_ON_NODE"])}
        # SLURM signals every process of a job; this signal is submitit's, and would kill the run before it has saved.
        options = {"preexec_fn": lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN), **TEXT}
        with self.open_log() as log:
            options |= {"stdout": log, "stderr": subprocess.PIPE, "env": os.environ | threads}
            self.process = subprocess.Popen(self.command, **options)
            _, errors = self.process.communicate()
            log.write(errors)
        code, self.process = self.process.returncode, None
        if code in (-signal.SIGTERM, 128 + signal.SIGTERM):  # preempted, requeued or cancelled
            sys.exit(code)
        return self.reason(code, errors)

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """Called by submitit before the time is up: let the run save, and end; the job is requeued then."""
        from submitit.helpers import DelayedSubmission

        self.process.terminate()
        with contextlib.suppress(ChildProcessError):  # not wait(), whose lock this signal may have interrupted
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(ClusterRun(self.command, self.log))


def sbatch_options(words: str) -> dict[str, str | bool]:
    """Of sbatch's words, as "--partition=gpu --time=240 --gpus=1". Raises UsageError."""
    options = {}
    for word in shlex.split(words):
        key, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise UsageError(f"--sbatch: {word!r} is not of the form --option=value")
        options[key.replace("-", "_")] = value or True  # as submitit writes them
    return options


def run_on_cluster(runs: Sequence[Run], folder: Path, options: dict[str, str | bool]) -> Iterator[tuple[int, str]]:
    """Submit all runs; yield the number and the failure ("": none) of each as it ends. `folder`: for submitit's files.

    Ended early, it cancels what has not ended: those runs save, and can be continued.
    Raises UsageError without a cluster, RunError where SLURM refuses a job.
    """
    import submitit

    try:
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=10**6)
    except RuntimeError:
        raise UsageError("--cluster slurm: there is no srun here; start on a machine of the cluster") from None
    setup = [f"export PYTHONPATH={shlex.quote(str(ROOT))}:$PYTHONPATH"]
    executor.update_parameters(timeout_min=MINUTES, slurm_setup=setup)
    jobs: dict[int, submitit.Job] = {}
    try:
        for number, run in enumerate(runs):
            named = {"job_name": run.log.parent.name, "requeue": True} | options
            executor.update_parameters(slurm_additional_parameters=named)
            try:
                jobs[number] = executor.submit(ClusterRun(run.command, run.log))
            except Exception as error:  # of submitit: what sbatch said is its last line
                raise RunError(f"sbatch refused a job: {one_line(error, -1)}") from None
        while jobs:
            time.sleep(POLL)
            waiting = _in_queue()
            for number, job in [*jobs.items()]:
                if job.paths.result_pickle.exists() or (waiting is not None and job.job_id not in waiting):
                    del jobs[number]
                    yield number, _failure(job)
    finally:
        for job in jobs.values():
            job.cancel(check=False)


def _in_queue() -> set[str] | None:
    """The ids of the user's jobs that wait or run. None where the controller does not answer.

    Not sacct, which submitit asks: many clusters keep no accounts.
    """
    command = ["squeue", "--noheader", "--format=%A", f"--user={getpass.getuser()}"]
    done = subprocess.run(command, capture_output=True, text=True)
    return {*done.stdout.split()} if done.returncode == 0 else None


def _failure(job: "submitit.Job") -> str:
    """What its run returned, or that it left the queue without a word, as a job does that was cancelled."""
    for _ in range(10):  # the file may be seen a while after the job has left
        if job.paths.result_pickle.exists():
            try:
                return job.result()
            except Exception as error:  # the text is that of the node's traceback
                return one_line(error, -1)
        time.sleep(POLL / 10)
    return f"job {job.job_id} ended without a result: cancelled, or killed by SLURM ({job.paths.stderr})"
