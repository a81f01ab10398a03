"""Tables as the paper lays them out: a row per method, the tasks side by side; as Markdown, CSV and LaTeX."""

import csv
import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from util.runtime.errors import UsageError

# Column titles of the paper, keys of `after` in results.json, and whether more is better.
COLUMNS = (
    ("H ↑", "h_mean", True),
    ("Acc_r ↑", "acc_remain", True),
    ("Acc_f ↓", "acc_forget", False),
    ("Acc_o ↓", "acc_old", False),
    ("Acc_m ↑", "acc_missing", True),
)
READINGS = {
    "": "Plain accuracy (%): what a user of the model sees",
    "margin_": "Margin accuracy (%): the published reading, the true class must win by the margin",
}
PAPER_TABLES = Path(__file__).with_name("paper_tables.json")
CELL_WIDTH = len("100.00")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that its columns also line up in a terminal; the first column is left-aligned."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    rule = "|" + "|".join(["-" * (widths[0] + 2)] + ["-" * (w + 1) + ":" for w in widths[1:]]) + "|"
    return "\n".join([table_line(header, widths), rule, *(table_line(row, widths) for row in rows)])


def table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (str(cell) for cell in cells)
    padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
    return "| " + " | ".join(padded) + " |"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


@dataclass(frozen=True)
class Column:
    """One accuracy of one task. `key` is its key in `after`, without the reading's prefix."""

    task: int
    setting: str
    title: str
    key: str
    more_is_better: bool


@dataclass
class Row:
    """A method: by (reading, column) one value for each of its runs; `note` where there are none."""

    label: str
    method: str = ""
    tunable: float | None = None
    seconds: float | None = None
    seeds: int = 1
    values: dict[tuple[str, Column], list[float]] = field(default_factory=dict)
    note: str = ""
    published: bool = False

    def mean(self, reading: str, column: Column) -> float | None:
        values = self.values.get((reading, column))
        return statistics.fmean(values) if values else None

    def std(self, reading: str, column: Column) -> float | None:
        """Sample standard deviation; None of fewer than two values."""
        values = self.values.get((reading, column), [])
        return statistics.stdev(values) if len(values) > 1 else None

    def text(self, reading: str, column: Column) -> str:
        std = self.std(reading, column)
        return percent(self.mean(reading, column)) + ("" if std is None else f" ± {std:.2f}")


class Comparison:
    """Runs of the same tasks side by side: the pre-trained row, then a row per label; runs of one label are averaged."""

    def __init__(self, runs: Sequence[dict], labels: Sequence[str] | None = None) -> None:
        """`runs` are contents of results.json. Raises UsageError if they are not of the same data and tasks."""
        labels = labels or [run["method"] for run in runs]
        longest = max(runs, key=lambda run: len(run["tasks"]))
        self.dataset = longest["dataset"]
        self.tasks = longest["tasks"]
        for run, label in zip(runs, labels, strict=True):
            self._check(run, label)
        self.columns = columns_of(self.tasks)
        self.before = Row("Pre-train")
        self.rows: list[Row] = []
        for label in dict.fromkeys(labels):
            self.rows.append(self._row(label, [run for run, name in zip(runs, labels, strict=True) if name == label]))
        self._fill_before(runs)

    def _check(self, run: dict, label: str) -> None:
        settings = [task["setting"] for task in run["tasks"]]
        if run["dataset"] != self.dataset or settings != [task["setting"] for task in self.tasks[: len(settings)]]:
            ours = f"{self.dataset['name']}, {' '.join(task['setting'] for task in self.tasks)}"
            theirs = f"{run['dataset']['name']}, {' '.join(settings)}"
            raise UsageError(f"{label} and the others are not of the same data and tasks: {theirs} against {ours}")

    def _row(self, label: str, runs: list[dict]) -> Row:
        whole = [run for run in runs if len(run["tasks"]) == len(self.tasks)]
        row = Row(label, runs[0]["method"], runs[0]["model"]["tunable_ratio"], seeds=len(runs))
        if whole:
            row.seconds = statistics.fmean(sum(task["train_seconds"] for task in run["tasks"]) for run in whole)
        for reading in READINGS:
            for column in self.columns:
                values = [run["tasks"][column.task]["after"] for run in runs if column.task < len(run["tasks"])]
                found = [value[reading + column.key] for value in values]
                row.values[reading, column] = [value for value in found if value is not None]
        return row

    def _fill_before(self, runs: Sequence[dict]) -> None:
        # The runs of one seed share their classes, and so their pre-trained row.
        by_seed = {run["seed"]: run for run in sorted(runs, key=lambda run: len(run["tasks"]))}
        for reading in READINGS:
            for column in self.columns:
                tasks = [run["tasks"][column.task] for run in by_seed.values() if column.task < len(run["tasks"])]
                values = [task["before"].get(reading + column.key) for task in tasks]
                self.before.values[reading, column] = [value for value in values if value is not None]

    def add_note(self, label: str, note: str) -> None:
        """A row without numbers, `note` saying why."""
        self.rows.append(Row(label, note=note))

    def add_published(self) -> None:
        """After each row the published one of the same method, in the margin reading, which the papers report.

        Raises UsageError if these runs are not in the setting of a published table.
        """
        table = published_table(self.dataset, self.tasks)
        ratios = json.loads(PAPER_TABLES.read_text())["tunable_ratio"]
        rows = []
        for row in self.rows:
            rows.append(row)
            if row.method in table["methods"]:
                published = Row(f"{row.label} (published)", row.method, published=True)
                published.tunable = ratios.get(row.method, ratios["others"]) / 100
                for column in self.columns:
                    place = table["settings"].index(column.setting)
                    value = table["methods"][row.method][place].get(column.key)
                    published.values["margin_", column] = [] if value is None else [value]
                rows.append(published)
        self.rows = rows

    def header(self) -> list[str]:
        cells = ["Method", "Tunable"]
        for column in self.columns:
            cells.append(f"{column.setting} {column.title}" if column.key == "h_mean" else column.title)
        return [*cells, "s"]

    def cells(self, row: Row, reading: str, mark: Callable[[str, int], str] | None = None) -> list[str]:
        """A row's texts; `mark` puts a sign around a text that is best (rank 1) or second best (2) in its column."""
        tunable = "–" if row.tunable is None else f"{100 * row.tunable:.2f}%"
        seconds = "–" if row.seconds is None else f"{row.seconds:.0f}"
        texts = []
        for column in self.columns:
            unfinished = row.method and not row.published and row.seconds is None and not row.values[reading, column]
            text = "…" if unfinished else row.text(reading, column)
            rank = self._rank(row, reading, column)
            texts.append(mark(text, rank) if mark and rank else text)
        return [row.label, "failed" if row.note else tunable, *texts, seconds]

    def _rank(self, row: Row, reading: str, column: Column) -> int:
        """1 for the best of a column, ties included; 2 for the next, unless there were ties; else 0."""
        if row is self.before or row.published:
            return 0
        sign = 1 if column.more_is_better else -1
        found = {id(each): each.mean(reading, column) for each in self.rows if not each.published}
        scores = {key: sign * round(value, 2) for key, value in found.items() if value is not None}
        if id(row) not in scores or len(scores) < 2:
            return 0
        better = sum(score > scores[id(row)] for score in scores.values())
        return better + 1 if better < 2 else 0

    def markdown(self) -> str:
        """Both readings, each as a titled table with the best in **bold** and the second best in *italics*."""
        mark = lambda text, rank: f"{'*' * (3 - rank)}{text}{'*' * (3 - rank)}"  # noqa: E731
        parts = []
        for reading, title in READINGS.items():
            rows = [row for row in [self.before, *self.rows] if reading or not row.published]
            parts += [title, markdown_table(self.header(), [self.cells(row, reading, mark) for row in rows])]
        notes = [f"{row.label}: {row.note}" for row in self.rows if row.note]
        return "\n\n".join(parts + notes)

    def csv(self) -> str:
        """One line per row, reading, task and accuracy."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["row", "tunable_ratio", "runs", "seconds", "reading", "task", "setting", "metric", "mean", "std"])
        for row in [self.before, *self.rows]:
            for reading in READINGS:
                for column in self.columns:
                    mean, std = row.mean(reading, column), row.std(reading, column)
                    if mean is not None:
                        about = [row.label, row.tunable, row.seeds, row.seconds, reading.rstrip("_") or "plain"]
                        place = [column.task + 1, column.setting, column.key]
                        writer.writerow([*about, *place, round(mean, 4), "" if std is None else round(std, 4)])
        return text.getvalue()

    def latex(self) -> str:
        """Both readings as `tabular`s for the booktabs package: the best bold, the second best underlined."""
        return "\n\n".join(f"% {title}\n{self._tabular(reading)}" for reading, title in READINGS.items()) + "\n"

    def _tabular(self, reading: str) -> str:
        mark = lambda text, rank: f"\\{['textbf', 'underline'][rank - 1]}{{{text}}}"  # noqa: E731
        by_task = [[c for c in self.columns if c.task == task] for task in range(len(self.tasks))]
        spans = " & ".join(f"\\multicolumn{{{len(group)}}}{{c}}{{{group[0].setting}}}" for group in by_task)
        titles = " & ".join(_latex_title(column.title) for column in self.columns)
        rows = [row for row in [self.before, *self.rows] if reading or not row.published]
        lines = [" & ".join(map(_latex, self.cells(row, reading, mark))) + r" \\" for row in rows]
        return "\n".join(
            [
                f"\\begin{{tabular}}{{lr{'r' * len(self.columns)}r}}",
                r"\toprule",
                f" & & {spans} & \\\\",
                f"Method & Tunable & {titles} & s \\\\",
                r"\midrule",
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )


def columns_of(tasks: Sequence[dict]) -> list[Column]:
    """The columns of these tasks: nothing is old in the first, and seldom is a class missing."""
    optional = {"acc_old", "acc_missing"}
    return [
        Column(number, task["setting"], title, key, more)
        for number, task in enumerate(tasks)
        for title, key, more in COLUMNS
        if key not in optional or task["after"][key] is not None
    ]


def published_table(dataset: dict, tasks: Sequence[dict]) -> dict:
    """The published table of these tasks. Raises UsageError if there is none."""
    tables = json.loads(PAPER_TABLES.read_text())
    first = tasks[0]
    few = first["train_images"]["forget"] == 4 * len(first["forget_classes"])
    table = tables["single_step" if len(tasks) == 1 else "continual_few_shot_4" if few else "continual"]
    settings = [task["setting"] for task in tasks]
    if dataset["name"] == "synthetic_faces" or dataset["classes"] != 100 or not set(settings) <= set(table["settings"]):
        raise UsageError(
            f"the published tables are of CASIA-100 in the settings {', '.join(table['settings'])}, these runs of "
            f"{dataset['name']} in {', '.join(settings)}: their numbers cannot be compared"
        )
    return table


def _latex(text: str) -> str:
    for plain, escaped in (("%", r"\%"), ("±", r"$\pm$"), ("–", "--"), ("…", r"\dots"), ("_", r"\_"), ("*", r"$^*$")):
        text = text.replace(plain, escaped)
    return text


def _latex_title(title: str) -> str:
    name, arrow = title.split()
    base, _, index = name.partition("_")
    direction = "uparrow" if arrow == "↑" else "downarrow"
    symbol = base.replace("Acc", r"\mathrm{Acc}") + (f"_{index}" if index else "")
    return f"${symbol}\\{direction}$"


def sweep_table(name: str, labels: Sequence[str], runs: Sequence[dict]) -> str:
    """The last task of each run, a row per run: both readings, zero groups, trained share, seconds."""
    titles = [title for title, *_ in COLUMNS[:3]]
    header = [name, *titles, *(f"margin {title}" for title in titles), "zero groups", "Tunable", "s"]
    last = [run["tasks"][-1] for run in runs]
    before = [percent(last[0]["before"].get(f"{reading}{key}")) for reading in READINGS for _, key, _ in COLUMNS[:3]]
    rows = [["Pre-train", *before, "–", "–", "–"]]
    for label, run, task in zip(labels, runs, last, strict=True):
        accuracies = [percent(task["after"][f"{reading}{key}"]) for reading in READINGS for _, key, _ in COLUMNS[:3]]
        zero = f"{100 * task['groups']['zero_ratio']:.0f}%" if task["groups"] else "–"
        tunable = f"{100 * run['model']['tunable_ratio']:.2f}%"
        rows.append([label, *accuracies, zero, tunable, f"{task['train_seconds']:.0f}"])
    return markdown_table(header, rows)
