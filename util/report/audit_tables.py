"""What audits found, as tables: one request of several methods side by side, and every figure of one run."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pandas as pd

from util.audit import title_of
from util.audit.statistics import INCONCLUSIVE, MARGIN, OVER_FORGOTTEN, STILL_KNOWN, WITHIN
from util.audit.utility import PAIRS_OF
from util.audit.verdict import AS_IF_NEVER_SEEN, LIKE_STRANGERS, NOT_ENOUGH, VERDICTS, calibration, significantly_off
from util.evaluation.metrics import MUCH_LOST
from util.report.tables import PRETRAINED, percent

NEVER_SEEN, STRANGERS = "Never seen", "Strangers"
# The metrics of the overview, with headings that fit a terminal.
OVERVIEW = {"sign_flip": "inverted", "enrolment_1": "re-id 1", "enrolment_5": "re-id 5", "verification_auc": "AUC"}
SIGNS = {STILL_KNOWN: "▲", OVER_FORGOTTEN: "▼", WITHIN: "●", INCONCLUSIVE: "?"}
OFF = "*"  # within the margin, and yet significantly off
LEGEND = ", ".join(f"{sign} {verdict}" for verdict, sign in SIGNS.items()) + f" ({OFF}: and yet significantly off)"
COUNTED = "in margin"
INSIDE = "probe_block"  # what these figures' keys begin with: read from the inside, not from what leaves the model
UTILITY = {
    "acc_remain": "top-1 accuracy",
    "verification_auc_remain": "verification AUC",
    "old_templates_tar_1pct": "old templates: TAR at FMR 1%",
}


# Label, content of results.json or None, content of audit.json or one of its requests.
Audited = tuple[str, dict | None, dict]


def _moments(audits: Sequence[Audited]) -> list[list[Audited]]:
    """The requests, each with its model, in groups of the same task, after the same task, of the same people."""
    found: dict[tuple, list] = {}
    for label, results, content in audits:
        for request in content["requests"]:
            moment = request["task"], request["after_task"], bool(request.get("strangers")), *request["forget"]
            found.setdefault(moment, []).append((label, results, request | {"first_look": content["first_look"]}))
    return [*found.values()]


def h_mean(results: dict | None, request: dict) -> float | None:
    """Of the request's own task; None afterwards, where H is about a later task's people."""
    if results is None or request["task"] != request["after_task"]:
        return None
    return next(task["after"]["h_mean"] for task in results["tasks"] if task["task"] == request["task"])


def tally(request: dict) -> str:
    """Of the figures with power, how many are within the margin, and how many of those are significantly off."""
    counts = request["tally"]
    off = f" ({counts['significantly_off']}{OFF})" if counts["significantly_off"] else ""
    return f"{counts['within']} of {counts['with_power']}{off}"


def _mean(request: dict, key: str, group: str, most: int | None = None) -> str:
    """What the `references` or `originals` (the first, with `most`) show on average."""
    entry = request["figures"].get(key)
    return f"{np.mean(entry[group][:most]):.1f}" if entry and entry["value"] is not None else "–"


def _value(request: dict, key: str, sign: str = "") -> str:
    """A metric of an audited model; with that of strangers, who are measured in each model anew, in brackets."""
    entry = request["figures"].get(key)
    if not entry or entry["value"] is None:
        return "–"
    return f"{entry['value']:.1f}{sign}" + (f" ({_mean(request, key, 'references')})" if request.get("strangers") else "")


def overview(audits: Sequence[Audited], width: int = 0) -> list[str]:
    """Lines: for each request the number of people and a table with a row per audited model, below those of the references
    and the pre-trained one; labels padded to `width`."""
    lines = []
    for models in _moments(audits):
        requests = [request for *_, request in models]
        request = requests[0]
        columns = {"H ↑": ["–", "–", *(percent(h_mean(results, other)) for _, results, other in models)]}
        for key, heading in OVERVIEW.items():
            known = _mean(request, key, "references"), _mean(request, key, "originals", 1)
            columns[heading] = [*known, *(_value(other, key) for other in requests)]
        columns[COUNTED] = ["", "", *map(tally, requests)]
        columns["verdict"] = [text.ljust(max(map(len, VERDICTS))) for text in ("", "", *(r["verdict"] for r in requests))]
        table = pd.DataFrame(columns, [NEVER_SEEN, PRETRAINED, *(label for label, *_ in models)])
        table = table.iloc[1:] if request.get("strangers") else table
        table.index = table.index.str.ljust(max(width, *map(len, table.index)))
        lines += [""] if lines else []
        names = request["forget"]
        people = f"is {names[0]}" if len(names) == 1 else f"are its {len(names)} people"
        lines += [f"{_title(request)}: {people} still known? {_faces(request)}, %", ""]
        lines += table.to_string(col_space=7).splitlines()
    return lines


def ruin(request: dict) -> str:
    """A sentence on a model that has lost much of what it knew of kept people; else nothing."""
    before, after = (useful["acc_remain"] for useful in (request["utility"]["before"], request["utility"]))
    if before - after <= MUCH_LOST:
        return ""
    return f"kept people's accuracy fell from {before:.0f} to {after:.0f}%: a ruined model looks forgetful"


def _faces(request: dict) -> str:
    return f"{request['images']} test faces" + (", strangers in brackets" if request.get("strangers") else "")


def _title(request: dict) -> str:
    later = "" if request["task"] == request["after_task"] else f", after task {request['after_task']}"
    look = ", a first look" if request.get("first_look") else ""
    return f"Request {request['task']}{later}{strangers_note(request)}{look}"


def reference_label(request: dict) -> str:
    return STRANGERS if request.get("strangers") else NEVER_SEEN


def strangers_note(request: dict) -> str:
    """Of a comparison with strangers: how many there were, and how many were left out."""
    if not (found := request.get("strangers")):
        return ""
    enrolled, tested = found["photos"]
    few = f"; {found['left_out']} people with fewer left out" if found["left_out"] else ""
    photos = f"{enrolled} + {tested} photos of everybody{few}"
    return f", compared with {found['people']} strangers, no retrained references ({photos})"


def comparison_markdown(audits: Sequence[Audited]) -> str:
    """For each request a row per model and a column per figure (but the probe's blocks), each value with its verdict."""
    parts = []
    for models in _moments(audits):
        requests = [request for *_, request in models]
        request, first = requests[0], requests[0]["figures"]
        columns = {"H": ["", "", *(percent(h_mean(results, other)) for _, results, other in models)]}
        for key in (key for key, entry in first.items() if entry["verdict"] and not key.startswith(INSIDE)):
            never = f"{_mean(request, key, 'references')} ± {np.std(first[key]['references'], ddof=1):.1f}"
            values = [_value(other, key, _sign(key, other["figures"][key])) for other in requests]
            columns[f"`{key}`"] = [never, _mean(request, key, "originals"), *values]
        columns[COUNTED] = ["", "", *map(tally, requests)]
        table = pd.DataFrame(columns, [NEVER_SEEN, "Originals", *(label for label, *_ in models)]).rename_axis("Method")
        about = f"{_count(request)}, {_faces(request)}"
        if request.get("strangers"):
            table = table.iloc[1:]
        else:
            about += f", K = {max(len(entry['references']) for entry in first.values())}"
        parts.append(f"**{_title(request)}**: {about}. {LEGEND}")
        parts.append(table.to_markdown(disable_numparse=True, colalign=["left"] + ["right"] * len(columns)))
    return "\n\n".join([*parts, *(f"- {line}" for line in verdicts(audits))])


def _sign(key: str, entry: dict) -> str:
    return f" {SIGNS[entry['verdict']]}{OFF * significantly_off(key, entry)}"


def verdicts(audits: Sequence[Audited]) -> list[str]:
    """Lines: which models are ruined; of several requests how often each verdict fell on each method; and what it would say
    of models of which the truth is known."""
    requests = [request for *_, content in audits for request in content["requests"]]
    counts: dict[str, Counter] = defaultdict(Counter)
    for label, _, content in audits:
        counts[label].update(request["verdict"] for request in content["requests"])
    counts = counts if len(requests) > len(counts) else {}
    truth = calibration(requests)
    counts |= {"never-seen models, each by the others": truth["references"], "models that know them": truth["originals"]}
    counts |= {"groups of strangers, each by the others": truth["strangers"]}
    ruined = [f"{label}: {words}" for label, _, content in audits for r in content["requests"] if (words := ruin(r))]
    return [*dict.fromkeys(ruined), *(f"{label}: {_counted(found)}" for label, found in counts.items() if found)]


def _counted(found: Counter) -> str:
    return ", ".join(f"{found[verdict]} {verdict}" for verdict in VERDICTS if found[verdict])


def _count(request: dict) -> str:
    return "1 person" if len(request["forget"]) == 1 else f"{len(request['forget'])} people"


def summary(request: dict) -> str:
    """What the verdict rests on, in a sentence without its full stop."""
    families = "; ".join(f"{name}: {verdict}" for name, verdict in request["families"].items())
    counts, undecided = request["tally"], request["undecided"]
    message = f"{WITHIN.capitalize()} ({MARGIN:.0%} of the way from never seen to known): {counts['within']} of"
    message += f" {counts['with_power']} metrics with power"
    message += f", {off} of these significantly off{OFF}" if (off := counts["significantly_off"]) else ""
    message += f". By family: {families or 'no metric judged'}"
    if undecided and undecided["rho"] > MARGIN and request["verdict"] in (AS_IF_NEVER_SEEN, LIKE_STRANGERS, NOT_ENOUGH):
        message += f". Worst undecided: {title_of(undecided['figure'])}, {undecided['rho']:.0%} of the way back"
    return message


def utility_titles(utility: dict) -> dict[str, str]:
    """Of each key of a request's utility: metrics of kept people, and the accuracy on each benchmark of --pairs."""
    return UTILITY | {key: f"{key.removeprefix(PAIRS_OF)} accuracy" for key in utility if key.startswith(PAIRS_OF)}


def never_seen_utility(utility: dict, key: str) -> float | None:
    """The references' mean, of what they have."""
    values = [reference.get(key) for reference in utility["references"]]
    return None if None in values or not values else float(np.mean(values))


def audit_markdown(content: dict) -> str:
    """Every figure of every request, as tables."""
    parts = [f"# Audit of {content['method'] or 'a checkpoint'} on {content['data']}"]
    parts += [f"**First look**: {'; '.join(content['first_look'])}."] if content["first_look"] else []
    for request in content["requests"]:
        about = f"{_count(request)}, {request['images']} test faces: **{request['verdict']}**"
        parts.append(f"## Request {request['task']}, after task {request['after_task']}{strangers_note(request)}: {about}")
        parts.append(f"{summary(request)}.")
        rows = []
        for key, entry in request["figures"].items():
            never, known = (float(np.mean(entry[group])) if entry[group] else None for group in ("references", "originals"))
            low, high = entry["interval"] or (None, None)
            row = {"Metric": f"{title_of(key)} (`{key}`)", "Value": percent(entry["value"])}
            row |= {"95% interval": "–" if low is None else f"{low:.1f} to {high:.1f}"}
            row |= {reference_label(request): percent(never), "Original": percent(known)}
            row |= {name: percent(entry[key]) for name, key in (("ρ", "rho"), ("z", "z"), ("p", "p"), ("Power", "power"))}
            off = ", and yet significantly off" * significantly_off(key, entry)
            rows.append(row | {"Verdict": (entry["verdict"] or entry["reason"]) + off})
        align = ["left"] + ["right"] * 8 + ["left"]
        parts.append(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True, colalign=align))
        useful, changes = request["utility"], []
        for key, name in utility_titles(useful).items():
            values = percent(useful["before"][key]), percent(useful[key]), percent(never_seen_utility(useful, key))
            changes.append("{} {} → {} ({})".format(name, *values))
        parts.append(f"Kept people, before → after (never seen): {', '.join(changes)}.")
        parts.append("; ".join(verdicts([("", None, {"requests": [request]})])) + ".")
    return "\n\n".join(parts)
