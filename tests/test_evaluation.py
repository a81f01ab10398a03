"""test.py: groups without images, classes whose images are erased, and the folder that its results go to."""

import json
import shutil

import pytest
import torch

from tests.test_bad_input import refused
from tests.test_record_check import without
from tests.test_requests import named  # noqa: F401
from util.runtime.files import sha256


def groups_of(folder) -> dict:
    return json.loads((folder / "test.json").read_text())["groups"]


@pytest.mark.parametrize(
    ("untested", "forget", "empty"),
    [("c3", "c3", "forgotten"), ("c3", ",".join(f"c{c}" for c in range(10) if c != 3), "remaining")],
)
def test_a_group_without_test_images_has_no_numbers(untested, forget, empty, trained, colours, command, tmp_path):
    data = shutil.copytree(colours, tmp_path / "colours")
    shutil.rmtree(data / "test" / untested)
    options = ("--checkpoint", trained, "--data", data, "--forget-classes", forget, "--output-dir", tmp_path / "t")
    code, out, err = command("test.py", *options)
    assert code == 0, err
    nothing = dict.fromkeys(("acc", "margin_acc", "verification"))
    assert groups_of(tmp_path / "t")[empty] == {"classes": [3], "images": 0} | nothing
    (line,) = [line for line in out.splitlines() if line.startswith(f"| {empty}")]
    assert [cell.strip() for cell in line.split("|")[3:-1]] == ["0", *"–––––"]


def test_a_group_of_all_classes_or_of_one_named_twice(trained, colours, command, tmp_path):
    options = ("--checkpoint", trained, "--data", colours, "--forget-classes")
    for forget, sizes in ((",".join(f"c{c}" for c in range(10)), {"all": 10, "forgotten": 10}), ("c1,#1", None)):
        output = tmp_path / forget
        code, _, err = command("test.py", *options, forget, "--output-dir", output)
        assert code == 0, err
        found = {name: len(group["classes"]) for name, group in groups_of(output).items()}
        assert found == (sizes or {"all": 10, "forgotten": 1, "remaining": 9})


def test_images_of_forgotten_classes_may_be_erased(named, trained, colours, command, tmp_path):  # noqa: F811
    data, whole = without(colours, tmp_path / "colours", "c3", "c7"), tmp_path / "whole"
    last = named / "first" / "checkpoints" / "task_2.pth"
    assert command("test.py", "--checkpoint", last, "--data", colours, "--output-dir", whole)[0] == 0
    for number, words in enumerate(
        [
            ("--checkpoint", last),
            ("--checkpoint", trained, "--forget-classes", "c3,c7"),
        ]
    ):
        code, _, err = command("test.py", *words, "--data", data, "--output-dir", tmp_path / f"{number}")
        assert code == 0, err
    found, expected = groups_of(tmp_path / "0"), groups_of(whole)
    assert found["forgotten earlier"]["images"] == 0
    for group in ("remaining", "forgotten last"):
        assert found[group] == expected[group]
    words = ("--checkpoint", trained, "--data", data, "--output-dir", tmp_path / "t")
    refused(command("test.py", *words), 2, "knows 10 classes, the data set colours has 8")
    refused(command("test.py", *words, "--forget-classes", "c3"), 2, "knows 10 classes, the data set colours has 8")


def test_each_model_has_a_folder_of_its_own_by_default(named, trained, colours, command, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    last = [named / run / "checkpoints" / f"task_{task}.pth" for run, task in (("first", 1), ("second", 3))]
    adapters = named / "first" / "adapters" / "task_1.safetensors"
    for words in (*([path] for path in last), [trained], [trained, "--adapters", adapters]):
        code, _, err = command("test.py", "--data", colours, "--random-pairs", 0, "--checkpoint", *words)
        assert code == 0, err
    own = f"test-pretrained-checkpoint-{sha256(trained)[:8]}"
    expected = {f"test-{path.parts[-3]}-{path.stem}-{sha256(path)[:8]}" for path in last} | {own}
    expected.add(f"{own}-{sha256(adapters)[:8]}")
    assert {path.name for path in (tmp_path / "exps").iterdir()} == expected


def test_results_go_to_a_folder_of_test_py_alone(trained, colours, command, tmp_path):
    options = ("test.py", "--checkpoint", trained, "--data", colours, "--output-dir", tmp_path / "t")
    assert command(*options)[0] == 0
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    assert config["script"] == "test.py" and config["arguments"]["checkpoint"] == str(trained)
    before = (tmp_path / "t" / "test.json").read_bytes()
    refused(command(*options, "--random-pairs", 0), 2, "holds results of other options: --random-pairs 20000, now 0")
    assert command(*options)[0] == 0
    assert (tmp_path / "t" / "test.json").read_bytes() == before
    refused(command(*options[:-1], trained.parent), 2, str(trained.parent))
    refused(command(*options[:-1], trained), 2, "is a file, not a folder")
    assert not (trained.parent / "test.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name the model with --checkpoint FILE"),
        (("--seed", 10**20), "--seed: "),
        (("--seed", -1), "--seed: -1 is out of range"),
    ],
)
def test_odd_options(words, message, trained, command):
    refused(command("test.py", *(["--checkpoint", trained, *words] if words else [])), 2, message)


def test_embeddings_that_are_not_finite(trained, colours, command, tmp_path):
    state = torch.load(trained, weights_only=True)
    state["model"]["backbone.norm.weight"] += 3e38
    torch.save(state, tmp_path / "huge.pth")
    options = ("--checkpoint", tmp_path / "huge.pth", "--data", colours, "--output-dir", tmp_path / "t")
    refused(command("test.py", *options), 1, "huge.pth: embeddings of the test images are not finite")
