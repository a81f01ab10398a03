"""Records of deletion whose files have moved, whose images are erased, and that began with a published checkpoint."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.test_bad_input import refused
from tests.test_requests import change, named  # noqa: F401


def without(colours: Path, folder: Path, *erased: str) -> Path:
    shutil.copytree(colours, folder)
    for name in erased:
        for split in ("train", "test"):
            shutil.rmtree(folder / split / name)
    return folder


def lines_of(out: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    return {what: [said, found] for what, said, found in rows}


@pytest.mark.parametrize(
    ("record", "erased", "untold"),
    [
        ("first 1", ["c3"], "before: acc_forget, margin_acc_forget"),
        ("first 1", ["c3", "c7"], "after: acc_forget, margin_acc_forget, h_mean, margin_h_mean"),
        ("first 1", ["c5"], "before: acc_remain, margin_acc_remain"),  # by a later request
        ("first 2", ["c3"], "after: acc_old, margin_acc_old"),
        ("second 3", ["c0", "c5"], "before: acc_forget, margin_acc_forget"),
    ],
)
def test_erased_images_are_not_checked_and_all_else_is(record, erased, untold, named, colours, command, tmp_path):  # noqa: F811
    run, task = record.split()
    file = named / run / "deletions" / f"task_{task}.json"
    data = without(colours, tmp_path / "colours", *erased)
    code, out, err = command("test.py", "--verify-record", file, "--data", data)
    assert code == 0, out + err
    found, gone = lines_of(out), f"images of {len(erased)} class{'es' * (len(erased) > 1)} are gone: {', '.join(erased)}"
    assert found["test images"][0] == found[f"accuracies {untold}"][0] == "not checked"
    assert found[f"accuracies {untold}"][1] == gone
    forgets = bool({*erased} & {*json.loads(file.read_text())["request"]["forget"].values()})
    for what in ("names of the forgotten classes", "training images to forget"):
        assert (found[what][0] == "not checked") == (" gone: " in found[what][1]) == forgets
    assert found["accuracies before"][0] == found["accuracies after"][0] == "confirmed"
    assert "NOT SO" not in out and "could not be checked" in out


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("request/forget", {"3": "cx", "7": "c7"}, "names of the forgotten classes"),
        ("images/remain", lambda hashes: ["0" * 64, *hashes[1:]], "training images to remain"),
        ("accuracies/after/acc_remain", -1.0, "accuracies after"),
    ],
)
def test_an_untrue_record_is_told_though_images_are_erased(path, value, what, named, colours, command, tmp_path):  # noqa: F811
    run = shutil.copytree(named / "first", tmp_path / "run")
    file, data = run / "deletions" / "task_1.json", without(colours, tmp_path / "colours", "c3")
    record = json.loads(file.read_text())
    change(record, path, value)
    file.write_text(json.dumps(record))
    code, _, err = command("test.py", "--verify-record", file, "--data", data)
    assert code == 1
    assert f"checks failed: {what}" in err
    # Nothing names the classes any more: what the images show cannot be told.
    shutil.rmtree(run / "checkpoints")
    change(record, "arguments/checkpoint", "absent.pth")
    file.write_text(json.dumps(record))
    code, out, _ = command("test.py", "--verify-record", file, "--data", data)
    assert code == 0
    assert lines_of(out)["images and accuracies"][1] == "classes are gone, and no model is left that names them"


def test_held_out_images_depend_on_the_erased_ones(trained, colours, command, tmp_path):
    words = ("--checkpoint", trained, "--data", colours, "--val-fraction", 0.25, "--forget-classes", "c3", "--epochs", 1)
    code, _, err = command("train_forget.py", *words, "--output-dir", tmp_path / "run")
    assert code == 0, err
    file, data = tmp_path / "run" / "deletions" / "task_1.json", without(colours, tmp_path / "colours", "c3")
    code, out, err = command("test.py", "--verify-record", file)
    assert code == 0 and lines_of(out)["test images"][0] == "confirmed"
    code, out, err = command("test.py", "--verify-record", file, "--data", data)
    assert code == 0, err
    assert lines_of(out)["images and accuracies"][0] == "not checked"
    last = ("--checkpoint", tmp_path / "run" / "checkpoints" / "task_1.pth", "--val-fraction", 0.25)
    refused(command("test.py", *last, "--data", data, "--output-dir", tmp_path / "t"), 2, "--val-fraction")


def test_files_that_have_moved_are_found_or_named(named, trained, colours, command, tmp_path):  # noqa: F811
    for run in ("first", "second"):
        shutil.copytree(named / run, tmp_path / "moved" / run)
    file = tmp_path / "moved" / "second" / "deletions" / "task_3.json"
    record = json.loads(file.read_text())
    data = shutil.copytree(colours, tmp_path / "elsewhere" / "colours")
    for key, there in (("checkpoint", "pth"), ("resume_from", "task_2.pth"), ("data", "colours")):
        record["arguments"][key] = str(tmp_path / "absent" / there)
    file.write_text(json.dumps(record))
    call = ("test.py", "--verify-record", file, "--data", data)
    code, out, err = command(*call)
    assert code == 0, err
    for what in ("file of the pre-trained model", "accuracies before"):
        assert lines_of(out)[what][0] == "not checked"
    assert lines_of(out)["weights before"][0] == "confirmed"  # in the other run's folder
    code, out, err = command(*call, "--checkpoint", trained)
    assert code == 0, err
    assert [what for what, (said, _) in lines_of(out).items() if said == "not checked"] == ["audit"]
    other = tmp_path / "moved" / "first" / "checkpoints" / "task_1.pth"
    code, out, err = command(*call, "--checkpoint", other)
    assert code == 1 and err.endswith("checks failed: file of the pre-trained model\n")
    refused(command(*call, "--checkpoint", "absent.pth"), 2, "no file absent.pth")
    refused(command(*call, "--checkpoint", colours), 2, f"no file {colours}")
    other.with_name("task_2.pth").write_bytes(b"damaged")
    code, out, err = command(*call, "--checkpoint", trained)
    assert code == 0, err
    assert lines_of(out)["weights before"][0] == "not checked"


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_a_signature_is_checked_where_there_is_one_or_has_to_be(named, command, tmp_path):  # noqa: F811
    run = shutil.copytree(named / "first", tmp_path / "run")
    file, key, allowed = run / "deletions" / "task_1.json", tmp_path / "key", tmp_path / "allowed"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    allowed.write_text(f"dpo@x.org {key.with_suffix('.pub').read_text()}")
    call, signature = ("test.py", "--verify-record", file), "signature of task_1.json"
    code, out, _ = command(*call)
    assert code == 0 and signature not in out
    code, out, err = command(*call, "--allowed-signers", allowed)
    assert code == 1 and err.endswith(f"checks failed: {signature}\n")
    subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-f", key, "-n", "file", file], check=True, capture_output=True)
    for more, whose in (((), "signature with ED25519"), (("--allowed-signers", allowed), "for dpo@x.org with ED25519")):
        code, out, err = command(*call, *more)
        assert code == 0, err
        said, found = lines_of(out)[signature]
        assert said == "confirmed" and whose in found
    file.write_text(file.read_text() + " ")
    code, out, err = command(*call)
    assert code == 1 and signature in err
    refused(command(*call, "--allowed-signers", "absent"), 2, "no file absent")
    refused(command("test.py", "--checkpoint", "x", "--allowed-signers", key), 2, "does nothing without --verify-record")


@pytest.mark.parametrize(
    ("path", "value"), [("images/size", "x"), ("images/size", 10**6), ("images/crop_pct", 0.0), ("arguments/data", None)]
)
def test_records_of_impossible_data(path, value, named, command, tmp_path):  # noqa: F811
    record = json.loads((named / "first" / "deletions" / "task_1.json").read_text())
    change(record, path, value)
    (tmp_path / "record.json").write_text(json.dumps(record))
    refused(command("test.py", "--verify-record", tmp_path / "record.json"), 1, "not a record of deletion")


def test_a_record_of_a_published_checkpoint_with_adapters(colours, command, tmp_path):
    model = ("--model", "face_vit_p8s8_d6", "--image-size", 16, "--depth", 1)
    command("train_pretrain.py", "--data", colours, *model, "--epochs", 1, "--published-layout", "--output-dir", tmp_path)
    state = torch.load(tmp_path / "published.pth", weights_only=True)
    layer = "transformer.layers.0.1.fn.fn.net.0."
    adapters = {f"{layer}lora_A": torch.randn(2, 512), f"{layer}lora_B": torch.randn(2048, 2)}
    torch.save(state | adapters, tmp_path / "adapted.pth")
    words = ("--published-adapters", "apart", "--head", "arcface", "--num-tasks", 1, "--epochs", 1)
    words += ("--checkpoint", tmp_path / "adapted.pth", "--data", colours, "--output-dir", tmp_path / "run")
    code, _, err = command("train_forget.py", *words)
    assert code == 0, err
    file = tmp_path / "run" / "deletions" / "task_1.json"
    name = next(iter(json.loads(file.read_text())["request"]["forget"].values()))
    code, out, err = command("test.py", "--verify-record", file)
    assert code == 0, out + err
    assert [what for what, (said, _) in lines_of(out).items() if said == "not checked"] == ["record before it", "audit"]
    # It names no classes, the model after it does.
    data = without(colours, tmp_path / "colours", name)
    code, out, err = command("test.py", "--verify-record", file, "--data", data)
    assert code == 0, out + err
    assert lines_of(out)["accuracies before"][0] == "confirmed"


def test_class_names_that_are_no_utf8(colours, command, tmp_path):
    data = shutil.copytree(colours, tmp_path / "colours")
    for split in ("train", "test"):
        os.rename(data / split / "c3", os.fsencode(data / split) + b"/c3\xff")
    small = ("--image-size", 32, "--depth", 1, "--epochs", 1)
    code, _, err = command("train_pretrain.py", "--data", data, *small, "--output-dir", tmp_path / "first")
    assert code == 0, err
    words = ("--checkpoint", tmp_path / "first" / "checkpoint.pth", "--data", data)
    code, out, err = command("test.py", *words, "--output-dir", tmp_path / os.fsdecode(b"t\xff"))
    assert code == 0, err
    assert out.endswith("t\\udcff\n")
    words += ("--forget-classes", "#3", "--method", "l2")
    code, _, err = command("train_forget.py", *words, "--epochs", 1, "--output-dir", tmp_path / "run")
    assert code == 0, err
    code, out, err = command("test.py", "--verify-record", tmp_path / "run" / "deletions" / "task_1.json")
    assert code == 0, err
    assert lines_of(out)["names of the forgotten classes"] == ["confirmed", "c3\\udcff"]
