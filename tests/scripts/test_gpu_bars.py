"""The script of the GPU's promises runs; on a CPU its figures say nothing, and none is asserted."""

import json


def test_the_table_of_promises_is_filled_in(command, tmp_path, monkeypatch):
    monkeypatch.setattr("math.ceil", lambda number: 1)  # single runs
    sizes = ("--identities", 10, "--train-per-identity", 10, "--test-per-identity", 1, "--pretrain-batch-size", 2)
    options = ("--epochs", 1, 2, "--batch-size", 2, "--repeats", 1, "--jobs-per-gpu", 1, "--compile", "off")
    options += ("--methods", "l2", "gs_lora")
    figures = tmp_path / "figures.json"
    arguments = ("--model", "face_vit_tiny", "--device", "cpu", *sizes, *options, "--json", figures)
    code, out, err = command("scripts/gpu_bars.py", *arguments)
    assert code == 0, err
    measured = json.loads(figures.read_text())
    few, more = measured["table"]["measured_seconds"].values()
    assert abs(measured["table"]["seconds"] - (few + 99 * (more - few))) < 1e-6
    assert measured["table"]["memory_mb"] > 100
    for promise in ("≥ 25,000 images/s", "≥ 10 × the plain path", "≤ 20 minutes", "≤ 8 GB", "≤ 10 s eager"):
        (row,) = [line for line in out.splitlines() if promise in line]
        assert any(character.isdigit() for character in row.rsplit("|", 2)[1])
