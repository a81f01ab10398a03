"""Run several methods from the same checkpoint, with one or more seeds, and print the papers' main table line by line.

python scripts/compare.py --methods all --output-dir DIR -- --checkpoint FILE --data DIR
python scripts/compare.py --methods gs_lora ewc --seeds 1337 1 2 --output-dir DIR -- --checkpoint FILE --data DIR
Arguments after -- are passed to train_forget.py, whose results are in DIR/<method>-seed<seed>. Finished runs are skipped,
interrupted runs are continued, and a failed run does not stop the others.
"""

import argparse
import shlex
import sys
from collections.abc import Iterable
from contextlib import closing
from itertools import chain, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

import train_forget
from methods import METHODS, method_class
from scripts.jobs import Job, add_job_options, job_slots, run_jobs, start_server
from util.cli import options
from util.cli.config import describe_command
from util.cli.main import run_main
from util.report.results import load_results
from util.report.tables import PRETRAINED, PUBLISHED_OPTION, Comparison, check_published
from util.runtime.errors import RunError, UsageError
from util.runtime.files import read_json, write_json
from util.runtime.hardware import choose_hardware
from util.runtime.interrupt import end_on_sigterm
from util.storage.folders import CONFIG, RunFolder, claim
from util.training.resume import difference_to, identity_of

SCRIPT = Path(__file__).name
FIRST = ("gs_lora", "unseen")  # run before the others: what a reader waits for


def make_jobs(args: argparse.Namespace, extra_args: list[str]) -> list[Job]:
    """Every run in order, checked; finished and interrupted ones are recognized. Raises UsageError for wrong options."""
    seeds = [*dict.fromkeys(args.seeds)]
    methods = [*METHODS] if args.methods == ["all"] else [*dict.fromkeys(args.methods)]
    method_args = {name: shlex.split(words) for name, words in args.options}
    for name in [*methods, *method_args]:
        method_class(name)
    jobs = []
    for seed, name in product(seeds, methods):
        folder = RunFolder(args.output_dir / f"{name}-seed{seed}")
        arguments = ["--method", name, *extra_args, *method_args.get(name, []), "--seed", str(seed)]
        label = METHODS[name].title + (f", seed {seed}" if len(seeds) > 1 else "")
        job = Job(label, folder, "train_forget.py", [*arguments, "--output-dir", str(folder.path)])
        parsed = train_forget.parse_arguments(job.arguments)
        if not jobs:
            # What is wrong for all of them is found once, before any of them starts.
            train_set = train_forget.assemble(parsed, choose_hardware("cpu")).data[0]
            identity = identity_of(parsed, train_set)
            if args.published:
                check_published(train_set.name, len(train_set.classes), args.published)
        resume = folder.config.exists() and not args.overwrite
        if resume:
            if other := difference_to(read_json(folder.config), parsed, identity):
                raise UsageError(f"{folder.path} holds a run with other options: {other}; use --overwrite or another folder")
            job.finished = folder.finished
        job.arguments.append("--resume" if resume and folder.last.exists() else "--overwrite")
        jobs.append(job)
    return jobs


def print_rows(jobs: Iterable[Job], width: int) -> None:
    """The narrow table, row by row as the runs end."""
    begun = False
    for job in jobs:
        if job.failure:
            print(f"{job.label.ljust(width)} failed: {job.failure}", flush=True)
            continue
        lines = Comparison([load_results(job.folder.results)], [job.label]).narrow(width=width)
        print(*lines[-1:] if begun else lines, sep="\n", flush=True)
        begun = True


def main(argv: list[str]) -> None:
    end = argv.index("--") if "--" in argv else len(argv)
    parser = options.Parser(__doc__, "%(prog)s [options] -- OPTIONS OF train_forget.py")
    parser.add_argument("--methods", nargs="+", default=["all"], metavar="NAME", help=f"all, or of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337], help="seeds of class order, samples and batches")
    words = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "STRING")}
    parser.add_argument("--options", **words, help='options of one method: ewc "--lr 1e-3"')
    add_job_options(parser)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the tables, the figure and every run")
    parser.add_argument("--overwrite", action="store_true", help="rerun finished runs")
    parser.add_argument("--published", **PUBLISHED_OPTION)
    args = parser.parse_args(argv[:end])
    if args.cluster == "local":
        start_server()
    claim(args.output_dir, SCRIPT)
    jobs = make_jobs(args, argv[end + 1 :])
    write_json(args.output_dir / CONFIG, describe_command(args, SCRIPT) | {"train_forget": argv[end + 1 :]})

    finished, waiting = [job for job in jobs if job.finished], [job for job in jobs if not job.finished]
    print(f"{len(jobs)} runs, {len(finished)} of them finished before → {args.output_dir}\n", flush=True)
    waiting.sort(key=lambda job: job.arguments[1] not in FIRST)
    with end_on_sigterm(), closing(run_jobs(waiting, job_slots(args, len(waiting)))) as ended:
        print_rows(chain(finished, ended), max(len(label) for label in [PRETRAINED, *(job.label for job in jobs)]))

    # matplotlib takes a second to import: only once there is something to draw.
    from util.report.figures import write_tables

    failures = {job.label: job.failure for job in jobs if job.failure}
    if len(failures) == len(jobs):
        raise RunError(f"every run failed; the first: {jobs[0].failure}")
    runs = [load_results(job.folder.results) for job in jobs if not job.failure]
    comparison = Comparison(runs, failures=failures, published=args.published)
    write_tables(comparison, args.output_dir)
    if args.published or len(comparison.labels) < len(runs):
        print("", *comparison.narrow(comparison.papers_margin), sep="\n")
    print(f"\nthe whole table and the figure: {args.output_dir}")
    if failures:
        raise RunError(f"{len(failures)} of {len(jobs)} runs failed: see above")


if __name__ == "__main__":
    run_main(main)
