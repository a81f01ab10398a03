"""Make an ONNX file of dlib's face recognizer, the model trained by others that the docs measure on.

python scripts/get_model.py                                          npm fetches the weights: leaves data/dlib_face.onnx
python scripts/get_model.py vladmandic-face-api-1.7.15.tgz           from what `npm pack @vladmandic/face-api@1.7.15` leaves
dlib_face_recognition_resnet_model_v1 (Davis E. King, CC0) has 5.6 M parameters and was trained on three million photos.
The package holds it in 8 bits. The file takes RGB from 0 to 255, (n, 3, 150, 150), and gives 128 numbers a face.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from scripts.get_data import open_archive
from util.cli import options
from util.cli.main import run_main
from util.runtime.errors import RunError, UsageError
from util.runtime.files import atomic_write

PACKAGE = "@vladmandic/face-api@1.7.15"
MANIFEST, WEIGHTS = "face_recognition_model-weights_manifest.json", "face_recognition_model.bin"
SHA256 = "c2cf51e45a1f96cf2ba75d6b588dc259d7f602a813ff6efbeba4884d7359fad1"
MEAN = 122.782, 117.001, 104.298  # of R, G, B; dlib then divides by 256, the package by 255
SIZE = 150
# Residual blocks in order; the first of a width halves the image.
BLOCKS = [f"conv32_{number}" for number in (1, 2, 3)] + ["conv64_down"] + [f"conv64_{number}" for number in (1, 2, 3)]
BLOCKS += ["conv128_down", "conv128_1", "conv128_2", "conv256_down", "conv256_1", "conv256_2", "conv256_down_out"]


def unpack(manifest: bytes, weights: bytes) -> dict[str, np.ndarray]:
    """Name → float32 tensor. They lie one after another, most of them as TensorFlow.js quantizes: min + scale · byte."""
    tensors, start = {}, 0
    for entry in json.loads(manifest)[0]["weights"]:
        count, coding = int(np.prod(entry["shape"])), entry.get("quantization")
        values = np.frombuffer(weights, np.uint8 if coding else np.float32, count, start)
        start += values.nbytes
        values = values * coding["scale"] + coding["min"] if coding else values
        tensors[entry["name"]] = values.reshape(entry["shape"]).astype(np.float32)
    return tensors


class Graph:
    """An ONNX graph that grows node by node."""

    def __init__(self) -> None:
        self.nodes, self.initializers = [], []

    def constant(self, name: str, values: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def add(self, kind: str, name: str, *inputs: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def convolution(self, name: str, x: str, tensors: dict[str, np.ndarray], *, stride: int = 1, relu: bool = True) -> str:
        """With the scale behind it multiplied into its weights."""
        kernel, scale = tensors[f"{name}/conv/filters"].transpose(3, 2, 0, 1), tensors[f"{name}/scale/weights"]
        bias = tensors[f"{name}/conv/bias"] * scale + tensors[f"{name}/scale/biases"]
        weight = self.constant(f"{name}.weight", kernel * scale[:, None, None, None])
        pads = [0 if stride > 1 else 1] * 4
        out = self.add("Conv", name, x, weight, self.constant(f"{name}.bias", bias), strides=[stride] * 2, pads=pads)
        return self.add("Relu", f"{name}.relu", out) if relu else out

    def pad(self, name: str, x: str, channels: int, rows: int) -> str:
        """Zeros behind the channels, and below and to the right of the image."""
        return self.add("Pad", name, x, self.constant(f"{name}.pads", np.array([0] * 5 + [channels, rows, rows])))

    def block(self, name: str, x: str, size: int, tensors: dict[str, np.ndarray]) -> tuple[str, int]:
        """A residual block on an image of `size`; a halving one adds the average of 2×2 pixels, on as many channels as
        there were. Returns the output and its size."""
        stride = 2 if "down" in name else 1
        out = self.convolution(f"{name}/conv1", x, tensors, stride=stride)
        out, same = self.convolution(f"{name}/conv2", out, tensors, relu=False), x
        if stride == 2:
            same = self.add("AveragePool", f"{name}.pool", x, kernel_shape=[2, 2], strides=[2, 2])
            before, after = (tensors[f"{name}/conv1/conv/filters"].shape[axis] for axis in (2, 3))
            if after > before:
                same = self.pad(f"{name}.channels", same, after - before, 0)
            convolved, size = (size - 3) // 2 + 1, size // 2
            if size > convolved:
                out = self.pad(f"{name}.rows", out, 0, size - convolved)
        return self.add("Relu", f"{name}.relu", self.add("Add", f"{name}.add", out, same)), size


def onnx_model(tensors: dict[str, np.ndarray]) -> bytes:
    """The network as an ONNX file of opset 13."""
    graph = Graph()
    x = graph.add("Sub", "centred", "images", graph.constant("mean", np.float32(MEAN).reshape(1, 3, 1, 1)))
    x = graph.add("Div", "scaled", x, graph.constant("range", np.float32(256)))
    x = graph.convolution("conv32_down", x, tensors, stride=2)
    x, size = graph.add("MaxPool", "pool", x, kernel_shape=[3, 3], strides=[2, 2]), 35
    for name in BLOCKS:
        x, size = graph.block(name, x, size, tensors)
    x = graph.add("ReduceMean", "mean_of_pixels", x, axes=[2, 3], keepdims=0)
    graph.add("MatMul", "embeddings", x, graph.constant("fc.weight", tensors["fc"]))
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, SIZE, SIZE])
    embeddings = helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["n", tensors["fc"].shape[1]])
    made = helper.make_graph(graph.nodes, "dlib_face_recognition", [images], [embeddings], graph.initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    checker.check_model(model)
    return model.SerializeToString()


def fetch(folder: Path) -> Path:
    """The package, by npm. Raises RunError."""
    try:
        command = ["npm", "pack", PACKAGE, "--pack-destination", str(folder)]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "").strip() or str(error)).splitlines()[0]
        raise RunError(f"npm cannot fetch {PACKAGE}: {said}; get the package another way, and give it as ARCHIVE") from None
    return next(folder.glob("*.tgz"))


def main(argv: list[str]) -> None:
    parser = options.Parser(__doc__, "%(prog)s [ARCHIVE] [options]")
    parser.add_argument("archive", nargs="?", type=Path, metavar="ARCHIVE", help="the package, or its unpacked folder")
    parser.add_argument("--output", type=Path, default=Path("data/dlib_face.onnx"), metavar="FILE", help="file to write")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        archive = args.archive or fetch(Path(folder))
        with open_archive(archive) as files:
            found = {name.rsplit("/", 1)[-1]: read for name, read in files.items()}
            if not {MANIFEST, WEIGHTS} <= found.keys():
                raise UsageError(f"{archive} is not {PACKAGE}: it has no {WEIGHTS}")
            manifest, weights = found[MANIFEST](), found[WEIGHTS]()
    if hashlib.sha256(manifest + weights).hexdigest() != SHA256:
        raise UsageError(f"{archive} is not {PACKAGE}: its {WEIGHTS} is another")
    with atomic_write(args.output) as file:
        file.write(onnx_model(unpack(manifest, weights)))
    print(f"{args.output}: dlib_face_recognition_resnet_model_v1, CC0, 150×150 RGB → 128 numbers")


if __name__ == "__main__":
    run_main(main)
