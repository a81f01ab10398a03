"""What an audit of a run leaves: audit.json, audit.md, audit.html, and scalars in the run's TensorBoard events."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from scripts.audited_run import AuditedRun
from util.audit import AUDIT_METRICS, STRANGER_METRICS
from util.audit.pictures import pictures
from util.cli import options
from util.cli.config import code_and_packages, describe_command
from util.report.audit_page import audit_page
from util.report.audit_tables import audit_markdown
from util.runtime.files import sha256, write_json, write_text
from util.storage.folders import CONFIG, claim, utc_now
from util.training.monitor import log_scalars, open_writer

SCHEMA = 2
FULL_AUDIT_REFERENCES = 5  # an audit with fewer is a first look


def claim_output(run: AuditedRun) -> None:
    """Make the output folder this audit's. Raises UsageError if it is of something else."""
    claim(run.output, "audit.py")
    write_json(run.output / CONFIG, describe_command(run.args, "audit.py"))


def write_audit(run: AuditedRun) -> dict:
    """Audit every request and leave the files. Returns the content of audit.json."""
    requests, drawn, others = [], [], {"references": {}, "originals": {}}
    for request, strangers in product(run.requests, run.yardsticks):
        found, never, known = run.audit(request, strangers)
        for group, entries in zip(others.values(), (never, known), strict=True):
            group |= {entry["sha256"]: entry for entry in entries}
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
        **{name: [*group.values()] for name, group in others.items()},
        "requests": requests,
        "arguments": options.plain_arguments(run.args) | dict.fromkeys(("runs", "references", "originals")),
    }
    write_json(run.output / "audit.json", content)
    write_text(run.output / "audit.md", audit_markdown(content) + "\n")
    write_text(run.output / "audit.html", audit_page(content, drawn, f"{run.label} on {run.data[0].name}"))
    if run.folder:
        _log(run.folder.path, requests)
    return content


def _first_look_reasons(metrics: Sequence[str], references: list[int]) -> list[str]:
    """What makes the audit a first look, with so many references of each request beside any."""
    without = [name for name in (AUDIT_METRICS if references else STRANGER_METRICS) if name not in metrics]
    least = min(references, default=FULL_AUDIT_REFERENCES)
    few = [f"{least} models that never saw them instead of {FULL_AUDIT_REFERENCES}"] * (least < FULL_AUDIT_REFERENCES)
    return few + ([f"without {', '.join(without)}"] if without else [])


def _log(folder: Path, requests: list[dict]) -> None:
    with open_writer(folder) as writer:
        for request in requests:
            for what in ("value", "rho"):
                values = {key: entry[what] for key, entry in request["figures"].items()}
                where = "audit_beside_strangers" if request["strangers"] else "audit"
                log_scalars(writer, f"{where}/request_{request['task']}/{what}", values, request["after_task"])
