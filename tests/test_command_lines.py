"""The three scripts through their own command lines, on small images whose mean colour tells the class."""

import csv
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from data.tasks import class_order
from tests.conftest import results_of
from util.storage.checkpoint import load_checkpoint


def forget_options(trained: Path, colours: Path, output: Path) -> list:
    options = ["--checkpoint", trained, "--data", colours, "--output-dir", output, "--forget-per-task", 2]
    options += ["--num-tasks", 2, "--epochs", 20, "--batch-size", 12, "--data-ratio", 1.0, "--rank", 4]
    return [*options, "--sparsity-warmup-epochs", 10]


@pytest.fixture
def run_folder(trained, colours, command, tmp_path_factory) -> Path:
    """A finished run of two tasks, made once a session."""
    folder = tmp_path_factory.getbasetemp() / "run"
    if not (folder / "figure.png").exists():
        code, out, err = command("train_forget.py", *forget_options(trained, colours, folder), "--eval-every", 6)
        assert code == 0, err
        assert "task 2/2 8-2" in out
        assert "\nGS-LoRA  " in out
    return folder


def test_a_run_leaves_every_file_and_the_whole_schema(run_folder, trained, colours):
    names = {str(path.relative_to(run_folder)) for path in run_folder.rglob("*") if path.is_file()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {
        *("config.json", "results.json", "table.md", "figure.png"),
        *("checkpoints/task_1.pth", "checkpoints/task_2.pth", "checkpoints/last.pth"),
        *("adapters/task_1.safetensors", "adapters/task_2.safetensors"),
        *("deletions/task_1.json", "deletions/task_2.json", ".lock"),
    }
    results = results_of(run_folder)
    assert results["schema"] == 1
    assert results["method"] == "gs_lora"
    assert results["dataset"] == {"name": "colours", "classes": 10, "train_images": 120, "test_images": 40}
    trainable = 2 * 2 * 4 * (128 + 512)
    assert results["model"]["trainable"] == trainable
    assert results["model"]["tunable_ratio"] == pytest.approx(trainable / results["model"]["parameters"], abs=1e-6)
    assert results["pretrained"]["acc"] >= 90
    order = class_order(10, 1337)
    for number, task in enumerate(results["tasks"], start=1):
        assert task["task"] == number
        assert set(task["forget_classes"]) == set(order[10 - 2 * number : 12 - 2 * number])
        assert set(task["remain_classes"]) == set(order[: 10 - 2 * number])
        assert task["train_images"] == {"forget": 24, "remain": 12 * (10 - 2 * number)}
        assert set(task["before"]) == {f"{m}acc_{g}" for m in ("", "margin_") for g in ("remain", "forget")}
        keys = ("acc_remain", "acc_forget", "acc_old", "acc_missing", "h_mean")
        assert set(task["after"]) == {f"{margin}{key}" for margin in ("", "margin_") for key in keys}
        assert (task["after"]["acc_old"] is None) == (number == 1)
        assert task["after"]["acc_missing"] is None
        assert set(task["groups"]["norms"]) == {"blocks.0", "blocks.1"}
        assert {"train_seconds", "eval_seconds", "images_per_second", "peak_memory_mb"} <= set(task)
    config = json.loads((run_folder / "config.json").read_text())
    assert config["arguments"]["rank"] == 4
    assert config["seed"] == 1337
    assert torch.__version__.startswith(config["packages"]["torch"])


def test_forgetting_works_and_the_rest_stays(run_folder):
    for task in results_of(run_folder)["tasks"]:
        assert task["before"]["acc_forget"] >= 75
        assert task["after"]["acc_forget"] <= 25
        assert task["after"]["acc_remain"] >= task["before"]["acc_remain"] - 15


def test_reloaded_and_rebuilt_models_give_the_same_accuracies(run_folder, trained, colours, command, tmp_path):
    for number, task in enumerate(results_of(run_folder)["tasks"], start=1):
        adapters = [run_folder / "adapters" / f"task_{n}.safetensors" for n in range(1, number + 1)]
        forgotten = ",".join(f"#{c}" for c in task["forget_classes"])
        sources = {
            "merged": ("--checkpoint", run_folder / "checkpoints" / f"task_{number}.pth"),
            "rebuilt": ("--checkpoint", trained, "--adapters", *adapters, "--forget-classes", forgotten),
        }
        keys = {"remaining": "remain", "forgotten last": "forget", "forgotten earlier": "old"}
        for name, source in sources.items():
            output = tmp_path / f"{name}{number}"
            code, _, err = command("test.py", *source, "--data", colours, "--output-dir", output)
            assert code == 0, err
            groups = json.loads((output / "test.json").read_text())["groups"]
            for group, key in (keys if name == "merged" else {"forgotten": "forget"}).items():
                for reading in ("", "margin_"):
                    expected = task["after"][f"{reading}acc_{key}"]
                    assert groups.get(group, {}).get(f"{reading}acc") == expected


def test_leaving_an_adapter_off_undoes_its_task(run_folder, trained, colours, command, tmp_path):
    task = results_of(run_folder)["tasks"][0]
    options = ("--data", colours, "--forget-classes", ",".join(f"#{c}" for c in task["forget_classes"]))
    command("test.py", "--checkpoint", trained, *options, "--output-dir", tmp_path)
    groups = json.loads((tmp_path / "test.json").read_text())["groups"]
    assert groups["forgotten"]["acc"] == task["before"]["acc_forget"]


def test_per_class_csv_and_groups_by_name_or_number(trained, colours, command, tmp_path):
    options = ("--checkpoint", trained, "--data", colours, "--forget-classes", "c3, #5", "--output-dir", tmp_path)
    code, out, err = command("test.py", *options)
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "per_class.csv").open()))
    assert [row["name"] for row in rows if row["group"] == "forgotten"] == ["c3", "c5"]
    assert {row["images"] for row in rows} == {"4"}
    groups = json.loads((tmp_path / "test.json").read_text())["groups"]
    assert groups["all"]["acc"] == pytest.approx(sum(float(row["acc"]) for row in rows) / 10)
    assert groups["forgotten"]["classes"] == [3, 5]
    assert "| forgotten" in out


def test_the_cls_only_last_block_recognises_what_the_full_one_does(trained, colours, command, tmp_path):
    found = {}
    for choice in ("on", "off"):
        options = ("--checkpoint", trained, "--data", colours, "--cls-only-last-block", choice)
        options += ("--output-dir", tmp_path / choice)
        code, _, err = command("test.py", *options)
        assert code == 0, err
        found[choice] = json.loads((tmp_path / choice / "test.json").read_text())["groups"]
    assert found["on"] == found["off"]


def test_an_interrupted_run_resumes_to_the_same_end(run_folder, trained, colours, command, tmp_path, monkeypatch):
    options = forget_options(trained, colours, tmp_path / "cut")
    from util.training import continual

    keep = continual.ContinualRun._after_epoch

    def cut(self, trainer):
        keep(self, trainer)
        if trainer.task.number == 2 and trainer.position.epoch == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(continual.ContinualRun, "_after_epoch", cut)
    code, _, err = command("train_forget.py", *options)
    assert code == 130
    assert err.strip().endswith("train_forget.py: error: interrupted")
    assert len(results_of(tmp_path / "cut")["tasks"]) == 1
    monkeypatch.undo()

    code, _, err = command("train_forget.py", *options)
    assert code == 2
    assert "--resume continues it, another --output-dir keeps it, --overwrite replaces it" in err
    code, _, err = command("train_forget.py", *options, "--rank", 8, "--resume")
    assert code == 2
    assert "was started with other options: --rank 4, now 8" in err
    code, out, err = command("train_forget.py", *options, "--resume")
    assert code == 0, err
    assert "task 1/2" not in out
    for number in (1, 2):
        whole, resumed = (
            torch.load(folder / "checkpoints" / f"task_{number}.pth", weights_only=True)["model"]
            for folder in (run_folder, tmp_path / "cut")
        )
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    expected, found = ([task["after"] for task in results_of(f)["tasks"]] for f in (run_folder, tmp_path / "cut"))
    assert found == expected


def test_resume_from_a_tasks_checkpoint_goes_on_with_the_next(run_folder, trained, colours, command, tmp_path):
    options = forget_options(trained, colours, tmp_path / "next")
    source = run_folder / "checkpoints" / "task_1.pth"
    code, _, err = command("train_forget.py", *options, "--resume-from", source)
    assert code == 0, err
    (task,) = results_of(tmp_path / "next")["tasks"]
    assert task["task"] == 2
    assert task["after"] == results_of(run_folder)["tasks"][1]["after"]
    code, _, err = command("train_forget.py", *options, "--overwrite", "--seed", 3, "--resume-from", source)
    assert code == 2
    assert "has not forgotten what the first tasks of this run forget" in err
    code, _, err = command("train_forget.py", *options, "--overwrite", "--checkpoint", source)
    assert code == 2
    assert "has already forgotten 2 classes" in err


def test_few_shot_missing_classes_and_a_single_step(trained, colours, command, tmp_path):
    options = [*forget_options(trained, colours, tmp_path), "--num-tasks", 1, "--few-shot", 3, "--missing-classes", 2]
    code, out, err = command("train_forget.py", *options, "--epochs", 2, "--grouping", "matrix", "--lora-place", "attention")
    assert code == 0, err
    (task,) = results_of(tmp_path)["tasks"]
    assert task["train_images"] == {"forget": 6, "remain": 18}
    assert task["after"]["acc_missing"] is not None
    assert "Acc_m" in out
    names = {f"blocks.{i}.attn.qkv.lora_{m}" for i in range(2) for m in "AB"}
    assert set(load_file(tmp_path / "adapters" / "task_1.safetensors")) == names == set(task["groups"]["norms"])


def test_small_sets_get_more_epochs(trained, colours, command, tmp_path, monkeypatch):
    options = forget_options(trained, colours, tmp_path)
    code, _, err = command("train_forget.py", *options, "--num-tasks", 1, "--epochs", 1, "--min-updates", 20)
    assert code == 0, err
    state = torch.load(tmp_path / "checkpoints" / "last.pth", weights_only=True)
    # 8 classes of 12 images in batches of 12: 8 steps an epoch.
    assert state["position"] == {"epoch": 3, "step": 0, "updates": 24}


def test_the_published_layout_goes_out_and_comes_back(colours, command, tmp_path):
    model = ("--model", "face_vit_p8s8_d6", "--image-size", 16, "--depth", 1)
    options = ("--epochs", 1, "--published-layout", "--output-dir", tmp_path)
    code, _, err = command("train_pretrain.py", "--data", colours, *model, *options)
    assert code == 0, err
    found = {}
    for name in ("checkpoint", "published"):
        arguments = ("--checkpoint", tmp_path / f"{name}.pth", "--data", colours, "--precision", "fp32")
        code, _, err = command("test.py", *arguments, "--output-dir", tmp_path / name)
        assert code == 0, err
        found[name] = json.loads((tmp_path / name / "test.json").read_text())["groups"]["all"]
    assert found["published"]["acc"] == found["checkpoint"]["acc"]


def test_a_published_checkpoint_with_adapters_is_not_guessed_at(colours, command, tmp_path):
    model = ("--model", "face_vit_p8s8_d6", "--image-size", 16, "--depth", 1)
    command("train_pretrain.py", "--data", colours, *model, "--epochs", 1, "--published-layout", "--output-dir", tmp_path)
    state = torch.load(tmp_path / "published.pth", weights_only=True)
    layer = "transformer.layers.0.1.fn.fn.net.0."
    adapters = {f"{layer}lora_A": torch.randn(2, 512), f"{layer}lora_B": torch.randn(2048, 2)}
    torch.save(state | adapters, tmp_path / "adapted.pth")
    test = ("test.py", "--checkpoint", tmp_path / "adapted.pth", "--data", colours, "--output-dir", tmp_path / "t")
    code, _, err = command(*test)
    assert code == 2 and err.count("\n") == 1
    assert "adapted.pth has adapters" in err and "add --published-adapters merged" in err
    code, _, err = command(*test, "--published-adapters", "merged")
    assert code == 0, err
    forget = (
        "train_forget.py",
        "--checkpoint",
        tmp_path / "adapted.pth",
        "--data",
        colours,
        "--num-tasks",
        1,
        "--epochs",
        1,
    )
    code, _, err = command(*forget, "--published-adapters", "apart", "--output-dir", tmp_path / "run")
    assert code == 0, err


def test_a_forgetting_run_in_the_published_layout(colours, command, tmp_path):
    model = ("--model", "face_vit_p12s8_d6", "--image-size", 16, "--depth", 1)
    command("train_pretrain.py", "--data", colours, *model, "--epochs", 1, "--output-dir", tmp_path)
    options = ("--data", colours, "--num-tasks", 1, "--epochs", 1, "--published-layout", "--output-dir", tmp_path / "run")
    code, _, err = command("train_forget.py", "--checkpoint", tmp_path / "checkpoint.pth", *options)
    assert code == 0, err
    ours, published = (load_checkpoint(tmp_path / "run" / name / "task_1.pth") for name in ("checkpoints", "published"))
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(ours.model.eval()(images), published.model.eval()(images), rtol=1e-5, atol=1e-4)


def test_backbone_weights_from_local_files(trained, colours, command, tmp_path):
    options = ("--data", colours, "--epochs", 1, "--lr", "1e-12", "--output-dir", tmp_path, "--overwrite")
    # A checkpoint of ours, at another image size: the position embeddings are resampled.
    code, _, err = command("train_pretrain.py", *options, "--image-size", 48, "--depth", 2, "--weights", trained)
    assert code == 0, err
    before, after = load_checkpoint(trained).model.backbone, load_checkpoint(tmp_path / "checkpoint.pth").model.backbone
    torch.testing.assert_close(after.blocks[1].mlp.fc1.weight, before.blocks[1].mlp.fc1.weight)
    assert (before.pos_embed.shape[1], after.pos_embed.shape[1]) == (17, 37)
    # A timm model with its own classifier.
    donor = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    save_file(donor.state_dict(), tmp_path / "donor.safetensors")
    model = ("--model", "vit_tiny_patch16_224", "--image-size", 32, "--weights", tmp_path / "donor.safetensors")
    code, _, err = command("train_pretrain.py", *options, *model, "--depth", 1)
    assert code == 0, err
    torch.testing.assert_close(load_checkpoint(tmp_path / "checkpoint.pth").model.backbone.norm.weight, donor.norm.weight)
    code, _, err = command("train_pretrain.py", *options, *model, "--depth", 2)
    assert code == 2
    assert "donor.safetensors does not fit the model: blocks.1.norm1.weight is missing" in err


def test_any_timm_vit_is_trained_and_forgets(colours, command, tmp_path):
    model = ("--model", "vit_tiny_patch16_224", "--image-size", 32, "--depth", 1)
    code, _, err = command("train_pretrain.py", "--data", colours, *model, "--epochs", 1, "--output-dir", tmp_path)
    assert code == 0, err
    options = ("--data", colours, "--num-tasks", 1, "--epochs", 1, "--output-dir", tmp_path / "run")
    code, _, err = command("train_forget.py", "--checkpoint", tmp_path / "checkpoint.pth", *options)
    assert code == 0, err
