"""What leaves the house after a deletion."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import SMALL, coloured_images, results_of, write_folder
from util.storage.checkpoint import load_checkpoint

NAMES = tuple(f"Person Number {letter}" for letter in "ABCDEFGHIJ")


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    train, test = (replace(coloured_images(10, 6, 32, seed=seed), classes=NAMES) for seed in (0, 1))
    return write_folder(tmp_path_factory.mktemp("release") / "people", train, test)


@pytest.fixture
def forgotten(people, command, tmp_path_factory) -> Path:
    """A run of two tasks, made once."""
    folder = people.parent
    run = folder / "run"
    if not run.exists():
        options = ("--epochs", 2, "--batch-size", 12, "--output-dir", folder / "pretrained")
        code, _, err = command("train_pretrain.py", "--data", people, *SMALL, *options)
        assert code == 0, err
        who = ("--forget-classes", f"{NAMES[2]}, {NAMES[7]}", "--then", NAMES[4])
        shared = ("--checkpoint", folder / "pretrained" / "checkpoint.pth", "--data", people, "--output-dir", run)
        shared += ("--method", "gs_lora")
        code, _, err = command("train_forget.py", *shared, *who, "--epochs", 1, "--batch-size", 6, "--data-ratio", 1)
        assert code == 0, err
    return run / "checkpoints" / "task_2.pth"


def smallest_angles(content: bytes, rows: np.ndarray) -> np.ndarray:
    """The largest |cosine| of each of the `rows` with any stretch of float32 numbers of its length, wherever in the file."""
    unit, found = torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)), torch.zeros(len(rows))
    for offset in range(4):
        count = (len(content) - offset) // 4
        values = torch.from_numpy(np.frombuffer(content, np.float32, count, offset).copy())
        values = torch.where(values.abs() < 1e6, values, 0.0).nan_to_num()
        for stretches in values.unfold(0, rows.shape[1], 1).split(1 << 16):
            cosines = stretches @ unit.T / stretches.norm(dim=1, keepdim=True).clamp(min=1e-12)
            found = torch.maximum(found, cosines.abs().max(dim=0).values)
    return found.numpy()


def test_nothing_of_the_forgotten_is_released(forgotten, people, command, tmp_path):
    out = tmp_path / "released"
    code, stdout, err = command("scripts/release.py", "--checkpoint", forgotten, "--output-dir", out)
    assert code == 0, err
    assert "7 classes, without Person Number C, Person Number H, Person Number E;" in stdout
    files = {path.name: path.read_bytes() for path in out.rglob("*.*")}
    assert set(files) == {"checkpoint.pth", "config.json", "model.safetensors", "model.onnx"}
    before = load_checkpoint(forgotten).model.head.weight.detach().numpy()
    for name, content in files.items():
        assert not any(NAMES[c].encode() in content for c in (2, 7, 4)), name
        assert name == "config.json" or max(smallest_angles(content, before[[2, 7, 4]])) < 0.9, name
        assert b".py" not in content, name  # nor where it was made
        assert str(people.parent).encode() not in content, name
    # The search finds what is there.
    assert min(smallest_angles(files["checkpoint.pth"], before[[0, 9]])) > 0.99999
    assert all(NAMES[c].encode() in files["checkpoint.pth"] for c in (0, 9))


def test_what_fails_leaves_nothing_behind(forgotten, command, tmp_path, monkeypatch):
    words = ("scripts/release.py", "--checkpoint", forgotten, "--output-dir", tmp_path / "out")
    code, _, err = command(*words, "--pairs", tmp_path / "nowhere.bin")
    assert code == 2 and "nowhere.bin" in err and not (tmp_path / "out").exists()

    def fails(*_, **__):
        raise NotImplementedError("no such operator\nmore of it")

    monkeypatch.setattr(torch.onnx, "export", fails)
    code, _, err = command(*words)
    assert (code, err) == (
        1,
        "release.py: error: torch cannot export this model: no such operator; --no-onnx leaves model.onnx out\n",
    )
    assert not any((tmp_path / "out").iterdir())
    assert command(*words, "--no-onnx")[0] == 0


def test_the_released_checkpoint_knows_the_others_as_before(forgotten, people, command, tmp_path):
    out = tmp_path / "released"
    code, _, err = command("scripts/release.py", "--checkpoint", forgotten, "--output-dir", out, "--no-onnx")
    assert code == 0, err
    assert {path.name for path in out.iterdir()} == {"checkpoint.pth", "timm"}
    before, after = load_checkpoint(forgotten), load_checkpoint(out / "checkpoint.pth")
    kept = [c for c in range(10) if c not in (2, 4, 7)]
    assert after.classes == tuple(NAMES[c] for c in kept)
    assert (after.forgotten, after.info) == ([], {})
    images = coloured_images(10, 2, 32).images
    torch.testing.assert_close(after.model.eval()(images), before.model.eval()(images)[:, kept])
    # The next request starts from it: nothing older is needed.
    gone = shutil.ignore_patterns(*(NAMES[c] for c in (2, 4, 7)))
    shutil.copytree(people, tmp_path / "those who stay", ignore=gone)
    words = ("--checkpoint", out / "checkpoint.pth", "--data", tmp_path / "those who stay", "--forget-classes", NAMES[0])
    words += ("--method", "gs_lora", "--epochs", 1, "--batch-size", 6, "--output-dir", tmp_path / "next")
    code, _, err = command("train_forget.py", *words)
    assert code == 0, err
    assert results_of(tmp_path / "next")["tasks"][0]["setting"] == "7-1"


def test_a_model_that_forgot_nobody_is_released_with_a_warning(forgotten, people, command, tmp_path):
    pretrained, out = people.parent / "pretrained" / "checkpoint.pth", tmp_path / "new"
    code, stdout, err = command("scripts/release.py", "--checkpoint", pretrained, "--no-onnx", "--output-dir", out)
    assert code == 0, err
    assert err == f"warning: {pretrained} has forgotten nobody: of a deletion, release its task\n"
    assert stdout.endswith(f"{out}: 10 classes\n")
    before, after = (load_checkpoint(path).model.eval() for path in (pretrained, out / "checkpoint.pth"))
    torch.testing.assert_close(after(coloured_images(10, 2, 32).images), before(coloured_images(10, 2, 32).images))


def test_a_full_folder_is_refused(forgotten, command, tmp_path):
    (tmp_path / "notes.txt").write_text("names")
    code, _, err = command("scripts/release.py", "--checkpoint", forgotten, "--output-dir", tmp_path)
    assert code == 2
    assert "is not empty" in err


def test_without_onnxs_packages_one_line_says_what_to_install(forgotten, command, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    code, _, err = command("scripts/release.py", "--checkpoint", forgotten, "--output-dir", tmp_path / "new")
    assert code == 2
    assert "pip install" in err
    assert not (tmp_path / "new").exists()
