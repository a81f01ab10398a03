"""Image folders that the tests of this folder share."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data.image_folder
from data.image_folder import image_folder
from data.image_set import class_digests

SIZE = 16


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def noise(seed, size=(20, 24)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def root(tmp_path):
    """Two classes, two training images and one test image each."""
    for seed, name in enumerate(["train/b/1.png", "train/b/2.png", "train/a/1.png", "train/a/2.png"]):
        save(noise(seed), tmp_path / "faces" / name)
    for seed, name in enumerate(["test/a/1.png", "test/b/1.png"]):
        save(noise(10 + seed), tmp_path / "faces" / name)
    return tmp_path / "faces"


@pytest.fixture
def load(tmp_path):
    return lambda root, image_size=SIZE, **how: image_folder(root, image_size, tmp_path / "cache", **how)


@pytest.fixture
def decoded(monkeypatch):
    """How often each file has been decoded."""
    counts, decode = Counter(), data.image_folder.decode_image

    def count(file, image_size, crop_pct):
        counts[os.path.relpath(file.name, Path(file.name).parents[2])] += 1
        return decode(file, image_size, crop_pct)

    monkeypatch.setattr(data.image_folder, "decode_image", count)
    return counts


def tag_of(data) -> str:
    return replace(data[0], contents=class_digests(*data)).tag
