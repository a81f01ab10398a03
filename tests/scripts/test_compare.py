"""scripts/compare.py and table.py through their command lines, on small images."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from methods import METHODS
from tests.conftest import ROOT, results_of
from util.storage.folders import RunFolder


@pytest.fixture
def extra_args(trained, colours):
    """What goes to train_forget.py: two tasks of one epoch."""
    shared = ("--checkpoint", trained, "--data", colours, "--num-tasks", 2, "--forget-per-task", 2)
    return ("--", *shared, "--epochs", 1, "--batch-size", 24, "--data-ratio", 1)


def rows_of(path: Path, table: int = 0) -> list[list[str]]:
    """The cells of a table.md: 0 without margin, 1 with margin."""
    lines = path.read_text().split("\n\n")[1 + 2 * table].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])]


def printed(out: str) -> list[str]:
    """The lines of the narrow table, without the two that head it."""
    lines = out.split("\n\n")[-2].splitlines()
    assert max(map(len, lines[1:])) <= 100
    return lines[2:]


def test_the_methods_end_in_one_table(here, command, extra_args, tmp_path):
    names = ["l2", "ssd", "gs_lora"]
    code, out, err = command("scripts/compare.py", "--methods", *names, "--output-dir", tmp_path, *extra_args)
    assert code == 0, err
    titles = [METHODS[name].title for name in names]
    lines = {line[: len(title)]: line for line in printed(out) for title in ("Pre-train", *titles) if line.startswith(title)}
    assert lines.keys() == {"Pre-train", *titles}
    for table in range(2):
        assert [row[0] for row in rows_of(tmp_path / "table.md", table)[1:]] == ["Pre-train", *titles]
    header, _, *rows = rows_of(tmp_path / "table.md")
    assert header[2:] == ["10-2 H ↑", "Acc_r ↑", "Acc_f ↓", "8-2 H ↑", "Acc_r ↑", "Acc_f ↓", "Acc_o ↓", "s"]
    for row, name in zip(rows, names, strict=True):
        results = results_of(tmp_path / f"{name}-seed1337")
        h_means = [f"{task['after']['h_mean']:.2f}" for task in results["tasks"]]
        assert lines[METHODS[name].title].removeprefix(METHODS[name].title).split()[:2] == h_means
        assert row[1] == f"{100 * results['model']['tunable_ratio']:.2f}%"
        assert row[2].strip("*") == h_means[0]
        assert row[8].strip("*") == f"{results['tasks'][1]['after']['acc_old']:.2f}"
    assert set(pd.read_csv(tmp_path / "table.csv")["label"]) == {"Pre-train", *titles}
    assert r"\begin{tabular}" in (tmp_path / "table.tex").read_text()
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_seeds_are_averaged_and_finished_runs_not_repeated(here, command, extra_args, trained, tmp_path):
    own, runs = tmp_path / "own.pth", tmp_path / "runs"
    own.write_bytes(trained.read_bytes())
    extra_args = [own if word == trained else word for word in extra_args]
    arguments = ("scripts/compare.py", "--methods", "l2", "gs_lora", "--output-dir", runs)
    code, out, err = command(*arguments, "--seeds", 1337, 1, *extra_args)
    assert code == 0, err
    assert "4 runs, 0 of them finished before" in out
    for seed in (1337, 1):
        assert f"L2*, seed {seed} " in out and f"GS-LoRA, seed {seed} " in out
    assert [line.split()[0] for line in printed(out)] == ["Pre-train", "L2*", "GS-LoRA"]
    rows = rows_of(runs / "table.md")
    assert all("±" in cell for cell in rows[2][2:-1])

    first = (runs / "l2-seed1" / "results.json").read_text()
    code, again, err = command(*arguments, "--seeds", 1337, 1, *extra_args)
    assert code == 0, err
    assert "4 of them finished before" in again
    assert rows_of(runs / "table.md") == rows
    assert (runs / "l2-seed1" / "results.json").read_text() == first
    any_results_merge_into_a_table(command, sorted(runs.glob("*/results.json")), rows, tmp_path / "table")

    code, _, err = command(*arguments, *extra_args, "--epochs", 2)
    assert code == 2
    assert "holds a run with other options: --epochs 1, now 2; use --overwrite" in err
    code, out, err = command(*arguments, "--methods", "l2", "--overwrite", *extra_args, "--epochs", 2)
    assert code == 0, err
    assert json.loads((runs / "l2-seed1337" / "config.json").read_text())["arguments"]["epochs"] == 2

    none = tmp_path / "none"
    code, _, err = command(*arguments[:-1], none, "--published", *extra_args)
    assert code == 2
    assert "cannot be compared" in err
    assert not [*none.glob("*/results.json")]  # nothing ran before it was found

    checkpoint = torch.load(own, weights_only=True)
    checkpoint["info"] = {}
    torch.save(checkpoint, own)
    code, _, err = command(*arguments, *extra_args, "--epochs", 2)
    assert code == 2
    assert "holds a run with other options: --checkpoint" in err


def any_results_merge_into_a_table(command, files, rows, output):
    """scripts/table.py on two seeds of two methods, whose table has these rows."""
    table = ("scripts/table.py", "--output-dir", output, "--results")
    code, out, err = command(*table, *files)
    assert code == 0, err
    assert [line.split()[0] for line in printed(out)] == ["Pre-train", "L2*", "GS-LoRA"]
    assert rows_of(output / "table.md") == rows
    code, out, err = command(*table, *files, "--labels", "a", "b", "c", "d", "--sweep", "letter")
    assert [line.split()[0] for line in printed(out)] == ["Pre-train", "a", "b", "c", "d"]
    assert rows_of(output / "table.md")[0][:2] == ["letter", "Tunable"]
    for words, message in (
        ((files[0], files[0]), "is there more than once"),
        ((*files, "--published"), "the published tables are of casia_100 with 100 classes"),
        ((*files, "--labels", "a"), "1 labels for 4 results"),
        ((output / "absent.json",), "no file"),
    ):
        code, _, err = command(*table, *words)
        assert code == 2
        assert message in err


def test_an_interrupted_run_is_continued(here, command, extra_args, tmp_path, monkeypatch):
    from util.training import continual

    keep = continual.ContinualRun._after_epoch

    def cut(self, trainer):
        keep(self, trainer)
        if trainer.task.number == 2:
            raise KeyboardInterrupt

    words = ["--method", "l2", *extra_args[1:], "--seed", 1337, "--output-dir", tmp_path / "cut" / "l2-seed1337"]
    monkeypatch.setattr(continual.ContinualRun, "_after_epoch", cut)
    assert command("train_forget.py", *words)[0] == 130
    monkeypatch.undo()
    arguments = ("scripts/compare.py", "--methods", "l2", "--output-dir")
    for folder in ("cut", "whole"):
        code, _, err = command(*arguments, tmp_path / folder, *extra_args)
        assert code == 0, err
    whole, resumed = (results_of(tmp_path / folder / "l2-seed1337")["tasks"] for folder in ("whole", "cut"))
    assert [task["after"] for task in whole] == [task["after"] for task in resumed]
    assert "task 1/2" not in (tmp_path / "cut" / "l2-seed1337" / "log.txt").read_text()


def test_a_method_that_fails_does_not_stop_the_others(command, extra_args, tmp_path):
    """Each in a process of its own, which sees no such device and uses the CPU."""
    methods = ("--methods", "der", "l2", "--gpus", "0", "1", "--options", "der", " --lr 1e30")
    code, out, err = command("scripts/compare.py", *methods, "--output-dir", tmp_path, *extra_args)
    assert code == 1
    assert "1 of 2 runs failed" in err
    assert "DER       failed: DER task 1/2 10-2: the loss is not finite: part" in out
    assert [row[:2] for row in rows_of(tmp_path / "table.md")[3:]] == [["DER", "failed"]]
    assert len(results_of(tmp_path / "l2-seed1337")["tasks"]) == 2


def test_wrong_requests_end_before_anything_runs(command, extra_args, tmp_path):
    for options, message in (
        (("--methods", "l3"), "unknown method 'l3'"),
        (("--jobs-per-gpu", 0), "--jobs-per-gpu: 0 is out of range"),
        (("--methods", "l2", "--options", "l3", "--lr 1"), "unknown method 'l3'"),
        (("--methods", "l2", "--options", "l2", "--lambda -1"), "--lambda: -1 is out of range"),
    ):
        code, out, err = command("scripts/compare.py", *options, "--output-dir", tmp_path, *extra_args)
        assert code == 2
        assert message in err
        assert not out
        assert not [*tmp_path.iterdir()]


def test_sigterm_ends_all_runs_saved(command, extra_args, tmp_path):
    """The runs at hand save and end, none is started after them."""
    words = [
        "--methods",
        "l2",
        "gs_lora",
        "ewc",
        "--jobs-per-gpu",
        2,
        "--output-dir",
        tmp_path,
        *extra_args,
        "--epochs",
        3000,
    ]
    process = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "compare.py", *map(str, words)], stderr=subprocess.PIPE, text=True
    )
    started = ["gs_lora", "l2"]  # GS-LoRA goes first
    end = time.monotonic() + 300
    while not all((tmp_path / f"{name}-seed1337" / "checkpoints" / "last.pth").exists() for name in started):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert not (tmp_path / "ewc-seed1337").exists()
    for name in started:
        with RunFolder(tmp_path / f"{name}-seed1337").locked():  # nobody holds it any more
            pass
