"""Two runs and one folder; a folder without room; signals; and losses that are not finite."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.conftest import ROOT, SMALL, results_of
from tests.test_bad_input import refused
from tests.test_command_lines import forget_options
from util.storage.folders import RunFolder

HOLDS_A_RUN = "holds a run: --resume continues it, another --output-dir keeps it, --overwrite replaces it"


def start(script: str, *words: object, **options) -> subprocess.Popen:
    command = [sys.executable, ROOT / script, *words]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for(path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.02)


def test_the_second_run_in_a_folder_is_refused_naming_the_first(trained, colours, command, tmp_path):
    words = forget_options(trained, colours, tmp_path / "run")
    first = start("train_forget.py", *words, "--epochs", 3000)
    wait_for(tmp_path / "run" / "checkpoints" / "last.pth")
    for more in ((), ("--overwrite",), ("--resume", "--overwrite")):
        refused(command("train_forget.py", *words, *more), 2, f"is in use by train_forget.py, process {first.pid} on ")
    # A signal ends it within a step, saved; and the folder is free again.
    first.send_signal(signal.SIGTERM)
    _out, err = first.communicate(timeout=60)
    assert first.returncode == 143, err
    assert "stopped by SIGTERM in epoch" in err
    assert "continue with --resume" in err
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pth", weights_only=True)
    assert f"in epoch {state['position']['epoch'] + 1} of 3000" in err
    refused(command("train_forget.py", *words), 2, HOLDS_A_RUN)
    code, _, err = command("train_forget.py", *words, "--overwrite", "--epochs", 1)
    assert code == 0, err


def test_pre_training_is_neither_replaced_nor_run_twice_at_once(colours, command, tmp_path):
    words = ("--data", colours, *SMALL, "--epochs", 2, "--batch-size", 24, "--output-dir", tmp_path)
    with RunFolder(tmp_path).locked():
        refused(command("train_pretrain.py", *words), 2, "is in use by")
    assert command("train_pretrain.py", *words)[0] == 0
    stamp = (tmp_path / "checkpoint.pth").stat().st_mtime_ns
    refused(command("train_pretrain.py", *words), 2, HOLDS_A_RUN)
    refused(command("train_pretrain.py", *words, "--resume", "--lr", 1), 2, "other options: --lr 0.001, now 1.0")
    assert (tmp_path / "checkpoint.pth").stat().st_mtime_ns == stamp
    assert command("train_pretrain.py", *words, "--resume", "--overwrite", "--lr", "1e-2")[0] == 0
    assert json.loads((tmp_path / "config.json").read_text())["arguments"]["lr"] == 1e-2


def test_a_run_is_finished_when_its_results_say_so(tmp_path):
    folder = RunFolder(tmp_path)
    assert not folder.finished
    for text, finished in (("{}", False), ('{"finished": true}', True)):
        folder.results.write_text(text)
        assert folder.finished == finished


def test_what_killed_processes_leave_is_removed(trained, colours, command, tmp_path):
    words = [*forget_options(trained, colours, tmp_path / "run"), "--epochs", 1]
    assert command("train_forget.py", *words)[0] == 0
    folder = tmp_path / "run" / "checkpoints"
    for name in (".task_1.pth.123.tmp", ".mine.pth.123.tmp", ".task_1.pth.mine.tmp"):
        (folder / name).write_bytes(b"half")
    code, _, err = command("train_forget.py", *words, "--overwrite")
    assert code == 0, err
    assert {path.name for path in tmp_path.rglob(".*")} == {".lock", ".mine.pth.123.tmp", ".task_1.pth.mine.tmp"}


def test_a_disk_without_room_is_found_before_anything_starts(trained, colours, command, tmp_path, monkeypatch):
    words = forget_options(trained, colours, tmp_path / "run")
    assert command("train_forget.py", *words, "--epochs", 1)[0] == 0
    before = results_of(tmp_path / "run")
    free = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    refused(command("train_forget.py", *words, "--overwrite"), 2, "1 MB are free")
    assert results_of(tmp_path / "run") == before


def fills_up(output, *words: object, **options) -> None:
    """The disk fills up while the run goes: one line, and every file whole."""
    command = [sys.executable, *map(str, words)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    assert "error: cannot write: " in process.stderr.strip().splitlines()[-1]
    for path in output.rglob("*.pth"):
        torch.load(path, weights_only=True)
    assert not list(output.rglob(".*.tmp"))


def continues(command, words: list, output) -> None:
    code, _, err = command("train_forget.py", *words, "--resume")
    assert code == 0, err
    assert len(results_of(output)["tasks"]) == 2


def test_a_quota_that_is_reached(trained, colours, command, tmp_path):
    words = forget_options(trained, colours, tmp_path / "run")
    size = trained.stat().st_size  # of a checkpoint: that of the last state is larger
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}
    fills_up(tmp_path / "run", "train_forget.py", *words, **limit)
    continues(command, words, tmp_path / "run")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_disk_that_fills_up(trained, colours, command, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = round(3.2 * trained.stat().st_size)  # one last state and one checkpoint, not the next ones beside them
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        words = forget_options(trained, colours, disk / "run")
        refused(command("train_forget.py", *words), 2, "MB are free")
        script = "import sys, shutil; shutil.disk_usage = lambda p: type('U', (), {'free': 1 << 40}); import train_forget"
        script += "; from util.cli.main import run_main; sys.argv[0] = 'train_forget.py'; run_main(train_forget.main)"
        fills_up(disk, "-c", script, *words)
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        continues(command, words, disk / "run")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("poisoned", [3, 9])
def test_a_loss_that_is_not_finite_ends_the_run_at_that_step(poisoned, trained, colours, command, tmp_path, monkeypatch):
    from methods.gs_lora import GSLoRA

    terms, calls = GSLoRA.terms, []

    def poison(self, model, embeddings, labels):
        losses = terms(self, model, embeddings, labels)
        calls.append(1)
        if len(calls) == poisoned:
            losses["remain"] = losses["remain"] * float("nan")
            losses["total"] = losses["total"] + losses["remain"]
        return losses

    monkeypatch.setattr(GSLoRA, "terms", poison)
    words = [*forget_options(trained, colours, tmp_path / "run"), "--batch-size", 48, "--save-every", 0]
    result = command("train_forget.py", *words)
    # Two steps an epoch.
    refused(result, 1, f"part 'remain' became nan in epoch {(poisoned + 1) // 2}, step {(poisoned + 1) % 2 + 1}")
    assert len(calls) == poisoned
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pth", weights_only=True)
    assert state["position"]["epoch"] == (poisoned - 1) // 2
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    monkeypatch.undo()
    code, _, err = command("train_forget.py", *words, "--resume")
    assert code == 0, err


def test_weights_that_are_not_finite_do_not_replace_good_ones(trained, colours, command, tmp_path, monkeypatch):
    from util.training.engine import Trainer

    step = Trainer.step

    def poison(self, batch):
        losses = step(self, batch)
        if self.position.updates == 6:  # the last of the third epoch: the loss of it was fine
            self.parameters[0].data.fill_(float("inf"))
        return losses

    monkeypatch.setattr(Trainer, "step", poison)
    words = [*forget_options(trained, colours, tmp_path / "run"), "--batch-size", 48, "--save-every", 0]
    refused(command("train_forget.py", *words), 1, "the weights are not finite after epoch 3")
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.pth", weights_only=True)["position"]["epoch"] == 2


def test_a_file_system_without_locks(trained, colours, command, tmp_path, monkeypatch):
    """As some NFS are: every lock fails. The cache is made anew, so that it locks as well."""

    def fail(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", fail)
    words = [*forget_options(trained, colours, tmp_path / "run"), "--epochs", 1, "--cache-dir", tmp_path / "cache"]
    code, _, err = command("train_forget.py", *words)
    assert code == 0, err
    told = f"warning: {tmp_path / 'run'} cannot be locked (No locks available): nothing keeps a second run out"
    assert told in err.splitlines()
    assert "held in memory" not in err
    assert list((tmp_path / "cache").glob("*.part"))
