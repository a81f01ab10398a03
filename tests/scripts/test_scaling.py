import json
import math

import pytest

from scripts.scaling import exponent

TINY = ("--models", "face_vit_tiny", "--factors", 1, 2, "--batch-size", 5, "--repeats", 1, "--compile", "off")


def test_exponents_are_those_of_power_laws():
    rows = [{"images": n, "seconds": 3 * n**1.5, "memory_mb": 7.0} for n in (1, 4, 16)]
    assert exponent(rows, "images", "seconds") == pytest.approx(1.5)
    assert exponent(rows, "images", "memory_mb") == pytest.approx(0, abs=1e-9)


def test_table_and_figure_are_left(command, tmp_path):
    two_models = (*TINY[:2], "vit_tiny_patch16_224", *TINY[2:])
    code, out, err = command("scripts/scaling.py", *two_models, "--device", "cpu", "--output-dir", tmp_path)
    assert code == 0, err
    figures = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["images"] for row in figures["images"]] == [16, 24]  # whole identities, of eight
    assert all(row["seconds"] > 0 and math.isfinite(row["memory_mb"]) for row in figures["images"])
    assert (tmp_path / "scaling.md").read_text().strip() in out
    assert (tmp_path / "scaling.png").stat().st_size > 1000
