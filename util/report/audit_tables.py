"""What audits found, as tables: one request of several methods side by side, and every figure of one run."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from util.audit.statistics import VERDICTS
from util.audit.titles import title_of
from util.report.tables import PRETRAINED, percent

NEVER_SEEN = "Never seen"
# The figures of the overview, with headings that fit a terminal.
OVERVIEW = {"sign_flip": "sign flip", "enrolment_1": "enrol 1", "enrolment_5": "enrol 5", "verification_auc": "verify"}
UTILITY = {"acc_remain": "Acc_r", "verification_auc_remain": "verification AUC", "old_templates_tar_1pct": "old templates"}


def overview_frame(audits: Sequence[tuple[str, dict | None, dict]], moment: tuple[int, int]) -> pd.DataFrame:
    """A row per audited model, below those of the references and the pre-trained one; `moment` is (task, after task).

    audits: (label, content of results.json or None, content of audit.json) of each.
    """
    rows = {}
    for label, results, content in audits:
        request = next(r for r in content["requests"] if (r["task"], r["after_task"]) == moment)
        figures = {key: entry for key in OVERVIEW if (entry := request["figures"].get(key)) and entry["value"] is not None}
        if not rows:
            seen = {key: float(np.mean(entry["references"])) for key, entry in figures.items()}
            rows[NEVER_SEEN] = _row(None, seen, "")
            known = {key: entry["originals"][0] for key, entry in figures.items()}
            rows[PRETRAINED] = _row(None, known, "")
        task = next((task for task in results["tasks"] if task["task"] == moment[1]), None) if results else None
        values = {key: entry["value"] for key, entry in figures.items()}
        rows[label] = _row(task and task["after"]["h_mean"], values, request["verdict"])
    return pd.DataFrame.from_dict(rows, orient="index", columns=["H ↑", *OVERVIEW.values(), "verdict"])


def _row(h_mean: float | None, values: dict[str, float], verdict: str) -> list[str]:
    return [percent(h_mean), *("–" if key not in values else f"{values[key]:.1f}" for key in OVERVIEW), verdict]


def overview(audits: Sequence[tuple[str, dict | None, dict]], width: int = 0, markdown: bool = False) -> list[str]:
    """Lines: for each request the number of people and the table; labels padded to `width`."""
    lines = []
    for request in audits[0][2]["requests"]:
        moment = request["task"], request["after_task"]
        table = overview_frame(audits, moment)
        later = "" if moment[0] == moment[1] else f", after task {moment[1]}"
        people, images = len(request["forget"]), request["images"]
        lines += [f"Request {moment[0]}{later}: are its {people} people still known? {images} test faces, %", ""]
        if markdown:
            align = ["left"] + ["right"] * (table.shape[1] - 1) + ["left"]
            lines += [table.rename_axis("Method").to_markdown(disable_numparse=True, colalign=align), ""]
        else:
            table.index = table.index.str.ljust(max(width, *map(len, table.index)))
            table["verdict"] = table["verdict"].str.ljust(max(map(len, VERDICTS)))
            lines += table.to_string().splitlines()
    return lines


def audit_markdown(content: dict) -> str:
    """Every figure of every request, as tables."""
    parts = [f"# Audit of {content['method'] or 'a checkpoint'} on {content['data']}"]
    for request in content["requests"]:
        people = f"{len(request['forget'])} people, {request['images']} test faces: **{request['verdict']}**"
        parts.append(f"## Request {request['task']}, after task {request['after_task']}: {people}")
        rows = []
        for key, entry in request["figures"].items():
            never, known = (float(np.mean(entry[group])) if entry[group] else None for group in ("references", "originals"))
            low, high = entry["interval"] or (None, None)
            row = {"Figure": f"{title_of(key)} (`{key}`)", "Value": percent(entry["value"])}
            row |= {"95% interval": "–" if low is None else f"{low:.1f} to {high:.1f}"}
            row |= {"Never seen": percent(never), "Original": percent(known)}
            row |= {name: percent(entry[key]) for name, key in (("ρ", "rho"), ("z", "z"), ("Power", "power"))}
            rows.append(row | {"Verdict": entry["verdict"] or entry["reason"]})
        align = ["left"] + ["right"] * 7 + ["left"]
        parts.append(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True, colalign=align))
        useful, before = request["utility"], request["utility"]["before"]
        told = [f"{name} {percent(before[key])} → {percent(useful[key])}" for key, name in UTILITY.items()]
        parts.append(f"Kept people, before → after: {', '.join(told)}.")
    return "\n\n".join(parts)
