"""Figures of runs, drawn from their results."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter
from matplotlib.transforms import Bbox

from util.evaluation.metrics import MARGINS, METRICS
from util.report.tables import PRETRAINED, Comparison
from util.runtime.files import atomic_write, write_text

BAND = "models that never saw them"
OWN = ("GS-LoRA", "GS-LoRA++", "Unseen")  # stand out


def run_figure(comparison: Comparison) -> Figure:
    """Accuracies, without and with margin, over the tasks of one run, with the norms of its groups; or over a sweep.

    A line per metric, side by side, since many are 0 together; dashes for the pre-trained model.
    """
    sweep, last = comparison.sweep, comparison.settings[-1]
    grouped = [] if sweep else [task for task in comparison.tasks if task["groups"]]
    figure = Figure(figsize=(16 if grouped else 11, 5), layout="constrained")
    panels = figure.subplots(1, 3 if grouped else 2)
    ticks = comparison.labels if sweep else [f"task {t['task']}\n{t['setting']}" for t in comparison.tasks]
    for panel, (margin, meaning) in zip(panels, MARGINS.items(), strict=False):
        numbers = comparison.numbers(margin)
        if sweep:
            before, after = (numbers[last].loc[rows] for rows in ([PRETRAINED] * len(ticks), ticks))
        else:
            before, after = (row.unstack().loc[comparison.settings] for _, row in numbers.iterrows())
        for number, (key, metric) in enumerate(METRICS.items()):
            if key in after:
                places = np.arange(len(ticks)) + 0.06 * (number - 2)
                panel.plot(places, after[key], "o-", color=metric.colour, label=f"{metric.title}, {metric.description}")
                panel.plot(places, before[key], "_--", color=metric.colour, alpha=0.4)
        panel.plot([], [], "_--", color="grey", label="pre-trained")
        panel.set_xticks(range(len(ticks)), ticks)
        panel.set(ylim=(-3, 103), ylabel="%", xlabel=sweep)
        panel.set_title(meaning, fontsize=10)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=9)
    if grouped:
        norms = {f"task {t['task']}, {t['groups']['zero_ratio']:.0%} zero": t["groups"]["norms"] for t in grouped}
        rotation = 30 if len(grouped[0]["groups"]["norms"]) <= 12 else 90
        pd.DataFrame(norms).plot.bar(ax=panels[2], width=0.8, rot=rotation, fontsize=8, legend=False)
        panels[2].set_ylabel("group norm ‖θ_g‖₂")
        panels[2].legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8, frameon=False)
        panels[2].grid(axis="y", alpha=0.3)
    method = comparison.about["method"][comparison.labels[0]]
    figure.suptitle(f"{method} on {comparison.title}" + (f", {last}" if sweep else ""))
    return figure


def comparison_figure(comparison: Comparison) -> Figure:
    """H and Acc_r, a row per method, best last H on top, and a dot per task; bars: the standard deviation over the runs."""
    settings = comparison.settings
    numbers = {what: comparison.numbers("", what) for what in ("mean", "std")}
    order = numbers["mean"][settings[-1], "h_mean"].loc[comparison.labels].sort_values(na_position="first").index
    figure = Figure(figsize=(11, 1.4 + 0.3 * len(order)), layout="constrained")
    panels, places = figure.subplots(1, 2, sharey=True), np.arange(len(order))
    for panel, metric in zip(panels, ("h_mean", "acc_remain"), strict=True):
        for number, setting in enumerate(settings):
            mean, std = (numbers[what][setting, metric].loc[order] for what in ("mean", "std"))
            shade = 0.35 + 0.65 * (number + 1) / len(settings)
            label = f"task {comparison.tasks[number]['task']}, {setting}"
            up = places + 0.3 * (0.5 - number / max(1, len(settings) - 1))  # the first task above
            panel.errorbar(mean, up, xerr=std.fillna(0), fmt="o", ms=5, color=colormaps["Blues"](shade), label=label)
        before = numbers["mean"].loc[PRETRAINED, (settings[0], metric)]
        if np.isfinite(before):
            panel.axvline(before, color="black", ls="--", lw=1, label="pre-trained")
        panel.set_xlabel(f"{METRICS[metric].title}, {METRICS[metric].description} (%)")
        panel.set_yticks(places, order)
        panel.grid(alpha=0.3)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle(f"{comparison.title}, {MARGINS['']}")
    return figure


def forgetting_scatter(
    models: pd.DataFrame, never_seen: Sequence[float], before: float, title: str, band: str = BAND
) -> Figure:
    """What forgetting cost kept people against what is left of forgotten people.

    models:     a row per method, its index the labels: `lost`, points of Acc_r; `known`, re-identified from one photo, %.
    never_seen: `known` of models that never saw the forgotten people, which `band` names. before: of the pre-trained model.
    """
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    panel = figure.subplots()
    low, high = min(never_seen), max(never_seen)
    panel.axhspan(low, high, color="grey", alpha=0.3, lw=0)
    panel.axhline(before, color="black", ls="--", lw=1)
    colours = ["crimson" if label in OWN else "steelblue" for label in models.index]
    panel.scatter(models["lost"], models["known"], c=colours, s=36, zorder=3)
    left = min(0, models["lost"].min())
    right = max(models["lost"].max(), left + 5)  # less is noise, and no axis long
    room = 0.06 * (right - left)
    if right > 30:  # a method that ruins the model is not to press the others together
        panel.set_xscale("symlog", linthresh=10, linscale=2)
        panel.set_xticks([x for x in (-10, -5, 0, 5, 10, 20, 50, 100) if left - 1 < x <= 1.5 * right], minor=False)
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_locator(NullLocator())
        room, right = 0.5, 1.4 * right
    panel.set_xlim(left - room, right + 4 * room)
    panel.set_ylim(min(0, low) - 2, 1.08 * max(before, models["known"].max()))
    scale = ", log from 10" if panel.get_xscale() == "symlog" else ""
    panel.set_xlabel(f"accuracy lost by kept people (points{scale}) → worse")
    panel.set_ylabel("forgotten people re-identified from one photo (%) → worse")
    panel.set_title(title, fontsize=11)
    panel.grid(alpha=0.3)
    text_style = {"va": "bottom", "ha": "right", "fontsize": 8, "color": "dimgrey"}
    for height, words in ((high, band), (before, "before forgetting")):
        panel.text(0.99, height, words, transform=panel.get_yaxis_transform(), **text_style)
    _label(figure, panel, models)
    return figure


def _label(figure: Figure, panel: Axes, models: pd.DataFrame) -> None:
    """Write each dot's label where it covers no dot and no label, with a line to the dot where that is not beside it."""
    figure.draw_without_rendering()  # lays it out
    dots = panel.transData.transform(models[["lost", "known"]].to_numpy())
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in dots]
    for words in panel.texts:  # of the band and the line: at their right end, or where there is no dot
        for end in np.arange(0.99, 0.3, -0.05):
            words.set_x(end)
            if not words.get_window_extent().count_overlaps(taken):
                break
        taken.append(words.get_window_extent())
    places = [(8 * (1 + r) * np.cos(a), 6 * (1 + r) * np.sin(a)) for r in range(14) for a in np.arange(0, 6.2, 0.2)]
    for label, at in zip(models.index, models[["lost", "known"]].to_numpy(), strict=True):
        note = panel.annotate(label, at, (0, 0), textcoords="offset points", fontsize=8, va="center")
        for x, y in places:
            note.set(position=(x, y), horizontalalignment="left" if x >= 0 else "right")
            box = note.get_window_extent()
            if not box.count_overlaps(taken) and panel.bbox.containsx(box.x0) and panel.bbox.containsx(box.x1):
                break
        taken.append(box)
        if np.hypot(x, y) > 14:
            panel.annotate(
                "", at, (x, y), textcoords="offset points", arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "grey"}
            )


def save_figure(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def write_tables(comparison: Comparison, folder: Path) -> None:
    """table.md, table.csv, table.tex and figure.png."""
    write_text(folder / "table.md", comparison.markdown() + "\n")
    write_text(folder / "table.csv", comparison.csv())
    write_text(folder / "table.tex", comparison.latex())
    save_figure((run_figure if comparison.sweep else comparison_figure)(comparison), folder / "figure.png")
