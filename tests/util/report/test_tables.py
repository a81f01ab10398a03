import io
import json

import numpy as np
import pandas as pd
import pytest

from util.report.tables import PAPER_TABLES, Comparison
from util.runtime.errors import UsageError

KEYS = ("h_mean", "acc_remain", "acc_forget", "acc_old", "acc_missing")


def task(number: int, **after) -> dict:
    values = {f"{m}{key}": after.get(key) for m in ("", "margin_") for key in KEYS}
    before = {f"{m}acc_{group}": 90.0 for m in ("", "margin_") for group in ("remain", "forget")}
    images = {"forget_classes": [9], "missing_classes": [], "train_images": {"forget": 7, "remain": 70}}
    costs = {"groups": {"norms": {}, "zero_ratio": 0.5}, "train_seconds": 61.4}
    return {"task": number, "setting": f"{10 - number}-1", "before": before, "after": values, **images, **costs}


def run(*tasks: dict, method: str = "gs_lora", seed: int = 1337, classes: int = 10) -> dict:
    dataset = {"name": "faces", "classes": classes, "train_images": 100, "test_images": 20}
    return {"method": method, "seed": seed, "dataset": dataset, "model": {"tunable_ratio": 0.01283}, "tasks": list(tasks)}


def single(h_mean: float, acc_forget: float = 0.0, **options) -> dict:
    return run(task(1, h_mean=h_mean, acc_remain=80.0, acc_forget=acc_forget), **options)


def cells(table: str) -> list[list[str]]:
    """The first table's cells, without the rule under the header."""
    lines = [line for line in table.split("\n\n")[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])]


def test_the_papers_layout():
    first = task(1, h_mean=80.0, acc_remain=85.123, acc_forget=0.0)
    second = task(2, h_mean=81.0, acc_remain=86.0, acc_forget=1.0, acc_old=2.0)
    header, before, row = cells(Comparison([run(first, second)], ["GS-LoRA"]).markdown())
    assert header[2:] == ["9-1 H ↑", "Acc_r ↑", "Acc_f ↓", "8-1 H ↑", "Acc_r ↑", "Acc_f ↓", "Acc_o ↓", "s"]
    assert before[2:] == ["–", "90.00", "90.00", "–", "90.00", "90.00", "–", "–"]
    assert row == ["GS-LoRA", "1.28%", "80.00", "85.12", "0.00", "81.00", "86.00", "1.00", "2.00", "123"]


def test_missing_classes_get_a_column_and_unfinished_runs_dots():
    whole = run(task(1, h_mean=1.0, acc_remain=2.0, acc_forget=3.0, acc_missing=4.0), task(2, h_mean=5.0))
    header, _, first, second = cells(Comparison([whole, run(whole["tasks"][0])], ["whole", "part"]).markdown())
    assert header[5] == "Acc_m ↑"
    assert first[5].strip("*") == second[5].strip("*") == "4.00"
    assert second[6:-1] == ["…"] * (len(header) - 7)
    assert second[-1] == "–"


def test_the_best_is_bold_and_the_second_best_in_italics():
    found = {"l2": (70.0, 3.0), "ewc": (90.0, 0.0), "mas": (80.0, 0.0), "lwf": (80.0, 1.0)}
    runs = [single(*values, method=name) for name, values in found.items()]
    _, _, *rows = cells(Comparison(runs, ["a", "b", "c", "d"]).markdown())
    assert [row[2] for row in rows] == ["70.00", "**90.00**", "*80.00*", "*80.00*"]
    # Two share the first place: the next is the third.
    assert [row[4] for row in rows] == ["3.00", "**0.00**", "**0.00**", "1.00"]


def test_runs_of_one_label_become_mean_and_sample_deviation():
    values = [70.0, 80.0, 85.5]
    runs = [single(value, seed=seed) for seed, value in enumerate(values)]
    comparison = Comparison(runs, ["GS-LoRA"] * 3)
    _, _, row = cells(comparison.markdown())
    assert row[2] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    table = pd.read_csv(io.StringIO(comparison.csv()))
    (line,) = table.query("label == 'GS-LoRA' and not margin and metric == 'h_mean'").to_dict("records")
    assert line["mean"] == pytest.approx(np.mean(values), abs=1e-4)
    assert line["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-4)
    assert (line["runs"], line["task"], line["setting"]) == (3, 1, "9-1")


def test_a_failed_method_keeps_its_row_and_says_why():
    comparison = Comparison([single(70.0)], ["GS-LoRA"], failures={"EWC*": "the loss is not finite"})
    text = comparison.markdown()
    assert cells(text)[-1][:3] == ["EWC*", "failed", "–"]
    assert "EWC*: failed: the loss is not finite" in text
    assert comparison.narrow()[-1] == "EWC*      failed: the loss is not finite"


def test_latex_escapes_and_marks():
    text = Comparison([single(70.0), single(80.5, method="ewc")], ["GS_LoRA", "EWC*"]).latex()
    assert r"\multicolumn{3}{c}{9-1}" in text
    assert r"GS\_LoRA & 1.28\% & \underline{70.00} & \textbf{80.00}" in text
    assert r"EWC* & 1.28\% & \textbf{80.50}" in text
    assert text.count(r"\begin{tabular}") == 2
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in rows if "multicolumn" not in line} == {5}


def test_runs_of_other_data_or_tasks_are_not_compared():
    with pytest.raises(UsageError, match="not of the same data and tasks"):
        Comparison([single(70.0), single(70.0, classes=11)], ["a", "b"])
    other = single(70.0)
    other["tasks"][0]["setting"] = "9-3"
    with pytest.raises(UsageError, match="9-3"):
        Comparison([single(70.0), other], ["a", "b"])


def casia(name: str = "casia100") -> dict:
    tasks = [task(1, h_mean=70.0, acc_remain=80.0, acc_forget=1.0), task(2, h_mean=71.0, acc_old=3.0)]
    tasks[0]["setting"], tasks[1]["setting"] = "100-20", "80-20"
    whole = run(*tasks, classes=100)
    whole["dataset"]["name"] = name
    return whole


def missing(count: int) -> dict:
    whole = casia()
    whole["tasks"][0]["missing_classes"] = [*range(count)]
    return whole


def test_published_rows_stand_beside_ours_by_the_margin_alone():
    without, margin = Comparison([casia()], ["GS-LoRA"], published="casia_100").markdown().split("with margin")
    assert "(published)" not in without
    (line,) = (line for line in margin.splitlines() if "GS-LoRA (published)" in line)
    row = [cell.strip() for cell in line.split("|")[1:-1]]
    # Table 2 of arXiv 2501.09705.
    assert row[1:] == ["1.28%", "74.40", "74.16", "0.00", "73.59", "73.37", "0.00", "0.05", "–"]


def test_ranks_are_compared_with_those_of_the_papers_rows():
    from scipy.stats import spearmanr

    papers = json.loads(PAPER_TABLES.read_text())["continual"]["methods"]
    ours = {"l2": 60.0, "ewc": 75.0, "scrub": 50.0, "gs_lora": 70.0, "unseen": 99.0}  # no paper has the last one

    def of(method: str, h_mean: float) -> dict:
        whole = casia()
        whole["tasks"][0]["after"]["margin_h_mean"] = h_mean
        return {**whole, "method": method}

    runs = [of(*one) for one in ours.items()]
    expected = spearmanr([*ours.values()][:4], [papers[name][0]["h_mean"] for name in [*ours][:4]]).statistic
    comparison = Comparison(runs, published="casia_100")
    for text in (comparison.markdown(), comparison.narrow("margin_")[-1]):
        assert f"100-20 {expected:.2f} of 4 methods" in text
    assert "rank correlation" not in Comparison(runs[:2], published="casia_100").markdown()
    assert "rank correlation" not in Comparison(runs).markdown()


def test_published_rows_of_missing_classes_are_those_of_table_5():
    _, margin = Comparison([missing(5)], ["GS-LoRA"], published="casia_100").markdown().split("with margin")
    (line,) = (line for line in margin.splitlines() if "GS-LoRA (published)" in line)
    assert [cell.strip() for cell in line.split("|")[2:7]] == ["1.28%", "72.13", "70.05", "0.10", "63.09"]


def test_published_rows_of_imagenet_stand_in_the_table_without_margin():
    comparison = Comparison([casia("imagenet100")], ["GS-LoRA"], published="imagenet_100")
    without, margin = comparison.markdown().split("with margin")
    assert "(published)" not in margin
    (line,) = (line for line in without.splitlines() if "GS-LoRA (published)" in line)
    # Table 4 of arXiv 2501.09705.
    assert [cell.strip() for cell in line.split("|")[2:7]] == ["–", "86.13", "85.00", "0.10", "87.33"]
    assert any("GS-LoRA (published)" in line for line in comparison.narrow(comparison.papers_margin))


@pytest.mark.parametrize(
    ("runs", "published"),
    [
        (casia("synthetic_faces"), "casia_100"),
        (single(70.0), "casia_100"),
        (missing(4), "casia_100"),
        (missing(5), "imagenet_100"),
    ],
)
def test_published_rows_need_their_setting(runs, published):
    with pytest.raises(UsageError, match="cannot be compared"):
        Comparison([runs], ["GS-LoRA"], published=published)


def test_a_sweeps_table_has_a_row_per_value():
    runs = [run(task(1, h_mean=70.0, acc_remain=80.0, acc_forget=0.5)), run(task(1, h_mean=75.0))]
    header, before, first, second = cells(Comparison(runs, ["4", "8"], sweep="rank").markdown())
    assert (header[0], before[0], first[0], second[0]) == ("rank", "Pre-train", "4", "8")
    assert header[-2:] == ["zero groups", "s"]
    assert first[1:] == ["1.28%", "*70.00*", "80.00", "0.50", "50%", "61"]


def test_the_narrow_table_fits_100_columns():
    tasks = [task(n, h_mean=100.0, acc_remain=100.0, acc_forget=0.0, acc_old=0.0, acc_missing=50.0) for n in range(4)]
    for number, one in enumerate(tasks):
        one["setting"] = f"{100 - 20 * number}-20"
    title, header, before, row = Comparison([run(*tasks)], ["GS-LoRA++, seed 1337"]).narrow()
    assert "without margin" in title
    words = "Method H 100-20 H 80-20 H 60-20 H 40-20 Acc_r ↑ Acc_f ↓ Acc_o ↓ Acc_m ↑ s"
    assert header.split() == words.split()
    assert before.split() == ["Pre-train", *"––––", "90.00", "90.00", "–", "–", "–"]
    assert row.split() == ["GS-LoRA++,", "seed", "1337", *["100.00"] * 5, "0.00", "0.00", "50.00", "246"]
    assert {len(line) for line in (header, before, row)} == {len(header)}
    assert len(header) <= 100
