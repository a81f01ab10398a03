"""What bad input gets: one clear line, the right exit code, nothing half-written."""

import shutil

import pytest
import torch

from tests.conftest import SMALL
from tests.test_command_lines import forget_options, run_folder  # noqa: F401


def refused(result, code: int, message: str) -> None:
    found, _, err = result
    lines = [line for line in err.splitlines() if "error:" in line]
    assert found == code
    assert len(lines) == 1, err
    assert message in lines[0]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-tasks", 5], "5 tasks of 2 classes: of 10, at least one must remain"),
        (["--forget-per-task", 11], "at least one must remain"),
        (["--forget-per-task", 0], "--forget-per-task: 0 is out of range"),
        (["--data-ratio", 1.5], "--data-ratio: 1.5 is out of range"),
        (["--few-shot", 13], "has 12 training images, fewer than the 13"),
        (["--missing-classes", 6], "6 missing classes: of the 6 that remain, at least one must lend images"),
        (["--rank", 1000], "rank 1000 is out of range: the adapted layers allow 1 to 128"),
        (["--epochs", 0], "--epochs: 0 is out of range"),
        (["--lr", "nan"], "--lr: nan is out of range"),
        (["--beta", "0.2", "inf"], "--beta: inf is out of range"),
        (["--lr", 0], "--lr: 0 is out of range"),
        (["--clip-grad", 0], "--clip-grad: 0 is out of range"),
        (["--method", "amnesia"], "unknown method 'amnesia'"),
        (["--device", "abacus"], "no device 'abacus'"),
        (["--device", "cuda:7"], "no device 'cuda:7'"),
        (["--opt", "no_such"], "--opt no_such"),
        (["--checkpoint", "absent.pth"], "no file absent.pth"),
        (["--data", "absent"], "absent"),
        (["--head", "arcface"], "was trained with --head cosface, not arcface"),
        (["--then", "c1"], "--then follows --forget-classes"),
        (["--forget-classes", "c1", "--method", "gs_lora", "--num-tasks", "2"], "it excludes --num-tasks"),
    ],
)
def test_impossible_requests(options, message, trained, colours, command, tmp_path):
    output = tmp_path / "run"
    refused(command("train_forget.py", *forget_options(trained, colours, output), *options), 2, message)
    assert not list(tmp_path.rglob("*.pth"))
    assert not (output / "results.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", 0], "--epochs 0 leaves a model of random weights"),
        (["--epochs", 5, "--warmup-epochs", 6], "--warmup-epochs 6 is out of range"),
        (["--model", "no_such_vit"], "unknown model 'no_such_vit'"),
        (["--model", "resnet18", "--image-size", 32, "--depth", 3], "cannot build resnet18"),
        (["--image-size", 30], "cannot build face_vit_tiny for 30×30 images"),
        (["--depth", 0], "--depth: 0 is out of range"),
        (["--drop-rate", 1], "--drop-rate: 1 is out of range"),
        (["--weights", "absent.pth"], "no file absent.pth"),
        (["--data", "synthetic_faces", "--identities", 1], "--identities: 1 is out of range"),
    ],
)
def test_impossible_pre_training(options, message, colours, command, tmp_path):
    refused(command("train_pretrain.py", "--data", colours, "--output-dir", tmp_path / "p", *options), 2, message)
    assert not (tmp_path / "p").exists()


def test_a_damaged_image_is_named_and_nothing_is_written(trained, colours, command, tmp_path):
    data = shutil.copytree(colours, tmp_path / "damaged")
    victim = next((data / "train" / "c4").iterdir())
    victim.write_bytes(victim.read_bytes()[:100])
    message = f"{data}: 1 of {{}} images cannot be decoded: {victim.relative_to(data)}"
    # The training images of the tasks, decoded apart from the test images; all images.
    refused(command("train_forget.py", *forget_options(trained, data, tmp_path / "run")), 1, message.format(120))
    refused(command("train_pretrain.py", "--data", data, *SMALL, "--output-dir", tmp_path / "p"), 1, message.format(160))
    assert {path.name for path in tmp_path.iterdir()} == {"damaged"}


def test_checkpoints_that_do_not_fit(trained, colours, command, tmp_path):
    fewer = shutil.copytree(colours, tmp_path / "fewer")
    for split in ("train", "test"):
        shutil.rmtree(fewer / split / "c9")
    message = "knows 10 classes, the data set fewer has 9"
    refused(command("train_forget.py", *forget_options(trained, fewer, tmp_path / "run")), 2, message)
    refused(command("test.py", "--checkpoint", trained, "--data", fewer, "--output-dir", tmp_path / "t"), 2, message)

    renamed = shutil.copytree(colours, tmp_path / "renamed")
    for split in ("train", "test"):
        (renamed / split / "c9").rename(renamed / split / "d9")
    message = "knows 10 classes, the data set renamed has 10: not in both are 'c9' there, 'd9' here"
    refused(command("test.py", "--checkpoint", trained, "--data", renamed, "--output-dir", tmp_path / "t"), 2, message)

    whole = torch.load(trained, weights_only=True)
    broken = {
        "missing": (lambda d: d["model"].pop("backbone.cls_token"), 2, "backbone.cls_token is missing"),
        "shape": (lambda d: d["model"].update({"head.weight": torch.zeros(3, 3)}), 2, "has shape (3, 3), not (10, 128)"),
        "model": (lambda d: d["architecture"].update(model="no_such"), 2, "unknown model 'no_such'"),
        "incomplete": (lambda d: d.pop("classes"), 1, "damaged checkpoint"),
        "foreign": (lambda d: d.pop("format"), 2, "is no checkpoint of a face recognizer"),
    }
    for name, (spoil, code, message) in broken.items():
        data = torch.load(trained, weights_only=True)
        spoil(data)
        torch.save(data, tmp_path / f"{name}.pth")
        options = ("--checkpoint", tmp_path / f"{name}.pth", "--data", colours, "--output-dir", tmp_path / "t")
        refused(command("test.py", *options), code, message)
    assert set(whole) == {"format", "architecture", "classes", "forgotten", "info", "model"}
    assert not (tmp_path / "t").exists()


class Malicious:
    def __reduce__(self):
        return print, ("code ran",)


def test_damaged_and_dangerous_files_are_refused(trained, colours, command, tmp_path):
    truncated, dangerous, text = tmp_path / "truncated.pth", tmp_path / "dangerous.pth", tmp_path / "text.pth"
    truncated.write_bytes(trained.read_bytes()[:5000])
    torch.save({"format": Malicious()}, dangerous)
    text.write_text("not a checkpoint")
    for path in (truncated, dangerous, text):
        result = command("test.py", "--checkpoint", path, "--data", colours, "--output-dir", tmp_path / "t")
        refused(result, 1, str(path))
        assert "code ran" not in result[1]
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\xff" * 64)
    options = ("--checkpoint", trained, "--adapters", damaged, "--data", colours, "--output-dir", tmp_path / "t")
    refused(command("test.py", *options), 1, "not a readable safetensors file")


def test_a_loss_that_is_not_finite_keeps_what_was_finished(trained, colours, command, tmp_path):
    options = [*forget_options(trained, colours, tmp_path / "run"), "--lr", "1e30", "--precision", "fp32"]
    refused(command("train_forget.py", *options), 1, "the loss is not finite")
    assert not (tmp_path / "run" / "results.json").exists()
    assert not list((tmp_path / "run").rglob("*.pth"))


def test_results_of_another_run(trained, colours, command, tmp_path):
    base = ("--checkpoint", trained, "--data", colours, "--output-dir", tmp_path / "t")
    table = ("scripts/table.py", "--output-dir", tmp_path / "table", "--results")
    refused(command(*table, tmp_path / "absent.json"), 2, "no file")
    (tmp_path / "other.json").write_text('{"schema": 99}')
    refused(command(*table, tmp_path / "other.json"), 1, "not a results.json of schema 1")
    refused(command("test.py", *base, "--forget-classes", "c3,nobody"), 2, "no class 'nobody'")
