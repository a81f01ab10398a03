"""The page of a comparison: what it says, and that its labels can be read."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from util.report import comparison_page
from util.report.comparison_page import write_comparison
from util.report.figures import forgetting_scatter


def audited(label: str, seed: int, lost: float, known: float | None, references: list[float]) -> tuple:
    task = {"task": 1, "before": {"acc_remain": 90.0}, "after": {"acc_remain": 90 - lost, "h_mean": 80 + seed}}
    figure = {"value": known, "references": references, "originals": [70.0, 1.0]}
    figure |= {"p": 0.002, "rho": 0.5, "power": 9.0, "verdict": "still known"}
    request = {"task": 1, "after_task": 1, "verdict": "still known", "figures": {"enrolment_1": figure}, "forget": ["ann"]}
    request["tally"] = {"within": 1, "with_power": 3, "significantly_off": 0}
    return (
        label,
        {"seed": seed, "tasks": [task]},
        {"requests": [request], "date": "", "git_commit": ""},
        f"{label}/audit/audit.html",
    )


def test_the_page_names_each_run_and_leads_to_its_audit(tmp_path):
    runs = [audited("L2", 1, 1.0, 55.5, [10.0, 14.0]), audited("A<B", 1, -2.0, 12.25, [10.0, 14.0])]
    page = write_comparison(runs, tmp_path, "a title")
    text = page.read_text()
    assert '<a href="L2/audit/audit.html">L2</a>' in text and "A&lt;B" in text
    assert '<td class="n">55.5</td>' in text and '<td class="n">-2.0</td>' in text
    assert "Never seen" in text and '<td class="n">12.0</td>' in text and '<td class="n">70.0</td>' in text
    assert "class order" not in text
    assert (tmp_path / "scatter.png").stat().st_size > 1000


def test_strangers_are_of_all_methods_and_named_so(tmp_path):
    runs = [audited("L2", 1, 1.0, 55.5, [10.0, 14.0]), audited("EWC", 1, 1.0, 12.25, [20.0, 24.0])]
    for run in runs:
        run[2]["requests"][0]["strangers"] = {"people": 30}
    text = write_comparison(runs, tmp_path, "a title").read_text()
    assert "Strangers, mean over the methods" in text and '<td class="n">17.0</td>' in text


def test_class_orders_are_one_dot_and_a_row_each(tmp_path):
    runs = [audited("L2", seed, seed, 50.0, [10.0, 14.0]) for seed in (1, 2)]
    text = write_comparison(runs, tmp_path, "a title").read_text()
    assert "class order" in text and text.count("<td><a") == 2
    assert text[: text.index("</svg>")].count(">L2<") == 1


def test_the_chart_is_of_one_comparison_where_there_are_two(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        comparison_page, "forgetting_scatter", lambda *words: drawn.append(words) or forgetting_scatter(*words)
    )
    run = audited("L2", 1, 1.0, 36.0, [10.0, 12.0])
    beside = audited("L2", 1, 1.0, 56.0, [30.0, 30.0])[2]["requests"][0] | {"strangers": {"people": 30}}
    run[2]["requests"].append(beside)
    write_comparison([run], tmp_path, "a title")
    models, band, *_ = drawn[0]
    assert models["known"].tolist() == [36.0]
    assert band == pytest.approx([11 - 2**0.5, 11 + 2**0.5])


def test_no_page_where_nobody_could_be_enrolled(tmp_path):
    assert write_comparison([audited("L2", 1, 1.0, None, [])], tmp_path, "a title") is None
    assert [path.name for path in tmp_path.iterdir()] == ["audit.csv"]


@pytest.mark.parametrize("seed", range(3))
def test_labels_of_nineteen_methods_cover_no_dot_and_no_label(seed):
    generator = np.random.default_rng(seed)
    places = np.column_stack([generator.normal(0, 3, 19), generator.uniform(10, 50, 19)])
    models = pd.DataFrame(places, [f"Method {i}" for i in range(19)], ["lost", "known"])
    figure = forgetting_scatter(models, [9.0, 15.0], 60.0, "a title")
    panel = figure.axes[0]
    boxes = [text.get_window_extent() for text in panel.texts if text.get_text()]
    assert len(boxes) == 19 + 2  # the band's and the line's
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    dots = panel.transData.transform(places)
    assert not any(box.contains(x, y) for box in boxes for x, y in dots)
    low, high = panel.patches[0].get_window_extent().get_points()[:, 1]
    band = panel.transData.inverted().transform([(0, low), (0, high)])[:, 1]
    np.testing.assert_allclose(band, [9.0, 15.0], atol=1e-6)


def test_the_scatter_is_drawn_from_rows_alone(tmp_path, command):
    runs = [audited("L2", 1337, 1.0, 55.5, [10.0, 14.0]), audited("DER", 1337, -2.0, 12.25, [10.0, 14.0])]
    write_comparison(runs, tmp_path, "a title")
    drawn = tmp_path / "again.png"
    code, _, err = command("scripts/scatter.py", tmp_path / "audit.csv", drawn)
    assert code == 0, err
    assert drawn.read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    code, _, err = command("scripts/scatter.py", tmp_path / "other.csv", drawn)
    assert code == 1 and "no rows of an audit" in err
