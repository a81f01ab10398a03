"""Unseen on photos of other people beside those of kept people (--replay), through the command line."""

import shutil

import pytest
import torch

import train_forget
from tests.conftest import coloured_images, write_folder
from util.runtime.hardware import choose_hardware
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


def test_photos_of_others_are_seen_and_their_people_leave_nothing(trained, gallery, others, command, tmp_path):
    words = ("--checkpoint", trained, "--data", gallery, "--forget-classes", "c2", *SHARED)
    weights = []
    for name, more in (("with", ("--replay", others)), ("without", ())):
        code, _, err = command("train_forget.py", *words, *more, "--output-dir", tmp_path / name)
        assert (code, "UserWarning" in err) == (0, False), err
        checkpoint = load_checkpoint(tmp_path / name / "checkpoints" / "task_1.pth")
        assert len(checkpoint.classes) == len(checkpoint.model.head.weight) == 10
        weights.append(checkpoint.model.state_dict())
        code, out, err = command("test.py", "--verify-record", tmp_path / name / "deletions" / "task_1.json")
        assert code == 0, out + err
        assert ("24 images of other people" in out) == (name == "with")
    code, _, err = command("scripts/audit.py", tmp_path / "with", "--quick", "--strangers", others)
    assert code == 2 and "was trained on the people of --strangers" in err
    assert torch.equal(weights[0]["head.weight"], weights[1]["head.weight"])
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_all_of_them_count_in_an_epoch(trained, gallery, others):
    words = [
        "--checkpoint",
        str(trained),
        "--data",
        str(gallery),
        "--forget-classes",
        "c2",
        "--passes",
        "1",
        "--visits",
        "1",
    ]
    counts = []
    for more in ([], ["--replay", str(others)]):
        run = train_forget.assemble(train_forget.parse_arguments([*words, *more]), choose_hardware("cpu"))
        (plan,) = run.method.passes(run.tasks[0], 0, 1)
        counts.append(plan.streams["remain"].tolist())
    known = 8 + 2 * 12
    assert counts[1] == counts[0] + [*range(known, known + 24)]
    assert len(run.method.seen_set) == known + 24


def test_a_later_request_ends_as_in_one_run(trained, gallery, others, command, tmp_path):
    words = ("--checkpoint", trained, "--data", gallery, *SHARED, "--replay", others)
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
    code, _, err = command("train_forget.py", *words, "--replay", colours)
    assert code == 2 and "holds train/ and test/" in err
    assert not (tmp_path / "run").exists()


def test_strangers_may_be_so_alike_that_the_last_block_is_read(trained, colours, others, command, tmp_path):
    """That block is computed for the class token alone."""
    for person in range(3):
        (tmp_path / "alike" / f"p{person}").mkdir(parents=True)
        for photo in ("a.png", "b.png"):
            shutil.copy(sorted((others / f"c{10 + person}").iterdir())[0], tmp_path / "alike" / f"p{person}" / photo)
    words = ("--checkpoint", trained, "--data", colours, "--forget-classes", "c2", *SHARED)
    code, _, err = command("train_forget.py", *words, "--strangers", tmp_path / "alike", "--output-dir", tmp_path / "run")
    assert code == 0, err
    code, _, err = command(
        "train_forget.py", *words, "--strangers", others, "--replay", others, "--output-dir", tmp_path / "new"
    )
    assert code == 2 and "--strangers has 6 identities of the training set" in err
