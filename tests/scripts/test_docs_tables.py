"""The tables of the docs are what docs/results says."""

import pandas as pd
import pytest
from scipy.stats import spearmanr

from scripts import docs_tables


def test_no_table_was_edited_by_hand(command):
    code, _, err = command("scripts/docs_tables.py", "--check")
    assert (code, err) == (0, "")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Two tasks of three methods, two of which the papers have as well."""
    monkeypatch.setattr(docs_tables, "RESULTS", tmp_path)
    found = {"Pre-train": {}, "A": {"h_mean": (50, 40)}, "B": {"h_mean": (70, 80)}, "C": {"h_mean": (60, 66)}}
    found |= {"D": {"h_mean": (99, 99)}}  # of one class order, where others have three
    found |= {
        "A (published)": {"h_mean": (72, 71)},
        "B (published)": {"h_mean": (70, 73)},
        "C (published)": {"h_mean": (65, 66)},
    }
    rows = []
    for label, metrics in found.items():
        for metric, values in {"acc_remain": (90, 80), **metrics}.items():
            for task, value in enumerate(values, start=1):
                value -= 5 * (metric == "acc_remain" and label == "A")
                row = {
                    "label": label,
                    "runs": 3 - 2 * (label == "D"),
                    "task": task,
                    "metric": metric,
                    "mean": value,
                    "std": 1.25 if label == "B" else None,
                }
                rows += [row | {"margin": margin} for margin in (True, False)]
    pd.DataFrame(rows).to_csv(tmp_path / "faces_accuracy.csv", index=False)


def test_methods_stand_beside_the_papers_best_first_with_the_correlation_of_ranks(results):
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in docs_tables.written("<!-- table: papers faces -->\nold\n<!-- end -->\n").splitlines()
        if line.startswith("|")
    ]
    assert [line[0] for line in lines] == ["H, CosFace", "---", "B", "C", "A", "*rank correlation*"]
    assert lines[2][1:] == ["70.0 ± 1.2", "80.0 ± 1.2", "70.0", "73.0"]  # B has several class orders
    assert lines[3][1:] == ["60.0", "66.0", "65.0", "66.0"]
    expected = [spearmanr([50, 70, 60], [72, 70, 65]).statistic, spearmanr([40, 80, 66], [71, 73, 66]).statistic]
    assert [float(cell.replace("−", "-")) for cell in lines[-1][1:3]] == pytest.approx(expected, abs=0.005)
    last_task = docs_tables.written("<!-- table: papers faces 2 -->\n<!-- end -->").splitlines()
    assert "| B | 80.0 ± 1.2 | 73.0 |" in last_task and "task 1" not in last_task[1]


def test_a_changed_page_is_found(results, tmp_path, monkeypatch, command):
    monkeypatch.setattr(docs_tables, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table: papers faces -->\n| edited |\n<!-- end -->\nafter\n")
    with pytest.raises(docs_tables.RunError, match=r"README\.md"):
        docs_tables.main(["--check"])
    docs_tables.main([])
    assert "edited" not in page.read_text()
    assert page.read_text().startswith("before\n<!-- table: papers faces -->\n| H, CosFace")
    docs_tables.main(["--check"])


def test_requests_stand_in_their_order_and_what_is_no_evidence_is_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(docs_tables, "RESULTS", tmp_path)
    verdicts = {"enrolment_1": "still known", "readout": "within the margin", "sign_flip": "within the margin"}
    rows = []
    for request, after in ((1, 1), (1, 2), (2, 2)):
        for metric, verdict in verdicts.items():
            about = {"method": "A", "request": request, "after_task": after, "metric": metric, "verdict": verdict}
            numbers = {"value": 10 * request + after, "never_seen": request, "trained_with_them": 90 + after, "power": 4}
            rows.append(about | numbers)
    pd.DataFrame([*rows, rows[0] | {"metric": "h_mean", "verdict": None}]).to_csv(tmp_path / "faces_audit.csv", index=False)
    table = docs_tables.written("<!-- table: requests faces -->\n<!-- end -->\n").splitlines()
    assert table[1] == "| | request 1 | request 2 | request 1, after 2 |"
    assert table[3:6] == [
        "| *never saw them* | 1.0 | 2.0 | 1.0 |",
        "| *before* | 91.0 | 92.0 | 92.0 |",
        "| A | 11.0 ▲, 1 of 2 | 22.0 ▲, 1 of 2 | 12.0 ▲, 1 of 2 |",
    ]


def test_people_deleted_one_at_a_time_are_averaged_and_their_verdicts_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(docs_tables, "RESULTS", tmp_path)
    rows = []
    for method, values, verdicts in (
        ("A", (40.0, 50.0), ("still known", "still known")),
        ("B", (10.0, 20.0), ("not enough", "fine")),
    ):
        for value, verdict in zip(values, verdicts, strict=True):
            rows.append(
                {"method": method, "metric": "enrolment_1", "value": value, "never_seen": 12, "trained_with_them": 60}
            )
            rows.append({"method": method, "metric": "acc_remain_lost", "value": value / 10})
            rows.append({"method": method, "metric": "request", "verdict": verdict})
    pd.DataFrame(rows).to_csv(tmp_path / "faces_one_audit.csv", index=False)
    table = docs_tables.written("<!-- table: people faces_one -->\n<!-- end -->\n").splitlines()
    assert table[1] == "| | faces: re-id 1 | Acc_r lost | verdict |"
    assert table[3:7] == [
        "| *never saw them* | 12.0 | | |",
        "| *before* | 60.0 | | |",
        "| A | 45.0 | 4.5 | 2 still known |",
        "| B | 15.0 | 1.5 | 1 not enough, 1 fine |",
    ]


def test_the_overview_averages_class_orders_and_takes_those_of_one_as_they_are(results, tmp_path):
    rows = []
    for order, (known, verdict) in {1337: (20, "still known"), 1: (30, "still known"), 2: (46, "inconclusive")}.items():
        about = {"class_order": order, "request": 1, "after_task": 1, "never_seen": order / 10, "trained_with_them": 90}
        for method, more in (("B", 0), ("C", 1), ("D", 2))[: 3 if order == 1337 else 2]:
            shown = {"metric": "enrolment_1", "value": known + more, "verdict": verdict if method == "B" else "still known"}
            rows += [about | {"method": method} | shown]
            rows += [about | {"method": method, "metric": "acc_remain_lost", "value": 7.5, "verdict": None}]
    pd.DataFrame(rows).to_csv(tmp_path / "faces_audit.csv", index=False)
    lines = docs_tables.written("<!-- table: overview 65 faces -->\n<!-- end -->").splitlines()
    assert lines[1:] == [
        "| | faces: H | lost | re-id 1 |",
        "| --- | --: | --: | --: |",
        "| *never saw them* | | | 44.7 |",  # of three class orders, whatever their numbers of methods
        "| *before* | | | 90.0 |",
        "| D | 99.0 | 7.5 | 22.0 ▲ |",  # of one class order
        "| B | 70.0 ± 1.2 | 0.0 | 32.0 ± 13.1 ▲? |",
        "<!-- end -->",
    ]
