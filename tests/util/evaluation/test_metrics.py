import json
from pathlib import Path

import pytest
import torch

from util.evaluation.metrics import h_mean, top1

PAPER = json.loads((Path(__file__).parents[3] / "util" / "report" / "paper_tables.json").read_text())
# Where the published table contradicts itself: its H does not follow from its own accuracies.
MISPRINTS = {("continual", "gs_lora_pp", "100-20"), ("single_step", "lwf", "100-5")}


def paper_cells():
    for name in ("continual", "continual_few_shot_4", "single_step", "imagenet_100", "missing_classes_5"):
        table = PAPER[name]
        for method, cells in table["methods"].items():
            for setting, before, cell in zip(table["settings"], table["pretrained"]["acc_forget"], cells, strict=True):
                yield name, method, setting, before, cell


def test_h_mean_agrees_with_every_published_cell_but_the_two_misprints():
    cells = list(paper_cells())
    wrong = {
        (name, method, setting)
        for name, method, setting, before, cell in cells
        if abs(h_mean(cell["acc_remain"], cell["acc_forget"], before) - cell["h_mean"]) > 0.06
    }
    assert len(cells) == 13 * 16 + 12 * 4
    assert wrong == MISPRINTS


@pytest.mark.parametrize(
    ("remain", "forget", "before", "expected"),
    [
        (80.0, 0.0, 80.0, 80.0),  # equal arms: the harmonic mean is both
        (60.0, 0.0, 30.0, 40.0),
        (50.0, 90.0, 80.0, 0.0),  # remembered better than before: nothing dropped
        (0.0, 0.0, 0.0, 0.0),
        (None, 0.0, 80.0, None),
        (80.0, None, 80.0, None),
    ],
)
def test_h_mean_by_hand(remain, forget, before, expected):
    assert h_mean(remain, forget, before) == expected


def test_top1_counts_the_chosen_images_only():
    correct = torch.tensor([True, False, True, True])
    assert top1(correct, torch.tensor([True, True, False, True])) == pytest.approx(200 / 3)
    assert top1(correct, torch.zeros(4, dtype=torch.bool)) is None
