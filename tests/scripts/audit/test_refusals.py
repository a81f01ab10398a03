"""What scripts/audit.py refuses, before it trains anything."""

import json
import shutil

import pytest
import torch

from tests.conftest import ROOT, SMALL, results_of
from tests.scripts.audit.conftest import FIRST, audit_of
from tests.test_bad_input import refused


def test_without_enough_strangers_it_says_what_to_do(files, strangers, tmp_path):
    refused(files("--compare-with", "both"), 2, "comparing with strangers needs people in no training set: --strangers DIR")
    refused(
        files("--compare-with", "both", "--strangers", strangers),
        2,
        "--strangers has 6 people with 4 photos or more, and 20 are needed",
    )
    refused(files("--compare-with", "both", "--metrics", "cka"), 2, "--compare-with both needs one of --metrics readout")
    assert not (tmp_path / "audit").exists()


def test_nothing_to_audit_is_refused(run, command, tmp_path):
    refused(command("scripts/audit.py"), 2, "name the folders of runs, or --before, --after and --forget-classes")
    refused(command("scripts/audit.py", "--before", "a.pth", "--after", "b.pth"), 2, "name the folders of runs, or --before")
    for folder in (tmp_path, tmp_path / "absent", run / "checkpoints"):
        refused(command("scripts/audit.py", folder), 2, f"{folder}: no run that has finished a task, nor a folder of such")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--forget-classes", "c0,eve"], 2, "no class 'eve'"),
        (["--forget-classes", ""], 2, "a list of names is empty"),
        (["--before", "absent.pth"], 2, "no file absent.pth"),
        (["--after", "absent.pth"], 2, "no file absent.pth"),
        (["--references", "absent.pth"], 2, "no file absent.pth"),
        (["--originals", "absent.pth"], 2, "no file absent.pth"),
        (["--references", ROOT], 2, f"no file {ROOT}"),
        (["--originals", "/dev/null"], 2, "no file /dev/null"),
        (["--references", __file__], 1, f"{__file__}: refused"),
        (["--recipe", ROOT], 2, f"no file {ROOT}"),
        (["--recipe", __file__], 1, f"{__file__}: not readable as JSON"),
        (["--strangers", __file__], 2, "cannot be read as <class>/<image>"),
        (["--strangers", "absent"], 2, "absent: cannot be read as <class>/<image>"),
        (["--data", "absent"], 2, "absent: cannot be read as {train,test}/<class>/<image>"),
        (["--metrics", "aura"], 2, "--metrics: invalid choice: 'aura'"),
        (["--requests", "some"], 2, "--requests: some is neither the number of a request nor all"),
        (["--requests", "0"], 2, "--requests: 0 is neither the number of a request nor all"),
        (["--num-references", 0], 2, "--num-references: 0 is out of range"),
        (["--head", "arcface"], 2, "was trained with --head cosface, not arcface"),
        (["--output-dir", __file__], 2, f"{__file__} is a file, not a folder"),
    ],
)
def test_impossible_audits_are_refused(options, code, message, files, tmp_path):
    refused(files(*options), code, message)
    assert not (tmp_path / "audit").exists()


def test_references_that_say_nothing_are_refused(files, references, early, tmp_path):
    refused(files("--references", *references[:2]), 2, "2 references: their spread cannot be told from fewer than 3")
    refused(files("--references", *references[:2], references[0]), 2, "2 references: their spread cannot be told")
    message = "reference 3 was trained with 5 of the 5 forgotten identities, 'c0' first"
    refused(files("--references", *references[:2], early), 2, message)
    refused(files("--originals", references[0]), 2, "original 1 was trained without 'c0'")
    refused(files("--before", references[0]), 2, "the pre-trained model was trained without 'c0'")
    message = "reference 1 was trained with 1 of the 6 forgotten identities, 'c7' first"
    refused(files("--forget-classes", ",".join([*FIRST, "c7"])), 2, message)
    assert not (tmp_path / "audit").exists()


def test_strangers_who_are_none_are_refused(files, colours, strangers, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(files("--strangers", tmp_path / "empty"), 2, "0 class folders; at least 1 are needed")
    refused(files("--strangers", colours / "train"), 2, "--strangers has 10 identities of the training set, 'c0' first")
    renamed = shutil.copytree(strangers, tmp_path / "renamed")
    shutil.copy(next((colours / "train" / "c8").iterdir()), renamed / "c12" / "copy.png")
    refused(files("--strangers", renamed), 2, "--strangers has 1 images of the training set, of 'c12' first")
    damaged = shutil.copytree(strangers, tmp_path / "damaged")
    (damaged / "c11" / "0.png").write_bytes(b"no image")
    refused(files("--strangers", damaged), 1, "images cannot be decoded: c11/0.png (not an image)")
    assert not (tmp_path / "audit").exists()


def test_people_with_too_few_images_are_named(files, poor):
    refused(files("--data", poor, "--forget-classes", "c0,c3"), 2, "c3 has 1 training images: the audit needs 2 or more")
    refused(files("--data", poor, "--forget-classes", "c0,c4"), 2, "c4 has no test images: nothing of it can be audited")


def test_kept_people_without_test_images_are_told(files, colours, tmp_path):
    folder = shutil.copytree(colours, tmp_path / "colours")
    for c in range(5, 10):
        shutil.rmtree(folder / "test" / f"c{c}")
    for figure in ("readout", "verification"):
        refused(files("--data", folder, "--metrics", figure), 2, "test images")


def test_two_photos_of_everybody_are_enough(files, colours, tmp_path):
    folder = shutil.copytree(colours, tmp_path / "colours")
    for person in (folder / "train").iterdir():
        for path in sorted(person.iterdir())[2:]:
            path.unlink()
    code, _, err = files("--data", folder, "--metrics", "probe")
    assert code == 0, err
    assert audit_of(tmp_path / "audit")["requests"][0]["figures"]["probe_embedding"]["value"] is not None


def test_data_of_other_people_are_refused(files, colours, tmp_path):
    for name, change in (("fewer", shutil.rmtree), ("renamed", lambda folder: folder.rename(folder.with_name("d9")))):
        folder = shutil.copytree(colours, tmp_path / name)
        for split in ("train", "test"):
            change(folder / split / "c9")
        told = "knows 10 classes, the data set fewer has 9" if name == "fewer" else "'c9' there, 'd9' here"
        refused(files("--data", folder), 2, told)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--num-references", 2], 2, "3"),
        (["--after", "absent.pth"], 2, "no file absent.pth"),
        (["--forget-classes", ",".join(f"c{c}" for c in range(9))], 2, "the audit needs 2 or more"),
        (["--forget-classes", ",".join(f"c{c}" for c in range(10))], 2, "the audit needs 2 or more"),
        (["--forget-classes", "c0,c3"], 2, "c3 has 1 training images"),
        (["--forget-classes", "c0,c4"], 2, "c4 has no test images"),
        (["--strangers", "known"], 2, "--strangers has 9 identities of the training set"),
    ],
)
def test_what_is_wrong_is_found_before_a_reference_is_trained(
    options,
    code,
    message,
    early,
    run,
    poor,
    command,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr("scripts.references.train_references", lambda *_: pytest.fail("references were trained first"))
    shutil.copytree(poor / "test", tmp_path / "known")
    monkeypatch.chdir(tmp_path)
    words = ("--before", early, "--after", run / "checkpoints" / "task_1.pth", "--data", poor, "--forget-classes", "c0,c1")
    refused(command("scripts/audit.py", *words, *options), code, message)


def test_the_table_of_a_folder_replaces_nothing_of_the_users(seeds, here, command, tmp_path):
    (tmp_path / "audit.md").write_text("mine")
    refused(command("scripts/audit.py", tmp_path, "--quick"), 2, f"{tmp_path / 'audit.md'} is there and not of this script")
    assert (tmp_path / "audit.md").read_text() == "mine"
    (tmp_path / "audit.md").rename(tmp_path / "index.html")
    refused(command("scripts/audit.py", tmp_path, "--quick"), 2, f"{tmp_path / 'index.html'} is there and not of this")


def test_runs_that_are_not_whole_are_refused(run, command, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("audit"))
    config, results = json.loads((copy / "config.json").read_text()), results_of(copy)

    def with_config(**changes: object) -> None:
        (copy / "config.json").write_text(json.dumps(config | changes))

    (copy / "results.json").write_text(json.dumps(results | {"tasks": []}))
    refused(command("scripts/audit.py", copy, "--quick"), 2, str(copy))
    (copy / "results.json").write_text("{}")
    refused(command("scripts/audit.py", copy, "--quick"), 1, "not a results.json of schema 1")
    (copy / "results.json").write_text(json.dumps(results))
    with_config(arguments=config["arguments"] | {"checkpoint": "gone.pth"})
    refused(command("scripts/audit.py", copy, "--quick"), 2, "no file gone.pth: --before says where the checkpoint lies")
    for changes in ({"arguments": {}}, {"arguments": None}, {"hardware": None}):
        with_config(**changes)
        refused(command("scripts/audit.py", copy, "--quick"), 1, str(copy / "config.json"))
    (copy / "config.json").unlink()
    refused(command("scripts/audit.py", copy, "--quick"), 2, f"no file {copy / 'config.json'}")
    assert not (copy / "audit").exists()


def test_references_that_do_not_fit_are_refused(files, references, colours, command, tmp_path):
    folder = shutil.copytree(colours, tmp_path / "fewer")
    for split in ("train", "test"):
        shutil.rmtree(folder / split / "c9")
    for name, data, *words in (
        ("classes", folder, *SMALL),
        ("size", colours, *SMALL[2:], "--image-size", 48),
        ("head", colours, *SMALL, "--head", "softmax"),
    ):
        words = ("--data", data, *words, "--epochs", 1, "--output-dir", tmp_path / name)
        code, _, err = command("train_pretrain.py", *words)
        assert code == 0, err
    for name, told in (
        ("classes", "knows 9 classes, the data set colours has 10"),
        ("size", "was trained on images of 48 pixels"),
        ("head", "in its head bias is unexpected"),
    ):
        path = tmp_path / name / "checkpoint.pth"
        refused(files("--references", *references[:2], path), 2, told)
        refused(files("--originals", path), 2, told)
    assert not (tmp_path / "audit").exists()


def test_what_a_checkpoint_says_of_itself_may_be_anything(files, early, tmp_path):
    checkpoint = torch.load(early, weights_only=True)
    checkpoint["info"] = {"acc": float("nan"), "seed": "x", "without_classes": [99], "recipe": {"lr": torch.ones(2)}}
    torch.save(checkpoint, tmp_path / "odd.pth")
    code, _, err = files("--before", tmp_path / "odd.pth")
    assert code == 0, err
    (entry,) = audit_of(tmp_path / "audit")["originals"]
    assert (entry["seed"], entry["acc_remain"], entry["without"]) == (None, None, [])


def test_a_folder_of_something_else_is_not_written_to(files, tmp_path):
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "letters.txt").write_text("mine")
    refused(files(), 2, str(tmp_path / "audit"))
    assert [path.name for path in (tmp_path / "audit").iterdir()] == ["letters.txt"]
    (tmp_path / "audit" / "letters.txt").unlink()
    for _ in range(2):
        code, _, err = files()
        assert code == 0, err
    config = json.loads((tmp_path / "audit" / "config.json").read_text())
    assert (config["script"], len(config["arguments"]["references"])) == ("audit.py", 3)
    assert "torch" in config["packages"]
