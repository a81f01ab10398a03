"""Photos of other people in the place of those of kept people (--replay), through the command line."""

import json
import shutil

import pytest
import torch

from tests.conftest import coloured_images, results_of, write_folder
from util.storage.checkpoint import load_checkpoint

SHARED = ("--data-ratio", 1, "--epochs", 2, "--batch-size", 8, "--precision", "fp32")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """<person>/<image> of six people with their own colours."""
    images = coloured_images(16, 4, 32, seed=3)
    folder = tmp_path_factory.mktemp("replay")
    write_folder(folder, images.subset(images.labels > 9), images.subset(slice(0)))
    return folder / "train"


@pytest.fixture(scope="module")
def gallery(colours, tmp_path_factory):
    """The data set with one training photo of each person who stays."""
    folder = tmp_path_factory.mktemp("gallery") / "people"
    shutil.copytree(colours, folder)
    for person in range(10):
        for photo in sorted((folder / "train" / f"c{person}").iterdir())[1:] if person not in (2, 7) else ():
            photo.unlink()
    return folder


@pytest.mark.parametrize("method", ["gs_lora", "gs_lora_pp", "ewc", "lirf", "bad_teacher", "unseen"])
def test_only_people_of_the_checkpoint_are_left(method, trained, gallery, others, command, tmp_path):
    words = ("--method", method, "--checkpoint", trained, "--data", gallery, "--forget-classes", "c2", "--then", "c7")
    code, _, err = command("train_forget.py", *words, *SHARED, "--replay", others, "--output-dir", tmp_path / "run")
    assert (code, "UserWarning" in err) == (0, False), err
    images = [task["train_images"] for task in results_of(tmp_path / "run")["tasks"]]
    assert images == [{"forget": 12, "remain": remain, "replay": 24} for remain in (8 + 12, 8)]
    for task in (1, 2):
        checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / f"task_{task}.pth")
        rows, known = len(checkpoint.model.head.weight), checkpoint.model.architecture.num_classes
        assert len(checkpoint.classes) == rows == known == 10
    code, out, err = command("test.py", "--verify-record", tmp_path / "run" / "deletions" / "task_2.json")
    assert code == 0, out + err


def test_it_keeps_more_than_the_gallery_alone(trained, gallery, others, command, tmp_path):
    """Images of others are seen: the model ends elsewhere, and is measured without them."""
    words = ("--checkpoint", trained, "--data", gallery, "--forget-classes", "c2,c7", "--method", "gs_lora", *SHARED)
    weights = []
    for name, more in (("with", ("--replay", others)), ("without", ())):
        code, _, err = command("train_forget.py", *words, *more, "--output-dir", tmp_path / name)
        assert code == 0, err
        weights.append(load_checkpoint(tmp_path / name / "checkpoints" / "task_1.pth").model.state_dict())
        record = json.loads((tmp_path / name / "deletions" / "task_1.json").read_text())
        assert ("replay" in record["images"]) == (name == "with")
    assert weights[0].keys() == weights[1].keys()
    assert torch.equal(weights[0]["head.weight"], weights[1]["head.weight"])
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_later_request_and_a_resumed_one_end_as_one_run(trained, gallery, others, command, tmp_path):
    words = ("--checkpoint", trained, "--data", gallery, "--method", "gs_lora", *SHARED, "--replay", others)
    for name, more in (
        ("both", ("--forget-classes", "c2", "--then", "c7")),
        ("first", ("--forget-classes", "c2")),
        ("then", ("--forget-classes", "c7", "--resume-from", tmp_path / "first" / "checkpoints" / "task_1.pth")),
    ):
        code, _, err = command("train_forget.py", *words, *more, "--output-dir", tmp_path / name)
        assert code == 0, err
    ends = [load_checkpoint(tmp_path / name / "checkpoints" / "task_2.pth").model.state_dict() for name in ("both", "then")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_people_of_the_data_set_are_refused(trained, gallery, colours, others, command, tmp_path):
    words = ("--checkpoint", trained, "--data", gallery, "--forget-classes", "c2", "--output-dir", tmp_path / "run")
    code, _, err = command("train_forget.py", *words, "--replay", colours / "train")
    assert code == 2 and "--replay has 10 identities of the training set, 'c0' first" in err
    shutil.copytree(others, tmp_path / "others")
    shutil.copy(next((gallery / "train" / "c2").iterdir()), tmp_path / "others" / "c12" / "copy.png")
    code, _, err = command("train_forget.py", *words, "--replay", tmp_path / "others")
    assert code == 2 and "--replay has 1 images of the training set, of 'c12' first" in err
    assert not (tmp_path / "run").exists()
