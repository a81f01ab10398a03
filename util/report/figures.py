"""Figures of a run and of a sweep, drawn from their results."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on the machines that train

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from util.report.tables import Comparison
from util.runtime.files import atomic_write

ACCURACIES = {
    "acc_remain": ("Acc_r, remaining", "tab:blue"),
    "acc_forget": ("Acc_f, forgotten now", "tab:red"),
    "acc_old": ("Acc_o, forgotten earlier", "tab:orange"),
    "acc_missing": ("Acc_m, without images", "tab:green"),
}

MARKERS = "osD^v<>PX*hdp"
OWN_COLOURS = {"gs_lora": "black", "gs_lora_pp": "crimson"}


def run_figure(results: dict) -> Figure:
    """Accuracies over the tasks (plain: solid, margin: dotted; dashes: the pre-trained model), and the group norms."""
    has_groups = any(task["groups"] for task in results["tasks"])
    figure, axes = plt.subplots(1, 2 if has_groups else 1, figsize=(12 if has_groups else 7, 4.5), squeeze=False)
    _accuracies(axes[0, 0], results)
    if has_groups:
        _group_norms(axes[0, 1], results)
    dataset = results["dataset"]
    figure.suptitle(f"{results['method']} on {dataset['name']} ({dataset['classes']} classes), seed {results['seed']}")
    figure.tight_layout()
    return figure


def _accuracies(axes: plt.Axes, results: dict) -> None:
    tasks = results["tasks"]
    positions = range(len(tasks))
    for key, (label, color) in ACCURACIES.items():
        for reading, style in (("", "-o"), ("margin_", ":s")):
            values = [task["after"][reading + key] for task in tasks]
            known = [(x, y) for x, y in zip(positions, values, strict=True) if y is not None]
            if known:
                name = label if not reading else None
                axes.plot(*zip(*known, strict=True), style, color=color, label=name, markersize=5, clip_on=False)
    for key in ("acc_remain", "acc_forget"):
        values = [task["before"][key] for task in tasks]
        if None not in values:
            axes.plot(positions, values, "--", color=ACCURACIES[key][1], alpha=0.4)
    axes.set_xticks(positions, [f"task {task['task']}\n{task['setting']}" for task in tasks])
    axes.set_ylim(0, 101)
    axes.set_ylabel("accuracy (%)")
    axes.set_title("solid: plain · dotted: margin · dashed: pre-trained", fontsize=9)
    axes.legend(loc="center left", fontsize=8)
    axes.grid(alpha=0.3)


def _group_norms(axes: plt.Axes, results: dict) -> None:
    tasks = [task for task in results["tasks"] if task["groups"]]
    names = list(tasks[0]["groups"]["norms"])
    width = 0.8 / len(tasks)
    for number, task in enumerate(tasks):
        places = [i + (number - (len(tasks) - 1) / 2) * width for i in range(len(names))]
        zero = task["groups"]["zero_ratio"]
        axes.bar(places, task["groups"]["norms"].values(), width, label=f"task {task['task']}, {100 * zero:.0f}% zero")
    axes.set_xticks(range(len(names)), names, rotation=30 if len(names) <= 12 else 90, fontsize=8)
    axes.set_ylabel("group norm ‖θ_g‖₂")
    axes.legend(fontsize=8)
    axes.grid(axis="y", alpha=0.3)


def comparison_figure(comparison: Comparison) -> Figure:
    """H and Acc_r over the tasks, a line per method, plain reading; bars: the standard deviation over the runs."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5))
    rows = [row for row in comparison.rows if not row.note and not row.published]
    colours = plt.get_cmap("tab20").colors
    for panel, (key, title) in zip(axes, {"h_mean": "H", "acc_remain": "Acc_r, remaining"}.items(), strict=True):
        columns = [column for column in comparison.columns if column.key == key]
        before = [comparison.before.mean("", column) for column in columns]
        if None not in before:
            panel.plot(range(len(columns)), before, "--", color="black", alpha=0.5, label="Pre-train")
        for number, row in enumerate(rows):
            known = [(x, row.mean("", c), row.std("", c) or 0.0) for x, c in enumerate(columns) if row.values["", c]]
            if known:
                x, means, stds = zip(*known, strict=True)
                # The project's own methods stand out; markers tell apart what colours do not.
                colour = OWN_COLOURS.get(row.method, colours[number % len(colours)])
                width = 3.0 if row.method in OWN_COLOURS else 1.3
                style = {"marker": MARKERS[number % len(MARKERS)], "color": colour}
                shift = 0.3 * (number / max(1, len(rows) - 1) - 0.5)  # side by side, not on top of each other
                places = [place + shift for place in x]
                bars = [[min(s, m) for m, s in zip(means, stds, strict=True)]]
                bars.append([min(s, 100 - m) for m, s in zip(means, stds, strict=True)])
                shown = bars if row.seeds > 1 else None
                panel.errorbar(places, means, yerr=shown, label=row.label, capsize=3, linewidth=width, **style)
        panel.set_xticks(range(len(columns)), [f"task {column.task + 1}\n{column.setting}" for column in columns])
        panel.set_ylabel(f"{title} (%)")
        _stretch_towards_100(panel)
        panel.grid(alpha=0.3)
    axes[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    figure.suptitle(f"{comparison.dataset['name']} ({comparison.dataset['classes']} classes), plain accuracy")
    figure.tight_layout()
    return figure


def _stretch_towards_100(axes: plt.Axes) -> None:
    """A logarithmic scale of the distance to 100 (102, to be exact): good methods differ by points, bad ones by tens."""
    low = max(0.0, axes.dataLim.y0 - 1)
    axes.set_yscale("function", functions=(lambda y: -np.log(np.maximum(102 - y, 1e-3)), lambda t: 102 - np.exp(-t)))
    axes.set_yticks([tick for tick in (0, 20, 40, 60, 80, 90, 95, 98, 100) if tick >= low])
    axes.set_ylim(low, 100.5)


def sweep_figure(title: str, name: str, labels: Sequence[str], runs: Sequence[dict]) -> Figure:
    """H, Acc_r and Acc_f of single-step runs over the settings of a sweep (plain: solid, margin: dotted)."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    curves = {"h_mean": ("H", "black"), **{key: ACCURACIES[key] for key in ("acc_remain", "acc_forget")}}
    for key, (label, color) in curves.items():
        for reading, style in (("", "-o"), ("margin_", ":s")):
            values = [run["tasks"][-1]["after"][reading + key] for run in runs]
            axes.plot(range(len(runs)), values, style, color=color, label=None if reading else label, clip_on=False)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel(name)
    axes.set_ylabel("%")
    axes.set_ylim(0, 101)
    axes.set_title(f"{title}\nsolid: plain · dotted: margin", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def roc_figure(curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """True accept rate over false accept rate, a curve per group of classes: (false, true) rates in [0, 1]."""
    figure, axes = plt.subplots(figsize=(6, 5))
    for name, (far, tar) in curves.items():
        axes.plot(far, tar, drawstyle="steps-post", label=name)
    axes.set_xscale("symlog", linthresh=1e-4)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.01)
    axes.set_xlabel("false accept rate")
    axes.set_ylabel("true accept rate")
    axes.set_title("face verification on pairs of test images")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
