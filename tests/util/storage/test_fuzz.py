"""Thousands of damaged files: each is refused in one line or loads whole; never anything else, never a part.

FUZZ_MUTANTS=20000 pytest tests/util/storage/test_fuzz.py tests/data/test_bad_images.py tries that many of each kind.
"""

import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from backbone import lora
from backbone.published import to_published
from scripts import table
from test import settings_of
from tests.conftest import coloured_images, drawn_tasks, small_recognizer
from tests.mutants import MUTANTS, damaged
from util.report.results import load_results, new_results, task_entry
from util.runtime.errors import RunError, UsageError
from util.runtime.files import load_tensors, save_tensors
from util.storage.checkpoint import Checkpoint, load_checkpoint, load_weights, save_checkpoint, torch_save
from util.training.deletion_record import load_record

ODD = [None, True, -1, 0, 1 << 70, 1e308, float("nan"), "", "x" * 5000, [], {}, [[]], {"a": {}}, b"\xff", [None] * 50]


def changed(value: object, chance: random.Random, odd: list) -> object:
    """A copy of nested dicts and lists with one entry replaced, dropped, doubled or renamed."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice([*value])
        rest = {name: inner for name, inner in value.items() if name != key}
        match chance.randrange(8):
            case 0:
                return rest
            case 1:
                return rest | {chance.choice([key + "x" if isinstance(key, str) else 0, 7, None, ""]): value[key]}
            case _:
                return {name: changed(inner, chance, odd) if name == key else inner for name, inner in value.items()}
    if isinstance(value, list) and value and chance.random() < 0.8:
        place = chance.randrange(len(value))
        return [*value[:place], changed(value[place], chance, odd), *value[place:][chance.randrange(2) :]]
    return chance.choice(odd)


def odd_tensors() -> list:
    like = torch.randn(6, 32)
    plain = [like, like[:5], like.T, like.half(), like.int(), like * float("nan"), like[0, 0], torch.empty(0)]
    zero = torch.zeros(1)
    return [*plain, like.to_sparse(), torch.nn.Parameter(like), zero.expand(6, 32), zero.expand(1 << 40)]


def saved(data: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(data, buffer)
    return buffer.getvalue()


def of_checkpoint(path: Path, chance: random.Random) -> Iterator[bytes]:
    whole, data = path.read_bytes(), torch.load(path, weights_only=True)
    odd = ODD + odd_tensors()
    while True:
        yield damaged(whole, chance)
        yield saved(changed(data, chance, odd))


def of_json(path: Path, chance: random.Random) -> Iterator[bytes]:
    text, data = path.read_text(), json.loads(path.read_text())
    odd = [value for value in ODD if not isinstance(value, bytes)]
    while True:
        yield damaged(text.encode(), chance)
        yield json.dumps(changed(data, chance, odd)).encode()


def of_bytes(path: Path, chance: random.Random) -> Iterator[bytes]:
    whole = path.read_bytes()
    while True:
        yield damaged(whole, chance)


def attack(path: Path, mutants: Iterator[bytes], load: Callable[[Path], object], count: int = MUTANTS) -> dict[str, int]:
    """Write and load `count` mutants. Returns how many were refused and loaded."""
    found = {"refused": 0, "loaded": 0}
    for _ in range(count):
        path.write_bytes(next(mutants))
        try:
            load(path)
        except (UsageError, RunError) as error:
            assert "\n" not in str(error)
            assert str(error)
            found["refused"] += 1
        else:
            found["loaded"] += 1
    return found


def unchanged(model: torch.nn.Module, load: Callable[[torch.nn.Module, Path], object]) -> Callable[[Path], None]:
    """Load into `model`: if that fails, it must be as before."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    def attempt(path: Path) -> None:
        try:
            load(model, path)
        except (UsageError, RunError):
            assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
            raise
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
        model.load_state_dict(before)

    return attempt


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("published", [False, True])
def test_checkpoints(published, tmp_path):
    model = small_recognizer(embed_dim=64, num_heads=1, depth=1)
    path = tmp_path / "c.pth"
    if published:
        torch_save(path, to_published(model))
    else:
        save_checkpoint(path, Checkpoint(model, tuple("abcdef"), [[1], [3, 4]], {"acc": 1.0}))

    def load(model: torch.nn.Module, path: Path) -> None:
        load_weights(model, load_checkpoint(path).model.state_dict(), path)

    found = attack(path, of_checkpoint(path, random.Random(1)), unchanged(model, load))
    assert found["refused"] > 0.5 * MUTANTS
    assert found["loaded"] > 0  # a flipped bit in a weight is a weight


def test_adapters(tmp_path):
    model, path = small_recognizer(), tmp_path / "a.safetensors"
    lora.add_adapters(model.backbone, 2)
    save_tensors(path, lora.adapter_tensors(model.backbone), {"method": "gs_lora"})
    plain = small_recognizer()
    load = unchanged(plain, lambda model, path: lora.apply_adapters(model.backbone, load_tensors(path), path))
    found = attack(path, of_bytes(path, random.Random(2)), load)
    assert min(found.values()) > 0


def test_results_and_their_tables(tmp_path):
    images = coloured_images()
    accuracies = {reading + "acc": 90.0 for reading in ("", "margin_")}
    model = {"name": "tiny", "parameters": 100, "trainable": 5, "tunable_ratio": 0.05}
    results = new_results("gs_lora", 1337, images, images, model, accuracies)
    keys = [f"acc_{group}" for group in ("remain", "forget", "old", "missing")] + ["h_mean"]
    after = {reading + key: 50.0 for reading in ("", "margin_") for key in keys}
    costs = dict.fromkeys(("train_seconds", "eval_seconds", "images_per_second", "peak_memory_mb"), 1.0)
    for task in drawn_tasks(images.labels, 6, num_tasks=2):
        results["tasks"].append(task_entry(task, after, after, {"norms": {"blocks.0": 1.0}, "zero_ratio": 0.5}, costs))
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))

    def load(path: Path) -> None:
        load_results(path)
        table.main(["--results", str(path), "--output-dir", str(tmp_path / "table")])

    found = attack(path, of_json(path, random.Random(4)), load, MUTANTS // 5)
    assert found["refused"] > 0.5 * (MUTANTS // 5)


def test_records(tmp_path):
    path = tmp_path / "r.json"
    arguments = {"data": "faces", "identities": 5, "val_fraction": None, "data_seed": 0, "checkpoint": "c.pth"}
    parts = {"request": {}, "model": {}, "images": {"size": 16}, "accuracies": {}, "hardware": {"bf16": True}}
    path.write_text(json.dumps({"schema": 1, "task": 1, "arguments": arguments, **parts}))
    found = attack(path, of_json(path, random.Random(5)), lambda path: settings_of(load_record(path)))
    assert min(found.values()) > 0
