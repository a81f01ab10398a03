"""Verification benchmarks and .rec training sets through the command lines."""

import io
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import SMALL, results_of
from tests.test_bad_input import refused
from tests.test_command_lines import forget_options


def encoded(path: Path) -> bytes:
    file = io.BytesIO()
    Image.open(path).convert("RGB").save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture
def lfw(colours, tmp_path) -> Path:
    """40 pairs of test images of ten classes."""
    files = [sorted((colours / "test" / f"c{c}").iterdir()) for c in range(10)]
    pairs = [(files[c][i], files[c][i + 1]) for i in (0, 2) for c in range(10)]
    pairs = [pair for c, same in enumerate(pairs) for pair in (same, (files[c % 10][c % 4], files[(c + 3) % 10][1]))]
    images = [encoded(file) for pair in pairs for file in pair]
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((images, [True, False] * 20)))
    return tmp_path / "lfw.bin"


def test_a_checkpoint_is_measured_without_its_data(trained, lfw, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--checkpoint", trained, "--pairs", lfw)
    code, out, err = command("test.py", *options)
    assert code == 0, err
    (folder,) = (tmp_path / "exps").iterdir()
    found = json.loads((folder / "test.json").read_text())["pairs"]["lfw"]
    assert found["genuine_pairs"] == found["impostor_pairs"] == 20 and found["accuracy"] > 70
    (line,) = [line for line in out.splitlines() if line.startswith("| lfw")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells == ["20", "20", *(f"{found[key]:.2f}" for key in ("accuracy", "accuracy_std", "auc")), "–", "–"]
    assert "–: too few impostor pairs" in out
    refused(command("test.py", *options, "--data", tmp_path), 2, "--data does nothing with --pairs")
    refused(command("test.py", "--checkpoint", trained, "--pairs", "20000"), 2, "--pairs 20000: neither FILE.bin nor")
    lfw.write_bytes(pickle.dumps((exit, [True])))
    refused(
        command("test.py", *options, "--output-dir", "t"), 1, "lfw.bin: no readable pairs of faces: refused: it asks for"
    )
    assert not Path("t/test.json").exists()


def test_a_run_of_tasks_is_measured_before_and_after_each(trained, colours, lfw, command, tmp_path):
    options = [*forget_options(trained, colours, tmp_path / "run"), "--epochs", 1, "--pairs", lfw]
    code, out, err = command("train_forget.py", *options, "--sparsity-warmup-epochs", 0)
    assert code == 0, err
    tasks = results_of(tmp_path / "run")["tasks"]
    alone = tmp_path / "alone"
    for task in tasks:
        own = tmp_path / "run" / "checkpoints" / f"task_{task['task']}.pth"
        for when, checkpoint in (("before", trained), ("after", own)):
            output = alone / f"{when}{task['task']}"
            assert command("test.py", "--checkpoint", checkpoint, "--pairs", lfw, "--output-dir", output)[0] == 0
            assert json.loads((output / "test.json").read_text())["pairs"]["lfw"] == pytest.approx(
                task["pairs"][when]["lfw"]
            )
        values = [task["pairs"][when]["lfw"]["accuracy"] for when in ("before", "after")]
        assert ", lfw {:.2f} → {:.2f}".format(*values) in out


@pytest.fixture
def rec(colours, tmp_path) -> Path:
    """The training images of the ten classes as a .rec."""
    path, body, index = tmp_path / "train.rec", b"", ""
    for number, file in enumerate(sorted(colours.glob("train/*/*.png"))):
        content = struct.pack("<IfQQ", 0, int(file.parent.name[1:]), number, 0) + encoded(file)
        index += f"{number}\t{len(body)}\n"
        body += struct.pack("<II", 0xCED7230A, len(content)) + content + b"\0" * (-len(content) % 4)
    path.write_bytes(body)
    path.with_suffix(".idx").write_text(index)
    return path


def test_a_rec_is_trained_on_and_forgotten_from(rec, command, tmp_path):
    data = ["--data", rec, "--cache-dir", tmp_path / "cache"]
    refused(
        command("train_pretrain.py", *data),
        2,
        "train.rec has no test images: hold some of each class out, with --val-fraction",
    )
    data += ["--val-fraction", 0.25]
    pretrain = [*SMALL, "--epochs", 8, "--batch-size", 24, "--lr", "2e-3", "--output-dir", tmp_path / "pre"]
    code, out, err = command("train_pretrain.py", *data, *pretrain)
    assert code == 0, err
    assert "held-out accuracy" in out
    forget = ["--checkpoint", tmp_path / "pre" / "checkpoint.pth", *data, "--forget-classes", "7", "--epochs", 1]
    code, _, err = command("train_forget.py", *forget, "--data-ratio", 0.3, "--output-dir", tmp_path / "run")
    assert code == 0, err
    results = results_of(tmp_path / "run")
    assert results["dataset"] == {"name": "train.rec", "classes": 10, "train_images": 90, "test_images": 30}
    assert results["tasks"][0]["forget_classes"] == [7]
    code, _, err = command(
        "test.py", "--checkpoint", tmp_path / "pre" / "checkpoint.pth", *data, "--output-dir", tmp_path / "t"
    )
    assert code == 0, err


@pytest.mark.parametrize(("method", "more"), [("unseen", []), ("ewc", ["--importance-data", "all"])])
def test_decoding_on_demand_changes_no_result(method, more, trained, colours, command, tmp_path):
    found = []
    for name in ("fresh", "whole"):
        cache = ["--cache-dir", tmp_path / name]
        if name == "whole":
            assert (
                command(
                    "train_pretrain.py", "--data", colours, *SMALL, "--epochs", 1, *cache, "--output-dir", tmp_path / "p"
                )[0]
                == 0
            )
        options = forget_options(trained, colours, tmp_path / f"run-{name}")
        options = [
            *options[: options.index("--rank")],
            "--epochs",
            2,
            "--data-ratio",
            0.3,
            "--method",
            method,
            *more,
            *cache,
        ]
        code, _, err = command("train_forget.py", *options)
        assert code == 0, err
        found.append([torch.load(tmp_path / f"run-{name}/checkpoints/task_{t}.pth", weights_only=True) for t in (1, 2)])
    assert [*(tmp_path / "fresh").glob("*.part")] == [] if more else [*(tmp_path / "fresh").glob("*.part")]
    for fresh, whole in zip(*found, strict=True):
        assert all(torch.equal(value, whole["model"][key]) for key, value in fresh["model"].items())
