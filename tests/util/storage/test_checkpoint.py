"""Files from strangers: a clear refusal, no code run, bounded memory, nothing loaded in part."""

import os
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from backbone.lora import apply_adapters
from backbone.published import to_published
from tests.conftest import ROOT, small_recognizer
from util.report.results import load_results
from util.runtime.errors import RunError, UsageError
from util.runtime.files import load_tensors
from util.storage.checkpoint import Checkpoint, load_backbone, load_checkpoint, load_weights, save_checkpoint, torch_save


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    save_checkpoint(tmp_path / "good.pth", Checkpoint(small_recognizer(), tuple("abcdef"), [[1], [3, 4]], {"acc": 1.0}))
    return tmp_path / "good.pth"


@pytest.fixture
def changed(checkpoint, tmp_path):
    """A copy of the checkpoint with parts replaced: paths of keys, and what they are to be."""

    def change(*changes: tuple) -> Path:
        data = torch.load(checkpoint, weights_only=True)
        for way, value in changes:
            target = data
            for key in way[:-1]:
                target = target[key]
            target[way[-1]] = value
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
        with pytest.raises(RunError, match=r"evil\.pth: refused: it holds more than tensors"):
            load(file)
    assert not marker.exists()


def test_truncated_files(checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        for load in (load_checkpoint, lambda path: load_backbone(small_recognizer(), path)):
            with pytest.raises(RunError, match=r"cut\.pth"):
                load(tmp_path / "cut.pth")


WEIGHT, OPTIONS = ("model", "head.weight"), ("architecture", "model_options")


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    ("way", "value", "error", "message"),
    [
        (WEIGHT, torch.zeros(7, 32), UsageError, r"head.weight has shape \(7, 32\), not \(6, 32\)"),
        (WEIGHT, torch.zeros(6, 32, dtype=torch.int32), UsageError, "head.weight is no float tensor"),
        (WEIGHT, torch.zeros(6, 32, dtype=torch.complex64), UsageError, "head.weight is no float tensor"),
        (WEIGHT, torch.zeros(6, 32).to_sparse(), RunError, "damaged checkpoint"),
        (WEIGHT, torch.zeros(6, 32, device="meta"), RunError, "damaged checkpoint"),
        (WEIGHT, torch.full((6, 32), float("nan")), RunError, "head.weight holds values that are not finite"),
        (WEIGHT, torch.full((6, 32), -float("inf")), RunError, "head.weight holds values that are not finite"),
        (WEIGHT, "a string", UsageError, "head.weight is no float tensor"),
        (WEIGHT, torch.zeros(1).expand(10**9, 32), RunError, "a tensor claims to be larger than the file"),
        (("model", "more"), torch.zeros(3), UsageError, "more is unexpected"),
        (("model",), [], RunError, "damaged checkpoint"),
        (("architecture",), None, RunError, "damaged checkpoint"),
        (("architecture", "model"), "hf-hub:someone/something", UsageError, "unknown model"),
        (("architecture", "model"), 5, RunError, "impossible architecture"),
        (("architecture", "num_classes"), 10**12, RunError, "impossible architecture"),
        (("architecture", "num_classes"), 7, UsageError, r"head.weight has shape \(6, 32\), not \(7, 32\)"),
        (("architecture", "image_size"), 10**9, RunError, "impossible architecture"),
        (("architecture", "image_size"), 64, UsageError, "pos_embed has shape"),
        (OPTIONS, {"depth": 10**6}, RunError, "fewer tensors than blocks"),
        (OPTIONS, {"embed_dim": 65536, "num_heads": 2}, UsageError, "does not fit"),
        (OPTIONS, {"checkpoint_path": "/etc/passwd"}, RunError, "impossible architecture"),
        (OPTIONS, {"pretrained_cfg": {"url": "http://x"}}, RunError, "impossible architecture"),
        (OPTIONS, {"pretrained": True}, RunError, "impossible architecture"),
        (OPTIONS, {"mlp_ratio": float("nan")}, RunError, "impossible architecture"),
        (("architecture", "head"), "no_such", UsageError, "unknown head"),
        (("architecture", "head_options"), {"scale": "large"}, RunError, "impossible architecture"),
        (("architecture", "evil"), 1, RunError, "unexpected keyword"),
        (("classes",), ["a"] * 6, RunError, "impossible classes"),
        (("classes",), list("abcde"), RunError, "impossible classes"),
        (("classes",), [1, 2, 3, 4, 5, 6], RunError, "impossible classes"),
        (("forgotten",), [[1], [1]], RunError, "impossible forgotten"),
        (("forgotten",), [[6]], RunError, "impossible forgotten"),
        (("forgotten",), [[0, 1, 2, 3, 4, 5]], RunError, "impossible forgotten"),
        (("forgotten",), "abc", RunError, "damaged checkpoint"),
        (("info",), 5, RunError, "damaged checkpoint"),
        (("format",), "something else", UsageError, "no checkpoint of a face recognizer"),
    ],
)
def test_impossible_contents(way, value, error, message, changed):
    with pytest.raises(error, match=message) as caught:
        load_checkpoint(changed((way, value)))
    assert "\n" not in str(caught.value)


def test_models_of_absurd_size_take_no_memory(changed):
    most = 10**7  # classes: 1.3 GB
    attacks = [
        [(("architecture", "num_classes"), most)],
        [(("architecture", "num_classes"), most), (WEIGHT, torch.zeros(1).expand(most, 32))],
        [(("architecture", "num_classes"), most), (WEIGHT, torch.zeros(most, 32, device="meta"))],
        [(OPTIONS, {"depth": 10**6, "embed_dim": 32, "num_heads": 2})],
        [(OPTIONS, {"depth": 2, "embed_dim": 10**6, "num_heads": 2})],
        [(("architecture", "image_size"), 10**6)],
    ]
    small_recognizer()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for changes in attacks:
        with pytest.raises((UsageError, RunError)):
            load_checkpoint(changed(*changes))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # kB


def test_a_model_is_not_loaded_in_part():
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
    torch_save(tmp_path / "good.pth", to_published(small_recognizer(embed_dim=64, num_heads=1, depth=1)))
    state = torch.load(tmp_path / "good.pth", weights_only=True)
    load_checkpoint(tmp_path / "good.pth")
    for value, message in (
        (torch.zeros(1, 1).expand(10**9, 64), "larger than the file"),
        (torch.full((6, 64), float("nan")), "not finite"),
    ):
        torch.save(state | {"loss.weight": value}, tmp_path / "bad.pth")
        with pytest.raises(RunError, match=message):
            load_checkpoint(tmp_path / "bad.pth")


@pytest.mark.parametrize("said", ["merged", "apart"])
def test_a_published_checkpoint_with_adapters_asks_whether_its_weights_contain_them(tmp_path, said):
    model = small_recognizer(embed_dim=64, num_heads=1, depth=1)
    state, layer = to_published(model), "transformer.layers.0.1.fn.fn.net.0."
    a, b = torch.randn(4, 64), torch.randn(256, 4)
    update = b @ a / 4  # as loralib scales it, with its default of 1
    torch_save(tmp_path / "fresh.pth", state | {f"{layer}lora_A": a, f"{layer}lora_B": 0 * b})
    weights = load_checkpoint(tmp_path / "fresh.pth").model.state_dict()  # B = 0: nothing to ask
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())

    if said == "merged":  # what loralib's eval() leaves in the weights
        state[f"{layer}weight"] = state[f"{layer}weight"] + update
    torch_save(tmp_path / "trained.pth", state | {f"{layer}lora_A": a, f"{layer}lora_B": b})
    with pytest.raises(UsageError, match="add --published-adapters merged"):
        load_checkpoint(tmp_path / "trained.pth")
    found = load_checkpoint(tmp_path / "trained.pth", adapters=said).model.backbone.blocks[0].mlp.fc1.weight
    torch.testing.assert_close(found, model.backbone.blocks[0].mlp.fc1.weight + update, rtol=1e-5, atol=1e-5)
    start = small_recognizer(embed_dim=64, num_heads=1, depth=1)  # of another training
    with pytest.raises(UsageError, match="add --published-adapters merged"):
        load_backbone(start, tmp_path / "trained.pth")
    load_backbone(start, tmp_path / "trained.pth", said)
    assert torch.equal(start.backbone.blocks[0].mlp.fc1.weight, found)


def test_adapters_that_are_not_finite(tmp_path):
    save_file({"blocks.0.mlp.fc1.lora_A": torch.full((2, 32), float("inf"))}, tmp_path / "bad.safetensors")
    with pytest.raises(RunError, match="not finite"):
        load_tensors(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not readable as JSON"),
        ('{"schema": 1, "seed": NaN}', "not readable as JSON"),
        ('{"schema": 1, "seed": 1e999}', "not readable as JSON"),
        ('{"schema": 1, "seed": ' + "9" * 10_000 + "}", "not readable as JSON"),
        ('{"schema": 1}', "damaged results"),
        ('{"schema": 1, "method": 3}', "damaged results"),
        ("[]", "not a JSON object"),
        ("\xff", "not readable as JSON"),
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
