"""Runs of the top scripts, each a process of its own, dealt out over devices or sent to a cluster."""

import argparse
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path

import torch

from scripts.cluster import ROOT, TEXT, Run, run_on_cluster, sbatch_options
from util.cli.options import number
from util.runtime.interrupt import deferred
from util.storage.folders import OutputFolder

# Imported once: they take five seconds of a core, which each run would spend. None of them touches a GPU.
IMPORTS = ["torchvision", "timm", "timm.optim", "timm.scheduler", "pandas", "torch.utils.tensorboard", "matplotlib.pyplot"]
SERVER = multiprocessing.get_context("forkserver")
STOPS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Job(Run):
    """One run of a script at the top; `label` names it among the others.

    On this machine it is a process that is forked off one which has imported the libraries (`start_server`).
    """

    label: str
    folder: OutputFolder
    script: str
    arguments: list[str]
    finished: bool = False
    failure: str = ""

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(ROOT / self.script), *self.arguments]

    @property
    def log(self) -> Path:
        return self.folder.path / "log.txt"

    def start(self, variables: dict[str, str]) -> int:
        """Begin. Returns the process's sentinel."""
        self.open_log().close()
        self.errors = tempfile.NamedTemporaryFile("r", **TEXT)  # noqa: SIM115  until `end`
        words = (self.command[1:], {1: self.log, 2: self.errors.name}, {**os.environ, **variables})
        self.process = SERVER.Process(target=_run_script, args=words)
        self.process.start()
        return self.process.sentinel

    def end(self) -> None:
        """Wait for the process's end, and note what went wrong."""
        self.process.join()
        with self.errors, self.open_log() as log:
            said = self.errors.read()
            log.write(said)
        self.failure = self.reason(self.process.exitcode, said)


def _run_script(words: list[str], streams: dict[int, Path | str], variables: dict[str, str]) -> None:
    """In the new process: the script and its arguments, as Python itself would run them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environ.clear()
    os.environ.update(variables)
    for stream, path in streams.items():
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    sys.stdout.reconfigure(line_buffering=True)
    threads = variables["OMP_NUM_THREADS"].partition(",")[0]  # the first of nested levels
    if threads.isdecimal() and int(threads):  # OpenMP has read its own when it was imported
        torch.set_num_threads(int(threads))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def start_server() -> None:
    """Begin with the imports in the background. What stops all processes does not stop the server, and waits in a run until
    it listens."""
    SERVER.set_forkserver_preload(IMPORTS)
    resource_tracker.ensure_running()  # it unblocks the signals
    with deferred(*STOPS):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def add_job_options(group: argparse.ArgumentParser) -> None:
    group.add_argument("--gpus", nargs="*", default=[], metavar="N", help="CUDA devices for the runs")
    help_text = "number of runs at a time on each device (default: 1; on a CPU, one on each core)"
    group.add_argument("--jobs-per-gpu", type=number(int, 1), metavar="N", help=help_text)
    help_text = "slurm sends each run to the cluster as a job of its own, from a folder that its nodes see"
    group.add_argument("--cluster", choices=("local", "slurm"), default="local", help=help_text)
    help_text = 'sbatch options of each job: --sbatch="--partition=gpu --gpus=1 --time=240"; requeued after its time'
    group.add_argument("--sbatch", default="", metavar="STRING", help=help_text)


def job_slots(args: argparse.Namespace, count: int) -> list[str] | dict:
    """Where `count` runs may run at once: GPUs by name, "" for the device that a run finds itself; or options of sbatch."""
    if args.cluster == "slurm":
        return sbatch_options(args.sbatch)
    cores = 1 if args.gpus or torch.cuda.is_available() else os.cpu_count() or 1
    # Three runs on two cores end sooner at once than two and then one. Without a second core there is nothing to gain.
    at_once = count if 1 < cores <= count < 2 * cores else min(cores, count)
    return (args.gpus or [""]) * (args.jobs_per_gpu or max(1, at_once))


def run_jobs(jobs: list[Job], where: list[str] | dict) -> Iterator[Job]:
    """Yield each job as it ends. A run is a process that sees one of the GPUs `where` ("": all of them), of `job_slots`.

    A device that is named N times takes N runs at once: steps of a few dozen images leave most of a large GPU idle. Runs
    side by side share out the CPU's cores.
    """
    if not jobs:
        return
    if isinstance(where, list):
        yield from _on_this_machine(jobs, where)
        return
    for index, failure in run_on_cluster(jobs, jobs[0].log.parents[1] / ".slurm", where):
        jobs[index].failure = failure
        yield jobs[index]


def _on_this_machine(jobs: list[Job], gpus: list[str]) -> Iterator[Job]:
    """Not through submitit, whose local executor has no queue. Whoever ends it early waits until the runs have saved."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(gpus)))} | os.environ
    free, waiting, running = [*gpus], [*jobs], {}
    start_server()
    ready = SERVER.Process(target=int)
    ready.start()  # may be interrupted, as a run's start may not
    ready.join()
    try:
        while waiting or running:
            while free and waiting:
                job, gpu = waiting.pop(0), free.pop(0)
                with deferred(*STOPS):  # what has begun is known before anything stops
                    running[job.start(threads | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}))] = job, gpu
            for sentinel in connection.wait(running):
                job, gpu = running.pop(sentinel)
                free.append(gpu)
                job.end()
                yield job
    finally:
        for job, _ in running.values():
            job.process.terminate()  # it saves, and ends
        for job, _ in running.values():
            job.end()
