"""Audit runs of forgetting: does the model still know the person? Beside models that never saw the person.

python scripts/audit.py RUN…                        run folders, or the folder of a comparison with its runs
python scripts/audit.py RUN --requests all --unseen DIR      every request, with people that no model has seen
python scripts/audit.py --before FILE --after FILE --forget-classes "ann, bob" --data DIR      any two checkpoints
Leaves audit.json, audit.md and audit.html in RUN/audit (or --output-dir), and scalars in the run's TensorBoard events.
References that the cache does not have are trained first.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path

import torch

# A script's own folder, not the repository's root, is where Python looks first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import build_datasets, build_unseen
from data.cache import cache_folder
from data.image_set import ImageSet
from data.tasks import named_classes
from methods import METHODS
from scripts.jobs import Job, add_job_options
from scripts.references import DATA_OPTIONS, recipe_of, reference_job, train_references
from util.audit import FIGURES
from util.audit.audit import LEAST_REFERENCES, Audit, audit, check_unseen
from util.audit.pictures import pictures
from util.audit.subject import Scene
from util.cli import options
from util.cli.main import run_main
from util.report.audit_page import audit_page
from util.report.audit_tables import audit_markdown, comparison_markdown, overview
from util.report.results import load_results
from util.runtime.errors import UsageError
from util.runtime.files import read_json, readable, sha256, write_json, write_text
from util.storage.checkpoint import Checkpoint, check_classes, load_checkpoint
from util.storage.folders import RunFolder
from util.training.deletion_record import settings_of
from util.training.monitor import log_scalars, open_writer

SCHEMA = 1
QUICK = {"num_references": 3, "num_originals": 1, "figures": ["readout", "enrolment", "verification"]}


def build_parser() -> options.Parser:
    parser = options.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folder of a run, or of a comparison")
    group = parser.add_argument_group("instead of runs, two checkpoints")
    group.add_argument("--before", type=Path, metavar="FILE", help="the pre-trained recognizer")
    group.add_argument("--after", type=Path, metavar="FILE", help="the one that was to forget")
    group.add_argument("--forget-classes", metavar="LIST", help="whom: ids or names, separated by commas")
    options.add_published(group)
    options.add_data(parser)
    parser.add_argument("--unseen", type=Path, metavar="DIR", help="<identity>/<image> of people in no training set")
    group = parser.add_argument_group("what is audited")
    group.add_argument(
        "--requests",
        type=request_number,
        nargs="+",
        default=[1],
        metavar="N",
        help="these, each after its task; all: each after its task and after the last",
    )
    group.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES), help="which")
    group.add_argument("--quick", action="store_true", help="the first three figures, 3 references, no pictures")
    group.add_argument("--seed", type=options.number(int, 0), default=0, help="seeds galleries, pairs and bootstrap")
    group = parser.add_argument_group("references")
    count = options.number(int, 1)
    least = options.number(int, LEAST_REFERENCES)
    group.add_argument("--num-references", type=least, default=5, help="models that never saw them; 3 are a first look")
    group.add_argument("--num-originals", type=count, default=3, help="models that saw all, with the pre-trained one")
    group.add_argument("--references", type=Path, nargs="+", metavar="FILE", help="given ones: none is trained")
    group.add_argument("--originals", type=Path, nargs="+", default=[], metavar="FILE", help="beside given references")
    group.add_argument("--recipe", type=Path, metavar="FILE", help="config.json of the pre-training, where it is unknown")
    add_job_options(group)
    options.add_hardware(parser)
    parser.add_argument("--output-dir", type=Path, help="default: RUN/audit, or exps/audit-<checkpoint>")
    return parser


def parse_arguments(argv: list[str] | None, defaults: dict | None = None) -> argparse.Namespace:
    parser = build_parser()
    parser.use_defaults(defaults or {})
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    files = (args.before, args.after, args.forget_classes)
    if (files != (None,) * 3) if args.runs else (None in files):
        raise UsageError("name the folders of runs, or --before, --after and --forget-classes")
    return args


def request_number(text: str) -> int | str:
    if text == "all" or (text.isdecimal() and int(text)):
        return text if text == "all" else int(text)
    raise argparse.ArgumentTypeError(f"{text} is neither the number of a request nor all")


@dataclass
class Case:
    """One request, after one of the tasks: class ids `forget` are audited in the checkpoint `after`.

    `gone` are all that it was to forget by then: references never saw any of them.
    """

    after: Path
    task: int
    after_task: int
    forget: list[int]
    gone: list[int]


@lru_cache(maxsize=1)
def load_data(
    where: tuple[tuple[str, object], ...], image_size: int, device: torch.device
) -> tuple[tuple[ImageSet, ImageSet], ImageSet | None]:
    """Training and test set, and people in none of them; runs of one data set share them."""
    args = argparse.Namespace(**dict(where))
    data, unseen = build_datasets(args, image_size, device), build_unseen(args, image_size, device)
    if unseen is not None:
        check_unseen(unseen, data[0])
    return data, unseen


load_once = lru_cache(maxsize=16)(load_checkpoint)  # runs share the pre-trained model and the references


class Trail:
    """A run, or two checkpoints, with data and models loaded: what becomes one audit.json."""

    def __init__(self, args: argparse.Namespace, before: Path, run: RunFolder | None = None) -> None:
        self.args, self.path, self.run, self.hardware = args, before, run, options.hardware_of(args)
        self.before = load_once(before, args.head, args.published_adapters)
        where = {key: getattr(args, key) for key in (*DATA_OPTIONS, "unseen", "images")}
        size = self.before.model.architecture.image_size
        self.data, self.unseen = load_data(tuple(where.items()), size, self.hardware.device)
        check_classes(self.before, self.data[0], before)
        self.classes = self.data[0].classes
        self.results = load_results(run.results) if run else None
        self.label = METHODS[self.results["method"]].title if run else args.after.stem
        self.output = args.output_dir or (run.path / "audit" if run else Path("exps") / f"audit-{self.label}")
        self.cases = self._cases_of_run() if run else [self._case_of_files()]
        for case in self.cases:  # what is wrong is found before references are trained
            self.load(case.after)
            people = tuple(sorted(case.forget)), tuple(self._remain(case))
            Scene(*self.data, *people, self.unseen, None, (), self.hardware).check()

    def _cases_of_run(self) -> list[Case]:
        tasks = self.results["tasks"]
        if not tasks or tasks[0]["task"] != 1:
            raise UsageError(f"{self.run.path} does not begin with the first task: audit the run that it continues")
        forget = [task["forget_classes"] for task in tasks]
        count, numbers = len(tasks), [*dict.fromkeys(self.args.requests)]
        moments = [(n, n) for n in (range(1, count + 1) if "all" in numbers else numbers)]
        if "all" in numbers:
            moments += [(n, count) for n in range(1, count)]
        elif max(numbers) > count:
            raise UsageError(f"--requests {max(numbers)}: {self.run.path} has finished {count} tasks")
        return [
            Case(self.run.checkpoint(after), task, after, forget[task - 1], sorted(chain(*forget[:after])))
            for task, after in moments
        ]

    def _case_of_files(self) -> Case:
        forget = [*dict.fromkeys(named_classes(self.args.forget_classes, self.classes))]
        return Case(self.args.after, 1, 1, forget, sorted(forget))

    def _remain(self, case: Case) -> list[int]:
        return [c for c in range(len(self.classes)) if c not in case.gone]

    def reference_jobs(self, case: Case) -> tuple[list[Job], list[Job]]:
        """The references and the further originals to train."""
        recipe, args = recipe_of(self.before, self.path, self.args.recipe), self.args
        # From 1 on, without the pre-trained model's own.
        seeds = [s for s in range(1, args.num_references + args.num_originals + 1) if s != self.before.info.get("seed")]
        wanted = (case.gone, args.num_references), ([], args.num_originals - 1)
        return tuple(
            [reference_job(args, recipe, self.data[0], without, seed) for seed in seeds[:count]] for without, count in wanted
        )

    def load(self, path: Path) -> Checkpoint:
        checkpoint = load_once(path, self.args.head, self.args.published_adapters)
        check_classes(checkpoint, self.data[0], path)
        return checkpoint

    def audit(self, case: Case) -> tuple[Audit, list[dict], list[dict]]:
        """The audit of one case, and what its references and originals are."""
        if self.args.references is None:
            files = [[job.folder.results for job in group] for group in self.reference_jobs(case)]
        else:
            files = [self.args.references, self.args.originals]
        never, known = ({path: self.load(path) for path in group} for group in files)
        label, start, live = f"{self.label}, request {case.task}", time.perf_counter(), sys.stderr.isatty()

        def progress(what: str) -> None:
            if live:
                print(f"\r\033[K{label}: {what}, {time.perf_counter() - start:.0f} s", end="", file=sys.stderr, flush=True)

        found = audit(
            self.before.model,
            self.load(case.after).model,
            [checkpoint.model for checkpoint in never.values()],
            self.data,
            case.forget,
            self.unseen,
            hardware=self.hardware,
            originals=[checkpoint.model for checkpoint in known.values()],
            remain=self._remain(case),
            figures=self.args.figures,
            seed=self.args.seed,
            cache=(self.args.cache_dir or cache_folder()) / "audits",
            progress=progress,
        )
        if live:
            print("\r\033[K", end="", file=sys.stderr)
        known = {self.path: self.before, **known}
        return found, *([describe(path, checkpoint) for path, checkpoint in group.items()] for group in (never, known))

    def write(self) -> dict:
        """Audit every case and leave the files. Returns the content of audit.json."""
        requests, drawn, others = [], [], {"references": {}, "originals": {}}
        for case in self.cases:
            found, never, known = self.audit(case)
            for group, entries in zip(others.values(), (never, known), strict=True):
                group |= {entry["sha256"]: entry for entry in entries}
            about = {"task": case.task, "after_task": case.after_task, "after_sha256": sha256(case.after)}
            if self.run and (record := self.run.task_file("deletions", case.after_task)).exists():
                about["record_sha256"] = sha256(record)
            about["references"] = [entry["sha256"] for entry in never]
            requests.append(about | found.as_dict())
            drawn.append(None if self.args.quick else pictures(found))
        content = {
            "schema": SCHEMA,
            "data": self.data[0].name,
            "method": self.label if self.run else None,
            "recipe": self.before.info.get("recipe"),
            **{name: [*group.values()] for name, group in others.items()},
            "requests": requests,
            "arguments": options.plain_arguments(self.args) | dict.fromkeys(("runs", "references", "originals")),
        }
        write_json(self.output / "audit.json", content)
        write_text(self.output / "audit.md", audit_markdown(content) + "\n")
        write_text(self.output / "audit.html", audit_page(content, drawn, f"{self.label} on {self.data[0].name}"))
        if self.run:
            self._log(requests)
        return content

    def _log(self, requests: list[dict]) -> None:
        with open_writer(self.run.path) as writer:
            for request in requests:
                for what in ("value", "rho"):
                    values = {key: entry[what] for key, entry in request["figures"].items()}
                    log_scalars(writer, f"audit/request_{request['task']}/{what}", values, request["after_task"])


def describe(path: Path, checkpoint: Checkpoint) -> dict:
    info = checkpoint.info
    without = [checkpoint.classes[c] for c in info.get("without_classes", [])]
    about = {"seed": info.get("seed"), "sha256": sha256(path), "acc_remain": info.get("acc"), "without": without}
    return about | {"file": str(path.resolve())}


def run_folders(paths: list[Path]) -> list[RunFolder]:
    """The runs with a finished task in these folders, or in the folders directly below, as tables order them."""
    found = []
    for path in paths:
        folders = [path] if (path / "results.json").exists() else sorted(path.glob("*/"))
        runs = [RunFolder(folder) for folder in folders if (folder / "results.json").exists()]
        if not runs:
            raise UsageError(f"{path}: no run that has finished a task, nor a folder of such runs")
        found += runs
    order = [*METHODS]
    results = {run: load_results(run.results) for run in found}
    return sorted(found, key=lambda run: (results[run]["seed"], order.index(results[run]["method"])))


def main(argv: list[str] | None) -> None:
    args = parse_arguments(argv)
    if args.runs:
        trails = []
        for run in run_folders(args.runs):
            config = read_json(run.config)
            with readable(run.config, "damaged config"):
                checkpoint, settings = Path(config["arguments"]["checkpoint"]), settings_of(config)
                if checkpoint.exists() and sha256(checkpoint) != config["checkpoint_sha256"]:
                    raise UsageError(f"{checkpoint} is no longer the checkpoint that {run.path} began with")
            trails.append(Trail(parse_arguments(argv, settings), checkpoint, run))
        if args.output_dir is not None and len(trails) > 1:
            raise UsageError(f"--output-dir is for one run, here are {len(trails)}: each gets a folder audit of its own")
    else:
        trails = [Trail(args, args.before)]
    if args.references is None:
        jobs = [job for trail in trails for case in trail.cases for group in trail.reference_jobs(case) for job in group]
        train_references(jobs, args)
    tables, width = [], max(len(trail.label) for trail in trails)
    for seed, group in groupby(trails, lambda trail: trail.results and trail.results["seed"]):  # who is forgotten
        audits = []
        for trail in group:
            audits.append((trail.label, trail.results, trail.write()))
            if len(trail.cases) == 1:
                lines = overview(audits[-1:], width)
                print(*lines if len(audits) == 1 else lines[-1:], sep="\n", flush=True)
        if len(audits[0][2]["requests"]) > 1:
            print(*overview(audits, width), sep="\n")
        tables.append(f"## Seed {seed}\n\n{comparison_markdown(audits)}")
    if len(args.runs) == 1 and len(trails) > 1:
        write_text(args.runs[0] / "audit.md", "\n\n".join(tables) + "\n")
    pages = trails[0].output if len(trails) == 1 else trails[0].run.path.parent / "*" / "audit"
    print(f"\nwhat each figure says, and the pages to look at: {pages}/audit.html")


if __name__ == "__main__":
    run_main(main)
