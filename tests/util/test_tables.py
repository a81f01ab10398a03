from util.tables import markdown_table, paper_tables, sweep_table


def task(number: int, **after) -> dict:
    keys = ("h_mean", "acc_remain", "acc_forget", "acc_old", "acc_missing")
    values = {f"{m}{key}": after.get(key) for m in ("", "margin_") for key in keys}
    before = {f"{m}acc_{group}": 90.0 for m in ("", "margin_") for group in ("remain", "forget")}
    costs = {"groups": {"norms": {}, "zero_ratio": 0.5}, "train_seconds": 61.4}
    return {"task": number, "setting": f"{10 - number}-1", "before": before, "after": values, **costs}


def run(*tasks: dict) -> dict:
    return {"method": "gs_lora", "model": {"tunable_ratio": 0.01283}, "tasks": list(tasks)}


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]


def test_columns_line_up_as_text():
    table = markdown_table(["name", "x"], [["a", "1"], ["longer", "1000"]])
    assert len({len(line) for line in table.splitlines()}) == 1


def test_the_papers_layout():
    first = task(1, h_mean=80.0, acc_remain=85.123, acc_forget=0.0)
    second = task(2, h_mean=81.0, acc_remain=86.0, acc_forget=1.0, acc_old=2.0)
    header, _, before, row = cells(paper_tables([run(first, second)], ["GS-LoRA"]).split("\n\n")[1])
    assert header[2:] == ["9-1 H ↑", "Acc_r ↑", "Acc_f ↓", "8-1 H ↑", "Acc_r ↑", "Acc_f ↓", "Acc_o ↓"]
    assert before[2:] == ["–", "90.00", "90.00", "–", "90.00", "90.00", "–"]
    assert row == ["GS-LoRA", "1.28%", "80.00", "85.12", "0.00", "81.00", "86.00", "1.00", "2.00"]


def test_missing_classes_get_a_column_and_unfinished_runs_dots():
    whole = run(task(1, h_mean=1.0, acc_remain=2.0, acc_forget=3.0, acc_missing=4.0), task(2, h_mean=5.0))
    header, _, _, first, second = cells(paper_tables([whole, run(whole["tasks"][0])]).split("\n\n")[1])
    assert header[5] == "Acc_m ↑"
    assert first[5] == "4.00"
    assert second[6:] == ["…"] * (len(header) - 6)


def test_a_sweeps_table_has_a_row_per_run():
    runs = [run(task(1, h_mean=70.0, acc_remain=80.0, acc_forget=0.5)), run(task(1, h_mean=75.0))]
    header, _, before, first, second = cells(sweep_table("rank", ["4", "8"], runs))
    assert (header[0], before[0], first[0], second[0]) == ("rank", "Pre-train", "4", "8")
    assert first[1:4] == ["70.00", "80.00", "0.50"]
    assert first[7:] == ["50%", "1.28%", "61"]
