"""Tables as the papers lay them out: a row per method, the tasks side by side; as Markdown, CSV, LaTeX and text."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import pandas as pd

from methods import METHODS
from util.evaluation.metrics import MARGINS, METRICS
from util.report.results import results_frame
from util.runtime.errors import UsageError

PAPER_TABLES = Path(__file__).with_name("paper_tables.json")
PRETRAINED = "Pre-train"
PUBLISHED = " (published)"  # after the label of the papers' row beside ours
PAPERS = {"casia_100": "margin_", "imagenet_100": ""}  # what the published tables are of, and which accuracy they hold
# Of the scripts that print tables: --published alone is casia_100.
PUBLISHED_OPTION = {"nargs": "?", "const": "casia_100", "choices": PAPERS}
PUBLISHED_OPTION |= {"help": "add the papers' results on casia_100 (the default, with the head's margin) or imagenet_100"}
LATEX = {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$", "–": "--", "…": r"\dots", "β": r"$\beta$"}
LATEX |= {f"Acc_{group}": f"Acc$_{group}$" for group in "rfom"}


def percent(value: float | None, form: str = "{:.2f}") -> str:
    return "–" if pd.isna(value) else form.format(value)


def published_frame(frame: pd.DataFrame, dataset: dict, tasks: Sequence[dict], published: str) -> pd.DataFrame:
    """The papers' rows of the methods in `frame`, on `published`. Raises UsageError if there are none of these tasks."""
    papers = json.loads(PAPER_TABLES.read_text())
    first, settings = tasks[0], [task["setting"] for task in tasks]
    few_shot, missing = first["train_images"]["forget"] == 4 * len(first["forget_classes"]), len(first["missing_classes"])
    name = "single_step" if len(tasks) == 1 else "continual_few_shot_4" if few_shot else "continual"
    of_missing = f"missing_classes_{missing}" if missing else ""
    name = {"casia_100": of_missing or name, "imagenet_100": f"imagenet_100{of_missing}"}[published]
    table = papers.get(name, {"settings": []})
    check_published(dataset["name"], dataset["classes"], published)
    if not {*settings} <= {*table["settings"]}:
        message = f"of {published} in {', '.join(table['settings'])}" if table["settings"] else "of no such missing classes"
        raise UsageError(f"the published tables are {message}: they cannot be compared")
    ratios, rows = papers["tunable_ratio"] if published == "casia_100" else {"others": math.nan}, []
    for label, method in frame[["label", "method"]].drop_duplicates().itertuples(index=False):
        about = {"label": label + PUBLISHED, "margin": PAPERS[published]}
        about["tunable_ratio"] = ratios.get(method, ratios["others"]) / 100
        by_setting = dict(zip(table["settings"], table["methods"].get(method, []), strict=False))
        for setting, metric in product(by_setting.keys() & settings, METRICS):
            rows.append({**about, "setting": setting, "metric": metric, "value": by_setting[setting].get(metric)})
    return pd.DataFrame(rows)


def check_published(name: str, classes: int, published: str) -> None:
    """Raise UsageError for data that cannot be those of the papers' tables."""
    if name == "synthetic_faces" or classes != 100:
        message = f"the published tables are of {published} with 100 classes"
        raise UsageError(f"{message}: {name} with {classes} cannot be compared")


def rank_correlation(ours: pd.DataFrame, papers: pd.DataFrame) -> pd.DataFrame:
    """Spearman's, by column, over the rows of `ours` that both tables have: {"value", "count"}."""
    both = ours.notna() & papers.notna()
    value = ours.where(both).rank().corrwith(papers.where(both).rank())
    return pd.DataFrame({"value": value, "count": both.sum()})


class Comparison:
    """Runs of the same tasks side by side: the pre-trained model, then a row per label; runs of one label are averaged.

    `stats` holds mean, std and count by (label, margin, setting, metric), `about` what else is known of a label.
    """

    def __init__(
        self,
        runs: Sequence[dict],
        labels: Sequence[str] | None = None,
        failures: Mapping[str, str] | None = None,
        published: str | None = None,
        sweep: str | None = None,
    ) -> None:
        """runs: contents of results.json. failures: why further labels have none. published: one of PAPERS, to add its rows.
        sweep: what the labels are values of, if they are not methods.

        Raises UsageError if the runs are not of the same data and tasks, or not of the papers'.
        """
        labels = labels or [METHODS[run["method"]].title for run in runs]
        longest = max(runs, key=lambda run: len(run["tasks"]))
        self.dataset, self.tasks = longest["dataset"], longest["tasks"]
        self.settings = [task["setting"] for task in self.tasks]
        for run, label in zip(runs, labels, strict=True):
            own = [task["setting"] for task in run["tasks"]]
            if run["dataset"] != self.dataset or own != self.settings[: len(own)]:
                both = ((run["dataset"], own), (self.dataset, self.settings))
                message = " against ".join(f"{dataset['name']}, {' '.join(settings)}" for dataset, settings in both)
                raise UsageError(f"{label} and the others are not of the same data and tasks: {message}")
        self.failures, self.sweep = failures or {}, sweep
        self.labels = [*dict.fromkeys(labels)]
        seeds = ", ".join(dict.fromkeys(str(run["seed"]) for run in runs))
        self.title = f"{self.dataset['name']} ({self.dataset['classes']} classes), seed {seeds}"
        frame = results_frame(runs, labels)
        # Runs of one seed share their classes, and so the pre-trained model's accuracies.
        cell = ["margin", "setting", "metric"]
        pretrained = frame.drop_duplicates(["seed", *cell])[[*cell, "before"]].rename(columns={"before": "value"})
        papers = [published_frame(frame, self.dataset, self.tasks, published)] if published else []
        self.papers_margin = PAPERS.get(published, "")
        frame = pd.concat([pretrained.assign(label=PRETRAINED), frame, *papers])
        about = {"method": "first", "tunable_ratio": "first", "zero_ratio": "last", "seconds": "mean"}
        self.about = frame.groupby("label").agg(about)
        values = frame.groupby(["label", *cell], sort=False)["value"]
        self.stats = values.agg(["mean", "std", "count"]).dropna(subset="mean")
        # Nothing is old in the first task, and seldom is a class missing.
        found = {(setting, metric) for _, _, setting, metric in self.stats.index}
        every = product(self.settings, METRICS)
        self.columns = [column for column in every if column in found or column[1] not in ("acc_old", "acc_missing")]

    def numbers(self, margin: str, statistic: str = "mean") -> pd.DataFrame:
        """A row per label, pre-trained first; a column per (setting, metric)."""
        rows = [PRETRAINED]
        for label in self.labels:
            published = margin == self.papers_margin and label + PUBLISHED in self.about.index
            rows += [label, label + PUBLISHED] if published else [label]
        table = self.stats[statistic].xs(margin, level="margin").unstack(["setting", "metric"])
        return table.reindex(index=rows, columns=pd.MultiIndex.from_tuples(self.columns))

    def _texts(self, margin: str, deviation: bool = True) -> pd.DataFrame:
        """`numbers` as text: – where there is none, … where there is none yet."""
        mean = self.numbers(margin)
        texts = mean.map(percent)
        if deviation:
            texts += self.numbers(margin, "std").map(lambda std: "" if pd.isna(std) else f" ± {std:.2f}")
        unfinished = [label for label in self.labels if pd.isna(self.about["seconds"][label])]
        texts.loc[unfinished] = texts.loc[unfinished].replace("–", "…")
        return texts

    def _table(self, margin: str, mark: Mapping[int, str]) -> pd.DataFrame:
        """All columns, under (setting, heading), as text; `mark` are the formats of the best and the second best."""
        table, sign = self._texts(margin), [1 if METRICS[metric].more_is_better else -1 for _, metric in self.columns]
        scores = self.numbers(margin).loc[self.labels].round(2) * sign
        # 1 for the best of our runs, ties included; 2 for the next, unless there were ties.
        ranks = scores.loc[:, scores.count() > 1].rank(ascending=False, method="min").reindex_like(table)
        for rank, form in mark.items():
            table = table.mask(ranks == rank, table.map(form.format))
        table.columns = pd.MultiIndex.from_tuples((setting, METRICS[key].heading) for setting, key in self.columns)
        about = self.about.loc[table.index]
        table.insert(0, ("", "Tunable"), [percent(ratio, "{:.2%}") for ratio in about["tunable_ratio"]])
        if self.sweep:
            table[("", "zero groups")] = [percent(ratio, "{:.0%}") for ratio in about["zero_ratio"]]
        table[("", "s")] = [percent(seconds, "{:.0f}") for seconds in about["seconds"]]
        for label in self.failures:
            table.loc[label] = ["failed"] + ["–"] * (table.shape[1] - 1)
        table.insert(0, ("", self.sweep or "Method"), table.index)
        return table

    def markdown(self) -> str:
        """Without and with margin; the best in **bold** and the second best in *italics*."""
        parts = []
        for margin, meaning in MARGINS.items():
            table = self._table(margin, {1: "**{}**", 2: "*{}*"})
            header = [f"{setting} {name}" if name == METRICS["h_mean"].heading else name for setting, name in table]
            align = ["left"] + ["right"] * (len(header) - 1)
            text = table.set_axis(header, axis=1).to_markdown(index=False, disable_numparse=True, colalign=align)
            parts += [f"Accuracy (%) {meaning}", text]
        return "\n\n".join(parts + self._agreement() + [f"{label}: failed: {why}" for label, why in self.failures.items()])

    def _agreement(self) -> list[str]:
        """A line on how the methods' H ranks beside the papers', for each task with three methods or more."""
        h_mean = self.numbers(self.papers_margin).xs("h_mean", axis=1, level=1)
        ours = h_mean.loc[self.labels]
        found = rank_correlation(ours, h_mean.reindex(ours.index + PUBLISHED).set_axis(ours.index))
        found = found[found["count"] > 2].dropna()
        values = [f"{setting} {value:.2f} of {count} methods" for setting, value, count in found.itertuples()]
        return [f"Spearman's rank correlation of H with the papers': {', '.join(values)}"] if values else []

    def csv(self) -> str:
        """One number a line."""
        table = self.stats.rename(columns={"count": "runs"}).reset_index().join(self.about, "label")
        table["task"] = table["setting"].map(self.settings.index) + 1
        table["margin"] = table["margin"].map(bool)
        columns = ["label", "tunable_ratio", "runs", "seconds", "margin", "task", "setting", "metric", "mean", "std"]
        return table[columns].round({"seconds": 3, "mean": 4, "std": 4}).to_csv(index=False)

    def latex(self) -> str:
        """Without and with margin, as `tabular`s for the booktabs package: the best bold, the second best underlined."""
        parts = []
        for margin, meaning in MARGINS.items():
            table = self._table(margin, {1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"})
            style = table.style.hide(axis="index").format(escape="latex", subset=[c for c in table if not c[0]])
            text = style.to_latex(hrules=True, multicol_align="c", column_format="l" + "r" * (table.shape[1] - 1))
            for plain, tex in LATEX.items():
                text = text.replace(plain, tex)
            parts.append(f"% Accuracy (%) {meaning}\n{text}")
        return "\n".join(parts)

    def narrow(self, margin: str = "", width: int = 0) -> list[str]:
        """Lines for a terminal: H of each task, the other accuracies after the last; labels padded to `width`."""
        heads = {(setting, "h_mean"): f"H {setting}" for setting in self.settings}
        last = [metric for setting, metric in self.columns if setting == self.settings[-1] and metric != "h_mean"]
        heads |= {(self.settings[-1], metric): METRICS[metric].heading for metric in last}
        table = self._texts(margin, deviation=False)[[*heads]].set_axis([*heads.values()], axis=1)
        table["s"] = [percent(seconds, "{:.0f}") for seconds in self.about["seconds"].loc[table.index]]
        width = max(width, *map(len, [*table.index, *self.failures]))
        table = table.rename(index=lambda label: label.ljust(width)).rename_axis(index=None, columns=self.sweep or "Method")
        failures = [f"{label.ljust(width)} failed: {why}" for label, why in self.failures.items()]
        title = f"Accuracy (%) {MARGINS[margin]}; Acc after the last task"
        return [title, *table.to_string(col_space=6).splitlines(), *failures, *self._agreement()]
