"""Deletion requests as they come in: by name, one run on top of another; their records; and a run from its config."""

import json
import shutil

import pytest

from tests.conftest import results_of
from tests.test_bad_input import refused
from tests.test_command_lines import forget_options, run_folder  # noqa: F401
from train_forget import parse_arguments
from util.runtime.files import sha256


def request(trained, colours, output, *options: object) -> list:
    shared = ["--checkpoint", trained, "--data", colours, "--output-dir", output, "--bound", 30]
    return [
        "train_forget.py",
        "--method",
        "gs_lora",
        *shared,
        "--epochs",
        3,
        "--batch-size",
        12,
        "--data-ratio",
        0.5,
        *options,
    ]


@pytest.fixture
def named(trained, colours, command, tmp_path_factory):
    """Two requests by name, then one on top of them; made once a session."""
    folder = tmp_path_factory.getbasetemp() / "named"
    if not (folder / "second" / "figure.png").exists():
        first = request(trained, colours, folder / "first", "--forget-classes", "c3, c7", "--then", "#5")
        code, out, err = command(*first)
        assert code == 0, err
        assert "2 + 1 of 10 classes" in out
        source = folder / "first" / "checkpoints" / "task_2.pth"
        second = request(trained, colours, folder / "second", "--forget-classes", "c0", "--resume-from", source)
        code, _, err = command(*second)
        assert code == 0, err
    return folder


def test_classes_are_forgotten_by_name_run_after_run(named):
    tasks = results_of(named / "first")["tasks"] + results_of(named / "second")["tasks"]
    assert [task["task"] for task in tasks] == [1, 2, 3]
    assert [task["forget_classes"] for task in tasks] == [[3, 7], [5], [0]]
    assert tasks[2]["remain_classes"] == [1, 2, 4, 6, 8, 9]
    assert tasks[2]["after"]["acc_old"] is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--forget-classes", "c3"], "task 1 forgets 'c3' already"),
        (["--forget-classes", "c0", "--then", "c5"], "task 2 forgets 'c5' already"),
        (["--forget-classes", "c0,c1,c2,c4,c6,c8,c9"], "all 10 classes would be forgotten"),
        (["--num-tasks", 4, "--forget-per-task", 2], "has not forgotten what the first tasks of this run forget"),
    ],
)
def test_what_was_forgotten_before_is_known(words, message, named, trained, colours, command, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(named / "second", output)
    source = named / "first" / "checkpoints" / "task_2.pth"
    arguments = request(trained, colours, output, "--resume-from", source, *words, "--overwrite")
    refused(command(*arguments), 2, message)
    assert results_of(output) == results_of(named / "second")  # not even replaced


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--forget-classes", "c77"], "no class 'c77'; did you mean 'c7'"),
        (["--forget-classes", "10"], "no class '10'"),
        (["--forget-classes", ""], "a list of names is empty"),
        (["--forget-classes", "5"], "no class '5'; class id 5 is written #5"),
        (["--forget-classes", "#10"], "no class '#10'"),
        (["--forget-classes", "c1", "--then", "c2,c1"], "task 1 forgets 'c1' already"),
        (["--forget-classes", "c1,c1"], "task 1 forgets 'c1' already"),
        (["--forget-classes", "c1", "--few-shot", 13], "has 12 training images, fewer than the 13"),
    ],
)
def test_impossible_names_end_before_anything_starts(words, message, trained, colours, command, tmp_path):
    refused(command(*request(trained, colours, tmp_path / "run", *words)), 2, message)
    assert not (tmp_path / "run").exists()


def test_an_interrupted_request_on_top_of_another_run_goes_on(named, trained, colours, command, tmp_path, monkeypatch):
    from util.training import continual

    output, source = tmp_path / "run", named / "first" / "checkpoints" / "task_2.pth"
    words = request(trained, colours, output, "--forget-classes", "c0", "--then", "c1", "--resume-from", source)
    keep = continual.ContinualRun._forget

    def cut(self, task):
        if task.number == 4:
            raise KeyboardInterrupt
        keep(self, task)

    monkeypatch.setattr(continual.ContinualRun, "_forget", cut)
    assert command(*words)[0] == 130
    monkeypatch.undo()
    code, out, err = command(*words, "--resume")
    assert code == 0, err
    assert "task 3/4" not in out
    tasks = results_of(output)["tasks"]
    assert [task["forget_classes"] for task in tasks] == [[0], [1]]
    assert tasks[0]["after"] == results_of(named / "second")["tasks"][0]["after"]


def test_a_record_says_what_was_done(named, trained):
    first, second = (json.loads((named / f"first/deletions/task_{t}.json").read_text()) for t in (1, 2))
    assert first["request"]["forget"] == {"3": "c3", "7": "c7"}
    assert second["request"]["forgotten_before"] == {"3": "c3", "7": "c7"}
    assert first["model"]["after"] == second["model"]["before"] != second["model"]["after"]
    assert first["model"]["pretrained_file"] == sha256(trained)
    assert second["model"]["after_file"] == sha256(named / "first" / "checkpoints" / "task_2.pth")
    assert second["previous_record"] == sha256(named / "first" / "deletions" / "task_1.json")
    assert (len(first["images"]["forget"]), len(first["images"]["remain"])) == (2 * 6, 8 * 6)
    assert second["accuracies"]["after"] == results_of(named / "first")["tasks"][1]["after"]
    third = json.loads((named / "second/deletions/task_3.json").read_text())
    assert third["model"]["before"] == second["model"]["after"]
    assert third["previous_record"] == sha256(named / "first" / "deletions" / "task_2.json")


@pytest.mark.parametrize("record", ["first 1", "first 2", "second 3"])
def test_a_record_is_confirmed(record, named, command):
    run, task = record.split()
    code, out, err = command("test.py", "--verify-record", named / run / "deletions" / f"task_{task}.json")
    assert code == 0, out + err
    assert "NOT SO" not in out
    assert out.count("confirmed") >= 8


def change(values: dict, path: str, value: object) -> None:
    *way, last = path.split("/")
    for key in way:
        values = values[key]
    values[last] = value(values[last]) if callable(value) else value


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("request/forget", {"3": "c4", "7": "c7"}, "names of the forgotten classes"),
        ("model/before", "0" * 64, "weights before"),
        ("model/after", "0" * 64, "weights after"),
        ("images/forget", lambda hashes: ["0" * 64, *hashes[1:]], "training images to forget"),
        ("images/remain", lambda hashes: ["0" * 64, *hashes[1:]], "training images to remain"),
        ("images/test", "0" * 64, "test images"),
        ("accuracies/after/acc_forget", -1.0, "accuracies after"),
        ("accuracies/before/acc_remain", -1.0, "accuracies before"),
    ],
)
def test_an_untrue_record_is_not_confirmed(path, value, what, named, command, tmp_path):
    shutil.copytree(named / "first", tmp_path / "run")
    file = tmp_path / "run" / "deletions" / "task_1.json"
    record = json.loads(file.read_text())
    change(record, path, value)
    file.write_text(json.dumps(record))
    code, out, err = command("test.py", "--verify-record", file)
    assert code == 1, out
    assert f"checks failed: {what}" in err
    # Nor is the record after it: it names this one's hash.
    code, _, err = command("test.py", "--verify-record", file.with_name("task_2.json"))
    assert code == 1
    assert "record before it" in err


@pytest.mark.parametrize(("bf16", "lean"), [(True, False), (False, True), (True, True), (False, False)])
def test_a_record_is_recomputed_in_the_arithmetic_it_was_made_in(bf16, lean, named, command, tmp_path, monkeypatch):
    from util.training import record_check as module

    shutil.copytree(named / "first", tmp_path / "run")
    file = tmp_path / "run" / "deletions" / "task_1.json"
    values = json.loads(file.read_text())
    change(values, "hardware/bf16", bf16)
    change(values, "hardware/cls_only_last_block", lean)
    file.write_text(json.dumps(values))
    predict, used = module.predict, []
    monkeypatch.setattr(module, "predict", lambda *rest: used.append(rest[2]) or predict(*rest))
    command("test.py", "--verify-record", file)
    assert [(hardware.bf16, hardware.cls_only_last_block) for hardware in used] == [(bf16, lean)] * 2


def test_a_replaced_model_or_a_damaged_record_is_told(named, command, tmp_path):
    shutil.copytree(named / "first", tmp_path / "run")
    checkpoints, file = tmp_path / "run" / "checkpoints", tmp_path / "run" / "deletions" / "task_2.json"
    shutil.copy(checkpoints / "task_1.pth", checkpoints / "task_2.pth")
    code, _out, err = command("test.py", "--verify-record", file)
    assert code == 1
    assert "file of the model after, weights after" in err
    file.write_text('{"schema": 1}')
    refused(command("test.py", "--verify-record", file), 1, "not a record of deletion")
    record = json.loads((named / "first/deletions/task_2.json").read_text())
    del record["images"]["forget"]
    file.write_text(json.dumps(record))
    refused(command("test.py", "--verify-record", file), 1, "damaged record")
    refused(command("test.py", "--verify-record", tmp_path / "absent.json"), 2, "no file")


def test_an_audit_is_confirmed_with_its_record(named, here, command, tmp_path):
    run = shutil.copytree(named / "first", tmp_path / "run")
    words = ("--metrics", "readout", "--num-references", 3, "--num-originals", 1)
    code, _, err = command("scripts/audit.py", run, *words)
    assert code == 0, err
    file, audit_file = run / "deletions" / "task_1.json", run / "audit" / "audit.json"
    whole = json.loads(audit_file.read_text())

    def audit_line(path: str, value: object) -> tuple[int, str]:
        content = json.loads(json.dumps(whole))
        change(content, path, value)
        audit_file.write_text(json.dumps(content))
        code, out, _ = command("test.py", "--verify-record", file)
        return code, next(line for line in out.splitlines() if line.startswith("| audit"))

    code, line = audit_line("method", "GS-LoRA")
    assert code == 0
    # The record, the audited model, three references and the pre-trained model.
    assert "| audit of request 1" in line and "| confirmed" in line and "all 6 files" in line

    def entry(group: str, **changes: str) -> tuple[str, list[dict]]:
        return group, [whole[group][0] | changes, *whole[group][1:]]

    request = whole["requests"][0]
    for changed in (
        ("requests", [request | {"record_sha256": "0" * 64}]),
        ("requests", [request | {"after_sha256": "0" * 64}]),
        entry("references", file=str(file)),
    ):
        code, line = audit_line(*changed)
        assert code == 1
        assert "NOT SO" in line and "another file: " in line
    code, line = audit_line(*entry("references", file=str(tmp_path / "gone.pth")))
    assert code == 0
    assert "not checked" in line and "gone.pth" in line
    code, line = audit_line("requests", [])
    assert code == 0
    assert "not checked" in line and "none after task 1" in line


def same_but_times(first, second) -> None:
    times = ("train_seconds", "eval_seconds", "images_per_second", "peak_memory_mb")
    for results in (first, second):
        for task in results["tasks"]:
            assert all(task.pop(key) >= 0 for key in times)
    assert first == second


def test_a_config_is_enough_to_run_again(named, command, tmp_path):
    config = ("--config", named / "first" / "config.json")
    code, _, err = command("train_forget.py", *config, "--output-dir", tmp_path / "again")
    assert code == 0, err
    same_but_times(results_of(tmp_path / "again"), results_of(named / "first"))
    other = ("--output-dir", tmp_path / "other", "--seed", 7, "--then", "c9")
    code, _, err = command("train_forget.py", *config, *other)
    assert code == 0, err
    assert [task["forget_classes"] for task in results_of(tmp_path / "other")["tasks"]] == [[3, 7], [5], [9]]
    assert results_of(tmp_path / "other")["seed"] == 7


def test_a_config_of_a_comparisons_run_is_enough_as_well(trained, colours, here, command, tmp_path):
    words = ["--checkpoint", trained, "--data", colours, "--num-tasks", 1, "--epochs", 1, "--batch-size", 12]
    code, _, err = command("scripts/compare.py", "--methods", "gs_lora", "--output-dir", tmp_path / "all", "--", *words)
    assert code == 0, err
    run = tmp_path / "all" / "gs_lora-seed1337"
    code, _, err = command("train_forget.py", "--config", run / "config.json", "--output-dir", tmp_path / "again")
    assert code == 0, err
    same_but_times(results_of(tmp_path / "again"), results_of(run))


def test_a_config_of_drawn_classes_and_of_pre_training(run_folder, colours, command, tmp_path):  # noqa: F811
    code, _, err = command("train_forget.py", "--config", run_folder / "config.json", "--output-dir", tmp_path / "again")
    assert code == 0, err
    same_but_times(results_of(tmp_path / "again"), results_of(run_folder))
    small = ("--image-size", 32, "--depth", 1, "--epochs", 2, "--batch-size", 24, "--drop-rate", 0.1)
    code, _, err = command("train_pretrain.py", "--data", colours, *small, "--output-dir", tmp_path / "first")
    assert code == 0, err
    config = tmp_path / "first" / "config.json"
    code, _, err = command("train_pretrain.py", "--config", config, "--output-dir", tmp_path / "second")
    assert code == 0, err
    assert sha256(tmp_path / "first" / "checkpoint.pth") == sha256(tmp_path / "second" / "checkpoint.pth")
    refused(command("train_forget.py", "--config", config), 2, "not the config.json of a run of train_forget.py")


def test_configs_that_cannot_be_used(named, command, tmp_path):
    refused(command("train_forget.py", "--config", tmp_path / "absent.json"), 2, "no file")
    (tmp_path / "damaged.json").write_text("{")
    refused(command("train_forget.py", "--config", tmp_path / "damaged.json"), 1, "not readable as JSON")
    config = json.loads((named / "first" / "config.json").read_text())
    config["arguments"]["no_such"] = 1
    (tmp_path / "strange.json").write_text(json.dumps(config))
    refused(command("train_forget.py", "--config", tmp_path / "strange.json"), 2, "--no-such of the file is no option here")
    config["git_commit"], config["arguments"] = "abc", {"method": "amnesia"}
    (tmp_path / "old.json").write_text(json.dumps(config))
    code, _, err = command("train_forget.py", "--config", tmp_path / "old.json")
    assert code == 2
    assert "was written with git_commit abc" in err


def test_the_first_request_of_forget_options_is_checked(trained, colours, command, tmp_path):
    """Nothing is replaced by a run that cannot start: wrong ranks and optimizers included."""
    output = tmp_path / "run"
    code, _, err = command("train_forget.py", *forget_options(trained, colours, output), "--epochs", 1)
    assert code == 0, err
    before = results_of(output)
    for words, message in ((("--rank", 1000), "rank 1000"), (("--opt", "no_such"), "--opt no_such")):
        refused(command("train_forget.py", *forget_options(trained, colours, output), "--overwrite", *words), 2, message)
        assert results_of(output) == before


PROTOCOL = {"method": "gs_lora", "data_ratio": 0.1, "epochs": 100, "min_updates": 0, "batch_size": 48}
BY_NAME = {"method": "unseen", "data_ratio": 1.0, "epochs": 5, "min_updates": 300, "batch_size": 16}


def chosen(*words: object) -> dict:
    args = parse_arguments(["--checkpoint", "x", *map(str, words)])
    return {name: getattr(args, name) for name in PROTOCOL}


def test_a_request_by_name_deletes_and_the_protocol_is_the_papers(capsys, tmp_path):
    assert chosen() == chosen("--num-tasks", 1) == PROTOCOL
    assert chosen("--forget-classes", "ann") == chosen("--forget-classes", "ann", "--method", "unseen") == BY_NAME
    given = ("--method", "scrub", "--data-ratio", 0.5, "--epochs", 7)
    assert chosen("--forget-classes", "ann", *given) == BY_NAME | {
        "method": "scrub",
        "data_ratio": 0.5,
        "epochs": 7,
        "min_updates": 0,
    }
    assert chosen("--forget-classes", "ann", "--epochs=7", "--min-updates", 9)["min_updates"] == 9
    assert chosen("--forget-classes", "ann", "--as-published") == PROTOCOL
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "(default: gs_lora; of a request by name: unseen)" in told
    assert "(default: 0.1; of a request by name: 1.0)" in told
    assert "--lora-place NAME" in told and "(default: 0.2; published: 0.2 0.25 0.25 0.2)" in told


def test_options_of_a_file_count_as_given_ones(tmp_path):
    for saved, expected in ((PROTOCOL, PROTOCOL), (PROTOCOL | {"forget_classes": "bob"}, PROTOCOL), ({}, BY_NAME)):
        file = tmp_path / "config.json"
        file.write_text(json.dumps({"script": "train_forget.py", "arguments": saved}))
        assert chosen("--config", file, "--forget-classes", "ann") == expected
    file.write_text(json.dumps({"script": "train_forget.py", "arguments": {"forget_classes": "bob"}}))
    assert chosen("--config", file) == BY_NAME


def test_few_photos_of_a_person_are_told(trained, colours, command, tmp_path):
    words = ("--checkpoint", trained, "--data", colours, "--epochs", 1, "--output-dir", tmp_path)
    code, out, err = command("train_forget.py", *words, "--forget-classes", "c1,c4", "--data-ratio", 0.5)
    assert code == 0 and out.startswith("Unseen on colours: 1 × 2 of 10 classes")
    assert "warning: fewer than 9 training photos of c1 (6), c4 (6): the model may still know them" in err
    count = len([*(colours / "test" / "c1").iterdir()])
    assert count < 5 and f"warning: fewer than 5 test photos of c1 ({count}), c4 ({count}): an audit will hardly" in err
    code, _, err = command("train_forget.py", *words, "--overwrite", "--forget-classes", "c1")
    assert code == 0 and "training photos" not in err


def test_unseen_stops_after_the_epoch_that_ruins_the_network(trained, colours, command, tmp_path):
    words = ("--checkpoint", trained, "--data", colours, "--output-dir", tmp_path, "--forget-classes", "c1")
    code, _, err = command("train_forget.py", *words, "--lr", 10)
    assert code == 1
    assert "task 1 has ruined the network" in err and "lower --lr, now 10" in err
    assert not (tmp_path / "checkpoints" / "task_1.pth").exists()


def test_an_onnx_file_is_no_checkpoint(colours, command, tmp_path):
    (tmp_path / "face.onnx").write_bytes(b"graph")
    code, _, err = command("train_forget.py", "--checkpoint", tmp_path / "face.onnx", "--data", colours)
    assert code == 2
    assert f"make one of it with train_pretrain.py --model {tmp_path / 'face.onnx'}" in err
