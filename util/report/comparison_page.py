"""The page of an audited comparison: the scatter, a table to sort by any column, and the way to each run's audit."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from util.report.audit_tables import COUNTED, PRETRAINED, STRANGERS, reference_label, tally
from util.report.figures import forgetting_scatter, save_figure
from util.runtime.files import write_text

INDEX, SCATTER, ROWS = "index.html", "scatter.png", "audit.csv"
TEMPLATE = Path(__file__).with_suffix(".html.j2")
X = "enrolment_1"  # of the scatter
METRICS = {X: "re-identified, 1 photo", "enrolment_5": "re-identified, 5 photos", "verification_auc": "verification AUC"}

Audited = Sequence[tuple[str, dict, dict, str]]


def write_comparison(audits: Audited, folder: Path, title: str) -> Path | None:
    """Leave audit.csv in `folder`, and index.html and scatter.png of the first request; None where nobody was enrolled.

    audits: (label, content of results.json, content of audit.json, the page of it as seen from `folder`) of each run.
    """
    frame = audit_rows(audits)
    write_text(folder / ROWS, frame.to_csv(index=False))
    first = [(label, results, content["requests"][0], page) for label, results, content, page in audits]
    if any(request["figures"].get(X, {}).get("value") is None for _, _, request, _ in first):
        return None
    rows = [_row(*one) for one in first]
    several = len({results["seed"] for _, results, *_ in first}) > 1
    compared = reference_label(request := first[0][2])
    averaged = f"{STRANGERS}, mean over the methods"  # who are measured in each model anew
    shown = frame[["request", "after_task", "compared_with"]].eq([request["task"], request["after_task"], compared])
    yardstick, band = (averaged, averaged.lower()) if compared == STRANGERS else (compared, "models that never saw them")
    figure = scatter_of(frame[shown.all(axis=1)], title, band)
    save_figure(figure, folder / SCATTER)
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined)
    known = {name: [float(np.mean(group[key])) for key in METRICS] for name, group in _yardsticks(first, yardstick).items()}
    words = {"title": title, "rows": rows, "several": several, "known": known, "metrics": METRICS, "counted": COUNTED}
    write_text(folder / INDEX, environment.get_template(TEMPLATE.name).render(words, chart=_svg(figure)))
    return folder / INDEX


def scatter_of(rows: pd.DataFrame, title: str, band: str = "models that never saw them") -> Figure:
    """The scatter of one request, from rows as `audit_rows` gives them: the means of each method, the band mean ± sd."""
    found = rows.pivot_table(index="method", columns="metric", values="value", sort=False).dropna(subset=[X])
    models = pd.DataFrame({"lost": found["acc_remain_lost"], "known": found[X]})
    models.index = models.index.str.replace(r" \(.*", "", regex=True)  # which version of a method it is
    known = rows[rows["metric"] == X]
    never, spread = known["never_seen"].mean(), np.nan_to_num(known["never_seen_sd"].mean())
    return forgetting_scatter(models, [never - spread, never + spread], known["trained_with_them"].mean(), title, band)


def audit_rows(audits: Audited) -> pd.DataFrame:
    """Every metric of every request of every run, a row each, for tables and pages of one's own."""
    rows = []
    for label, results, content, _ in audits:
        for request in content["requests"]:
            about = {"method": label, "class_order": results["seed"], "request": request["task"]}
            about |= {"after_task": request["after_task"], "people": len(request["forget"])}
            about["compared_with"] = reference_label(request)
            made = {"date": content["date"], "git_commit": content["git_commit"]}
            rows += [about | {"metric": key, "value": value} | made for key, value in _costs(results, request).items()]
            rows.append(about | {"metric": "request", "verdict": request["verdict"]} | made)
            for key, entry in request["figures"].items():
                row = {"metric": key, "value": entry["value"]}
                row |= {"never_seen": _mean(entry["references"]), "never_seen_sd": _deviation(entry["references"])}
                row |= {"trained_with_them": _mean(entry["originals"])}
                rows.append(about | row | {name: entry[name] for name in ("rho", "power", "verdict")} | made)
    return pd.DataFrame(rows)


def _costs(results: dict, request: dict) -> dict[str, float]:
    """By the run's own account: H of the request's own task (None after a later one), and the points of accuracy that kept
    people have lost by then."""
    task = next(task for task in results["tasks"] if task["task"] == request["after_task"])
    lost = task["before"]["acc_remain"] - task["after"]["acc_remain"]
    return {"h_mean": task["after"]["h_mean"] if task["task"] == request["task"] else None, "acc_remain_lost": lost}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _row(label: str, results: dict, request: dict, page: str) -> dict:
    values, costs = [request["figures"].get(key, {}).get("value") for key in METRICS], _costs(results, request)
    row = {"label": label, "seed": results["seed"], "values": values, "known": values[0], "page": page}
    row |= {"h": costs["h_mean"], "lost": costs["acc_remain_lost"]}
    return row | {"tally": tally(request), "verdict": request["verdict"]}


def _yardsticks(first: Sequence[tuple[str, dict, dict, str]], name: str) -> dict[str, dict[str, list[float]]]:
    """Of what is compared with, called `name`, and of the pre-trained model: the values of each metric, of every request."""
    found = {name: {}, PRETRAINED: {}}
    for _, _, request, _ in first:
        for key in METRICS:
            entry = request["figures"].get(key) or {"references": [], "originals": []}
            for group, values in zip(found.values(), (entry["references"], entry["originals"][:1]), strict=True):
                group.setdefault(key, []).extend(values or [np.nan])
    return found


def _svg(figure: Figure) -> Markup:
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(file := io.StringIO(), format="svg", metadata={"Date": None})
    text = file.getvalue()
    return Markup(text[text.index("<svg") :])
