"""Figures of runs, drawn from their results."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure

from util.evaluation.metrics import MARGINS, METRICS
from util.report.tables import PRETRAINED, Comparison
from util.runtime.files import atomic_write

MARKERS = "osD^v<>PX*hdp"
OWN_COLOURS = {"gs_lora": "black", "gs_lora_pp": "crimson", "unseen": "royalblue"}


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
    """H and Acc_r over the tasks, without margin, a line per method; bars: the standard deviation over the runs."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    panels = figure.subplots(1, 2)
    tasks = np.arange(len(comparison.tasks))
    for panel, metric in zip(panels, ("h_mean", "acc_remain"), strict=True):
        mean, std = (comparison.numbers("", what).xs(metric, axis=1, level=1) for what in ("mean", "std"))
        panel.plot(tasks, mean.loc[PRETRAINED], "--", color="black", alpha=0.5, label=PRETRAINED)
        for number, label in enumerate(comparison.labels):
            # The project's own methods stand out; markers tell apart what colours do not.
            colour = OWN_COLOURS.get(comparison.about["method"][label])
            style = {"color": colour or colormaps["tab20"](number % 20), "linewidth": 3.0 if colour else 1.3}
            style |= {"marker": MARKERS[number % len(MARKERS)], "zorder": 1 if colour else 2}
            shift = 0.3 * (number / max(1, len(comparison.labels) - 1) - 0.5)  # side by side, not on top of each other
            # A single run's deviation is NaN, which is not drawn.
            panel.errorbar(tasks + shift, mean.loc[label], yerr=std.loc[label], label=label, capsize=3, **style)
        panel.set_xticks(tasks, [f"task {t['task']}\n{t['setting']}" for t in comparison.tasks])
        panel.set_ylabel(f"{METRICS[metric].title}, {METRICS[metric].description} (%)")
        panel.grid(alpha=0.3)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.suptitle(f"{comparison.title}, {MARGINS['']}")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
