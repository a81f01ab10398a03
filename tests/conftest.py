"""Small data and models that the tests share. No test touches the user's cache or the repository's exps folder."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch

from backbone.recognizer import Architecture, Recognizer, build_recognizer
from data.image_set import ImageSet
from util.hardware import Hardware


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
