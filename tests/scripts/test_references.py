"""References of the audit: what they are trained by, when they are trained, and what is said where they cannot be."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import scripts.references
import train_pretrain
from data import build_datasets
from data.tasks import named_classes
from scripts.audit import parse_arguments
from scripts.jobs import Job
from scripts.references import _locks, pretraining_recipe, reference_job, train_references
from tests.conftest import ROOT
from tests.scripts.test_jobs import SAVES
from tests.test_bad_input import refused
from train_pretrain import RECIPE
from util.runtime.errors import RunError
from util.runtime.files import file_lock
from util.storage.checkpoint import load_checkpoint
from util.storage.folders import PretrainFolder
from util.training.engine import Trainer
from util.training.resume import LastState

ONE_DEVICE = Namespace(gpus=[], jobs_per_gpu=1, cluster="local")


@pytest.fixture
def recipe(early) -> dict:
    return torch.load(early, weights_only=True)["info"]["recipe"]


def job_of(data, recipe, without=(2, 7), seed=1, classes=None, **options):
    words = ["--before", "b", "--after", "a", "--forget-classes", "c1", "--data", data, "--device", "cpu"]
    args = parse_arguments([*map(str, words)])
    train_set, _ = build_datasets(args, 32, torch.device("cpu"))
    vars(args).update(options)
    return reference_job(args, recipe, replace(train_set, classes=classes or train_set.classes), without, seed)


def spoil(colours: Path, target: Path, change) -> Path:
    """A copy of the data, changed."""
    change(shutil.copytree(colours, target / "colours"))
    return target / "colours"


def test_a_reference_is_known_by_images_recipe_classes_and_seed(colours, recipe, tmp_path):
    base = job_of(colours, recipe).folder.path
    copy = spoil(colours, tmp_path / "elsewhere", lambda folder: [os.utime(path) for path in folder.rglob("*.png")])
    alike = {
        "another place": job_of(copy, recipe),
        "classes in another order": job_of(colours, recipe, (7, 2)),
        "other hardware": job_of(colours, recipe, device="cuda:1", precision="bf16", images="host", attention="fused"),
    }
    assert {name: job.folder.path for name, job in alike.items()} == dict.fromkeys(alike, base)
    names = tuple(f"d{c}" for c in range(10))
    changed = {
        "an image fewer": lambda folder: next((folder / "train" / "c0").iterdir()).unlink(),
        "an image of another class": lambda folder: next((folder / "train/c0").iterdir()).rename(folder / "train/c1/x.png"),
        "another image": lambda folder: shutil.copy(*[*(folder / "train" / "c0").iterdir()][:2]),
    }
    others = {name: job_of(spoil(colours, tmp_path / name, change), recipe) for name, change in changed.items()}
    others |= {
        "other names": job_of(colours, recipe, classes=names),
        "fewer classes": job_of(colours, recipe, (2,)),
        "all classes": job_of(colours, recipe, ()),
        "another seed": job_of(colours, recipe, seed=2),
        **{key: job_of(colours, recipe | {key: 0.5}) for key in ("lr", "drop_rate", "clip_grad", "min_lr")},
        **{key: job_of(colours, recipe | {key: 7}) for key in ("epochs", "batch_size", "depth")},
    }
    assert len({base, *(job.folder.path for job in others.values())}) == 1 + len(others)


def test_weights_to_start_from_are_known_by_what_they_are(colours, recipe, tmp_path):
    """Not by where they lie: another file in the same place is another recipe."""
    for name, content in (("a.pth", b"one"), ("b.pth", b"one"), ("c.pth", b"other")):
        (tmp_path / name).write_bytes(content)
    one, same, other = (
        job_of(colours, recipe | {"weights": str(tmp_path / name)}).folder.path for name in ("a.pth", "b.pth", "c.pth")
    )
    assert one == same
    assert one != other


def test_it_is_trained_by_the_recipe_on_as_many_images(colours, recipe):
    whole = recipe | {"epochs": 20, "warmup_epochs": 4, "clip_grad": 0.5, "pretrained": True, "drop_rate": 0.25}
    for without, epochs, warmup in (((), 20, 4), ((2, 7), 25, 5), ((0, 1, 2, 3, 4), 40, 8)):
        job = job_of(colours, whole, without, seed=3, precision="fp32")
        parsed = train_pretrain.parse_arguments(job.arguments)
        shown = {key: getattr(parsed, key) for key in RECIPE}
        assert shown == whole | {"epochs": epochs, "warmup_epochs": warmup}
        assert epochs * 12 * (10 - len(without)) == 20 * 120
        assert (parsed.seed, parsed.output_dir, parsed.data) == (3, job.folder.path, str(colours))
        assert (parsed.precision, parsed.device, parsed.resume, parsed.overwrite) == ("fp32", "cpu", True, True)
        assert parsed.absent_classes is None
        left_out = parsed.without_classes and named_classes(parsed.without_classes, [f"c{c}" for c in range(10)])
        assert left_out == ([*without] or None)


def test_any_name_of_a_class_is_left_out(colours, recipe):
    names = ("\n", "o'neil, pat", '"eve"', "-x", "--seed", "7", "0", " ann, ", "\udcff", "#")
    for without in ([c] for c in range(10)):
        parsed = train_pretrain.parse_arguments(job_of(colours, recipe, without, classes=names).arguments)
        assert named_classes(parsed.without_classes, names) == without


def test_whoever_has_no_images_keeps_the_class_id(colours, recipe):
    args = parse_arguments(["--before", "b", "--after", "a", "--forget-classes", "c1", "--data", str(colours)])
    train_set, _ = build_datasets(args, 32, torch.device("cpu"))
    names = ("b", "a,\n", '"q"', *(f"c{c}" for c in range(10)))
    train_set = replace(train_set, labels=train_set.labels + 3, classes=names)
    parsed = train_pretrain.parse_arguments(reference_job(args, recipe, train_set, (4,), 1).arguments)
    assert next(csv.reader([parsed.absent_classes])) == [*names[:3]]
    assert named_classes(parsed.without_classes, names) == [4]


def test_what_the_cache_has_is_not_trained_again(colours, recipe, here, capsys):
    jobs = [job_of(colours, recipe, (2, 7), seed) for seed in (1, 2, 1)]
    train_references(jobs, ONE_DEVICE)
    assert here == ["colours without 2 classes, seed 1", "colours without 2 classes, seed 2"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "references: 2 needed, 0 in the cache"
    assert [line.split(" · ")[0] for line in lines[1:]] == [f"reference {n} of 2: {here[n - 1]}" for n in (1, 2)]
    checkpoints = [torch.load(job.folder.results, weights_only=True) for job in jobs[:2]]
    assert [checkpoint["info"]["seed"] for checkpoint in checkpoints] == [1, 2]
    for checkpoint in checkpoints:
        assert checkpoint["info"]["without_classes"] == [2, 7]
        assert checkpoint["info"]["recipe"] == recipe | {"epochs": 8, "warmup_epochs": 1}
        assert not checkpoint["model"]["head.weight"][[2, 7]].any()
    again = [job_of(colours, recipe, (7, 2), seed) for seed in (1, 2)]
    assert all(job.finished for job in again)
    train_references(again, ONE_DEVICE)
    assert len(here) == 2
    assert capsys.readouterr().out == ""


def test_an_interrupted_reference_is_continued_to_the_same_end(colours, recipe, here, monkeypatch, tmp_path):
    job, epochs = job_of(colours, recipe, (3,), seed=5), []
    one_epoch, after_epoch = Trainer.train_one_epoch, LastState.after_epoch

    def note(self, *arguments):
        epochs.append(self.position.epoch)
        one_epoch(self, *arguments)

    def cut(self, trainer):
        self.save_every = 0
        after_epoch(self, trainer)
        if trainer.position.epoch == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train_one_epoch", note)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LastState, "after_epoch", cut)
        train_references([job], ONE_DEVICE)
    assert job.folder.last.exists() and not job.folder.finished
    train_references([job_of(colours, recipe, (3,), seed=5)], ONE_DEVICE)
    assert epochs == [*range(5), *range(5, 7)]
    whole = ["" if word == str(job.folder.path) else word for word in job.arguments]
    whole[whole.index("")] = str(tmp_path / "whole")
    train_pretrain.main(whole)
    one, other = (
        torch.load(path, weights_only=True)["model"] for path in (job.folder.results, tmp_path / "whole" / "checkpoint.pth")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_one_that_fails_is_named_in_one_line(early, colours, command, tmp_path):
    """Two side by side, in processes of their own, which see no such device, and use the CPU."""
    config = json.loads((early.parent / "config.json").read_text())
    config["arguments"] |= {"lr": 1e30, "precision": "fp32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ("--before", early, "--after", early, "--forget-classes", "c8", "--data", colours, "--quick", "--gpus", 0, 1)
    result = command("scripts/audit.py", *words, "--recipe", tmp_path / "config.json", "--output-dir", tmp_path / "audit")
    refused(result, 1, "audit.py: error: reference colours without 1 classes, seed ")
    assert ": the loss is not finite: part 'total' became " in result[2]
    log = Path(result[2].split("(see ")[1].split(")")[0])
    assert "the loss is not finite" in log.read_text()
    assert result[1] == "references: 3 needed, 0 in the cache\n"
    assert [path.name for path in (tmp_path / "audit").iterdir()] == ["config.json"]


def test_after_one_that_fails_the_others_save_and_end(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SAVES)
    folders = [PretrainFolder(tmp_path / name) for name in ("bad", "long", "later")]
    jobs = [Job(folder.path.name, folder, str(script), [str(folder.path)]) for folder in folders]
    with pytest.raises(RunError, match="reference bad: no"):
        train_references(jobs, Namespace(gpus=["0", "1"], jobs_per_gpu=1, cluster="local"))
    assert (tmp_path / "long" / "saved").exists()  # while the error is at hand, and with it all that led there
    assert not (tmp_path / "later" / "begun").exists()


def test_sigterm_ends_them_saved(early, colours, tmp_path):
    """The one at hand saves and ends, none is started after it."""
    config = json.loads((early.parent / "config.json").read_text())
    config["arguments"]["epochs"] = 1000  # not enough to compile for, and more than it lives to see
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["--before", early, "--after", early, "--forget-classes", "c8", "--data", colours, "--quick", "--gpus", "0"]
    words += ["--recipe", tmp_path / "config.json", "--cache-dir", tmp_path / "cache", "--output-dir", tmp_path / "audit"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "audit.py", *map(str, words)], stderr=subprocess.PIPE, text=True
    )
    references = tmp_path / "cache" / "references"
    try:
        end = time.monotonic() + 300
        while not [*references.glob("*/events.out*")]:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        time.sleep(3)  # the writer is opened just before the first step
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 143, err
        assert "Traceback" not in err
        (folder,) = (log.parent for log in references.glob("*/log.txt"))
        assert (folder / "checkpoints" / "last.pth").exists() and not (folder / "checkpoint.pth").exists()
        with PretrainFolder(folder).locked():  # nobody holds it any more
            pass
    finally:
        for holder in references.glob("*/.lock.holder"):
            os.kill(int(holder.read_text().split("process ")[1].split()[0]), signal.SIGTERM)


ANOTHER_AUDIT = """
import sys
from pathlib import Path
from util.runtime.errors import RunError
from util.runtime.files import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
    Path(sys.argv[2]).write_bytes(b"")
"""


@pytest.mark.parametrize("held", ["the audit", "the run that a killed audit left"])
@pytest.mark.parametrize("killed", [False, True])
def test_a_reference_that_another_audit_trains_is_waited_for(held, killed, colours, recipe, monkeypatch, tmp_path):
    """And trained where that one dies before it is there; meanwhile the others are."""
    jobs, lines, trained = [job_of(colours, recipe, (4,), seed, cache_dir=tmp_path) for seed in (1, 2)], [], []
    words = [_locks(jobs[0])[held != "the audit"], jobs[0].folder.results]
    command = [sys.executable, "-c", ANOTHER_AUDIT, *map(str, words)]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"

    def run_jobs(jobs, gpus):
        for job in jobs:
            trained.append(job.label)
            job.folder.results.write_bytes(b"")
            yield job

    def note(line, **_):
        lines.append(line.split(" · ")[0])
        if "waiting" in line:
            threading.Timer(0.2, other.kill if killed else other.stdin.close).start()

    monkeypatch.setattr(scripts.references, "run_jobs", run_jobs)
    monkeypatch.setattr(scripts.references, "print", note, raising=False)
    train_references(jobs, ONE_DEVICE)
    other.wait()
    second, first = (f"colours without 1 classes, seed {seed}" for seed in (2, 1))
    assert trained == ([second, first] if killed else [second])
    assert lines[1:] == [
        f"reference 1 of 2: {second}",
        f"waiting for another audit, which trains {first}",
        f"reference 2 of 2: {first}",
    ]


def test_references_on_a_cluster_tell_their_time_as_side_by_side(colours, recipe, monkeypatch, tmp_path):
    jobs, lines = [job_of(colours, recipe, (4,), seed, cache_dir=tmp_path) for seed in (1, 2)], []
    monkeypatch.setattr(scripts.references, "run_jobs", lambda jobs, where: (job for job in jobs))
    monkeypatch.setattr(scripts.references, "print", lambda line, **_: lines.append(line), raising=False)
    train_references(jobs, Namespace(gpus=[], jobs_per_gpu=None, cluster="slurm", sbatch=""))
    assert [line.split(", ")[-1] for line in lines[1:]] == ["about 0:00 left"] * 2


def test_a_run_that_another_process_has_taken_in_the_meantime_is_waited_for(colours, recipe, monkeypatch, tmp_path):
    """A killed audit's run may begin late: ours fails then, and is no failure."""
    job, tried = job_of(colours, recipe, (4,), cache_dir=tmp_path), []

    def run_jobs(jobs, gpus):
        for job in jobs:
            tried.append(job.label)
            with file_lock(_locks(job)[1]) if len(tried) == 1 else contextlib.nullcontext():
                job.failure = "in use by another" if len(tried) == 1 else ""
                yield job

    monkeypatch.setattr(scripts.references, "run_jobs", run_jobs)
    train_references([job], ONE_DEVICE)
    assert len(tried) == 2


@pytest.fixture
def asked(early, colours, command, tmp_path):
    """Audit a checkpoint whose recipe is unknown."""
    checkpoint = torch.load(early, weights_only=True)
    del checkpoint["info"]["recipe"]
    torch.save(checkpoint, tmp_path / "old.pth")
    words = ("--before", tmp_path / "old.pth", "--after", early, "--forget-classes", "c0,c1,c2,c3,c4", "--data", colours)
    words += ("--quick", "--output-dir", tmp_path / "audit")
    return lambda *more: command("scripts/audit.py", *words, *more)


def test_an_unknown_recipe_is_asked_for(asked, trained, early, here, tmp_path):
    known = "--recipe, references with --references, or people in no training set with --strangers"
    refused(asked(), 2, f"{tmp_path / 'old.pth'} names no recipe of pre-training")
    assert known in asked()[2]
    for name, content in (("empty", {}), ("none", {"arguments": None}), ("other", {"arguments": {"lr": 1}})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        refused(asked("--recipe", tmp_path / f"{name}.json"), 2, f"{name}.json has no recipe of pre-training")
    refused(asked("--recipe", tmp_path / "absent.json"), 2, f"no file {tmp_path / 'absent.json'}")
    refused(asked("--recipe", early), 1, "not readable as JSON")
    config = json.loads((early.parent / "config.json").read_text())
    for changes, code, message in (
        ({"depth": 3}, 2, "was not trained by the recipe in"),
        ({"image_size": 48}, 2, "was not trained by the recipe in"),
        ({"head": "softmax"}, 2, "head.bias is missing"),
        ({"model": "face"}, 2, "unknown model 'face'"),
        ({"epochs": None}, 1, "no recipe of pre-training"),
        ({"epochs": 0}, 2, "audit it with --strangers"),
        ({"weights": str(tmp_path / "gone.pth")}, 2, f"no file {tmp_path / 'gone.pth'}, whose weights"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"arguments": config["arguments"] | changes}))
        refused(asked("--recipe", tmp_path / "config.json"), code, message)
    assert not here
    assert not (tmp_path / "audit").exists()


def test_the_recipe_of_a_config_file_is_the_checkpoints_own(early, colours, recipe):
    checkpoint = load_checkpoint(early)
    for config in (None, early.parent / "config.json"):
        found = pretraining_recipe(checkpoint, early, config)
        assert (found, [*found]) == (recipe, [*RECIPE])
