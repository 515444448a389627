"""Reading an exported ATen graph: what a node is, what it came from, what changes no value."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

# these change no value where they keep the type, and the shape or what it means; see is_copy
_COPIES = set("clone contiguous detach alias lift_fresh_copy to _to_copy dropout".split())
_COPIES |= set("flatten view _unsafe_view reshape squeeze unsqueeze".split())
_LINEAR, _MEAN = {"conv2d", "linear"}, {"mean", "adaptive_avg_pool2d"}
_GATE = (
    {"hardsigmoid"},
    _LINEAR,
    {"relu", "hardswish"},
    _LINEAR,
    _MEAN,
)  # from the last to the first


def find_gate(product: Node) -> tuple[Node, ...]:
    """hardsigmoid, linear, relu, linear, mean of a squeeze-excite, from its product; or none."""
    if op(product) != "mul":
        return ()
    for x, gate in (product.args, product.args[::-1]):
        chain: list[Node] = []
        node: Any = gate
        for accepted in _GATE:
            if op(node) not in accepted or len(node.users) > 1 or not is_vector(node):
                break
            chain.append(node)
            node = node.args[0]
        else:
            if node is x and is_global_pool(chain[-1]) and shape(x) == shape(product):
                return tuple(chain)
    return ()


def is_copy(node: Node) -> bool:
    """Whether a node changes no value: same type, and same shape or two forms of [N, C]."""
    name, source = op(node), node.args[0] if node.args else None
    if name not in _COPIES or not isinstance(source, Node):
        return False
    if name == "dropout" and arguments(node)["train"]:
        return False
    if source.meta["val"].dtype != node.meta["val"].dtype:
        return False
    same_vector = is_vector(source) and is_vector(node) and shape(source)[:2] == shape(node)[:2]
    return same_vector or shape(source) == shape(node)


def is_vector(node: Node) -> bool:
    """Whether its map is [N, C], with any number of ones behind."""
    return len(shape(node)) >= 2 and math.prod(shape(node)[2:]) == 1


def is_global_pool(node: Node) -> bool:
    """Whether a mean or an adaptive_avg_pool2d takes whole maps [N, C, H, W] to [N, C]."""
    args = arguments(node)
    if op(node) == "adaptive_avg_pool2d":
        return pair(args["output_size"]) == (1, 1)
    ndim = len(shape(args["self"]))
    return ndim == 4 and {axis % ndim for axis in args.get("dim") or ()} == {2, 3}


def op(node: Any) -> str:
    """conv2d of aten::conv2d and of aten::conv2d_; empty for what is no ATen operation."""
    target = getattr(node, "target", None)
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return target._schema.name.removeprefix("aten::").rstrip("_")


def arguments(node: Node) -> dict[str, Any]:
    """All arguments by name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return {
        argument.name: node.args[position]
        if position < len(node.args)
        else node.kwargs.get(argument.name, argument.default_value)
        for position, argument in enumerate(node.target._schema.arguments)
    }


def shape(node: Any) -> tuple[int, ...]:
    """Of the exported map; empty for what is no tensor."""
    return tuple(getattr(node.meta.get("val"), "shape", ())) if isinstance(node, Node) else ()


def pair(value: Any) -> tuple[int, int]:
    """Rows and columns of an integer, or of a list of one or two."""
    if isinstance(value, int):
        return value, value
    return value[0], value[-1]


def module(node: Node) -> tuple[str, str]:
    """Path and type of the innermost module that a node came from."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return (stack[-1][0], str(stack[-1][1])) if stack else ("", "")
