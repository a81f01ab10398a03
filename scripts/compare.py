"""Run several methods from the same checkpoint, with one or more seeds, and print the paper's main table row by row.

python scripts/compare.py --methods all --output-dir DIR -- --checkpoint FILE --data DIR
python scripts/compare.py --methods gs_lora ewc --seeds 1337 1 2 --output-dir DIR -- --checkpoint FILE --data DIR
What follows -- goes to train_forget.py, whose results land in DIR/<method>-seed<seed>. Runs that are finished are not
repeated, interrupted ones are continued, and one that fails does not stop the others.
"""

import argparse
import contextlib
import os
import queue
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

# A script's own folder, not the repository's root, is where Python looks first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_forget
from methods import METHODS, method_class
from util.cli.main import run_main
from util.cli.options import first_difference
from util.report.results import load_results
from util.report.tables import CELL_WIDTH, Comparison, table_line
from util.report.write import write_report
from util.runtime.errors import RunError, UsageError
from util.runtime.files import read_json, sha256
from util.runtime.hardware import choose_hardware
from util.runtime.interrupt import Interrupted, end_on_sigterm
from util.storage.folders import RunFolder
from util.training.resume import FREE_ON_RESUME


@dataclass
class Job:
    """One run: a method with a seed, and the words that train_forget.py is called with."""

    method: str
    seed: int
    folder: RunFolder
    arguments: list[str]
    finished: bool = False
    failure: str = ""

    @property
    def log(self) -> Path:
        return self.folder.path / "log.txt"


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    argv = sys.argv[1:] if argv is None else argv
    ours, further = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["all"], metavar="NAME", help=f"all, or of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337], help="class orders, samples and batches")
    parser.add_argument(
        "--options",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "STRING"),
        help='options for one method alone, as: --options ewc "--lr 1e-3 --lambda 1"',
    )
    parser.add_argument("--gpus", nargs="*", default=[], metavar="N", help="CUDA devices to deal the runs out over")
    parser.add_argument("--jobs-per-gpu", type=int, default=1, metavar="N", help="runs side by side on each device")
    parser.add_argument("--output-dir", type=Path, required=True, help="the tables, the figure and a folder for each run")
    parser.add_argument("--overwrite", action="store_true", help="run again what is finished")
    parser.add_argument("--published", action="store_true", help="add the papers' rows (CASIA-100 alone), by the margin")
    args = parser.parse_args(ours)
    if args.jobs_per_gpu < 1:
        raise UsageError(f"--jobs-per-gpu {args.jobs_per_gpu} is out of range: at least 1")
    return args, further


def make_jobs(args: argparse.Namespace, further: list[str]) -> list[Job]:
    """Every run in order, checked; finished and interrupted ones are recognised. Raises UsageError for wrong options."""
    names = [*METHODS] if args.methods == ["all"] else [*dict.fromkeys(args.methods)]
    own = {name: shlex.split(words) for name, words in args.options}
    for name in [*names, *own]:
        method_class(name)
    jobs = []
    for seed in dict.fromkeys(args.seeds):
        for name in names:
            folder = RunFolder(args.output_dir / f"{name}-seed{seed}")
            words = ["--method", name, *further, *own.get(name, []), "--seed", str(seed), "--output-dir", str(folder.path)]
            parsed = train_forget.parse_arguments(words)
            if not jobs:
                # What is wrong for all of them is found once, before any of them starts.
                train_forget.assemble(parsed, choose_hardware("cpu"))
                checkpoint_sha256 = sha256(parsed.checkpoint)
            jobs.append(Job(name, seed, folder, words))
            if args.overwrite or not folder.config.exists():
                jobs[-1].arguments.append("--overwrite")
                continue
            check_same(folder, parsed, checkpoint_sha256)
            jobs[-1].finished = folder.finished
            jobs[-1].arguments.append("--resume" if folder.last.exists() else "--overwrite")
    return jobs


def check_same(folder: RunFolder, args: argparse.Namespace, checkpoint_sha256: str) -> None:
    """Raise UsageError if the folder holds a run with other options or of another checkpoint."""
    config = read_json(folder.config)
    advice = "use --overwrite to replace it, or another output folder"
    difference = first_difference(config.get("arguments", {}), args, {*FREE_ON_RESUME, "checkpoint"})
    if difference is not None:
        raise UsageError(f"{folder.path} holds a run with other options: {difference}; {advice}")
    if config.get("checkpoint_sha256") != checkpoint_sha256:
        raise UsageError(f"{folder.path} holds a run from another checkpoint than {args.checkpoint}; {advice}")


def run_here(job: Job) -> None:
    """Run in this process, which spares the start-up. What it prints goes to its log."""
    job.folder.path.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as log, contextlib.redirect_stdout(log):
        try:
            train_forget.main(job.arguments)
        except Interrupted:
            raise  # all of them are meant
        except (UsageError, RunError) as error:
            job.failure = str(error)
        except Exception as error:
            # Whatever goes wrong with one method, the others still run: the log keeps where it happened.
            traceback.print_exc(file=log)
            job.failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]} (see {job.log})"


def run_on(gpu: str, job: Job, running: set[subprocess.Popen]) -> None:
    """Run in a process of its own, one of `running`, that sees one CUDA device ("": those that this one sees)."""
    job.folder.path.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as log:
        process = subprocess.Popen(
            [sys.executable, train_forget.__file__, *job.arguments],
            env=os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}),
            stdout=log,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.add(process)
        _, errors = process.communicate()
        running.discard(process)
        log.write(errors)
    if process.returncode:
        last = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        job.failure = last.removeprefix("train_forget.py: error: ")


def run_all(jobs: list[Job], gpus: list[str]) -> Iterator[Job]:
    """Yield each job as it ends: those finished before at once, the others one after another or dealt out to `gpus`.

    A device that is named N times takes N runs at once: steps of a few dozen images leave most of a large GPU idle.
    """
    yield from (job for job in jobs if job.finished)
    waiting = [job for job in jobs if not job.finished]
    if len(gpus) < 2:
        for job in waiting:
            run_here(job)
            yield job
        return
    running: set[subprocess.Popen] = set()
    free: queue.Queue[str] = queue.Queue()
    for gpu in gpus:
        free.put(gpu)

    def run_next(job: Job) -> Job:
        gpu = free.get()
        try:
            run_on(gpu, job, running)
        finally:
            free.put(gpu)
        return job

    with ThreadPoolExecutor(len(gpus)) as pool:
        try:
            for done in as_completed([pool.submit(run_next, job) for job in waiting]):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in [*running]:
                process.terminate()  # it saves, and ends
            raise


class GrowingTable:
    """The plain reading, printed row by row while the runs go on."""

    def __init__(self, jobs: list[Job]) -> None:
        self.many_seeds = len({job.seed for job in jobs}) > 1
        self.width = max(len(self._label(job)) for job in jobs)
        self.widths: list[int] = []

    def _label(self, job: Job) -> str:
        title = METHODS[job.method].title
        return f"{title}, seed {job.seed}" if self.many_seeds else title

    def add(self, job: Job) -> None:
        if job.failure:
            print(f"| {self._label(job).ljust(self.width)} | failed: {job.failure}", flush=True)
            return
        comparison = Comparison([load_results(job.folder.results)], [self._label(job)])
        if not self.widths:
            header = comparison.header()
            self.widths = [max(self.width, len("Pre-train")), *(max(CELL_WIDTH, len(title)) for title in header[1:])]
            print(table_line(header, self.widths))
            print("|" + "|".join("-" * (width + 2) for width in self.widths) + "|")
            print(table_line(comparison.cells(comparison.before, ""), self.widths))
        print(table_line(comparison.cells(comparison.rows[0], ""), self.widths), flush=True)


def compare(jobs: list[Job]) -> Comparison:
    """The finished runs, a row per method, in order; then the methods of which no run was finished."""
    done = [job for job in jobs if not job.failure]
    if not done:
        raise RunError(f"every run failed; the first: {jobs[0].failure}")
    titles = [METHODS[job.method].title for job in done]
    comparison = Comparison([load_results(job.folder.results) for job in done], titles)
    for job in jobs:
        if job.failure:
            seed = f" (seed {job.seed})" if METHODS[job.method].title in titles else ""
            comparison.add_note(METHODS[job.method].title + seed, f"failed: {job.failure}")
    return comparison


def main(argv: list[str] | None) -> None:
    args, further = parse_arguments(argv)
    jobs = make_jobs(args, further)
    if len(args.gpus) == 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = args.gpus[0]
    print(f"{len(jobs)} runs, {sum(job.finished for job in jobs)} of them finished before → {args.output_dir}\n", flush=True)
    table = GrowingTable(jobs)
    with end_on_sigterm():
        for job in run_all(jobs, (args.gpus or [""]) * args.jobs_per_gpu):
            table.add(job)
    comparison = compare(jobs)
    if args.published:
        comparison.add_published()
    write_report(comparison, args.output_dir)
    print(f"\n{comparison.markdown()}\n\ntables and figure: {args.output_dir}")
    failed = sum(bool(job.failure) for job in jobs)
    if failed:
        raise RunError(f"{failed} of {len(jobs)} runs failed: see above")


if __name__ == "__main__":
    run_main(main)
