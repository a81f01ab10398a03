"""A small recognizer in ONNX, written by hand: two residual blocks, of which the second halves the map."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE, DIM = 16, 12


def small_onnx(
    path: Path, opset: int = 13, channels_last: bool = False, residual: bool = True, batch: str | int = "n"
) -> Path:
    """images (n, 3, 16, 16) → embeddings (n, 12). With a convolution, batch norm, PReLU, a product and a Gemm."""
    rng, nodes, weights = np.random.default_rng(0), [], {}

    def weight(name: str, *shape: int, low: float = -0.5) -> str:
        weights[name] = rng.uniform(low, 0.5 if low < 0 else 1.5, shape).astype(np.float32)
        return name

    def add(kind: str, output: str, *inputs: str, **attributes) -> str:
        nodes.append(helper.make_node(kind, [*inputs], [output], name=f"/{output}/{kind}", **attributes))
        return output

    def conv(x: str, name: str, inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> str:
        kernels = weight(f"{name}.weight", outputs, inputs, kernel, kernel), weight(f"{name}.bias", outputs)
        pads = [kernel // 2] * 4
        return add("Conv", name, x, *kernels, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads)

    x = add("Transpose", "nchw", "images", perm=[0, 3, 1, 2]) if channels_last else "images"
    x = conv(x, "stem", 3, 8)
    norm = [weight(f"norm.{name}", 8, low=0.5) for name in ("scale", "bias", "mean", "var")]
    x = add("PRelu", "prelu", add("BatchNormalization", "bn", x, *norm, epsilon=1e-5), weight("slope", 8, 1, 1))
    for block, stride in enumerate((1, 2)):
        inner = add("Relu", f"relu{block}", conv(x, f"block{block}.conv1", 8, 8, stride))
        inner = conv(inner, f"block{block}.conv2", 8, 8)
        short = conv(x, f"block{block}.short", 8, 8, stride, 1) if stride > 1 else x
        x = add("Relu", f"out{block}", add("Add", f"sum{block}", inner, short) if residual else inner)
    x = add("GlobalAveragePool", "pool", x)
    # Flattened as exporters write it: by a shape that is computed.
    weights |= {name: np.array([value]) for name, value in (("zero", 0), ("one", 1), ("rest", -1))}
    where = ({"starts": [0], "ends": [1]},) if opset < 10 else ({}, "zero", "one", "zero")
    first = add("Slice", "count", add("Shape", "shape", x), *where[1:], **where[0])
    x = add("Reshape", "flat", x, add("Concat", "sizes", first, "rest", axis=0))
    x = add("MatMul", "product", x, weight("matrix", 8, 10))
    add("Gemm", "embeddings", x, weight("fc.weight", DIM, 10), weight("fc.bias", DIM), transB=1)
    shape = [batch, SIZE, SIZE, 3] if channels_last else [batch, 3, SIZE, SIZE]
    graph = helper.make_graph(
        nodes,
        "recognizer",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, [batch, DIM])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
