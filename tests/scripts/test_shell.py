"""The shell scripts, in a copy of the repository elsewhere, with another folder as the current one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import results_of

ROOT = Path(__file__).parents[2]
FOLDERS = ("backbone", "data", "methods", "scripts", "util")


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A checkout of the code alone, its path holding a space."""
    target = tmp_path_factory.mktemp("with space") / "checkout"
    target.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, target)
    shutil.copy(ROOT / "requirements.txt", target)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__", "faces_*"))
    return target


@pytest.fixture
def script(copy, colours, tmp_path, monkeypatch):
    """Run one of the scripts on the small images, with one epoch of everything."""

    def run(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        data = os.path.relpath(colours, tmp_path)
        fast = {
            "PYTHON": sys.executable,
            "EPOCHS": "1",
            "PRETRAIN_EPOCHS": "1",
            "DATA": data,
            "SETTING": "small",
            "JOBS_PER_GPU": "1",
        }
        return subprocess.run(
            ["bash", copy / "scripts" / name, *arguments],
            env={**os.environ, **fast, **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_continual_forgetting_pretrains_once_prints_its_table_and_audits(script, copy, tmp_path):
    done = script("run_cl_forget.sh", OUTPUT="my results", METHODS="l2 gs_lora", OPTIONS_gs_lora="--rank 3")
    assert done.returncode == 0, done.stderr
    assert "pre-training face_vit_tiny" in done.stdout
    assert "without margin" in done.stdout
    folders = {path.name for path in (tmp_path / "my results").iterdir() if path.is_dir()}
    assert folders == {"l2-seed1337", "gs_lora-seed1337"}
    results = results_of(tmp_path / "my results" / "gs_lora-seed1337")
    assert [task["setting"] for task in results["tasks"]] == ["10-2", "8-2", "6-2", "4-2"]
    assert results["model"]["trainable"] == 4 * 2 * 3 * (128 + 512)
    checkpoint = copy / "exps" / "pretrain-colours-face_vit_tiny" / "checkpoint.pth"
    assert checkpoint.exists()
    # The audit of the first request comes after the table, beside three references.
    assert "reference 3 of 3" in done.stdout
    *_, never, before, l2, gs_lora, _, where = done.stdout.splitlines()
    for line, label in ((never, "Never seen"), (before, "Pre-train"), (l2, "L2*"), (gs_lora, "GS-LoRA")):
        assert line.startswith(label)
    assert where.endswith("my results/*/audit/audit.html")
    audit = json.loads((tmp_path / "my results" / "l2-seed1337" / "audit" / "audit.json").read_text())
    assert (len(audit["references"]), len(audit["originals"])) == (3, 1)
    # The next command, printed by `echo` in Python's place, takes the model that is there.
    again = script("run_cl_forget_open.sh", PYTHON="echo", AUDIT="off")
    assert "train_pretrain.py" not in again.stdout
    assert f"--checkpoint {checkpoint} " in again.stdout


def test_the_open_form_reports_acc_m(script, copy, trained):
    variables = {"SEED": "5", "CHECKPOINT": str(trained), "METHODS": "lwf", "MISSING": "2", "AUDIT": "off"}
    done = script("run_cl_forget_open.sh", "--", "--num-tasks", "1", **variables)
    assert done.returncode == 0, done.stderr
    assert "pre-training" not in done.stdout
    assert "Never seen" not in done.stdout
    assert "Acc_m" in done.stdout
    (task,) = results_of(copy / "exps" / "cl_forget_open-colours" / "lwf-seed5")["tasks"]
    assert task["setting"] == "10-1"
    assert len(task["missing_classes"]) == 2
    assert task["after"]["acc_missing"] is not None


def test_paths_for_the_audit_are_relative_to_the_callers_folder(script, tmp_path):
    """`echo` stands for Python: the command is printed, not run."""
    (tmp_path / "my results").mkdir()
    done = script("run_audit.sh", "my results", "--requests", "all", PYTHON="echo")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"scripts/audit.py {tmp_path}/my results --requests all --gpus --jobs-per-gpu 1\n"


def test_a_sweep_ends_in_one_table_and_one_figure(script, trained, tmp_path):
    done = script("run_forget.sh", "rank", VALUES="1 4", OUTPUT="sweep", CHECKPOINT=str(trained))
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "sweep" / "table.md").read_text()
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows == ["rank r of the adapters", "Pre-train", "1", "4"] * 2
    assert (tmp_path / "sweep" / "figure.png").stat().st_size > 0
    trainable = [results_of(tmp_path / "sweep" / rank)["model"]["trainable"] for rank in ("1", "4")]
    assert trainable[1] == 4 * trainable[0]


def test_the_depth_sweep_pretrains_a_model_for_each_depth(script, copy):
    """`echo` stands for Python: the commands are printed, not run."""
    done = script("run_forget.sh", "depth", VALUES="1 2", OUTPUT="depths", PYTHON="echo")
    assert done.returncode == 0, done.stderr
    *commands, table = done.stdout.splitlines()
    for depth, pretrain, forget in zip("12", commands[::2], commands[1::2], strict=True):
        folder = f"exps/pretrain-colours-face_vit_tiny-depth{depth}"
        assert f"--output-dir {folder} --resume --overwrite --depth {depth}" in pretrain
        assert f"--checkpoint {copy}/{folder}/checkpoint.pth" in forget
        assert f"/depths/{depth} " in forget
    assert "--sweep number of blocks --labels 1 2 --results" in table


def test_the_evaluation_script(script, tmp_path):
    done = script("test_sub.sh", "--", "--forget-classes", "c1", OUTPUT="tested")
    assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "tested" / "test.json").read_text())["groups"]) == {"all", "forgotten", "remaining"}


@pytest.mark.parametrize(("gpu", "casia"), [(True, True), (True, False), (False, True)])
def test_the_papers_setting_is_chosen_with_a_gpu_and_its_data(script, copy, tmp_path, gpu, casia):
    """A stand-in says that there is a GPU, and `echo` stands for Python: the commands are printed, not run."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{'echo GPU 0: stand-in' if gpu else 'exit 9'}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    folder = copy / "data" / "faces_webface_112x112_sub100_train_test"
    if casia:
        folder.mkdir()
    try:
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = script("run_cl_forget.sh", PATH=path, PYTHON="echo", DATA="", SETTING="", EPOCHS="", PRETRAIN_EPOCHS="")
    finally:
        if casia:
            folder.rmdir()
    assert done.returncode == 0, done.stderr
    pretrain, forget, _, audit = done.stdout.splitlines()
    assert audit.startswith("scripts/audit.py exps/cl_forget-") and "--quick" in audit
    if gpu and casia:
        assert "--model face_vit_p8s8_d6 --epochs 1200 --batch-size 480 --lr 3e-4" in pretrain
        assert "--methods all --seeds 1337" in forget
        assert f"--data {folder} --num-tasks 4 --as-published" in forget
    else:
        assert "--data synthetic_faces --model face_vit_tiny" in pretrain
        assert "--data synthetic_faces" in forget


def test_wrong_words_are_refused_at_once(script):
    for name, arguments, variables, message in (
        ("run_forget.sh", ["colour"], {}, "unknown sweep 'colour'"),
        ("run_cl_forget.sh", [], {"SETTING": "huge"}, "SETTING=huge is unknown"),
        ("run_cl_forget.sh", [], {"AUDIT": "some"}, "AUDIT=some is unknown: first, all or off"),
        ("run_audit.sh", [], {}, "name the folders of runs"),
        ("run_cl_forget.sh", [], {"DATA": "absent", "CHECKPOINT": "absent.pth"}, "no file"),
    ):
        done = script(name, *arguments, **variables)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
