"""Damaged image files by the hundreds: named and refused, or decoded; never anything else."""

import random
import re

import pytest
from PIL import Image

from tests.data.conftest import SIZE, noise, save
from tests.mutants import MUTANTS, damaged
from util.runtime.errors import RunError

FORMATS = {"jpg": {"exif": Image.Exif()}, "png": {}, "gif": {"save_all": True}, "webp": {}, "tiff": {}, "bmp": {}, "ppm": {}}


@pytest.mark.parametrize("extension", FORMATS)
def test_mutants_are_named_or_decoded(extension, tmp_path, root, load, capsys):
    chance = random.Random(extension)
    image = noise(0, (40, 48))
    save(image, tmp_path / f"whole.{extension}", **FORMATS[extension])
    buffer = (tmp_path / f"whole.{extension}").read_bytes()
    count = max(1, MUTANTS // 5)
    for number in range(count):
        (root / f"train/a/x{number}.{extension}").write_bytes(damaged(buffer, chance))
    try:
        train, _ = load(root)
    except RunError as error:
        (refused,) = re.findall(rf": (\d+) of {count + 6} images cannot be decoded: ", str(error))
        assert 0 < int(refused) <= count
        assert "\n" not in str(error)
        assert not [*(tmp_path / "cache").glob("*.raw*")]
    else:
        assert train.images.shape == (count + 4, 3, SIZE, SIZE)
    assert "Traceback" not in capsys.readouterr().err
