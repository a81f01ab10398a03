"""Machines that lack something: each still runs, and says what it runs with."""

import json
import subprocess
import sys

import pytest
import torch

from data import has_room
from tests.conftest import ROOT

SHORT = ("--num-tasks", 1, "--epochs", 1, "--overwrite")


def start_line(out: str) -> str:
    return out.splitlines()[0]


def chosen(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["hardware"]


@pytest.mark.parametrize("has", [True, False])
def test_bf16(has, trained, colours, command, tmp_path, monkeypatch):
    monkeypatch.setattr("util.runtime.hardware.has_fast_bf16", lambda device: has)
    words = ("--checkpoint", trained, "--data", colours, "--device", "cpu", "--output-dir", tmp_path, *SHORT)
    code, out, err = command("train_forget.py", *words)
    assert code == 0, err
    assert (", bf16 →" in start_line(out)) == has
    assert (", fp32 →" in start_line(out)) != has
    assert chosen(tmp_path)["bf16"] == has
    code, out, err = command("train_forget.py", *words, "--precision", "bf16")
    assert code == 0, err
    assert chosen(tmp_path)["bf16"]


def test_no_compiler(trained, colours, tmp_path):
    """Found without a cache's answer; auto runs eagerly then, and asking for it is refused in one line."""
    # In a process of its own: torch remembers for the rest of one that there is no compiler.
    script = """
import sys, torch
from util.cli import main; from util.runtime import hardware; import train_forget
sys.argv[0] = "train_forget.py"
assert hardware.can_compile(torch.device("cpu"))
torch._inductor.config.cpp.cxx = ("/no-compiler",)
torch.compiler.reset()
hardware.WORTH_COMPILING = {"cpu": 0, "cuda": 0}
main.run_main(train_forget.main)
sys.argv += ["--compile", "on"]
main.run_main(train_forget.main)
"""
    command = [sys.executable, "-c", script]
    command += ["--checkpoint", trained, "--data", colours, "--device", "cpu", "--output-dir", tmp_path, *map(str, SHORT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "compiled" not in start_line(done.stdout)
    assert chosen(tmp_path)["compile"] is False
    assert done.stderr.splitlines()[-1].startswith("train_forget.py: error: torch.compile does not work here")


def test_images_stay_where_there_is_room(monkeypatch):
    cuda, cpu, casia100 = torch.device("cuda"), torch.device("cpu"), 45_000 * 3 * 112 * 112
    for total, has in ((80, True), (12, True), (4, False)):
        free = (total - 1) << 30
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free + (1 << 30)))
        assert has_room(cuda, casia100) == has
    assert not has_room(cpu, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("where", ["device", "host"])
def test_a_gpu_of_4_gb(where, trained, colours, command, tmp_path):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (4 << 30) / total))
    try:
        words = ("--checkpoint", trained, "--data", colours, "--output-dir", tmp_path, "--images", where, *SHORT)
        code, _, err = command("train_forget.py", *words)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert code == 0, err
    assert chosen(tmp_path)["images"].startswith("cuda" if where == "device" else "cpu")


def test_a_set_larger_than_memory(tmp_path):
    """100 GB of images, in a cache file of holes: a few-shot task and its evaluation take a small part of it."""
    script = """
import sys, torch
from pathlib import Path
from backbone.recognizer import Architecture, build_recognizer, to_device
from data.cache import cached_images
from data.image_set import ImageSet
from methods import METHODS
from tests.conftest import drawn_tasks
from util.training.engine import Trainer
from util.evaluation.evaluate import predict
from util.runtime.hardware import choose_hardware
from util.training.monitor import Monitor
import train_forget
folder, shape = sys.argv[1], (100_000_000_000 // 37632, 3, 112, 112)
with open(f"{folder}/key.raw", "wb") as file:
    file.truncate(shape[0] * 37632)
images = cached_images("key", shape, lambda array: sys.exit("the cache was not used"), Path(folder))
labels = torch.arange(shape[0]) % 6
data = ImageSet("holes", images, labels, tuple("abcdef"))
hardware = choose_hardware("cpu")
args = train_forget.parse_arguments(["--checkpoint", "none", "--epochs", "2"])
tasks = drawn_tasks(labels, 6, num_tasks=2, per_task=2, seed=0, few_shot=50)
torch.manual_seed(0)
size = {"embed_dim": 32, "depth": 2, "num_heads": 2}
model = to_device(build_recognizer(Architecture("face_vit_tiny", 6, 112, "cosface", size)), hardware.resolve_compile(0))
method = METHODS["gs_lora"](args, hardware)
method.begin_run(model, tasks, data)
method.begin_task(model, tasks[0], data, args.epochs)
trainer = Trainer(model, method, tasks[0])
hardware.reset_peak_memory()
with Monitor(None, "", "", 2) as monitor:
    trainer.train(monitor, lambda trainer: None, lambda trainer: print(2 * monitor.images))
predict(model, data.subset(torch.arange(0, shape[0], shape[0] // 50)), hardware)
print(hardware.peak_memory_mb())
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not writable" not in done.stderr
    images, megabytes = map(float, done.stdout.split()[-2:])
    assert images == 2 * 5 * (48 + 48)  # two epochs of five steps: 200 images of D_r
    assert megabytes < 4000  # half of it are torch's own libraries
