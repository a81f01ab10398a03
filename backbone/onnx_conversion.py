"""An ONNX model of a recognizer as a torch.fx graph, by onnx2torch, whatever its opset; and the graph cut into blocks."""

import operator
import warnings
from functools import reduce
from pathlib import Path

import torch
from torch import fx, nn

from util.runtime.errors import UsageError, one_line

OPSETS = range(10, 18)  # that onnx2torch converts; of 18 it lacks what torch exports
warnings.filterwarnings("ignore", message="Using a non-tuple sequence")  # of torch, about onnx2torch


def to_fx(model, path: Path | str = "the graph") -> fx.GraphModule:
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
        raise UsageError(f"{path} cannot be converted by onnx2torch: {one_line(error)}") from None
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


def cut_into_blocks(module: fx.GraphModule) -> list[fx.GraphModule]:
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

    def passes_alone(node: fx.Node) -> bool:
        return node in moving and not any(place[other] < place[node] < last_use[other] for other in moving)

    cuts = [node for node in order[:-1] if passes_alone(node)]

    def is_sum(node: fx.Node) -> bool:
        added = getattr(kind(node), "math_op_function", None) in (torch.add, operator.add)
        return added and sum(source in moving for source in node.all_input_nodes) == 2

    ends = [number for number, node in enumerate(cuts) if is_sum(node)]
    if len(ends) > 1:
        bounds = [*(cuts[number - 1] for number in ends), cuts[ends[-1]]]
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
