"""Write the tables of README.md and docs from the numbers in docs/results: nobody edits these by hand.

python scripts/docs_tables.py            rewrite them
python scripts/docs_tables.py --check    exit 1 if one is not what its numbers say
A table stands between <!-- table: KIND NAME… --> and <!-- end -->. The numbers of NAME are docs/results/NAME_accuracy.csv,
the table.csv of a comparison, and NAME_audit.csv, the audit.csv of the same folder.
"""

import re
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

import pandas as pd

from util.audit.statistics import POWER, WITHIN
from util.audit.verdict import counts
from util.cli import options
from util.cli.main import run_main
from util.report.audit_tables import NEVER_SEEN, SIGNS
from util.report.tables import PRETRAINED, PUBLISHED, rank_correlation
from util.runtime.errors import RunError
from util.runtime.files import readable, write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
KNOWN = {"*never saw them*": "never_seen", "*before*": "trained_with_them"}  # rows that all audits have, their columns
METRICS = {"enrolment_1": "re-id 1", "verification_auc": "AUC", "membership_images": "member"}


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [[*header], *map(list, rows)]
    lines.insert(1, ["---"] + ["--:"] * (len(lines[0]) - 1))
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def number(value: float, verdict: str = "", std: float = float("nan")) -> str:
    spread = "" if pd.isna(std) else f" ± {std:.1f}"
    shown = round(value, 1) + 0  # no −0.0
    return "" if pd.isna(value) else f"{shown:.1f}{spread} {SIGNS.get(verdict, '')}".strip().replace("-", "−")


def read(name: str) -> pd.DataFrame:
    with readable(RESULTS / name, "no numbers of a comparison"):
        return pd.read_csv(RESULTS / name)


def accuracies(name: str, margin: bool = False, statistic: str = "mean") -> pd.DataFrame:
    """A row per label, a column per (metric, task); std is over class orders."""
    found = read(f"{name}_accuracy.csv")
    return found[found["margin"] == margin].pivot(index="label", columns=["metric", "task"], values=statistic)


def of_fewer_orders(name: str) -> set[str]:
    """Labels that were run on fewer class orders than others."""
    runs = read(f"{name}_accuracy.csv").groupby("label")["runs"].max()
    return {label for label, count in runs.items() if count < runs.max() and not label.endswith(PUBLISHED)} - {PRETRAINED}


def _first_request(name: str) -> pd.DataFrame:
    """The rows of the first request after its task, compared with never-seen models."""
    found = read(f"{name}_audit.csv")
    first = found[["request", "after_task"]].eq(1).all(axis=1) & (found.get("compared_with", NEVER_SEEN) == NEVER_SEEN)
    found["method"] = found["method"].str.replace(r" \(.*", "", regex=True)  # which version of a method it is
    return found[first].drop_duplicates(["method", "metric", "class_order"])


def audited(name: str) -> pd.DataFrame:
    """The rows of the first request of class order 1337, by method and metric."""
    found = _first_request(name)
    return found[found["class_order"] == 1337].set_index(["method", "metric"]).sort_index()


def beside_the_papers(name: str, *tasks: str) -> str:
    """H with CosFace's margin of each task, or of these, ours and the papers'; highest mean of all tasks first. The last
    row is Spearman's correlation of the two."""
    h_mean = accuracies(name, margin=True)["h_mean"]
    ours = h_mean[~h_mean.index.str.endswith(PUBLISHED)].drop([PRETRAINED, *of_fewer_orders(name)], errors="ignore")
    ours = ours.loc[ours.mean(axis=1).sort_values(ascending=False).index, [int(task) for task in tasks] or ours.columns]
    papers = h_mean.reindex(ours.index + PUBLISHED).set_axis(ours.index)[ours.columns]
    std = accuracies(name, margin=True, statistic="std")["h_mean"].loc[ours.index, ours.columns]
    rows = []
    for label in ours.index:
        means = [number(mean, std=spread) for mean, spread in zip(ours.loc[label], std.loc[label], strict=True)]
        rows.append([label, *means, *map(number, papers.loc[label])])
    correlation = [f"{value:.2f}".replace("-", "−") for value in rank_correlation(ours, papers)["value"]]
    rows.append(["*rank correlation*", *correlation, *[""] * len(correlation)])
    heads = [f"task {task}" for task in ours.columns]
    return markdown(["H, CosFace", *heads, *(f"paper, {head}" for head in heads)], rows)


def all_metrics(name: str, least: str = "0") -> str:
    """Accuracy over all tasks and the audit of the first request, of methods with H of `least`, best first. †: of fewer
    class orders."""
    table, margin, audit = accuracies(name), accuracies(name, margin=True), audited(name)
    keys, fewer = [key for key in METRICS if key in audit.index.unique("metric")], of_fewer_orders(name)
    costs = pd.DataFrame({"H": table["h_mean"].mean(axis=1)})
    costs["Acc_r lost"] = (table.loc[PRETRAINED, "acc_remain"] - table["acc_remain"]).max(axis=1)
    costs["Acc_f"] = table["acc_forget"].max(axis=1)
    if "acc_old" in table:
        costs["Acc_o"] = table["acc_old"].max(axis=1)
    costs["H, CosFace"] = margin["h_mean"].mean(axis=1)
    known = audit.loc[audit.index[0][0]].loc[keys]
    rows = [[label, *[""] * costs.shape[1], *map(number, known[column])] for label, column in KNOWN.items()]
    for label, own in (
        costs[costs["H"] >= float(least)].sort_values("H", ascending=False).iterrows()
    ):  # the pre-trained: none
        entries = audit.loc[label].loc[keys]
        mark = " †" * (label in fewer)
        rows.append([label + mark, *map(number, own), *map(number, entries["value"], entries["verdict"])])
    return markdown(["", *costs, *(METRICS[key] for key in keys)], rows)


def overview(least: str, *names: str) -> str:
    """H, points of Acc_r lost and re-identification from one photo after the first request of several sets, of the methods
    with H of `least` on the last set; means and standard deviations of class orders, where there are several."""
    found = [_identified(name) for name in names]
    sets = [_first_task(name).join(identified) for name, (identified, _) in zip(names, found, strict=True)]
    rows = []
    for label, column in KNOWN.items():
        rows.append([label, *chain.from_iterable(["", "", number(known[column])] for _, known in found)])
    best = sets[-1].sort_values("H", ascending=False)
    for method in best.index[best["H"] >= float(least)]:
        rows.append([method])
        for one in sets:
            own = one.reindex([method]).iloc[0]
            known = f"{number(own['known'], std=own['known_std'])} {own['signs']}" if method in one.index else ""
            rows[-1] += [number(own["H"], std=own["H_std"]), number(own["lost"]), known]
    return markdown(["", *chain.from_iterable([f"{name.split('_')[0]}: H", "lost", "re-id 1"] for name in names)], rows)


def _first_task(name: str) -> pd.DataFrame:
    """By method: H, H_std, and points of Acc_r lost; of methods of fewer class orders, as their audit says."""
    mean, std = accuracies(name), accuracies(name, statistic="std")
    lost = mean.loc[PRETRAINED, ("acc_remain", 1)] - mean["acc_remain", 1]
    found = pd.DataFrame({"H": mean["h_mean", 1], "H_std": std["h_mean", 1], "lost": lost}).drop(PRETRAINED)
    found = found[~found.index.str.endswith(PUBLISHED)]
    fewer, audit = [*of_fewer_orders(name)], audited(name)["value"]
    found.loc[fewer, "lost"] = audit.xs("acc_remain_lost", level="metric")[fewer]
    return found


def _identified(name: str) -> tuple[pd.DataFrame, pd.Series]:
    """Re-identification from one photo after the first request, over class orders: by method {"known", "known_std", "signs"
    (of its verdicts, one where all agree)}, and the columns of KNOWN."""
    found = _first_request(name)
    found = found[found["metric"] == "enrolment_1"].sort_values("class_order")
    rows = found.groupby("method")
    signs = rows["verdict"].agg(lambda verdicts: "".join(dict.fromkeys(SIGNS[verdict] for verdict in verdicts)))
    by_method = pd.DataFrame({"known": rows["value"].mean(), "known_std": rows["value"].std(), "signs": signs})
    return by_method, found.drop_duplicates("class_order")[[*KNOWN.values()]].mean()


def by_request(name: str) -> str:
    """Of each request after its task, and of earlier ones after the last: re-identification from one photo, and how many
    metrics with power are within the margin."""
    found = read(f"{name}_audit.csv").dropna(subset="verdict")
    found = found.set_index(["method", "after_task", "request"])
    counted = found[[counts(row.metric, {"verdict": row.verdict}) for row in found.itertuples()]]
    within = counted["verdict"].eq(WITHIN).groupby(counted.index.names).sum()
    powerful = counted["power"].ge(POWER).groupby(counted.index.names).sum()
    shown = found[found["metric"] == "enrolment_1"]
    moments = sorted({moment[1:] for moment in shown.index}, key=lambda moment: (moment[0] != moment[1], moment[1]))
    known = shown.loc[shown.index[0][0]]
    rows = [[label, *(number(known.loc[moment, column]) for moment in moments)] for label, column in KNOWN.items()]
    for method in shown.index.unique("method"):
        own = [(method, *moment) for moment in moments]
        cells = [f"{number(*shown.loc[key, ['value', 'verdict']])}, {within[key]} of {powerful[key]}" for key in own]
        rows.append([method, *cells])
    heads = [f"request {number}" + f", after {after}" * (after != number) for after, number in moments]
    return markdown(["", *heads], rows)


def one_by_one(*names: str) -> str:
    """People deleted one at a time, whose rows of audit.csv stand below one another: means over people, and the verdicts."""
    heads, columns = [], []
    for name in names:
        found = read(f"{name}_audit.csv")
        known, rows = found[found["metric"] == "enrolment_1"], found.groupby(["metric", "method"], sort=False)
        values = rows["value"].mean()
        shown = {label: known[column].mean() for label, column in KNOWN.items()} | dict(values["enrolment_1"])
        said = rows["verdict"].agg(lambda verdicts: ", ".join(f"{n} {v}" for v, n in verdicts.value_counts().items()))
        heads += [f"{name.split('_')[0]}: re-id 1", "Acc_r lost", "verdict"]
        columns += [pd.Series(shown).map(number), values["acc_remain_lost"].map(number), said["request"]]
    table = pd.concat(columns, axis=1).fillna("")
    return markdown(["", *heads], ([label, *row] for label, *row in table.itertuples()))


KINDS = {"papers": beside_the_papers, "all": all_metrics, "overview": overview, "requests": by_request, "people": one_by_one}


def _table(block: re.Match) -> str:
    kind, *names = block[2].split()
    return block[1] + KINDS[kind](*names) + block[3]


def written(text: str) -> str:
    """A page with its tables made anew."""
    return BLOCK.sub(_table, text)


def main(argv: list[str]) -> None:
    parser = options.Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, and exit 1 where a table would change")
    args = parser.parse_args(argv)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        page, now = path.read_text(), written(path.read_text())
        if page == now:
            continue
        if args.check:
            raise RunError(f"{path.relative_to(ROOT)}: a table is not what docs/results says: run scripts/docs_tables.py")
        write_text(path, now)
        print(f"{path.relative_to(ROOT)} is new")


if __name__ == "__main__":
    run_main(main)
