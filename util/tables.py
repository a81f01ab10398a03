"""Tables as the paper lays them out: a row per method, the tasks side by side. Markdown that also reads well as text."""

from collections.abc import Sequence

# Column titles of the paper, and the keys of `after` in results.json.
COLUMNS = (("H ↑", "h_mean"), ("Acc_r ↑", "acc_remain"), ("Acc_f ↓", "acc_forget"), ("Acc_o ↓", "acc_old"))
MISSING = ("Acc_m ↑", "acc_missing")
READINGS = {
    "": "Plain accuracy (%): what a user of the model sees",
    "margin_": "Margin accuracy (%): the published reading, the true class must win by the margin",
}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that its columns also line up in a terminal; the first column is left-aligned."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    align = [str.ljust] + [str.rjust] * (len(header) - 1)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(pad(str(c), w) for pad, c, w in zip(align, cells, widths, strict=True)) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2)] + ["-" * (w + 1) + ":" for w in widths[1:]]) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def paper_tables(runs: Sequence[dict], labels: Sequence[str] | None = None) -> str:
    """Both readings of runs with the same tasks, as two titled tables. `labels` name the rows (default: the method)."""
    return "\n\n".join(f"{title}\n\n{paper_table(runs, reading, labels)}" for reading, title in READINGS.items())


def paper_table(runs: Sequence[dict], reading: str = "", labels: Sequence[str] | None = None) -> str:
    """One reading ("" or "margin_") of runs with the same tasks: the pre-trained row, then a row per run."""
    first = runs[0]["tasks"]
    header = ["Method", "Tunable"]
    before = ["Pre-train", "–"]
    for task in first:
        columns = _columns(task)
        header += [f"{task['setting']} {columns[0][0]}"] + [title for title, _ in columns[1:]]
        before += [percent(task["before"].get(f"{reading}{key}")) for _, key in columns]
    rows = [before]
    for index, run in enumerate(runs):
        row = [labels[index] if labels else run["method"], f"{100 * run['model']['tunable_ratio']:.2f}%"]
        for like, task in zip(first, run["tasks"], strict=False):
            row += [percent(task["after"][f"{reading}{key}"]) for _, key in _columns(like)]
        rows.append(row + ["…"] * (len(header) - len(row)))
    return markdown_table(header, rows)


def _columns(task: dict) -> list[tuple[str, str]]:
    """Title and key of a task's columns: nothing is old in the first task, and seldom is a class missing."""
    optional = {"acc_old", "acc_missing"}
    return [(t, key) for t, key in (*COLUMNS, MISSING) if key not in optional or task["after"][key] is not None]


def sweep_table(name: str, labels: Sequence[str], runs: Sequence[dict]) -> str:
    """The last task of each run, a row per run: both readings, zero groups, trained share, seconds."""
    titles = [title for title, _ in COLUMNS[:3]]
    header = [name, *titles, *(f"margin {title}" for title in titles), "zero groups", "Tunable", "s"]
    last = [run["tasks"][-1] for run in runs]
    before = [percent(last[0]["before"].get(f"{reading}{key}")) for reading in READINGS for _, key in COLUMNS[:3]]
    rows = [["Pre-train", *before, "–", "–", "–"]]
    for label, run, task in zip(labels, runs, last, strict=True):
        accuracies = [percent(task["after"][f"{reading}{key}"]) for reading in READINGS for _, key in COLUMNS[:3]]
        zero = f"{100 * task['groups']['zero_ratio']:.0f}%" if task["groups"] else "–"
        tunable = f"{100 * run['model']['tunable_ratio']:.2f}%"
        rows.append([label, *accuracies, zero, tunable, f"{task['train_seconds']:.0f}"])
    return markdown_table(header, rows)
