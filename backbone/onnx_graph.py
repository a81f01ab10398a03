"""Recognizers in ONNX files: images → embeddings as a torch module, and the same graph again with other weights.

onnx2torch makes a flat torch.fx graph of the file. It is cut into stem, blocks and tail where the network's residual
additions end, so that an ONNX model has blocks as timm's models do. A checkpoint holds the graph as it came, without its
large weights, which are in the state dict.
"""

import operator
import warnings
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx, nn

from util.runtime.errors import RunError, UsageError

# Whose initializers are weights. What else is constant in a graph (sizes, axes, limits) stays as it is.
WEIGHTED = ("Conv", "Gemm", "MatMul", "BatchNormalization", "PRelu", "LayerNormalization", "Add", "Mul", "Sub", "Div")
LARGE = 1024  # values; smaller initializers may be read when the graph is converted, and stay in it
warnings.filterwarnings("ignore", message="Using a non-tuple sequence")  # of torch, about onnx2torch
OPSETS = range(10, 18)  # that onnx2torch converts; of 18 it lacks what torch exports


class OnnxBackbone(nn.Module):
    """Normalized images (B, 3, H, W) → embeddings (B, dim), from a graph that `read_onnx` has found; its large weights are
    new ones. Raises UsageError where onnx2torch does not know an operator."""

    def __init__(self, graph: Tensor, image_size: int) -> None:
        super().__init__()
        module = _converted(_filled(graph))
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                part.reset_parameters()
        stem, *blocks, tail = _parts(module)
        self.stem, self.blocks, self.tail = stem, nn.ModuleList(blocks), tail
        self.channels_last = _input_dims(onnx_model(graph))[1] != 3
        images = torch.linspace(-1, 1, 6 * image_size**2).reshape(2, 3, image_size, image_size).sin()
        with torch.no_grad():
            self.eval()
            try:
                embeddings, whole = self.forward(images), module(self.as_given(images)).flatten(1)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                message = str(error).strip().splitlines()[0]
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
        raise UsageError(f"{path} is no ONNX model that can be read: {str(error).strip().splitlines()[0]}") from None
    inputs = [value.name for value in _inputs(model)]
    if len(inputs) != 1:
        raise UsageError(f"{path} has {len(inputs)} inputs, {', '.join(inputs)}: one is needed, a batch of images")
    dims = _input_dims(model)
    if len(dims) != 4 or 3 not in (dims[1], dims[3]):
        raise UsageError(f"{path} takes {dims}, not a batch of RGB images (N, 3, H, W)")
    size = dims[2] if isinstance(dims[2], int) and dims[2] > 0 else None
    module = _converted(model, path)
    stem, *blocks, tail = _parts(module)
    parts = {"stem": stem, **{f"blocks.{i}": block for i, block in enumerate(blocks)}, "tail": tail}
    state = {
        f"{name}.{key}": value.float() if value.is_floating_point() else value
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }
    # As insightface tells: a graph that begins with arithmetic takes pixels as they are, others from −1 to 1.
    first = next((n.op_type for n in model.graph.node if n.op_type not in ("Constant", "Cast", "Transpose", "Identity")), "")
    pixels = {"mean": [0.0] * 3, "std": [1 / 255] * 3} if first in ("Sub", "Mul", "Div", "Add", "BatchNormalization") else {}
    for tensor in _weights(model).values():
        if np.prod(tensor.dims) >= LARGE:
            for field in ("raw_data", "float_data", "int32_data"):
                tensor.ClearField(field)
    return torch.frombuffer(bytearray(model.SerializeToString()), dtype=torch.uint8), size, pixels, state


def onnx_model(graph: Tensor):
    """The graph as onnx has it, its large weights missing."""
    import onnx

    return onnx.load_from_string(graph.numpy().tobytes())


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
    converted = OnnxBackbone.__new__(OnnxBackbone)
    nn.Module.__init__(converted)
    stem, *blocks, tail = _parts(_converted(model))
    converted.stem, converted.blocks, converted.tail = stem, nn.ModuleList(blocks), tail
    names = {key: marks.get(value.numpy().tobytes()) for key, value in converted.state_dict().items()}
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


def _weights(model) -> dict:
    """The float initializers that weigh something, by name."""
    used = {name for node in model.graph.node if node.op_type in WEIGHTED for name in node.input}
    return {t.name: t for t in model.graph.initializer if t.name in used and t.data_type in (1, 10, 11)}


def _filled(graph: Tensor, marked: bool = False):
    """The onnx model with zeros for its missing weights; `marked`: with numbers of its own for each weight."""
    from onnx import numpy_helper
    from onnx.helper import tensor_dtype_to_np_dtype

    model = onnx_model(graph)
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


def _converted(model, path: Path | str = "the graph") -> fx.GraphModule:
    """The onnx model as a torch.fx graph, with linear layers in place of products with a constant matrix."""
    import onnx2torch
    from onnx import version_converter

    try:
        opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        if opset < OPSETS[0]:
            model = version_converter.convert_version(model, OPSETS[-1])
        elif opset > OPSETS[-1]:
            model = _older(model)
        module = onnx2torch.convert(model).float()
    except Exception as error:  # an operator that it does not know, or an opset
        message = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{path} cannot be converted by onnx2torch: {message[0]}") from None
    for node in module.graph.nodes:
        product = node.op == "call_module" and type(module.get_submodule(node.target)).__name__ == "OnnxMatMul"
        if product and node.args[1].op == "get_attr":
            matrix = reduce(getattr, node.args[1].target.split("."), module)
            if matrix.ndim == 2:
                linear = nn.Linear(*matrix.shape, bias=False)
                linear.weight = nn.Parameter(matrix.T.contiguous())
                module.set_submodule(node.target, linear)
                node.args = node.args[:1]
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _older(model):
    """The onnx model in the last of OPSETS, as far as networks for images use what came later: functions that are operators
    now, and axes that are inputs. (onnx's own converter lacks steps that torch's exports need.)"""
    from onnx import helper, inliner, numpy_helper

    model = inliner.inline_selected_functions(model, [("", "Gelu"), ("", "CastLike")], inline_schema_functions=True)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants |= {n.output[0]: n.attribute[0].t for n in model.graph.node if n.op_type == "Constant"}
    same = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Identity" and n.input[0] in constants}
    for node in model.graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(node.input) > 1:
            node.attribute.append(helper.make_attribute("axes", numpy_helper.to_array(constants[node.input.pop()]).tolist()))
        dropped = {"Reshape": "allowzero", "Split": "num_outputs"}.get(node.op_type)  # no exported size is zero
        kept = [attribute for attribute in node.attribute if attribute.name != dropped]
        del node.attribute[:]
        node.attribute.extend(kept)
    next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")).version = OPSETS[-1]
    return model


def _parts(module: fx.GraphModule) -> list[fx.GraphModule]:
    """The graph cut into a stem, blocks and a tail, each a function of the one before.

    A cut can be wherever one value alone passes; between two such places lies a residual block where it ends in a sum of two
    computed values. Where there is none or one, a block begins with each layer that has weights.
    """

    def kind(node: fx.Node) -> nn.Module | None:
        return module.get_submodule(node.target) if node.op == "call_module" else None

    order = [*module.graph.nodes]
    place = {node: number for number, node in enumerate(order)}
    moving = set()  # what depends on the images
    for node in order:
        # How many images there are is known in each part: that is no value to pass on.
        of_images = type(kind(node)).__name__ == "OnnxShape" and node.args[0].op == "placeholder"
        if node.op == "placeholder" or (any(source in moving for source in node.all_input_nodes) and not of_images):
            moving.add(node)
    last_use = {node: max((place[user] for user in node.users), default=-1) for node in moving}
    cuts = [
        node
        for node in order[:-1]
        if node in moving and not any(place[o] < place[node] < last_use[o] for o in moving if o is not node)
    ]

    def is_sum(node: fx.Node) -> bool:
        added = getattr(kind(node), "math_op_function", None) in (torch.add, operator.add)
        return added and sum(source in moving for source in node.all_input_nodes) == 2

    ends = [number for number, node in enumerate(cuts) if is_sum(node)]
    if len(ends) > 1:
        bounds = [cuts[ends[0] - 1], *(cuts[number - 1] for number in ends[1:]), cuts[ends[-1]]]
    else:
        bounds = [cuts[i - 1] for i, node in enumerate(cuts) if i and isinstance(kind(node), nn.Linear | nn.Conv2d)]
    if not bounds:  # no place where one value alone passes
        return [module, nn.Identity()]
    return [_part(module, order, moving, a, b) for a, b in zip([None, *bounds], [*bounds, None], strict=True)]


def _part(module: fx.GraphModule, order: list, moving: set, begin: fx.Node | None, end: fx.Node | None) -> fx.GraphModule:
    """What lies behind `begin` (None: the images) up to `end` (None: the embedding), as a module of its own."""
    graph, copies = fx.Graph(), {}

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:  # a constant: each part has its own
            copies[node] = graph.node_copy(node, copy_of)
        return copies[node]

    begin = begin or order[0]
    copies[begin] = copies[order[0]] = graph.placeholder("x")
    end = end or order[-1].all_input_nodes[0]
    for node in order[order.index(begin) + 1 : order.index(end) + 1]:
        if node in moving:
            copies[node] = graph.node_copy(node, copy_of)
    graph.output(copies[end])
    return fx.GraphModule(module, graph)
