"""Every method through train_forget.py's command line, on small images whose mean colour tells the class."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from methods import METHODS
from tests.conftest import ROOT, SMALL, results_of
from util.storage.checkpoint import load_checkpoint


def method_run(name: str, trained: Path, colours: Path, output: Path, *options: object) -> list:
    shared = ["--checkpoint", trained, "--data", colours, "--output-dir", output, "--forget-per-task", 2, "--data-ratio", 1]
    return ["train_forget.py", "--method", name, *shared, "--num-tasks", 1, "--batch-size", 6, *options]


# A rate at which three epochs of these few images are enough; SCRUB's ascent needs the larger step.
RATES = {"scrub": "2e-3", "scrub_s": "2e-3", "lirf": "1e-3", "gs_lora": "2e-2", "gs_lora_pp": "2e-2", "lwf": "1e-3"}


def test_a_rate_that_ruins_the_model_is_said_to(trained, colours, command, tmp_path):
    code, _, err = command(*method_run("l2", trained, colours, tmp_path / "run", "--lr", 1, "--epochs", 1))
    assert code == 0
    after = results_of(tmp_path / "run")["tasks"][0]
    lost = after["before"]["acc_remain"] - after["after"]["acc_remain"]
    assert lost > 10
    assert f"warning: task 1 cost kept people {lost:.0f} points of accuracy: try a lower --lr than 1" in err
    code, _, err = command(*method_run("l2", trained, colours, tmp_path / "small", "--lr", "1e-5", "--epochs", 1))
    assert (code, err) == (0, "")


@pytest.mark.parametrize("name", METHODS)
def test_three_epochs_of_any_method_forget(name, trained, colours, command, tmp_path):
    own = {"lwf": ("--lambda-remain", 1), "lirf": ("--replay-weight", 1), "ssd": ("--dampening", 0.1)}.get(name, ())
    rate = ("--lr", RATES.get(name, "1e-3"))
    code, out, err = command(*method_run(name, trained, colours, tmp_path, "--epochs", 3, *rate, *own))
    assert code == 0, err
    (task,) = results_of(tmp_path)["tasks"]
    assert task["after"]["acc_forget"] < task["before"]["acc_forget"]
    assert METHODS[name].title in out
    assert ("deposits" in {path.name for path in tmp_path.iterdir()}) == (name == "lirf")
    assert ("adapters" in {path.name for path in tmp_path.iterdir()}) == (name in ("gs_lora", "gs_lora_pp", "unseen"))


@pytest.mark.parametrize("name", METHODS)
def test_few_shot_and_missing_classes_with_any_method(name, trained, colours, command, tmp_path):
    options = ("--epochs", 1, "--few-shot", 2, "--missing-classes", 2)
    code, _out, err = command(*method_run(name, trained, colours, tmp_path, *options))
    assert code == 0, err
    (task,) = results_of(tmp_path)["tasks"]
    assert task["train_images"] == {"forget": 4, "remain": 12}
    assert task["after"]["acc_missing"] is not None


@pytest.mark.parametrize("name", METHODS)
def test_the_published_readings_run(name, trained, colours, command, tmp_path):
    options = ("--as-published", "--epochs", 5, "--batch-size", 24)
    code, _, err = command(*method_run(name, trained, colours, tmp_path, *options))
    assert code == 0, err
    arguments = json.loads((tmp_path / "config.json").read_text())["arguments"]
    published = {option.dest: option.published for option in METHODS[name].options if option.published is not None}
    assert {key: arguments[key] for key in published} == published


def test_the_deposit_brings_back_what_the_student_forgot(trained, colours, command, tmp_path):
    run = tmp_path / "run"
    options = ("--epochs", 12, "--lr", "1e-3", "--replay-weight", 1, "--deposit-weight", 1)
    code, _, err = command(*method_run("lirf", trained, colours, run, *options))
    assert code == 0, err
    found = {}
    for name, deposit in (("student", ()), ("deposit", ("--deposit", run / "deposits" / "task_1.safetensors"))):
        output = tmp_path / name
        source = ("--checkpoint", run / "checkpoints" / "task_1.pth", *deposit, "--data", colours, "--output-dir", output)
        code, _, err = command("test.py", *source)
        assert code == 0, err
        found[name] = json.loads((output / "test.json").read_text())["groups"]["forgotten last"]["acc"]
    assert found["student"] <= 50
    assert found["deposit"] >= 75
    wrong = ("--deposit", run / "checkpoints" / "task_1.pth")
    code, _, err = command("test.py", "--checkpoint", trained, *wrong, "--data", colours, "--output-dir", tmp_path)
    assert code == 1
    assert "not a readable safetensors file" in err


@pytest.mark.parametrize("name", ["ewc", "mas"])
def test_what_a_method_carries_over_survives_a_stop_between_tasks(name, trained, colours, command, tmp_path, monkeypatch):
    from util.training import continual

    def arguments(folder: str) -> list:
        return [*method_run(name, trained, colours, tmp_path / folder, "--epochs", 2, "--lr", "1e-3"), "--num-tasks", 2]

    code, _, err = command(*arguments("whole"))
    assert code == 0, err
    begin = continual.ContinualRun._trainer

    def cut(self, task):
        if task.number == 2:
            raise KeyboardInterrupt
        return begin(self, task)

    monkeypatch.setattr(continual.ContinualRun, "_trainer", cut)
    assert command(*arguments("cut"))[0] == 130
    monkeypatch.undo()
    for folder, source in (("cut", ("--resume",)), ("next", ("--resume-from", tmp_path / "cut/checkpoints/task_1.pth"))):
        code, _, err = command(*arguments(folder), *source)
        assert code == 0, err
        whole, resumed = (load_checkpoint(tmp_path / f / "checkpoints" / "task_2.pth").model for f in ("whole", folder))
        resumed = resumed.state_dict()
        assert all(torch.equal(value, resumed[key]) for key, value in whole.state_dict().items())


def test_a_val_fraction_leaves_the_test_set_alone(trained, colours, command, tmp_path, monkeypatch):
    options = ("--epochs", 1, "--val-fraction", 0.25)
    code, _, err = command(*method_run("l2", trained, colours, tmp_path, *options))
    assert code == 0, err
    dataset = results_of(tmp_path)["dataset"]
    assert (dataset["train_images"], dataset["test_images"]) == (90, 30)
    pretrain = ("--data", colours, *SMALL, "--epochs", 1, "--output-dir", tmp_path / "pretrained")
    code, out, err = command("train_pretrain.py", *pretrain, "--val-fraction", 0.25)
    assert code == 0, err
    assert "held-out accuracy" in out
    code, _, err = command(*method_run("l2", trained, colours, tmp_path, "--overwrite", "--val-fraction", 1.5))
    assert code == 2
    assert "--val-fraction: 1.5 is out of range" in err


def test_the_readmes_example_of_a_method_runs(trained, colours, command, tmp_path, monkeypatch):
    """The README's example, in a file of its own beside the other methods."""
    (code,) = [block.split("```")[0] for block in (ROOT / "README.md").read_text().split("```python\n")[1:]]
    assert len(code.splitlines()) <= 30
    module = types.ModuleType("methods.example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "README.md", "exec"), module.__dict__)
    (method,) = (v for v in vars(module).values() if isinstance(v, type) and v.__module__ == "methods.example")
    monkeypatch.setitem(METHODS, method.name, method)
    code, _out, err = command(*method_run(method.name, trained, colours, tmp_path, "--epochs", 3, "--lr", "1e-3"))
    assert code == 0, err
    (task,) = results_of(tmp_path)["tasks"]
    assert task["after"]["acc_forget"] < task["before"]["acc_forget"]
    assert task["after"]["acc_remain"] >= task["before"]["acc_remain"] - 15
