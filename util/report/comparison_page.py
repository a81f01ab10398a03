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

from util.report.audit_tables import COUNTED, PRETRAINED, STRANGERS, h_mean, reference_label, tally
from util.report.figures import BAND, forgetting_scatter, save_figure
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
    requests = [request for _, _, request, _ in first]
    if any(request["figures"].get(X, {}).get("value") is None for request in requests):
        return None
    moment = [requests[0]["task"], requests[0]["after_task"], reference_label(requests[0])]
    shown = frame[frame[["request", "after_task", "compared_with"]].eq(moment).all(axis=1)]
    name, band = moment[2], BAND
    if name == STRANGERS:  # who are measured in each model anew
        name = f"{STRANGERS}, mean over the methods"
        band = name.lower()
    figure = scatter_of(shown, title, band)
    save_figure(figure, folder / SCATTER)
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template(TEMPLATE.name).render(
        title=title,
        chart=_svg(figure),
        rows=[_row(*one) for one in first],
        several=len({results["seed"] for _, results, *_ in first}) > 1,
        known={name: _means(requests, "references"), PRETRAINED: _means(requests, "originals", 1)},
        metrics=METRICS,
        counted=COUNTED,
    )
    write_text(folder / INDEX, page)
    return folder / INDEX


def scatter_of(rows: pd.DataFrame, title: str, band: str = BAND) -> Figure:
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
                never, known = (pd.Series(entry[group], dtype=float) for group in ("references", "originals"))
                row = {"metric": key, "value": entry["value"], "never_seen": never.mean(), "never_seen_sd": never.std()}
                row["trained_with_them"] = known.mean()
                rows.append(about | row | {name: entry[name] for name in ("p", "rho", "power", "verdict")} | made)
    return pd.DataFrame(rows)


def _costs(results: dict, request: dict) -> dict[str, float | None]:
    """By the run's own account: H, and the points of accuracy that kept people have lost by then."""
    task = next(task for task in results["tasks"] if task["task"] == request["after_task"])
    lost = task["before"]["acc_remain"] - task["after"]["acc_remain"]
    return {"h_mean": h_mean(results, request), "acc_remain_lost": lost}


def _row(label: str, results: dict, request: dict, page: str) -> dict:
    row = {"label": label, "seed": results["seed"], "page": page, "tally": tally(request), "verdict": request["verdict"]}
    return row | _costs(results, request) | {"values": [request["figures"].get(key, {}).get("value") for key in METRICS]}


def _means(requests: Sequence[dict], group: str, most: int | None = None) -> list[float]:
    """Of each metric, over what the `references` or `originals` (the first, with `most`) of all requests show."""
    found = ([request["figures"].get(key, {}).get(group) or [np.nan] for request in requests] for key in METRICS)
    return [float(np.mean([value for values in own for value in values[:most]])) for own in found]


def _svg(figure: Figure) -> Markup:
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(file := io.StringIO(), format="svg", metadata={"Date": None})
    text = file.getvalue()
    return Markup(text[text.index("<svg") :])
