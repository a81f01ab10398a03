"""An ONNX model as a torch.fx graph, by onnx2torch, whatever its opset."""

import warnings
from functools import reduce
from pathlib import Path

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
