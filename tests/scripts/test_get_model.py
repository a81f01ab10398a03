"""The recognizer that get_model.py makes of 8-bit weights, against the same network written with torch."""

import hashlib
import json
import tarfile

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from scripts import get_model
from tests.test_bad_input import refused

WIDTHS = {"conv32": 32, "conv64": 64, "conv128": 128, "conv256": 256}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An archive of random weights in 8 bits, some of them in floats; and the weights."""
    rng, entries, data, tensors, width = np.random.default_rng(0), [], b"", {}, 3

    def add(name: str, shape: tuple[int, ...], scale: float, coded: bool = True) -> None:
        nonlocal data
        values = rng.integers(0, 256, shape).astype(np.uint8)
        entry, low = {"name": name, "shape": shape, "dtype": "float32"}, -127.5 * scale
        tensors[name] = torch.from_numpy((values * scale + low).astype(np.float32))
        if coded:
            entry["quantization"] = {"dtype": "uint8", "scale": scale, "min": low}
        data += values.tobytes() if coded else tensors[name].numpy().tobytes()
        entries.append(entry)

    for block in ["conv32_down", *get_model.BLOCKS]:
        out = WIDTHS[block.split("_")[0]]
        for part in [""] if width == 3 else ["/conv1", "/conv2"]:
            size = 7 if width == 3 else 3
            add(f"{block}{part}/conv/filters", (size, size, width, out), 0.01 / width**0.5)
            add(f"{block}{part}/conv/bias", (out,), 1e-3, coded=part != "/conv2")
            add(f"{block}{part}/scale/weights", (out,), 4e-3)
            add(f"{block}{part}/scale/biases", (out,), 1e-3)
            width = out
    add("fc", (256, 128), 1e-3)
    for name, content in ((get_model.MANIFEST, json.dumps([{"weights": entries}]).encode()), (get_model.WEIGHTS, data)):
        (tmp_path / name).write_bytes(content)
    both = [tmp_path / name for name in (get_model.MANIFEST, get_model.WEIGHTS)]
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as archive:
        for path in both:
            archive.add(path, f"package/model/{path.name}")
    monkeypatch.setattr(get_model, "SHA256", hashlib.sha256(b"".join(path.read_bytes() for path in both)).hexdigest())
    return tmp_path / "package.tgz", tensors


def convolved(x, tensors, name, stride=1):
    x = F.conv2d(x, tensors[f"{name}/conv/filters"].permute(3, 2, 0, 1), tensors[f"{name}/conv/bias"], stride, stride % 2)
    return x * tensors[f"{name}/scale/weights"][:, None, None] + tensors[f"{name}/scale/biases"][:, None, None]


def embedded(images, tensors):
    x = (images - torch.tensor([122.782, 117.001, 104.298])[:, None, None]) / 256
    x = F.max_pool2d(convolved(x, tensors, "conv32_down", 2).relu(), 3, 2)
    for name in get_model.BLOCKS:
        down = "down" in name
        out = convolved(convolved(x, tensors, f"{name}/conv1", 1 + down).relu(), tensors, f"{name}/conv2")
        x = F.avg_pool2d(x, 2) if down else x
        x = F.pad(x, (0, 0, 0, 0, 0, out.shape[1] - x.shape[1]))
        x = (F.pad(out, (0, x.shape[3] - out.shape[3], 0, x.shape[2] - out.shape[2])) + x).relu()
    return x.mean(dim=(2, 3)) @ tensors["fc"]


def test_the_file_computes_what_the_network_does(package, tmp_path):
    archive, tensors = package
    get_model.main([str(archive), "--output", str(tmp_path / "made" / "face.onnx")])
    session = onnxruntime.InferenceSession(tmp_path / "made" / "face.onnx", providers=["CPUExecutionProvider"])
    images = torch.rand(2, 3, 150, 150, generator=torch.Generator().manual_seed(0)) * 255
    (found,) = session.run(["embeddings"], {"images": images.numpy()})
    expected = embedded(images, tensors)
    assert expected.shape == (2, 128) and expected.std() > 1e-3
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_another_package_is_refused(package, command, tmp_path):
    archive, _ = package
    result = command("scripts/get_model.py", archive, "--output", tmp_path / "face.onnx")  # not the real weights
    refused(result, 2, "its face_recognition_model.bin is another")
    (tmp_path / "empty").mkdir()
    result = command("scripts/get_model.py", tmp_path / "empty", "--output", tmp_path / "face.onnx")
    refused(result, 2, "it has no face_recognition_model.bin")
    assert not (tmp_path / "face.onnx").exists()


def test_without_npm_it_says_what_to_do(command, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = command("scripts/get_model.py", "--output", tmp_path / "face.onnx")
    refused(result, 1, "npm cannot fetch @vladmandic/face-api@1.7.15: ")
    assert "give it as ARCHIVE" in result[2]
