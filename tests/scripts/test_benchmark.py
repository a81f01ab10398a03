"""The benchmark runs, at sizes that say nothing about speed; no timing is asserted."""

import json
import runpy
from dataclasses import replace

import pytest
import torch

from tests.conftest import ROOT

SMALL = ("--batch-size", 4, "--min-run-time", 0.01, "--compile", "off", "--device", "cpu", "--precision", "fp32")
PARTS = {"cls_only_last_block off", "fast_dropout off", "fused_optimizer off", "fused_attention on"}


@pytest.fixture
def measure(command, tmp_path):
    def measure(mode: str) -> tuple[list[dict], str]:
        model = ("--model", "face_vit_tiny")
        code, out, err = command("scripts/benchmark.py", mode, *model, *SMALL, "--json", tmp_path / "figures.json")
        assert code == 0, err
        return json.loads((tmp_path / "figures.json").read_text())[mode], out

    return measure


def test_steps_on_both_paths(measure):
    rows, out = measure("steps")
    assert [row["work"] for row in rows] == ["gs_lora", "der_pp", "ewc", "pretrain", "evaluation"]
    for row in rows:
        assert row["fast : plain"] == pytest.approx(row["images/s fast"] / row["images/s plain"])
    assert max(map(len, out.splitlines()[4:])) <= 100


def test_ablation_undoes_one_part_at_a_time(measure):
    rows, _ = measure("ablation")
    whole, *undone = rows
    assert {row["work"] for row in undone} == PARTS
    for row in undone:
        assert row["times as long"] == pytest.approx(row["ms"] / whole["ms"])


@pytest.mark.parametrize("name", ["gs_lora", "der_pp", "ewc", "pretrain"])
def test_both_paths_compute_the_same_loss(name, cpu):
    """The plain path's is checked against independent arithmetic in tests/methods."""
    script = runpy.run_path(str(ROOT / "scripts" / "benchmark.py"))
    fast = replace(cpu, cls_only_last_block=True, fast_dropout=True, fused_optimizer=True, fused_attention=True)
    plain = replace(fast, **dict.fromkeys(script["FIELDS"], False))
    bench = script["Bench"]("face_vit_tiny", 4, 4, cpu.device)
    losses = []
    for hardware in (fast, plain):
        torch.manual_seed(0)
        trainer = bench.begin(name, hardware)
        trainer.model.eval()
        torch.manual_seed(1)
        losses.append(trainer.step(next(bench.batches(trainer)))["total"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
