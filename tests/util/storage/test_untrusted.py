"""Dangerous files: a clear refusal, no code run, bounded memory, nothing loaded in part."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from backbone.lora import apply_adapters
from tests.conftest import ROOT, small_recognizer
from util.report.results import load_results
from util.runtime.errors import RunError, UsageError
from util.runtime.files import load_tensors
from util.storage.checkpoint import Checkpoint, load_backbone, load_checkpoint, load_weights, save_checkpoint, save_published


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    save_checkpoint(tmp_path / "good.pth", Checkpoint(small_recognizer(), tuple("abcdef"), [[1], [3, 4]], {"acc": 1.0}))
    return tmp_path / "good.pth"


@pytest.fixture
def changed(checkpoint, tmp_path):
    """A copy of the checkpoint with one part replaced: a path of keys, and what it is to be."""

    def change(*way, value) -> Path:
        data = torch.load(checkpoint, weights_only=True)
        target = data
        for key in way[:-1]:
            target = target[key]
        target[way[-1]] = value(target[way[-1]]) if callable(value) else value
        torch.save(data, tmp_path / "changed.pth")
        return tmp_path / "changed.pth"

    return change


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_runs_no_code(zipped, tmp_path):
    marker, file = tmp_path / "marker", tmp_path / "evil.pth"
    torch.save({"format": Malicious(marker)}, file, _use_new_zipfile_serialization=zipped)
    for load in (load_checkpoint, lambda path: load_backbone(small_recognizer(), path)):
        with pytest.raises(RunError, match=r"evil\.pth"):
            load(file)
    assert not marker.exists()


def test_truncated_files(checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(RunError, match=r"cut\.pth"):
            load_checkpoint(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    ("way", "value", "error", "message"),
    [
        (("model", "head.weight"), torch.zeros(7, 32), UsageError, r"head.weight has shape \(7, 32\), not \(6, 32\)"),
        (("model", "head.weight"), torch.zeros(6, 32, dtype=torch.int32), UsageError, "head.weight has shape None"),
        (("model", "head.weight"), torch.zeros(6, 32, dtype=torch.complex64), UsageError, "head.weight has shape None"),
        (("model", "head.weight"), torch.zeros(6, 32).to_sparse(), RunError, "head.weight is no plain tensor"),
        (("model", "head.weight"), torch.zeros(6, 32, device="meta"), RunError, "refused|damaged"),
        (("model", "head.weight"), torch.full((6, 32), float("nan")), RunError, "head.weight holds values that are not"),
        (("model", "head.weight"), torch.full((6, 32), -float("inf")), RunError, "head.weight holds values that are not"),
        (("model", "head.weight"), "a string", UsageError, "head.weight has shape None"),
        (("model", "head.weight"), torch.zeros(1).expand(10**9, 32), RunError, "larger than what the file holds"),
        (("model", "more"), torch.zeros(3), UsageError, "more is unexpected"),
        (("model",), [], RunError, "damaged|does not fit"),
        (("architecture",), None, RunError, "no architecture"),
        (("architecture", "model"), "hf-hub:someone/something", UsageError, "unknown model"),
        (("architecture", "model"), 5, RunError, "impossible model"),
        (("architecture", "num_classes"), 10**12, RunError, "impossible num_classes"),
        (("architecture", "num_classes"), True, RunError, "impossible num_classes"),
        (("architecture", "num_classes"), 7, RunError, "impossible classes"),
        (("architecture", "image_size"), 10**9, RunError, "impossible image_size"),
        (("architecture", "image_size"), 64, UsageError, "pos_embed has shape"),
        (("architecture", "model_options"), {"depth": 10**9}, RunError, "impossible depth"),
        (("architecture", "model_options"), {"depth": 5000}, RunError, "fewer tensors than blocks"),
        (("architecture", "model_options"), {"embed_dim": 65536, "num_heads": 2}, UsageError, "does not fit"),
        (("architecture", "model_options"), {"checkpoint_path": "/etc/passwd"}, RunError, "impossible model_options"),
        (("architecture", "model_options"), {"pretrained_cfg": {"url": "http://x"}}, RunError, "impossible model_options"),
        (("architecture", "model_options"), {"mlp_ratio": float("nan")}, RunError, "impossible mlp_ratio"),
        (("architecture", "head"), "no_such", UsageError, "unknown head"),
        (("architecture", "head_options"), {"weight": 1}, RunError, "impossible head_options"),
        (("architecture", "evil"), 1, RunError, "unexpected keyword"),
        (("classes",), ["a"] * 6, RunError, "impossible classes"),
        (("classes",), list("abcde"), RunError, "impossible classes"),
        (("classes",), [1, 2, 3, 4, 5, 6], RunError, "impossible classes"),
        (("forgotten",), [[1], [1]], RunError, "impossible forgotten"),
        (("forgotten",), [[6]], RunError, "impossible forgotten"),
        (("forgotten",), [[0, 1, 2, 3, 4, 5]], RunError, "impossible forgotten"),
        (("forgotten",), "abc", RunError, "impossible forgotten"),
        (("info",), 5, RunError, "damaged"),
        (("format",), "something else", UsageError, "no checkpoint of a face recogniser"),
    ],
)
def test_impossible_contents(way, value, error, message, changed):
    with pytest.raises(error, match=message) as caught:
        load_checkpoint(changed(*way, value=value))
    assert "\n" not in str(caught.value)


def test_a_model_is_not_loaded_in_part(changed):
    model = small_recognizer()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = {key: tensor + 1 for key, tensor in before.items()}
    state[[*state][-1]] = state[[*state][-1]] * float("nan")
    with pytest.raises(RunError, match="not finite"):
        load_weights(model, state, Path("x"))
    adapter = {"blocks.0.mlp.fc1.lora_A": torch.ones(2, 32), "blocks.0.mlp.fc1.lora_B": torch.ones(128, 2)}
    with pytest.raises(UsageError):
        apply_adapters(model.backbone, adapter | {"blocks.1.mlp.fc1.lora_A": torch.ones(2, 32)})
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_published_checkpoints_too(tmp_path):
    size = {"embed_dim": 64, "num_heads": 1, "depth": 1}
    model = small_recognizer(**size)
    save_published(tmp_path / "good.pth", model)
    state = torch.load(tmp_path / "good.pth", weights_only=True)
    load_checkpoint(tmp_path / "good.pth")
    for value, message in (
        (torch.zeros(1, 1).expand(10**9, 64), "larger than what the file holds"),
        (torch.full((6, 64), float("nan")), "not finite"),
    ):
        torch.save(state | {"loss.weight": value}, tmp_path / "bad.pth")
        with pytest.raises(RunError, match=message):
            load_checkpoint(tmp_path / "bad.pth")


def test_adapters_of_no_numbers(tmp_path):
    for value in (torch.full((2, 32), float("inf")), torch.ones(2, 32, dtype=torch.int64)):
        save_file({"blocks.0.mlp.fc1.lora_A": value}, tmp_path / "bad.safetensors")
        with pytest.raises(RunError, match="not finite"):
            load_tensors(tmp_path / "bad.safetensors")


def bomb(path: Path) -> None:
    """A gigabyte of zeros in a megabyte, under the name of a checkpoint's pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data.pkl", "w") as file:
        for _ in range(1024):
            file.write(bytes(1 << 20))


def liar(path: Path) -> None:
    """A checkpoint whose directory claims that an entry is a terabyte."""
    torch.save({"x": torch.zeros(100)}, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        (entry,) = (e for e in archive.infolist() if e.filename.endswith("data/0"))
    size = entry.file_size.to_bytes(4, "little") * 2
    place = content.rindex(size)
    path.write_bytes(content[:place] + b"\xfe\xff\xff\xff" * 2 + content[place + 8 :])


def terabyte(path: Path) -> None:
    """A safetensors header of a tensor of a terabyte."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))


def long_header(path: Path) -> None:
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


def expanded(path: Path) -> None:
    """A terabyte made of one number."""
    torch.save({"format": "continual-forgetting-1", "model": {"x": torch.zeros(1).expand(1 << 38)}}, path)


def legacy(path: Path) -> None:
    """A file of the old format, whose pickle asks for a storage of a terabyte."""
    torch.save({"x": torch.zeros(65537)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content.replace((65537).to_bytes(4, "little"), (2**31 - 1).to_bytes(4, "little")))


@pytest.mark.parametrize("make", [bomb, liar, terabyte, long_header, expanded, legacy])
def test_memory_stays_bounded(make, tmp_path):
    suffix = ".safetensors" if make in (terabyte, long_header) else ".pth"
    make(tmp_path / f"large{suffix}")
    script = """
import resource, sys
from pathlib import Path
from util.storage.checkpoint import load_backbone, load_checkpoint
from util.runtime.errors import RunError
from util.runtime.files import load_tensors
from tests.conftest import small_recognizer
model = small_recognizer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for load in (load_checkpoint, load_tensors, lambda path: load_backbone(model, path)):
    try:
        load(Path(sys.argv[1]))
        sys.exit("was loaded")
    except RunError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    command = [sys.executable, "-c", script, str(tmp_path / f"large{suffix}")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *messages, megabytes = done.stdout.splitlines()
    assert len(messages) == 3
    assert int(megabytes) < 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not readable as JSON"),
        ('{"schema": 1, "seed": NaN}', "NaN is not finite"),
        ('{"schema": 1, "seed": 1e999}', "1e999 is not finite"),
        ('{"schema": 1, "seed": ' + "9" * 10_000 + "}", "not readable as JSON"),
        ('{"schema": 1}', "method is missing"),
        ('{"schema": 1, "method": 3}', "dataset is missing"),
        ("[]", "not a JSON object"),
        ("\xff", "not a JSON|not readable"),
    ],
)
def test_results_of_no_run(text, message, tmp_path):
    (tmp_path / "results.json").write_text(text, encoding="latin-1")
    with pytest.raises(RunError, match=message) as caught:
        load_results(tmp_path / "results.json")
    assert "\n" not in str(caught.value)


def test_nothing_in_the_project_loads_code():
    """Only `weights_only=True` and safetensors; no pickle, no eval."""
    files = [p for p in ROOT.rglob("*.py") if not {"tests", ".venv", "exps"} & {*p.relative_to(ROOT).parts}]
    assert len(files) > 50
    for path in files:
        text = path.read_text()
        for call in re.findall(r"torch\.load\(.*", text) + re.findall(r"models\.load_state_dict\(.*", text):
            assert "weights_only=True" in call, path
        assert not re.search(r"pickle\.loads?\(|allow_pickle=True|(?<![\w.])(eval|exec)\(|joblib|yaml\.load\(", text), path
