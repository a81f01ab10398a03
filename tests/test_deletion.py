"""One deletion request, as an engineer makes it: whom, photos under other names, and images that are erased afterwards."""

import json
import os
import shutil

import pytest
import torch
from PIL import Image

from tests.conftest import SMALL, results_of, write_folder
from tests.test_bad_input import refused
from tests.test_requests import request


@pytest.fixture
def data(colours, tmp_path):
    return shutil.copytree(colours, tmp_path / "faces")


def test_photos_that_stay_under_another_name_are_refused(trained, data, command, tmp_path):
    photos = sorted((data / "train" / "c3").iterdir())
    for photo in photos[:2]:
        shutil.copy(photo, data / "train" / "c7" / f"copy-{photo.name}")
    Image.open(photos[2]).save(data / "test" / "c8" / "copy.bmp")  # another file of the same pixels
    words = request(trained, data, tmp_path / "run", "--forget-classes", "c3")
    refused(command(*words), 2, "2 of the photos of c3 are kept as c7's (train/c3/")
    refused(command(*words), 2, "1 of the photos of c3 are kept as c8's (train/c3/")
    assert not (tmp_path / "run").exists()
    code, _, err = command(*words, "--allow-copies")
    assert code == 0, err
    assert "warning: faces: 2 of the photos of c3 are kept as c7's" in err
    code, _, err = command(*request(trained, data, tmp_path / "all", "--forget-classes", "c3,c7", "--then", "c8"))
    assert code == 0, err
    drawn = request(trained, data, tmp_path / "drawn", "--num-tasks", 1, "--forget-per-task", 9)
    code, _, err = command(*drawn)
    assert code == 0, err


@pytest.mark.parametrize("text", ["c3\nc7\n", "\ufeffc3\r\n\r\n c7 "])
def test_names_come_one_a_line_or_from_a_file(text, trained, colours, command, tmp_path):
    (tmp_path / "names.txt").write_text(text, "utf-8", newline="")
    for words in (text.removeprefix("\ufeff"), f"@{tmp_path / 'names.txt'}"):
        output = tmp_path / f"run{words[0]}"
        code, out, err = command(*request(trained, colours, output, "--forget-classes", words))
        assert code == 0, err
        assert "task 1 forgets c3, c7\n" in out
        assert results_of(output)["tasks"][0]["forget_classes"] == [3, 7]
    (tmp_path / "names.txt").write_text("c3, c7")  # a line is one name
    line = request(trained, colours, tmp_path / "x", "--forget-classes", f"@{tmp_path / 'names.txt'}")
    refused(command(*line), 2, "no class 'c3, c7'")
    (tmp_path / "names.txt").write_text("c1")  # a run holds the names, not the file's
    again = ["--config", tmp_path / "run@" / "config.json", "--output-dir", tmp_path / "again"]
    code, _, err = command("train_forget.py", *again)
    assert code == 0, err
    assert results_of(tmp_path / "again")["tasks"][0]["forget_classes"] == [3, 7]
    missing = request(trained, colours, tmp_path / "x", "--forget-classes", f"@{tmp_path / 'absent'}")
    refused(command(*missing), 2, "--forget-classes: cannot read")


def test_folders_whose_names_are_numbers(command, tmp_path, make_images):
    """As CASIA-100's are: the tenth folder in order is not that of the name 10."""
    sets = [make_images(4, 6, 32), make_images(4, 2, 32, seed=1)]
    names = ("0", "10", "2", "31")
    for images in sets:
        object.__setattr__(images, "classes", names)
    data = write_folder(tmp_path / "faces", *sets)
    pretrain = ["--data", data, *SMALL, "--epochs", 1, "--output-dir", tmp_path / "p"]
    assert command("train_pretrain.py", *pretrain)[0] == 0
    refused(command("train_pretrain.py", *pretrain, "--overwrite", "--without-classes", "1"), 2, "class id 1 is written #1")
    shared = ["--checkpoint", tmp_path / "p" / "checkpoint.pth", "--data", data]
    forget = ["train_forget.py", *shared, "--epochs", 1, "--batch-size", 8]
    refused(command(*forget, "--forget-classes", "10,3"), 2, "no class '3'; class id 3 is written #3")
    refused(command(*forget, "--forget-classes", "10", "--then", "1"), 2, "no class '1'; class id 1 is written #1")
    refused(command("test.py", *shared, "--forget-classes", "3", "--output-dir", tmp_path / "t"), 2, "written #3")
    audit = ["--before", shared[1], "--after", shared[1], "--data", data, "--forget-classes", "3"]
    refused(command("scripts/audit.py", *audit), 2, "written #3")
    code, out, err = command(*forget, "--forget-classes", "10, #3", "--output-dir", tmp_path / "run")
    assert code == 0, err
    assert "task 1 forgets 10, 31" in out
    assert results_of(tmp_path / "run")["tasks"][0]["forget_classes"] == [1, 3]


def test_after_the_images_are_erased_requests_go_on(trained, data, command, tmp_path):
    run, after = tmp_path / "run", tmp_path / "run" / "checkpoints" / "task_1.pth"
    assert command(*request(trained, data, run, "--forget-classes", "c3"))[0] == 0
    for split in ("train", "test"):
        shutil.rmtree(data / split / "c3")
    shared = ["--data", data, "--output-dir"]
    code, out, err = command("test.py", "--checkpoint", after, *shared, tmp_path / "t")
    assert code == 0, err
    refused(command("test.py", "--checkpoint", trained, *shared, tmp_path / "t2"), 2, "knows 10 classes, the data set")
    record = run / "deletions" / "task_1.json"
    code, out, err = command("test.py", "--verify-record", record, "--data", data)
    assert code == 0, out + err
    assert "images of 1 class are gone: c3" in out
    words = ["--forget-classes", "c5", "--then", "c6", "--resume-from", after]
    code, out, err = command(*request(trained, data, tmp_path / "next", *words))
    assert code == 0, err
    assert "task 2 forgets c5\ntask 3 forgets c6\n" in out
    tasks = results_of(tmp_path / "next")["tasks"]
    assert [task["forget_classes"] for task in tasks] == [[5], [6]]
    assert tasks[0]["after"]["acc_old"] is None  # nothing left to measure it on
    refused(command(*request(trained, data, tmp_path / "x", "--forget-classes", "c5")), 2, "knows 10 classes")
    shutil.rmtree(data / "train" / "c9")
    shutil.rmtree(data / "test" / "c9")
    refused(command(*request(trained, data, tmp_path / "x", *words)), 2, "knows 10 classes, the data set faces has 8")


def test_photos_of_the_forgotten_are_not_taught_again(trained, data, command, tmp_path):
    run = tmp_path / "run"
    assert command(*request(trained, data, run, "--forget-classes", "c3"))[0] == 0
    photos = sorted((data / "train" / "c3").iterdir())
    for photo in photos[:2]:
        photo.rename(data / "train" / "c7" / f"moved-{photo.name}")
    words = ["--forget-classes", "c5", "--resume-from", run / "checkpoints" / "task_1.pth"]
    message = "2 photos that were forgotten before are c7's now (train/c7/moved-"
    refused(command(*request(trained, data, tmp_path / "next", *words)), 2, message)
    code, _, err = command(*request(trained, data, tmp_path / "next", *words, "--allow-copies"))
    assert code == 0, err
    assert f"warning: faces: {message}" in err
    words = ["--forget-classes", "c6", "--resume-from", tmp_path / "next" / "checkpoints" / "task_2.pth"]
    refused(command(*request(trained, data, tmp_path / "third", *words)), 2, message)


@pytest.mark.skipif(os.name != "posix", reason="names are text elsewhere")
def test_names_that_are_no_text(command, tmp_path, make_images, monkeypatch):
    data = write_folder(tmp_path / "faces", make_images(4, 8, 32), make_images(4, 2, 32, seed=1))
    odd = os.fsdecode(b'\xff\xfe, "odd"\n')
    for split in ("train", "test"):
        (data / split / "c2").rename(data / split / odd)
    checkpoint, named = tmp_path / "p" / "checkpoint.pth", data.rename(tmp_path / os.fsdecode(b"faces\xff"))
    monkeypatch.chdir(tmp_path)  # default folders are named for the data
    code, _, err = command("train_pretrain.py", "--data", named, *SMALL, "--epochs", 1)
    assert code == 0, err
    assert len(list((tmp_path / "exps").glob("pretrain-faces?udcff-*"))) == 1
    refused(command("train_pretrain.py", "--data", named, "--output-dir", os.fsdecode(b"x\xff")), 2, "not plain text")
    data = named.rename(data)
    code, _, err = command("train_pretrain.py", "--data", data, *SMALL, "--epochs", 1, "--output-dir", checkpoint.parent)
    assert code == 0, err
    (tmp_path / "names").write_bytes(os.fsencode('"' + odd.replace('"', '""') + '"'))
    run, shared = tmp_path / "run", ["--checkpoint", checkpoint, "--data", data]
    forget = [*shared, "--epochs", 1, "--batch-size", 8, "--output-dir", run, "--forget-classes", f"@{tmp_path / 'names'}"]
    code, _, err = command("train_forget.py", *forget)
    assert code == 0, err
    task = run / "checkpoints" / "task_1.pth"
    code, _, err = command("test.py", "--checkpoint", task, "--data", data, "--output-dir", tmp_path / "t")
    assert code == 0, err
    code, _, err = command("test.py", "--verify-record", run / "deletions" / "task_1.json")
    assert code == 0, err
    code, _, err = command("scripts/release.py", "--checkpoint", task, "--output-dir", tmp_path / "release", "--no-onnx")
    assert code == 0, err
    code, _, err = command("train_forget.py", "--config", run / "config.json", "--output-dir", tmp_path / "again")
    assert code == 0, err
    assert torch.load(task, weights_only=True)["forgotten"] == [[3]]


def test_held_out_images_that_were_trained_on_are_told(trained, colours, command, tmp_path):
    for fraction, pretrained, warned in ((0.2, trained, True), (0.2, None, False)):
        if pretrained is None:
            pretrained = tmp_path / "p" / "checkpoint.pth"
            words = ["--data", colours, *SMALL, "--epochs", 1, "--val-fraction", 0.3, "--output-dir", pretrained.parent]
            assert command("train_pretrain.py", *words)[0] == 0
        words = request(pretrained, colours, tmp_path / f"{warned}", "--forget-classes", "c3", "--val-fraction", fraction)
        code, _, err = command(*words)
        assert code == 0, err
        assert ("trained on images that --val-fraction holds out" in err) == warned


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("train_forget.py", "--checkpoint x --identities 5 --data x", "--identities does nothing unless --data is"),
        ("train_forget.py", "--checkpoint x --min-lr 1e-6 --sched step", "--min-lr does nothing with --sched step"),
        ("train_forget.py", "--checkpoint x --min-lr=1", "--min-lr does nothing above --lr"),
        ("train_forget.py", "--checkpoint x --allow-copies", "--allow-copies does nothing without --forget-classes"),
        ("train_pretrain.py", "--weights x --init published", "--init does nothing with --weights"),
        ("train_pretrain.py", "--published-adapters apart", "--published-adapters does nothing without --weights"),
        ("test.py", "--checkpoint x --allowed-signers y", "--allowed-signers does nothing without --verify-record"),
        ("scripts/audit.py", "x --originals y", "--originals does nothing without --references"),
        ("scripts/audit.py", "x --references y --num-originals 2", "--num-originals does nothing with --references"),
        ("scripts/audit.py", "--before x --requests 2", "--requests does nothing without a RUN"),
        ("scripts/table.py", "--results x --sweep rank --output-dir y", "--sweep does nothing without --labels"),
    ],
)
def test_options_that_would_do_nothing_are_refused(script, words, message, command):
    refused(command(script, *words.split()), 2, message)


def test_a_record_is_checked_without_options_of_the_evaluation(command, tmp_path):
    words = ("--verify-record", tmp_path, "--random-pairs", 5)
    refused(command("test.py", *words), 2, "--random-pairs does nothing with --verify-record")


def test_options_that_a_method_does_not_use_are_told(trained, colours, command, tmp_path):
    words = ["--checkpoint", trained, "--data", colours, "--num-tasks", 1, "--batch-size", 12, "--epochs", 100]
    code, out, err = command("train_forget.py", "--method", "ssd", *words, "--output-dir", tmp_path)
    assert code == 0, err
    assert "SSD has no use for --batch-size, --epochs" in out
    assert json.loads((tmp_path / "results.json").read_text())["finished"]
    words = [*words[:-1], 1, "--epoch-over", "remain", "--few-shot", 1, "--output-dir", tmp_path / "l2"]
    code, out, err = command("train_forget.py", "--method", "l2", *words)
    assert code == 0, err
    assert "L2* has no use for --epoch-over" in out
