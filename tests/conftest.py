"""Small data and models that the tests share. No test touches the user's cache or the repository's exps folder."""

import contextlib
import importlib
import json
import os
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import scripts.jobs
import scripts.references
from backbone.recognizer import Architecture, Recognizer, build_recognizer
from data.image_set import ImageSet
from data.tasks import drawn_requests, forgetting_tasks
from util.runtime.hardware import Hardware

ROOT = Path(__file__).parents[1]
# 4×4 tokens of 16 pixels: an epoch takes milliseconds.
SMALL = ("--image-size", "32", "--depth", "2")
# What takes a minute is not begun last, when no other process has work left.
LONG = ("test_shell", "test_rehearsal", "test_kills", "test_distributed", "test_method_runs", "test_requests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A cache folder of the test session's own, for this process and the scripts that it starts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def faces() -> Path:
    """The folder with real faces; skips the test where the variable FACES does not name one."""
    if not os.environ.get("FACES"):
        pytest.skip("FACES is unset: no real faces to test on")
    return Path(os.environ["FACES"])


@pytest.fixture
def cpu() -> Hardware:
    return Hardware(torch.device("cpu"), bf16=False)


def small_recognizer(num_classes: int = 6, head: str = "cosface", dtype=torch.float32, **options) -> Recognizer:
    """A Face Transformer of 16×16 images, dim 32, depth 2."""
    size = {"embed_dim": 32, "depth": 2, "num_heads": 2, **options}
    torch.manual_seed(0)
    return build_recognizer(Architecture("face_vit_tiny", num_classes, 16, head, size)).to(dtype)


@pytest.fixture
def make_recognizer():
    return small_recognizer


def coloured_images(num_classes: int = 6, per_class: int = 8, image_size: int = 16, seed: int = 0) -> ImageSet:
    """Noisy images whose mean colour tells the class: learnt within a few epochs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    # Ternary digits of the class number as levels of red, green and blue: no two classes look alike.
    colours = 90 * torch.stack([torch.arange(num_classes) // base % 3 for base in (1, 3, 9)], dim=1)[:, :, None, None]
    noise = torch.rand(len(labels), 3, image_size, image_size, generator=generator) * 70
    images = (colours[labels] + noise).to(torch.uint8)
    return ImageSet("colours", images, labels, tuple(f"c{i}" for i in range(num_classes)))


@pytest.fixture
def make_images():
    return partial(coloured_images)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a script as a user would; returns exit code, standard output and standard error."""

    def run(script: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def here(monkeypatch) -> list[str]:
    """Runs of comparisons and references are made in this process, which spares start-ups: the labels of those that were."""
    made = []

    def run_jobs(jobs, where):
        for job in jobs:
            made.append(job.label)
            with job.open_log() as log, contextlib.redirect_stdout(log):
                importlib.import_module(job.script.removesuffix(".py")).main(job.arguments)
            yield job

    for module in (scripts.jobs, scripts.references):
        monkeypatch.setattr(module, "run_jobs", run_jobs)
    return made


def drawn_tasks(labels: torch.Tensor, num_classes: int, *, num_tasks=1, per_task=1, seed=0, **options) -> list:
    """The protocol's tasks, of classes drawn by the seed."""
    requests = drawn_requests(num_classes, num_tasks, per_task, seed)
    return forgetting_tasks(labels, num_classes, requests, seed=seed, **options)


def write_folder(root: Path, train, test) -> Path:
    for split, images in (("train", train), ("test", test)):
        for number, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
            folder = root / split / images.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    train, test = coloured_images(10, 12, 32), coloured_images(10, 4, 32, seed=1)
    return write_folder(tmp_path_factory.mktemp("data") / "colours", train, test)


@pytest.fixture
def trained(colours, command, tmp_path_factory, request) -> Path:
    """A pre-trained checkpoint, made once a session."""
    folder = tmp_path_factory.getbasetemp() / "pretrained"
    if not (folder / "checkpoint.pth").exists():
        options = ("--epochs", 20, "--batch-size", 24, "--lr", "2e-3", "--output-dir", folder)
        code, out, err = command("train_pretrain.py", "--data", colours, *SMALL, *options)
        assert code == 0, err
        assert "test accuracy" in out
    return folder / "checkpoint.pth"


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())
