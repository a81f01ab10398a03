"""The benchmark runs, at sizes that say nothing about speed; no timing is asserted."""

import json

import pytest
import torch.nn.functional as F

from scripts.plain_path import PlainTraining

TINY = ("--model", "face_vit_tiny", "--image-size", 16, "--batch-size", 2, "--eval-images", 10, "--repeats", 1)
TINY += ("--workers", 0, "--compile", "off", "--device", "cpu")


@pytest.fixture(autouse=True)
def single_runs(monkeypatch):
    monkeypatch.setattr("math.ceil", lambda number: 1)


def test_every_table_is_measured_and_printed(command, tmp_path):
    code, out, err = command("scripts/benchmark.py", *TINY, "--json", tmp_path / "figures.json")
    assert code == 0, err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["work"] for row in figures["steps"]][-2:] == ["pre-training step", "evaluation"]
    for row in figures["steps"]:
        assert row["ratio"] == pytest.approx(row["images_per_second"]["fast"] / row["images_per_second"]["plain"])
        assert row["utilisation"] > 0
    parts = {row["part"] for row in figures["ablation"]}
    assert {"teacher once a task", "one forward pass", "images decoded once", "fast dropout"} <= parts
    assert 0 < figures["task"]["share"] < 1
    begun, ended = figures["start"]["eager"]
    assert 0.5 < begun < ended
    assert figures["importances"][0]["work"] == "backward pass"
    for text in ("forget step, GS-LoRA", "without", "A whole task of 20 epochs", "Fisher, single images"):
        assert text in out


def test_paths_that_compute_different_losses_end_the_run(command, monkeypatch):
    def without_margin(training, stream, labels=None):
        images, own = stream
        return F.cross_entropy(training.logits(training.model, images), own if labels is None else labels)

    monkeypatch.setattr(PlainTraining, "cosface", without_margin)
    code, _, err = command("scripts/benchmark.py", *TINY, "--only", "steps")
    assert code == 1
    assert "forget step, GS-LoRA: the paths disagree" in err


def test_sizes_that_cannot_be_measured(command):
    code, _, err = command("scripts/benchmark.py", "--batch-size", 0)
    assert code == 2
    assert "--batch-size, --eval-images and --repeats must be at least 1" in err
