"""What audits found, as tables: one request of several methods side by side, and every figure of one run."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from util.audit import FIGURES
from util.audit.statistics import AS_IF_NEVER_SEEN, CANNOT_TELL, OVER_FORGOTTEN, POWER, STILL_KNOWN, VERDICTS, compare
from util.audit.titles import title_of
from util.report.tables import PRETRAINED, percent

NEVER_SEEN = "Never seen"
# The figures of the overview, with headings that fit a terminal.
OVERVIEW = {"sign_flip": "sign flip", "enrolment_1": "enrol 1", "enrolment_5": "enrol 5", "verification_auc": "verify"}
SIGNS = {STILL_KNOWN: "▲", OVER_FORGOTTEN: "▼", AS_IF_NEVER_SEEN: "●", CANNOT_TELL: "?"}
LEGEND = ", ".join(f"{sign} {verdict}" for verdict, sign in SIGNS.items())
FALLING = frozenset().union(*(figure.falling for figure in FIGURES.values()))
BORROWED = {key for figure in FIGURES.values() for key in figure.known_by}
INSIDE = "probe_block"  # what these figures' keys begin with: read from the inside, not from what leaves the model
UTILITY = {"acc_remain": "Acc_r", "verification_auc_remain": "verification AUC", "old_templates_tar_1pct": "old templates"}


def _moments(audits: Sequence[tuple[str, dict | None, dict]]) -> dict[tuple[int, int], list[tuple[str, dict | None, dict]]]:
    """By (task, after task) the audits of it: (label, content of results.json or None, one of the requests)."""
    found: dict[tuple[int, int], list] = {}
    for label, results, content in audits:
        for request in content["requests"]:
            found.setdefault((request["task"], request["after_task"]), []).append((label, results, request))
    return found


def _h_mean(results: dict | None, request: dict) -> float | None:
    tasks = {task["task"]: task for task in results["tasks"]} if results else {}
    return tasks[request["after_task"]]["after"]["h_mean"] if tasks else None


def count_as_never_seen(request: dict) -> str:
    """Of the figures that can tell on these data, how many are as if never seen; without `acc_forget`, which `readout`
    has, and without the probe's blocks."""
    can_tell = [
        entry["verdict"]
        for key, entry in request["figures"].items()
        if entry["verdict"] and entry["power"] >= POWER and key != "acc_forget" and not key.startswith(INSIDE)
    ]
    return f"{can_tell.count(AS_IF_NEVER_SEEN)} of {len(can_tell)}"


def _overview_frame(models: Sequence[tuple[str, dict | None, dict]]) -> pd.DataFrame:
    """A row per audited model, below those of the references and the pre-trained one; `models` as `_moments` gives them."""
    first = {key: entry for key, entry in models[0][2]["figures"].items() if entry["value"] is not None}
    rows = [_row(None, {key: float(np.mean(entry["references"])) for key, entry in first.items()}, "", "")]
    rows += [_row(None, {key: entry["originals"][0] for key, entry in first.items()}, "", "")]
    for _, results, request in models:
        values = {key: entry["value"] for key, entry in request["figures"].items() if entry["value"] is not None}
        rows.append(_row(_h_mean(results, request), values, count_as_never_seen(request), request["verdict"]))
    labels = [NEVER_SEEN, PRETRAINED, *(label for label, *_ in models)]
    return pd.DataFrame(rows, labels, ["H ↑", *OVERVIEW.values(), AS_IF_NEVER_SEEN, "verdict"])


def _row(h_mean: float | None, values: dict[str, float], *judged: str) -> list[str]:
    return [percent(h_mean), *("–" if key not in values else f"{values[key]:.1f}" for key in OVERVIEW), *judged]


def overview(audits: Sequence[tuple[str, dict | None, dict]], width: int = 0) -> list[str]:
    """Lines: for each request the number of people and the table; labels padded to `width`.

    audits: (label, content of results.json or None, content of audit.json) of each model.
    """
    lines = []
    for models in _moments(audits).values():
        request, table = models[0][2], _overview_frame(models)
        people, images = len(request["forget"]), request["images"]
        lines += [""] if lines else []
        lines += [f"{_title(request)}: are its {people} people still known? {images} test faces, %", ""]
        table.index = table.index.str.ljust(max(width, *map(len, table.index)))
        table["verdict"] = table["verdict"].str.ljust(max(map(len, VERDICTS)))
        lines += table.to_string(col_space=7).splitlines()
    return lines


def _title(request: dict) -> str:
    later = "" if request["task"] == request["after_task"] else f", after task {request['after_task']}"
    return f"Request {request['task']}{later}"


def comparison_markdown(audits: Sequence[tuple[str, dict | None, dict]]) -> str:
    """For each request a row per model and a column per figure (but the probe's blocks), each value with its verdict."""
    parts = []
    for models in _moments(audits).values():
        request = models[0][2]
        first = request["figures"]
        keys = [key for key, entry in first.items() if entry["verdict"] and not key.startswith(INSIDE)]
        spread = [(np.mean(first[key]["references"]), np.std(first[key]["references"], ddof=1)) for key in keys]
        rows = [["", *(f"{mean:.1f} ± {std:.1f}" for mean, std in spread), ""]]
        rows += [["", *(f"{np.mean(first[key]['originals']):.1f}" for key in keys), ""]]
        for _, results, other in models:
            entries = [other["figures"][key] for key in keys]
            told = (f"{entry['value']:.1f} {SIGNS[entry['verdict']]}" for entry in entries)
            rows.append([percent(_h_mean(results, other)), *told, count_as_never_seen(other)])
        labels = [NEVER_SEEN, "Originals", *(label for label, *_ in models)]
        table = pd.DataFrame(rows, labels, ["H", *(f"`{key}`" for key in keys), AS_IF_NEVER_SEEN]).rename_axis("Method")
        about = f"{len(request['forget'])} people, {request['images']} test faces"
        about += f", K = {max(len(entry['references']) for entry in first.values())}"
        parts.append(f"**{_title(request)}**: {about}. {LEGEND}")
        parts.append(table.to_markdown(disable_numparse=True, colalign=["left"] + ["right"] * (len(keys) + 2)))
    return "\n\n".join(parts)


def calibration(request: dict) -> tuple[int, int, int, int]:
    """Does the audit judge right where the truth is known? Of one request, over its figures:

    references, each judged by the others, that are not taken for knowing the person or for having lost it, of how many;
    originals that are told as knowing it, of how many where the figure has power.
    """
    passed = tried = told = can_tell = 0
    for key, entry in request["figures"].items():
        if entry["verdict"] is None:
            continue
        never, known = entry["references"], [entry["known"]]
        judge = partial(compare, originals=known, resolution=100 / request["images"], falls=key in FALLING)
        for place, value in enumerate(never):
            others = [*never[:place], *never[place + 1 :]]
            tried += 1
            passed += judge(value, others).verdict in (AS_IF_NEVER_SEEN, CANNOT_TELL)
        if entry["power"] >= POWER and key not in BORROWED | FALLING:  # which do not show who is known
            can_tell += len(entry["originals"])
            told += sum(judge(value, never).verdict == STILL_KNOWN for value in entry["originals"])
    return passed, tried, told, can_tell


def never_seen_utility(utility: dict, key: str) -> float | None:
    """The references' mean, of what they have."""
    values = [reference.get(key) for reference in utility["references"]]
    return None if None in values else float(np.mean(values))


def audit_markdown(content: dict) -> str:
    """Every figure of every request, as tables."""
    parts = [f"# Audit of {content['method'] or 'a checkpoint'} on {content['data']}"]
    for request in content["requests"]:
        people = f"{len(request['forget'])} people, {request['images']} test faces: **{request['verdict']}**"
        people += f" ({count_as_never_seen(request)} figures that can tell are as if never seen, the probe's blocks aside)"
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
        told = [
            f"{name} {percent(before[key])} → {percent(useful[key])} ({percent(never_seen_utility(useful, key))})"
            for key, name in UTILITY.items()
        ]
        parts.append(f"Kept people, before → after (never seen): {', '.join(told)}.")
        passed, tried, known, can_tell = calibration(request)
        parts.append(
            f"Calibration: references, each judged by the others, pass {passed} of {tried} figures; originals are told as "
            f"knowing them in {known} of {can_tell} that have power."
        )
    return "\n\n".join(parts)
