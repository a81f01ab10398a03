"""A torch.fx graph of a recognizer, cut into stem, blocks and tail."""

import operator

import torch
from torch import fx, nn


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
