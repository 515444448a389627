"""Reading an exported ATen graph: what a node is, what it came from, what changes no value.

`simplify` and `find_gate` know the forms in which MobileNets write an activation and a
squeeze-excite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from typing import Any

import torch
from torch.fx import Graph, Node

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
_CHANNELWISE = set("batch_norm add sub rsub mul div addcmul".split())


def simplify(graph: Graph) -> None:
    """Clamps become relu and relu6, relu6(x + 3) / 6 hardsigmoid, and x times it hardswish.

    The steps between must have no other reader; they are erased.
    """
    for node in list(graph.nodes):
        _simplify_clamp(node)
        if sixfold := _sixfold(node):
            if x := _clamped(sixfold):
                _become(node, "hardsigmoid", x)
            elif x := _times_its_own(sixfold, _clamped):
                _become(node, "hardswish", x)
        elif x := _times_its_own(node, lambda y: y.args[0] if op(y) == "hardsigmoid" else None):
            _become(node, "hardswish", x)


def _simplify_clamp(node: Node) -> None:
    bounds = _bounds(node)
    source: Any = node.args[0] if bounds else None
    if _read_once(source) and {bounds, _bounds(source)} == {(0, None), (None, 6)}:
        bounds, source = (0, 6), source.args[0]
    name = {(0, None): "relu", (0, 6): "relu6"}.get(bounds) if bounds else None
    if name and name != op(node):
        _become(node, name, source)


def _bounds(node: Any) -> tuple[Any, Any] | None:
    """Between which numbers a node clamps its input, None for no bound."""
    name = op(node)
    if name in ("relu", "relu6"):
        return 0, 6 if name == "relu6" else None
    if name not in ("clamp", "clip", "clamp_min", "clamp_max", "hardtanh"):
        return None
    args = arguments(node)
    bounds = args.get("min", args.get("min_val")), args.get("max", args.get("max_val"))
    return None if any(isinstance(bound, Node) for bound in bounds) else bounds


def _read_once(node: Any) -> bool:
    return isinstance(node, Node) and len(node.users) == 1


def _sixfold(node: Node) -> Any:
    """x of x / 6 and x * (1/6), as rounded as it is written."""
    x: Any
    factor: Any
    x, factor = (*node.args, None, None)[:2]
    if op(node) == "mul" and isinstance(x, int | float):
        x, factor = factor, x
    if not _read_once(x) or not isinstance(factor, int | float) or not factor:
        return None
    factor = 1 / factor if op(node) == "div" and not node.kwargs else factor
    return x if op(node) in ("mul", "div") and abs(6 * factor - 1) < 1e-4 else None


def _clamped(node: Node) -> Any:
    """x of relu6(x + 3)."""
    more: Any = node.args[0] if op(node) == "relu6" else None
    if not _read_once(more) or op(more) != "add" or arguments(more)["alpha"] != 1:
        return None
    x, three = arguments(more)["self"], arguments(more)["other"]
    return x if isinstance(x, Node) and three == 3 else None


def _times_its_own(node: Node, source: Callable[[Node], Any]) -> Any:
    """x of x * y where x is y's source."""
    if op(node) == "mul":
        x: Any
        y: Any
        for x, y in (node.args, node.args[::-1]):
            if _read_once(y) and source(y) is x:
                return x
    return None


def _become(node: Node, name: str, source: Any) -> None:
    """Makes a node another operation, of one input, and erases what was between them.

    What wrote to its source no longer does: nothing else may read the source of an activation.
    """
    dropped: list[Any] = [node]
    for step in dropped:
        dropped += [x for x in step.all_input_nodes if x is not source and _read_once(x)]
    node.target = getattr(torch.ops.aten, name).default
    node.args, node.kwargs = (source,), {}
    for x in dropped[1:]:
        node.graph.erase_node(x)


def variable(node: Node, constants: Container[Any]) -> Node | None:
    """The only input that is not constant, of x * scale + shift; None of what is no such thing."""
    if op(node) not in _CHANNELWISE:
        return None
    inputs = [x for x in node.args if isinstance(x, Node) and x not in constants]
    return inputs[0] if len(inputs) == 1 else None


def find_gate(product: Node, constants: Container[Any]) -> tuple[Node, ...]:
    """hardsigmoid, linear, relu, linear, mean of a squeeze-excite, from its product; or none.

    After a linear layer there may be batch norms, each x * scale + shift.
    """
    if op(product) != "mul":
        return ()
    for x, gate in (product.args, product.args[::-1]):
        chain: list[Node] = []
        node: Any = gate
        for accepted in _GATE:
            while accepted is _LINEAR and len(node.users) == 1 and is_vector(node):
                if (source := variable(node, constants)) is None:
                    break
                chain.append(node)
                node = source
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
