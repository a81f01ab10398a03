"""Audit runs of forgetting: does the model still know the person? Compares with models that never saw the person.

python scripts/audit.py RUN…                        run folders, or the folder of a comparison with its runs
python scripts/audit.py RUN --requests all --strangers DIR      every request, with strangers
python scripts/audit.py --before FILE --after FILE --forget-classes "ann, bob" --data DIR      any two checkpoints
Leaves audit.json, audit.md and audit.html in RUN/audit (or --output-dir), and scalars in the run's TensorBoard events.
Missing references are trained first; where none can be, or with --compare-with strangers, nothing is trained.
"""

import argparse
import os
import sys
from itertools import chain, groupby, product
from pathlib import Path

# A script's own folder, not the repository's root, is where Python looks first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import SYNTHETIC
from methods import METHODS
from scripts.audited_run import YARDSTICKS, AuditedRun
from scripts.jobs import add_job_options
from scripts.references import train_references
from util.audit import AUDIT_METRICS, STRANGER_METRICS
from util.audit.audit import MIN_REFERENCES
from util.audit.pictures import pictures
from util.cli import options
from util.cli.config import code_and_packages, describe_command
from util.cli.main import run_main
from util.report.audit_page import audit_page
from util.report.audit_tables import audit_markdown, comparison_markdown, overview, verdicts
from util.report.comparison_page import INDEX, ROWS, SCATTER, write_comparison
from util.report.results import load_results
from util.runtime.errors import UsageError
from util.runtime.files import read_json, readable, sha256, write_json, write_text
from util.storage.folders import CONFIG, RunFolder, claim, utc_now
from util.training.deletion_record import settings_of
from util.training.monitor import log_scalars, open_writer

SCRIPT = Path(__file__).name
SCHEMA = 3  # of audit.json
FULL_AUDIT_REFERENCES = 5  # an audit with fewer is a first look
TABLE_BEGINS = "## Seed "
QUICK = {"num_references": 3, "num_originals": 1, "metrics": ["readout", "enrolment", "verification", "membership_images"]}


def build_parser() -> options.Parser:
    parser = options.Parser(__doc__, "%(prog)s [RUN …] [options]")
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folder of a run, or of a comparison")
    group = parser.add_argument_group("instead of runs, two checkpoints")
    group.add_argument("--before", type=Path, metavar="FILE", help="pre-trained recognizer; of runs, only if it was moved")
    group.add_argument("--after", type=Path, metavar="FILE", help="recognizer after forgetting")
    group.add_argument("--forget-classes", type=options.class_list, metavar="LIST", help=f"people: {options.NAMES}")
    options.add_published(group)
    options.add_data(parser)
    options.add_pairs(parser, "to measure before and after forgetting, and on the references")
    parser.add_argument("--strangers", type=Path, metavar="DIR", help="folder <person>/<image> of people in no training set")
    group = parser.add_argument_group("what is audited")
    help_text = "requests to audit, each after its task (default: 1); all audits each again after the last task"
    group.add_argument("--requests", type=request_number, nargs="+", metavar="N", help=help_text)
    names, help_text = list(AUDIT_METRICS), f"metrics: {', '.join(AUDIT_METRICS)} (default: all)"
    group.add_argument("--metrics", nargs="+", choices=names, default=names, metavar="NAME", help=help_text)
    group.add_argument("--quick", action="store_true", help="first look: four quick metrics, 3 references, no pictures")
    group.add_argument("--seed", type=options.number(int, 0), default=0, help="seed of galleries, pairs and bootstrap")
    group = parser.add_argument_group("references")
    count, least = options.number(int, 1), options.number(int, MIN_REFERENCES)
    group.add_argument("--num-references", type=least, default=5, help="number of never-seen models; 3 are a first look")
    group.add_argument("--num-originals", type=count, default=3, help="number of models trained with everybody")
    group.add_argument("--references", type=Path, nargs="+", metavar="FILE", help="given never-seen models: none is trained")
    help_text = "given models trained with everybody"
    group.add_argument("--originals", type=Path, nargs="+", default=[], metavar="FILE", help=help_text)
    help_text = "never-seen models, strangers, or both (default: references; strangers where no reference can be trained)"
    group.add_argument("--compare-with", choices=YARDSTICKS, help=help_text)
    group.add_argument("--recipe", type=Path, metavar="FILE", help="config.json of the pre-training, if it is unknown")
    add_job_options(group)
    options.add_hardware(parser)
    parser.add_argument("--output-dir", type=Path, help="folder of the results (default: RUN/audit, or one in exps/)")
    return parser


def parse_arguments(argv: list[str], defaults: dict | None = None) -> argparse.Namespace:
    parser = build_parser()
    parser.use_defaults(defaults or {})
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    if True in YARDSTICKS.get(args.compare_with, []) and not {*args.metrics} & {*STRANGER_METRICS}:
        raise UsageError(f"--compare-with {args.compare_with} needs one of --metrics {' '.join(STRANGER_METRICS)}")
    files = (args.after, args.forget_classes)
    if (files != (None, None)) if args.runs else (None in (args.before, *files)):
        raise UsageError("name the folders of runs, or --before, --after and --forget-classes")
    return args


def request_number(text: str) -> int | str:
    if text == "all" or (text.isdecimal() and int(text)):
        return text if text == "all" else int(text)
    raise argparse.ArgumentTypeError(f"{text} is neither the number of a request nor all")


def run_folders(paths: list[Path]) -> list[RunFolder]:
    """The runs with a finished task in these folders or directly below, as tables order them: those of a seed share data."""
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


def load_audited_run(run: RunFolder, argv: list[str]) -> AuditedRun:
    """The run beside what it began with. Raises UsageError where that is gone or another file."""
    config = read_json(run.config)
    with readable(run.config, "damaged config"):
        args = parse_arguments(argv, settings_of(config))
        args.before, expected = args.before or Path(config["arguments"]["checkpoint"]), config["checkpoint_sha256"]
        if not args.before.is_file():
            raise UsageError(f"no file {args.before}: --before says where the checkpoint lies that {run.path} began with")
        if sha256(args.before) != expected:
            raise UsageError(f"{args.before} is not the checkpoint that {run.path} began with: --before names that")
        replay = config["arguments"].get("replay")
        if replay and args.strangers and args.strangers.resolve() == Path(replay).resolve():
            raise UsageError(f"{run.path} was trained on the people of --strangers {args.strangers} (--replay): give others")
        if args.data != SYNTHETIC and not Path(args.data).is_dir():
            raise UsageError(f"no folder {args.data}: --data says where the images of {run.path} lie")
    return AuditedRun(args, run)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.gpus:  # the audit itself is on the first; each reference sees the one that it is dealt
        os.environ["CUDA_VISIBLE_DEVICES"] = args.gpus[0]
    folders = run_folders(args.runs)
    if args.output_dir is not None and len(folders) > 1:
        raise UsageError(f"--output-dir is for one run, here are {len(folders)}: each gets a folder audit of its own")
    table = args.runs[0] / "audit.md" if len(args.runs) == 1 and len(folders) > 1 else None
    if table and not (table.exists() and table.read_bytes().startswith(TABLE_BEGINS.encode())):
        for path in (table, *map(table.with_name, (INDEX, SCATTER, ROWS))):
            if path.exists():
                raise UsageError(f"{path} is there and not of this script: move it")
    runs = [load_audited_run(folder, argv) for folder in folders] or [AuditedRun(args)]
    for run in runs:
        claim(run.output, SCRIPT)
        write_json(run.output / CONFIG, describe_command(run.args, SCRIPT))
    train_references([job for run in runs for request in run.requests for job in chain(*run.reference_jobs(request))], args)
    width = max(len(run.label) for run in runs)
    audits = {seed: print_audits([*group], width) for seed, group in groupby(runs, lambda run: run.seed)}
    index = write_comparison_of(runs, audits, table) if table else None
    if index is None:
        index = (runs[0].output if len(runs) == 1 else runs[0].folder.path.parent / "*" / "audit") / "audit.html"
    print(f"\nthe page to look at: {index}")


def print_audits(runs: list[AuditedRun], width: int) -> list[tuple[str, dict | None, dict]]:
    """Audit the runs of one seed, which share who is forgotten, and print what was found: line by line, if that is one
    request a run. Returns (label, content of results.json, content of audit.json) of each."""
    audits, people = [], None
    for run in runs:
        audits.append((run.label, run.results, write_audit(run)))
        if len(audits[0][2]["requests"]) == 1:
            lines, before, people = overview(audits[-1:], width), people, run.requests[0].forget
            print(*lines if people != before else lines[-1:], sep="\n", flush=True)
    if len(audits[0][2]["requests"]) > 1:
        print(*overview(audits, width), sep="\n")
    print("", *verdicts(audits), sep="\n")
    return audits


def write_audit(run: AuditedRun) -> dict:
    """Audit every request and leave the files. Returns the content of audit.json."""
    requests, drawn, references, originals = [], [], {}, {}
    for request, strangers in product(run.requests, run.yardsticks):
        found, never, known = run.audit(request, strangers)
        references |= {entry["sha256"]: entry for entry in never}
        originals |= {entry["sha256"]: entry for entry in known}
        about = {"task": request.task, "after_task": request.after_task}
        about |= {"after_file": str(request.after.resolve()), "after_sha256": sha256(request.after)}
        if run.folder and (record := run.folder.task_file("deletions", request.after_task)).exists():
            about |= {"record_file": str(record.resolve()), "record_sha256": sha256(record)}
        about["references"] = [entry["sha256"] for entry in never]
        requests.append(about | found.as_dict())
        drawn.append(None if run.args.quick or strangers else pictures(found))
    content = {
        "schema": SCHEMA,
        "date": utc_now(),
        **code_and_packages(),
        "first_look": _first_look_reasons(run.args.metrics, [len(r["references"]) for r in requests if not r["strangers"]]),
        "data": run.data[0].name,
        "method": run.label if run.folder else None,
        "recipe": run.recipe,
        "restoring": [kind for kind in ("adapters", "deposits") if run.folder and any(run.folder.path.glob(f"{kind}/*"))],
        "references": [*references.values()],
        "originals": [*originals.values()],
        "requests": requests,
        "arguments": options.plain_arguments(run.args) | dict.fromkeys(("runs", "references", "originals")),
    }
    write_json(run.output / "audit.json", content)
    write_text(run.output / "audit.md", audit_markdown(content) + "\n")
    write_text(run.output / "audit.html", audit_page(content, drawn, f"{run.label} on {run.data[0].name}"))
    if run.folder:
        _log(run.folder.path, requests)
    return content


def _first_look_reasons(metrics: list[str], references: list[int]) -> list[str]:
    without = [name for name in (AUDIT_METRICS if references else STRANGER_METRICS) if name not in metrics]
    least = min(references, default=FULL_AUDIT_REFERENCES)
    few = [f"{least} models that never saw them instead of {FULL_AUDIT_REFERENCES}"] * (least < FULL_AUDIT_REFERENCES)
    return few + ([f"without {', '.join(without)}"] if without else [])


def _log(folder: Path, requests: list[dict]) -> None:
    with open_writer(folder) as writer:
        for request, what in product(requests, ("value", "rho")):
            values = {key: entry[what] for key, entry in request["figures"].items()}
            where = "audit_beside_strangers" if request["strangers"] else "audit"
            log_scalars(writer, f"{where}/request_{request['task']}/{what}", values, request["after_task"])


def write_comparison_of(runs: list[AuditedRun], audits: dict[int, list[tuple]], table: Path) -> Path | None:
    """Leave `table` and the page of a comparison beside it; the page's path, if there is one."""
    parts = [f"{TABLE_BEGINS}{seed}\n\n{comparison_markdown(group)}" for seed, group in audits.items()]
    write_text(table, "\n\n".join(parts) + "\n")
    pages = [os.path.relpath(run.output / "audit.html", table.parent) for run in runs]
    look = ", a first look" if any(content["first_look"] for *_, content in chain(*audits.values())) else ""
    rows = [(*audit, page) for audit, page in zip(chain(*audits.values()), pages, strict=True)]
    return write_comparison(
        rows, table.parent, f"{len(runs)} runs on {runs[0].data[0].name}, request {runs[0].requests[0].task}{look}"
    )


if __name__ == "__main__":
    run_main(main)
