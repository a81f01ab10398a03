"""Pre-training without some of the classes, and evaluating what came of it, through the scripts' own command lines."""

import json
from pathlib import Path

import pytest
import torch

from methods.pretrain import Pretrain
from tests.conftest import SMALL
from tests.test_bad_input import refused
from train_pretrain import IMAGES_SHOWN, RECIPE

CLASSES = [f"c{c}" for c in range(10)]


def options(colours: Path, output: Path, without: str, *more: object) -> list:
    small = [*SMALL, "--epochs", 6, "--batch-size", 24, "--lr", "2e-3", "--device", "cpu", "--precision", "fp32"]
    return ["--data", colours, *small, "--output-dir", output, "--without-classes", without, *more]


@pytest.fixture
def without(colours, command, tmp_path_factory) -> Path:
    """A checkpoint without c2 and c7, made once a session."""
    folder = tmp_path_factory.getbasetemp() / "without"
    if not (folder / "checkpoint.pth").exists():
        code, out, err = command("train_pretrain.py", *options(colours, folder, "c7, #2"))
        assert code == 0, err
        assert "on colours: 8 classes, 96 images of 32×32" in out
    return folder / "checkpoint.pth"


def test_no_image_of_an_absent_class_is_in_any_batch(colours, command, tmp_path, monkeypatch):
    seen, loss = [], Pretrain.loss

    def note(self, model, batch):
        seen.extend(batch.labels.tolist())
        return loss(self, model, batch)

    monkeypatch.setattr(Pretrain, "loss", note)
    code, _, err = command("train_pretrain.py", *options(colours, tmp_path, '"c7",c2', "--epochs", 2))
    assert code == 0, err
    assert {*seen} == {*range(10)} - {2, 7}
    assert len(seen) == 2 * 96


def test_class_ids_stay_and_absent_rows_are_zero(without):
    checkpoint = torch.load(without, weights_only=True)
    assert checkpoint["classes"] == CLASSES
    assert checkpoint["forgotten"] == []
    assert checkpoint["architecture"]["num_classes"] == 10
    zero = (checkpoint["model"]["head.weight"] == 0).all(dim=1)
    assert zero.nonzero().flatten().tolist() == [2, 7]


def test_the_checkpoint_tells_its_recipe_and_who_was_left_out(without):
    info = torch.load(without, weights_only=True)["info"]
    assert info["without_classes"] == [2, 7]
    assert info["seed"] == 1337
    config = json.loads((without.parent / "config.json").read_text())["arguments"]
    assert info["recipe"] == {key: config[key] for key in RECIPE}
    assert (info["recipe"]["lr"], info["recipe"]["epochs"], info["recipe"]["depth"]) == (2e-3, 6, 2)


def test_with_every_class_nothing_is_left_out(trained):
    checkpoint = torch.load(trained, weights_only=True)
    assert checkpoint["info"]["without_classes"] == []
    assert checkpoint["info"]["recipe"]["epochs"] == 20
    assert (checkpoint["model"]["head.weight"] != 0).all()


def test_by_default_as_many_images_are_shown(colours, command, tmp_path):
    """The learning rate ends it within a few steps: what it had chosen is in config.json."""
    data = ("--data", colours, *SMALL, "--compile", "off", "--lr", "1e30", "--precision", "fp32")
    for name, more, images in (("all", (), 120), ("some", ("--without-classes", "c2,c7"), 96)):
        refused(command("train_pretrain.py", *data, *more, "--output-dir", tmp_path / name), 1, "the loss is not finite")
        chosen = json.loads((tmp_path / name / "config.json").read_text())["arguments"]
        assert chosen["epochs"] == IMAGES_SHOWN // images
        assert chosen["warmup_epochs"] == IMAGES_SHOWN // images // 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("c77", "no class 'c77'; did you mean 'c7'?"),
        ("2", "no class '2'; class id 2 is written #2"),
        ("", "a list of names is empty"),
        (",".join(CLASSES[1:]), "--without-classes leaves 1 classes; at least 2 are needed"),
        (",".join(CLASSES), "--without-classes leaves 0 classes; at least 2 are needed"),
    ],
)
def test_impossible_classes_are_refused(words, message, colours, command, tmp_path):
    refused(command("train_pretrain.py", *options(colours, tmp_path / "p", words)), 2, message)
    assert not (tmp_path / "p").exists()


def test_resuming_with_other_classes_is_refused(without, colours, command):
    before = without.read_bytes()
    for words in ("c7", "c7,c3"):
        result = command("train_pretrain.py", *options(colours, without.parent, words, "--resume"))
        refused(result, 2, f"other options: --without-classes c7, #2, now {words}")
    assert without.read_bytes() == before


def test_it_is_evaluated_like_any_checkpoint(without, colours, command, tmp_path):
    options = ("--data", colours, "--forget-classes", "c2,c7", "--device", "cpu", "--precision", "fp32")
    code, _, err = command("test.py", "--checkpoint", without, *options, "--output-dir", tmp_path)
    assert code == 0, err
    groups = json.loads((tmp_path / "test.json").read_text())["groups"]
    info = torch.load(without, weights_only=True)["info"]
    assert groups["remaining"]["acc"] == info["acc"] > 50
    assert groups["remaining"]["margin_acc"] == info["margin_acc"]
    assert groups["forgotten"]["acc"] == 0
    assert groups["forgotten"]["verification"]["auc"] >= 0


def test_names_or_numbers_in_any_order_are_the_same_classes(without, colours, command, tmp_path):
    code, _, err = command("train_pretrain.py", *options(colours, tmp_path, "#2,c7"))
    assert code == 0, err
    one, other = (torch.load(path, weights_only=True)["model"] for path in (without, tmp_path / "checkpoint.pth"))
    assert all(torch.equal(one[key], other[key]) for key in one)
