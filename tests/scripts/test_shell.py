"""The shell scripts, in a copy of the repository elsewhere, with another folder as the current one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train_forget
from tests.conftest import results_of
from util.storage.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
FOLDERS = ("backbone", "data", "methods", "scripts", "util")
# In Python's place: prints the command instead of running it, and a tag of the data as data_tag.py would. Where a variable
# is named as the script, its exit code is the variable's.
ECHO = """#!/usr/bin/env bash
case "$1" in
scripts/data_tag.py) echo "$(basename "$2")-$(cksum <<<"$2" | cut -c -8)" ;;
*) printf '%s\\n' "$*" ;;
esac
name=$(basename "$1" .py)
exit "${!name:-0}"
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A checkout of the code alone, its path holding a space."""
    target = tmp_path_factory.mktemp("with space") / "checkout"
    target.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, target)
    shutil.copy(ROOT / "requirements.txt", target)
    (target / "echo").write_text(ECHO)
    (target / "echo").chmod(0o755)
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
        if variables.get("PYTHON") == "echo":
            variables["PYTHON"] = str(copy / "echo")
        return subprocess.run(
            ["bash", copy / "scripts" / name, *arguments],
            env={**os.environ, **fast, **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_continual_forgetting_pretrains_once_and_ends_with_a_page(script, copy, tmp_path):
    given = {"METHODS": "unseen gs_lora", "OPTIONS_gs_lora": "--rank 3"}
    done = script("run_cl_forget.sh", "--", "--num-tasks", "2", OUTPUT="my results", **given)
    assert done.returncode == 0, done.stderr
    assert "pre-training face_vit_tiny" in done.stdout
    assert "without margin" in done.stdout
    folders = {path.name for path in (tmp_path / "my results").iterdir() if path.is_dir()}
    assert folders == {"gs_lora-seed1337", "unseen-seed1337"}
    results = results_of(tmp_path / "my results" / "gs_lora-seed1337")
    assert [task["setting"] for task in results["tasks"]] == ["10-2", "8-2"]
    assert results["model"]["trainable"] == 4 * 2 * 3 * (128 + 512)
    # The audit of the first request comes after the table, beside three references.
    assert "reference 3 of 3" in done.stdout
    audit = json.loads((tmp_path / "my results" / "unseen-seed1337" / "audit" / "audit.json").read_text())
    assert (len(audit["references"]), len(audit["originals"])) == (3, 1)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("Never seen", "Pre-train", "GS-LoRA", "Unseen"))]
    rows = [line.split("  ")[0] for line in lines if "ruined" not in line]
    assert {*rows[-4:]} == {"Never seen", "Pre-train", "GS-LoRA", "Unseen"}
    page = Path(done.stdout.splitlines()[-1].split("look at: ")[1])
    assert "GS-LoRA</a>" in page.read_text() and "Unseen</a>" in page.read_text()
    (checkpoint,) = (copy / "exps").glob("pretrain-colours-*-face_vit_tiny/checkpoint.pth")
    assert re.fullmatch("pretrain-colours-[0-9a-f]{8}-face_vit_tiny", checkpoint.parent.name)
    # The next command takes the model that is there.
    before = checkpoint.read_bytes()
    again = script("run_sub.sh")
    assert again.returncode == 0, again.stderr
    assert "finished before" in again.stdout
    assert checkpoint.read_bytes() == before


def test_the_demo_starts_from_its_own_model_where_nothing_else_is_asked_for(script, copy):
    unset = dict.fromkeys(("DATA", "SETTING", "EPOCHS", "PRETRAIN_EPOCHS"), "")
    for own, wanted in (
        ({}, f"--checkpoint {copy}/scripts/demo.pth --data synthetic_faces"),
        ({"CHECKPOINT": "/p"}, "--checkpoint /p "),
    ):
        (compared,) = (
            line for line in script("demo.sh", PYTHON="echo", **unset | own).stdout.splitlines() if "compare.py" in line
        )
        assert "--methods gs_lora unseen" in compared and wanted in compared and compared.endswith("--num-tasks 2")
    told = script("demo.sh", "--overwrite", "--", "--lr", "1e-3", PYTHON="echo").stdout
    assert "pretrain-colours-" in told.splitlines()[0]
    before, after = next(line for line in told.splitlines() if "compare.py" in line).split(" -- ")
    assert "--overwrite" in before and after.endswith("--num-tasks 2 --lr 1e-3")


def test_the_demos_model_knows_the_synthetic_faces(command, tmp_path):
    model = ROOT / "scripts" / "demo.pth"
    code, _, err = command("test.py", "--checkpoint", model, "--precision", "fp32", "--output-dir", tmp_path)
    assert (code, err) == (0, "")  # no warning either: it was trained on these images
    found = json.loads((tmp_path / "test.json").read_text())["groups"]["all"]["acc"]
    assert found == pytest.approx(load_checkpoint(model).info["acc"], abs=1)


def test_the_open_form_reports_acc_m(script, copy, trained):
    variables = {"SEED": "5", "CHECKPOINT": str(trained), "METHODS": "lwf", "MISSING": "2", "AUDIT": "off"}
    done = script("run_cl_forget_open.sh", "--", "--num-tasks", "1", **variables)
    assert done.returncode == 0, done.stderr
    assert "pre-training" not in done.stdout
    assert "Never seen" not in done.stdout
    assert "Acc_m" in done.stdout
    (folder,) = (copy / "exps").glob("cl_forget_open-colours-*")
    (task,) = results_of(folder / "lwf-seed5")["tasks"]
    assert task["setting"] == "10-1"
    assert len(task["missing_classes"]) == 2
    assert task["after"]["acc_missing"] is not None


def test_paths_for_the_audit_are_relative_to_the_callers_folder(script, tmp_path):
    for name in ("all", "s01", "enrolment", "names.txt"):
        (tmp_path / name).touch()  # what is there is not therefore a path
    for words, made in (
        ("my_results other --requests all", "{}/my_results {}/other --requests all"),
        (
            "RUN --forget-classes s01 --metrics enrolment --output-dir new",
            "{}/RUN --forget-classes s01 --metrics enrolment --output-dir {}/new",
        ),
        ("--quick RUN --strangers /strangers", "--quick {}/RUN --strangers /strangers"),
        ("--compare-with both RUN", "--compare-with both RUN"),
        (
            "--before a.pth --after=b.pth --forget-classes @names.txt",
            "--before {}/a.pth --after={}/b.pth --forget-classes @{}/names.txt",
        ),
        (
            "--references a b --originals c --recipe d --seed 1",
            "--references {}/a {}/b --originals {}/c --recipe {}/d --seed 1",
        ),
        ("--data synthetic_faces --cache-dir ../cache", "--data synthetic_faces --cache-dir {}/../cache"),
        ("RUN --rows classifier --rows=a.npy", "{}/RUN --rows classifier --rows={}/a.npy"),
        ("RUN --pairs lfw.bin pairs.txt:lfw", "{}/RUN --pairs {}/lfw.bin {}/pairs.txt:{}/lfw"),
        ("RUN -- --help", "{}/RUN --help"),
    ):
        done = script("run_audit.sh", *words.split(), PYTHON="echo")
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"scripts/audit.py {made.replace('{}', str(tmp_path))} --jobs-per-gpu 1\n"
    done = script("run_audit.sh", "my results", PYTHON="echo", GPUS="2 3")
    assert done.stdout == f"scripts/audit.py {tmp_path}/my results --gpus 2 3 --jobs-per-gpu 1\n"


def test_runs_and_references_go_to_the_cluster(script):
    there = {"CLUSTER": "slurm", "SBATCH": "--gpus=1 --time=60", "JOBS_PER_GPU": ""}
    compared, *_, audited = script("run_cl_forget.sh", PYTHON="echo", CHECKPOINT="p", **there).stdout.splitlines()
    told = "--cluster slurm --sbatch=--gpus=1 --time=60"
    assert f"--gpus {told} --output-dir" in compared and audited.endswith(f"--gpus {told}")
    assert script("run_audit.sh", "RUN", PYTHON="echo", **there).stdout.endswith(f"/RUN {told}\n")


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
        folder = re.search(r"exps/pretrain-colours-\d{8}-face_vit_tiny-depth\d", pretrain)[0]
        assert f"--output-dir {folder} --resume --depth {depth}" in pretrain
        assert f"--checkpoint {copy}/{folder}/checkpoint.pth" in forget
        assert f"/depths/{depth} " in forget
    assert "--sweep number of blocks --labels 1 2 --results" in table


def test_the_evaluation_script(script, trained, tmp_path):
    done = script("test_sub.sh", "--", "--forget-classes", "c1", OUTPUT="tested", CHECKPOINT=str(trained))
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


def test_imagenets_setting_takes_the_models_own_classifier_and_the_papers_values(script, tmp_path):
    given = {"SETTING": "imagenet", "EPOCHS": "", "PRETRAIN_EPOCHS": "", "PYTHON": "echo", "AUDIT": "off"}
    done = script("run_cl_forget.sh", "--published", WEIGHTS="my vit.pth", OPTIONS_l2="--lambda 1", **given)
    assert done.returncode == 0, done.stderr
    pretrain, forget = done.stdout.splitlines()
    model = f"--model vit_base_patch16_224 --weights {tmp_path}/my vit.pth"
    assert f"{model} --epochs 0 --rows classifier --crop-pct 0.9" in pretrain
    assert "--published=imagenet_100 --options" in forget
    assert "--options l2  --lambda 0.05 --lambda 1 --options" in forget
    assert "--num-tasks 4 --as-published --data-ratio 0.05" in forget
    assert "--pretrained" in script("run_cl_forget.sh", **given).stdout
    # Every value is an option of its method.
    words = re.split(" --options ", forget.split(" --jobs-per-gpu ")[0])[1:]
    for name, *values in (word.split() for word in words):
        args = train_forget.parse_arguments(["--checkpoint", "p", "--method", name, "--as-published", *values])
        assert args.batch_size == 48 and args.epochs == 100


def test_wrong_words_are_refused_at_once(script):
    for name, arguments, variables, message in (
        ("run_forget.sh", ["colour"], {}, "unknown sweep 'colour'"),
        ("run_cl_forget.sh", [], {"SETTING": "huge"}, "SETTING=huge is unknown"),
        ("run_cl_forget.sh", [], {"AUDIT": "some"}, "AUDIT=some is unknown: first, all or off"),
        ("run_cl_forget.sh", ["l2"], {}, "unknown word 'l2': methods are named in METHODS"),
        ("run_cl_forget.sh", [], {"STRANGERS": "absent"}, "absent is no folder"),
        ("run_forget.sh", ["depth"], {"CHECKPOINT": "a.pth"}, "CHECKPOINT has one depth"),
        ("run_tests.sh", [], {"FACES": "absent"}, "absent is no folder"),
        ("run_sub.sh", [], {"SETTING": "huge"}, "SETTING=huge is unknown"),
        ("run_audit.sh", [], {}, "name the folders of runs"),
    ):
        done = script(name, *arguments, **variables)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


SHELL_SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.sh") if path.read_text().startswith("#!"))


@pytest.mark.parametrize("name", SHELL_SCRIPTS)
@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--overwrite", "--help", "--", "--epochs", "3"]])
def test_help_and_wrong_words_come_before_any_set_up(script, copy, tmp_path, name, words):
    """Without PYTHON, a set-up would begin with a python3 that lacks everything."""
    (tmp_path / "python3").write_text("#!/bin/sh\necho set up >&2\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = script(name, *words, PYTHON="", PATH=path)
    assert (done.returncode, done.stderr) == (0, "")
    header = (copy / "scripts" / name).read_text().split("\n")[1:]
    count = next(number for number, line in enumerate(header) if not line.startswith("#"))
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in header[:count]]
    wrong = script(name, *words[3:], PYTHON="", PATH=path, SETTING="huge", FACES="absent")
    if name != "run_audit.sh":
        assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)


def test_words_after_two_dashes_are_pythons(script):
    done = script("run_forget.sh", "--", "--help", PYTHON="echo")
    assert "train_forget.py" in done.stdout and done.stdout.endswith(" --resume --help\n")


def test_a_run_is_replaced_only_where_the_words_say_so(script):
    for name, words, last in (
        ("run_sub.sh", [], "--resume"),
        ("run_sub.sh", ["--", "--overwrite"], "--overwrite"),
        ("run_forget.sh", [], "--resume"),
        ("run_forget.sh", ["--", "--resume-from", "/a.pth"], "--resume --resume-from /a.pth"),
        ("run_forget.sh", ["rank", "--overwrite", "--", "--lr", "1"], "--rank 2 --overwrite --lr 1"),
    ):
        done = script(name, *words, PYTHON="echo", VALUES="2", CHECKPOINT="" if name == "run_forget.sh" else "x")
        *shared, command = [line for line in done.stdout.splitlines() if line.startswith("train_")]
        assert command.endswith(last), command
        assert command.count("--overwrite") == words.count("--overwrite")
        assert [line.split()[-1] for line in shared] == ["--resume"] * (name == "run_forget.sh")


def test_folders_are_named_for_the_data_itself(script, tmp_path):
    def folders(data: str, name: str, *words: str, **variables: str) -> list[str]:
        done = script(name, *words, PYTHON="echo", DATA=data, VALUES="2", **variables)
        assert done.returncode == 0, done.stderr
        return re.findall(r"exps/\S+", done.stdout)

    for command in (("run_sub.sh",), ("run_cl_forget.sh",), ("run_cl_forget_open.sh",), ("run_forget.sh", "rank")):
        one, other = (folders(data, *command) for data in ("a/faces", "b/faces"))
        assert one and not {*one} & {*other}
    assert folders("synthetic_faces", "run_sub.sh") == ["exps/pretrain-synthetic_faces-face_vit_tiny"]
    assert folders("synthetic_faces", "run_sub.sh", SEED="5") == ["exps/pretrain-synthetic_faces-face_vit_tiny-seed5"]


def test_data_that_have_no_tag_end_the_script(script):
    for name, *words in (("run_sub.sh",), ("run_cl_forget.sh",), ("run_forget.sh", "rank"), ("test_sub.sh",)):
        done = script(name, *words, PYTHON="echo", data_tag="2")
        assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("asked", "compared", "audited", "code"),
    [("", 0, 2, 0), ("", 1, 2, 1), ("", 0, 1, 1), ("first", 0, 2, 2), ("all", 0, 2, 2), ("", 2, 0, 2)],
)
def test_an_audit_that_nobody_asked_for_may_be_impossible(script, asked, compared, audited, code):
    done = script("run_cl_forget.sh", PYTHON="echo", AUDIT=asked, CHECKPOINT="p", compare=str(compared), audit=str(audited))
    assert done.returncode == code
    assert ("scripts/audit.py" in done.stdout) == (compared < 2)


def test_paths_and_options_with_spaces_reach_python_from_anywhere(script, copy, tmp_path):
    """Also through a link to the script, and with words before and after the two dashes."""
    link = tmp_path / "a link"
    link.symlink_to(copy / "scripts" / "run_forget.sh")
    done = script(
        link,
        "--",
        "--resume-from",
        "runs/task_1.pth",
        PYTHON="echo",
        DATA="my faces",
        CHECKPOINT="my *.pth",
        OUTPUT="an output",
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "--data {}/my faces",
        "--checkpoint {}/my *.pth",
        "--output-dir {}/an output",
        "--resume-from {}/runs/task_1.pth",
    ):
        assert f"{words.replace('{}', str(tmp_path))} " in f"{done.stdout.strip()} "
    done = script(
        "run_cl_forget_open.sh", "--published", "--", "--cache-dir", "cache", PYTHON="echo", AUDIT="off", CHECKPOINT="p"
    )
    before, after = done.stdout.strip().split(" -- ")
    assert before.endswith(" --published")
    assert after.endswith(f"--missing-classes 5 --cache-dir {tmp_path}/cache")


def test_every_option_that_takes_a_path_is_known_to_the_shell():
    known = (ROOT / "scripts" / "command_line.sh").read_text()
    sources = [
        ROOT / name for name in ("test.py", "train_forget.py", "train_pretrain.py", "scripts/audit.py", "scripts/compare.py")
    ]
    for source in (*sources, *(ROOT / "util" / "cli").glob("*.py")):
        for option in re.findall(r'"(--[a-z-]+)", type=Path', source.read_text()):
            assert f" {option} " in known or f' {option}"' in known, f"{option} of {source.name}"
