"""Recognizers in ONNX files: images → embeddings as a torch module, and the same graph again with other weights.

onnx2torch makes a flat torch.fx graph of the file. It is cut into stem, blocks and tail where the network's residual
additions end, so that an ONNX model has blocks as timm's models do. A checkpoint holds the graph as it came, without its
large weights, which are in the state dict.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx, nn

from backbone.onnx_conversion import cut_into_blocks, to_fx
from util.runtime.errors import RunError, UsageError, one_line

# Whose initializers are weights. What else is constant in a graph (sizes, axes, limits) stays as it is.
WEIGHTED = ("Conv", "Gemm", "MatMul", "BatchNormalization", "PRelu", "LayerNormalization", "Add", "Mul", "Sub", "Div")
LARGE = 1024  # values; smaller initializers may be read when the graph is converted, and stay in it


class OnnxBackbone(nn.Module):
    """Normalized images (B, 3, H, W) → embeddings (B, dim), from a graph that `read_onnx` has found; its large weights are
    new ones. Raises UsageError where onnx2torch does not know an operator."""

    def __init__(self, graph: Tensor, image_size: int) -> None:
        super().__init__()
        model = _filled(graph)
        module = to_fx(model)
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                part.reset_parameters()
        self.stem, self.blocks, self.tail = _parts(module).values()
        self.channels_last = _input_dims(model)[1] != 3
        images = torch.linspace(-1, 1, 6 * image_size**2).reshape(2, 3, image_size, image_size).sin()
        with torch.no_grad():
            self.eval()
            try:
                embeddings, whole = self.forward(images), module(self.as_given(images)).flatten(1)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                message = one_line(error)
                raise UsageError(f"the graph cannot embed two {image_size}×{image_size} images at once: {message}") from None
            self.train()
        if not torch.allclose(embeddings, whole, rtol=1e-3, atol=1e-5):
            raise UsageError("the graph uses the size of its images where it can no longer be cut into blocks")
        self.num_features = embeddings.shape[1]
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def as_given(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) as the graph takes them."""
        return images.permute(0, 2, 3, 1) if self.channels_last else images

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(self.as_given(images))
        for block in self.blocks:
            x = block(x)
        return self.tail(x).flatten(1)


def read_onnx(path: Path) -> tuple[Tensor, int | None, dict, dict[str, Tensor]]:
    """A recognizer's file → its graph without the large weights (uint8), the side of its images in pixels (None: any), what
    pixels it takes (as `Architecture.pixels`), and the backbone's state dict."""
    import onnx

    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's, the checker's, a missing file of external data
        raise UsageError(f"{path} is no ONNX model that can be read: {one_line(error)}") from None
    inputs = [value.name for value in _inputs(model)]
    if len(inputs) != 1:
        raise UsageError(f"{path} has {len(inputs)} inputs, {', '.join(inputs)}: one is needed, a batch of images")
    dims = _input_dims(model)
    if len(dims) != 4 or 3 not in (dims[1], dims[3]):
        raise UsageError(f"{path} takes {dims}, not a batch of RGB images (N, 3, H, W)")
    size = dims[2] if isinstance(dims[2], int) and dims[2] > 0 else None
    state = _parts(to_fx(model, path)).state_dict()
    # As insightface tells: a graph that begins with arithmetic takes pixels as they are, others from −1 to 1.
    first = next((n.op_type for n in model.graph.node if n.op_type not in ("Constant", "Cast", "Transpose", "Identity")), "")
    pixels = {"mean": [0.0] * 3, "std": [1 / 255] * 3} if first in ("Sub", "Mul", "Div", "Add", "BatchNormalization") else {}
    for tensor in _weights(model).values():
        if np.prod(tensor.dims) >= LARGE:
            for field in ("raw_data", "float_data", "int32_data"):
                tensor.ClearField(field)
    return torch.frombuffer(bytearray(model.SerializeToString()), dtype=torch.uint8), size, pixels, state


def write_onnx_weights(backbone: OnnxBackbone, graph: Tensor):
    """The graph with the weights of `backbone`: an onnx model whose names, inputs and outputs are those of the file it came
    from. Raises RunError where a trained weight is no initializer of it."""
    from onnx import numpy_helper

    model = _filled(graph, marked=True)
    marks = {}
    for name, tensor in _weights(model).items():
        value = numpy_helper.to_array(tensor).astype(np.float32)
        marks |= {value.T.tobytes(): (name, True)} if value.ndim == 2 else {}
        marks[value.tobytes()] = name, False
    names = {key: marks.get(value.numpy().tobytes()) for key, value in _parts(to_fx(model)).state_dict().items()}
    lost = [name for name, _ in backbone.named_parameters() if names.get(name) is None]
    if lost:
        raise RunError(f"{len(lost)} weights have no place in the ONNX graph, {lost[0]} first")
    model, written = _filled(graph), {}
    tensors = _weights(model)
    for key, value in backbone.state_dict().items():
        if names.get(key) is None:
            continue
        name, transposed = names[key]
        array = value.detach().cpu().numpy()
        array = np.ascontiguousarray(array.T if transposed else array).astype(numpy_helper.to_array(tensors[name]).dtype)
        if not np.array_equal(written.setdefault(name, array), array):
            raise RunError(f"{key} shares its weight with another layer of the ONNX graph, which is another now")
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))
    return model


def _parts(module: fx.GraphModule) -> nn.ModuleDict:
    stem, *blocks, tail = cut_into_blocks(module)
    return nn.ModuleDict({"stem": stem, "blocks": nn.ModuleList(blocks), "tail": tail})


def _weights(model) -> dict:
    """The float initializers that weigh something, by name."""
    used = {name for node in model.graph.node if node.op_type in WEIGHTED for name in node.input}
    return {t.name: t for t in model.graph.initializer if t.name in used and t.data_type in (1, 10, 11)}


def _filled(graph: Tensor, marked: bool = False):
    """The onnx model with zeros for its missing weights; `marked`: with numbers of its own for each weight."""
    from onnx import load_from_string, numpy_helper
    from onnx.helper import tensor_dtype_to_np_dtype

    model = load_from_string(graph.numpy().tobytes())
    for number, tensor in enumerate(_weights(model).values()):
        dims, dtype = tuple(tensor.dims), tensor_dtype_to_np_dtype(tensor.data_type)
        if marked and dims:
            array = np.random.default_rng(number).random(dims).astype(dtype)
        elif np.prod(dims) >= LARGE:
            array = np.zeros(dims, dtype)
        else:
            continue
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


def _input_dims(model) -> list:
    """Of the graph's one input that is no weight; a dimension that may vary is its name."""
    return [dim.dim_param or dim.dim_value for dim in _inputs(model)[0].type.tensor_type.shape.dim]


def _inputs(model) -> list:
    given = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in given]
