"""Folders of the user's, with names like ours: nothing in them is ever lost.

USER_FOLDERS=200 pytest tests/test_user_folders.py tries that many.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from tests.conftest import SMALL, results_of
from tests.test_bad_input import refused
from tests.test_command_lines import forget_options, run_folder  # noqa: F401

FOLDERS = int(os.environ.get("USER_FOLDERS", "12"))
NAMES = ["checkpoints", "config.json", "published", "audit", "adapters", "deletions", "deposits", "results.json", "table.md"]
NAMES += ["figure.png", "checkpoint.pth", "published.pth", "task_1.pth", "last.pth", ".last.pth.12.tmp", ".lock", "log.txt"]
NAMES += ["events.out.tfevents.1", ".replaced", "test.json", "per_class.csv", "audit.json", "gs_lora-seed1337", "mine"]


def fill(folder: Path, chance: random.Random, outside: Path, depth: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in chance.sample(NAMES, chance.randint(0 if depth else 1, 5)):
        kind, path = chance.choice(["file", "file", "folder", "link", "dead link"]), folder / name
        if kind == "file":
            path.write_text(chance.choice(["", "mine", '{"script": "train_forget.py"}', '{"finished": true}']))
        elif kind == "folder" and depth < 2:
            fill(path, chance, outside, depth + 1)
        else:
            path.symlink_to(outside / ("absent" if kind == "dead link" else chance.choice(["file", "folder"])))


def content(folder: Path) -> dict[str, object]:
    found = {}
    for path in sorted(folder.rglob("*")):
        what = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = what
    return found


def test_random_folders_of_the_users_keep_all_that_they_hold(trained, colours, run_folder, command, tmp_path):  # noqa: F811
    forget = [*forget_options(trained, colours, "")[:4], "--num-tasks", 1, "--epochs", 1, "--batch-size", 48]
    scripts = [
        ("train_pretrain.py", ["--data", colours, *SMALL, "--epochs", 1, "--batch-size", 60]),
        ("train_forget.py", forget),
        ("test.py", ["--checkpoint", trained, "--data", colours, "--random-pairs", 0]),
        ("scripts/compare.py", ["--methods", "gs_lora"]),
        ("scripts/table.py", ["--results", run_folder / "results.json"]),
        ("scripts/release.py", ["--checkpoint", run_folder / "checkpoints" / "task_1.pth", "--no-onnx"]),
    ]
    for number in range(FOLDERS):
        chance, place = random.Random(number), tmp_path / f"{number}"
        (place / "outside" / "folder").mkdir(parents=True)
        for name in ("file", "folder/task_1.pth", "folder/config.json"):
            (place / "outside" / name).write_text("mine")
        fill(place / "home", chance, place / "outside")
        before = content(place)
        script, words = chance.choice(scripts)
        flags = chance.choice([[], ["--resume"], ["--overwrite"], ["--resume", "--overwrite"]])
        if script == "scripts/compare.py":
            flags = [flag for flag in flags if flag == "--overwrite"]
        elif not script.startswith("train"):
            flags = []
        after_dashes = ["--", *forget] if script == "scripts/compare.py" else []
        code, _, err = command(script, *words, "--output-dir", place / "home", *flags, *after_dashes)
        assert "Traceback" not in err
        assert code in (0, 1, 2)
        now = content(place)
        assert {name: now.get(name) for name in before} == before, (script, flags, err)
        if code == 2:
            assert now == before, (script, flags)


def test_a_folder_of_files_is_not_taken(colours, command, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "x.pth").write_text("mine")
    monkeypatch.chdir(tmp_path)
    words = ("--data", colours, *SMALL, "--epochs", 1, "--output-dir", ".")
    for flags in ((), ("--overwrite",), ("--resume",), ("--resume", "--overwrite")):
        refused(command("train_pretrain.py", *words, *flags), 2, ". holds other files ('checkpoints' first)")
    assert content(tmp_path) == {"checkpoints": "folder", "checkpoints/x.pth": b"mine"}


@pytest.mark.parametrize("where", ["checkpoints/pretrained.pth", "checkpoint.pth"])
def test_a_run_never_deletes_what_it_reads(where, trained, colours, command, tmp_path):
    """In a folder that is no run's, in a pre-training's own folder, and where --overwrite would replace it."""
    home = tmp_path / "p"
    if where == "checkpoint.pth":
        shutil.copytree(trained.parent, home)
    else:
        (home / "checkpoints").mkdir(parents=True)
        shutil.copy(trained, home / where)
    before = content(home)
    words = [*forget_options(home / where, colours, home), "--overwrite"]
    message = "is a folder of train_pretrain.py" if where == "checkpoint.pth" else "holds other files ('checkpoints' first)"
    refused(command("train_forget.py", *words), 2, message)
    assert content(home) == before


def test_overwrite_spares_what_the_command_reads_and_what_is_not_ours(run_folder, trained, colours, command, tmp_path):  # noqa: F811
    run = shutil.copytree(run_folder, tmp_path / "run")
    own = {"checkpoints/mine.pth": b"1", "audit/notes.txt": b"2", "adapters/task_1_mine.safetensors": b"3", "mine/a": b"4"}
    for name, what in own.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(what)
    before = content(run)
    options = [*forget_options(trained, colours, run), "--epochs", 1, "--overwrite"]
    task = run / "checkpoints" / "task_1.pth"
    refused(command("train_forget.py", *options, "--resume-from", task), 2, f"--resume-from {task} lies in the run")
    again = ["--config", run / "config.json", "--output-dir", run, "--overwrite"]
    refused(command("train_forget.py", *again), 2, "config.json lies in the run")
    unseen = [*forget_options(trained, colours, run)[:-4], "--overwrite", "--method", "unseen", "--few-shot", 1]
    refused(command("train_forget.py", *unseen), 2, "raise --data-ratio or --few-shot")
    assert content(run) == before
    code, out, err = command("train_forget.py", *options)
    assert code == 0, err
    assert "the earlier run is kept in .replaced until this one has finished" in out
    now = content(run)
    assert {name: now[name] for name in own} == own
    assert ".replaced" not in now
    assert len([name for name in now if "tfevents" in name]) == 1
    assert json.loads(now["config.json"])["arguments"]["epochs"] == 1


def test_a_replaced_run_stays_until_its_successor_has_finished(run_folder, trained, colours, command, tmp_path):  # noqa: F811
    run = shutil.copytree(run_folder, tmp_path / "run")
    before = results_of(run)
    words = [*forget_options(trained, colours, run), "--lr", "1e30", "--precision", "fp32"]
    for _ in range(2):  # a second try replaces the first, not what it has replaced
        refused(command("train_forget.py", *words, "--overwrite"), 1, "the loss is not finite")
        assert results_of(run / ".replaced") == before
    plain = [*forget_options(trained, colours, run), "--epochs", 1]
    refused(command("train_forget.py", *plain), 2, "holds a run")
    task = run / ".replaced" / "checkpoints" / "task_1.pth"
    for flags in (["--overwrite"], ["--resume", "--overwrite"]):
        result = command("train_forget.py", *plain, *flags, "--resume-from", task)
        refused(result, 2, f"--resume-from {task} lies in the run")
    (run / ".replaced" / "mine.txt").write_text("mine")
    code, _, err = command("train_forget.py", *plain, "--overwrite")
    assert code == 0, err
    assert content(run / ".replaced") == {"mine.txt": b"mine"}
    assert len(results_of(run)["tasks"]) == 2
    before = results_of(run)  # which is set aside beside it in turn
    # As one leaves it that was killed when it had finished, before it removed what it replaced.
    shutil.copytree(run / "checkpoints", run / ".replaced" / "checkpoints")
    refused(command("train_forget.py", *words, "--overwrite"), 1, "the loss is not finite")
    assert results_of(run / ".replaced") == before


def test_a_run_that_was_killed_when_it_had_finished_removes_what_it_replaced(run_folder, command, tmp_path):  # noqa: F811
    run = shutil.copytree(run_folder, tmp_path / "run")
    before = content(run)
    shutil.copytree(run / "checkpoints", run / ".replaced" / "checkpoints")
    again = ["--config", tmp_path / "config.json", "--output-dir", run, "--resume"]
    shutil.copy(run / "config.json", tmp_path)
    code, _, err = command("train_forget.py", *again)
    assert code == 0, err
    assert content(run) == before


def test_nothing_is_removed_through_a_link(run_folder, trained, colours, command, tmp_path):  # noqa: F811
    run = shutil.copytree(run_folder, tmp_path / "run")
    vault = (run / "checkpoints").rename(tmp_path / "vault")
    (run / "checkpoints").symlink_to(vault)
    (vault / "task_5.pth").write_text("mine")
    code, _, err = command("train_forget.py", *forget_options(trained, colours, run), "--epochs", 1, "--overwrite")
    assert code == 0, err
    assert (vault / "task_5.pth").read_text() == "mine"


def test_requests_data_and_tasks_have_default_folders_of_their_own(trained, colours, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = ["--checkpoint", trained, "--epochs", 1, "--batch-size", 12, "--rank", 4]
    requests = [["--forget-classes", "c1"], ["--forget-classes", "c2"], ["--forget-classes", "c1", "--then", "c2"]]
    requests += [["--num-tasks", 2, "--forget-per-task", 1]]
    for number, words in enumerate(requests, start=1):
        code, _, err = command("train_forget.py", *shared, "--data", colours, *words)
        assert code == 0, err
        assert len(list((tmp_path / "exps").iterdir())) == number
    folders = (tmp_path / "exps").iterdir()
    first = next(folder for folder in folders if results_of(folder)["tasks"][0]["forget_classes"] == [1])
    words = ["--data", colours, "--forget-classes", "c2", "--resume-from", first / "checkpoints/task_1.pth"]
    code, out, err = command("train_forget.py", *shared, *words)
    assert code == 0, err
    assert "task 2 forgets c2" in out
    assert (first / "deletions" / "task_1.json").exists()
    assert len(list((tmp_path / "exps").iterdir())) == len(requests) + 1
    drawn = next((tmp_path / "exps").glob("*-10-1-seed1337"))
    words = [*requests[3], "--resume-from", drawn / "checkpoints/task_1.pth"]
    assert command("train_forget.py", *shared, "--data", colours, *words)[0] == 0
    other = shutil.copytree(colours, tmp_path / "other" / "colours")
    image = next((other / "train" / "c5").iterdir())
    image.unlink()
    code, _, err = command("train_forget.py", *shared, "--data", other, *requests[3])
    assert code == 0, err
    assert "the images of 1 of 10 classes are others than" in err
    assert len(list((tmp_path / "exps").iterdir())) == len(requests) + 3


def test_a_run_does_not_go_on_with_other_images(trained, colours, command, tmp_path):
    data = shutil.copytree(colours, tmp_path / "data")
    words = [*forget_options(trained, data, tmp_path / "run"), "--epochs", 1]
    assert command("train_forget.py", *words)[0] == 0
    moved = data.rename(tmp_path / "moved")
    words[words.index("--data") + 1] = moved
    code, out, err = command("train_forget.py", *words, "--resume")
    assert code == 0, err
    assert "GS-LoRA" in out
    next((moved / "test" / "c5").iterdir()).unlink()
    refused(command("train_forget.py", *words, "--resume"), 2, "other options: --data has other content now")
    pretrained = shutil.copy(trained, tmp_path / "elsewhere.pth")
    next((moved / "test" / "c5").iterdir()).unlink()
    words[words.index("--checkpoint") + 1] = pretrained
    words[words.index("--data") + 1] = colours
    assert command("train_forget.py", *words, "--resume")[0] == 0


def test_a_finished_run_is_only_told_again(trained, colours, command, tmp_path):
    words = [*forget_options(trained, colours, tmp_path / "run"), "--epochs", 1]
    pretrain = ["--data", colours, *SMALL, "--epochs", 1, "--output-dir", tmp_path / "p"]
    for script, arguments, told in (
        ("train_forget.py", words, "\nGS-LoRA"),
        ("train_pretrain.py", pretrain, "finished before"),
    ):
        assert command(script, *arguments)[0] == 0
        before = content(tmp_path)
        code, out, err = command(script, *arguments, "--resume")
        assert code == 0, err
        assert told in out
        assert content(tmp_path) == before
