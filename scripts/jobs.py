"""Runs of the top scripts, each a process of its own, dealt out over devices."""

import argparse
import os
import queue
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from util.cli.options import number
from util.storage.folders import OutputFolder

ROOT = Path(__file__).resolve().parent.parent
TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}  # names of files may be no text


@dataclass
class Job:
    """One run of a script at the top; `label` names it among the others."""

    label: str
    folder: OutputFolder
    script: str
    arguments: list[str]
    finished: bool = False
    failure: str = ""

    def open_log(self) -> TextIO:
        self.folder.path.mkdir(parents=True, exist_ok=True)
        return (self.folder.path / "log.txt").open("a", **TEXT)


def add_job_options(group: argparse._ActionsContainer) -> None:
    group.add_argument("--gpus", nargs="*", default=[], metavar="N", help="CUDA devices to deal the runs out over")
    group.add_argument(
        "--jobs-per-gpu",
        type=number(int, 1),
        metavar="N",
        help="runs side by side on each device (default: 1; on a CPU, one on each core)",
    )


def places(args: argparse.Namespace, count: int) -> list[str]:
    """Where `count` runs may run at once: GPUs by name, "" for the device that a run finds itself."""
    cores = 1 if args.gpus or torch.cuda.is_available() else os.cpu_count() or 1
    # Three runs on two cores end sooner at once than two and then one. Without a second core there is nothing to gain.
    at_once = count if 1 < cores <= count < 2 * cores else min(cores, count)
    return (args.gpus or [""]) * (args.jobs_per_gpu or max(1, at_once))


def deal_out(jobs: list[Job], gpus: list[str]) -> Iterator[Job]:
    """Yield each job as it ends. A run is a process that sees one of the `gpus` ("": all of them).

    A device that is named N times takes N runs at once: steps of a few dozen images leave most of a large GPU idle. Runs
    side by side share out the CPU's cores.
    """
    threads = max(1, (os.cpu_count() or 1) // len(gpus))
    running: set[subprocess.Popen] = set()
    free: queue.Queue[str] = queue.Queue()
    for gpu in gpus:
        free.put(gpu)

    def run(job: Job) -> Job:
        gpu = free.get()
        variables = {"OMP_NUM_THREADS": str(threads)} | os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        with job.open_log() as log:
            command = [sys.executable, str(ROOT / job.script), *job.arguments]
            process = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.PIPE, **TEXT)
            running.add(process)
            _, errors = process.communicate()
            running.discard(process)
            log.write(errors)
        free.put(gpu)
        if process.returncode:
            last = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            job.failure = last.removeprefix(f"{job.script}: error: ")
        return job

    with ThreadPoolExecutor(len(gpus)) as pool:
        try:
            for done in as_completed([pool.submit(run, job) for job in jobs]):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in [*running]:
                process.terminate()  # it saves, and ends
            raise
