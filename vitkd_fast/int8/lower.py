"""From a model to a small float graph: torch.export, batch norms folded, padding made explicit.

`lower` exports at one static size, drops what changes no value, finds the squeeze-excites, and
turns each remaining ATen operation into a node or folds it into the one before. SAME padding stays
a rule, so the graph is right at other sizes too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

from ._aten import (
    arguments,
    find_gate,
    is_copy,
    is_global_pool,
    is_vector,
    module,
    op,
    pair,
    shape,
    simplify,
    variable,
)
from .float_graph import BatchNorm, FloatNode, Origin, batch_norm
from .graph import Padding


class UnsupportedError(ValueError):
    """The model holds an operation that the int8 engine does not have."""


def lower(model: nn.Module, image_size: int) -> tuple[FloatNode, ...]:
    """The nodes with forward(nodes, x) = model(x), up to rounding, for images [N, 3, H, W].

    The model is traced at [2, 3, image_size, image_size] and left as it is. Of several outputs the
    first, or the one under "logits", counts. Padding is as in the model at every size; only what
    the model itself computes from the size, outside of timm's Conv2dSame, is fixed to image_size.
    Weights are float64 copies on the CPU.

    Raises:
        ValueError: the model is no module, or in training mode, or image_size is not positive.
        UnsupportedError: the model cannot be exported, holds an operation that the engine does
            not have, or does not end in a linear classifier; names the module and the operation.
    """
    model = checked(model)
    if image_size < 1:
        raise ValueError(f"quantize: image_size: expected 1 or more, got {image_size}")
    like = next(model.parameters(), torch.empty(0))
    image = like.new_zeros(2, 3, image_size, image_size, requires_grad=False)
    try:
        with torch.no_grad(), _normalize_without_branches():
            program = torch.export.export(model, (image,), strict=False)
    except Exception as error:  # any: the model's own code runs here
        raise UnsupportedError(f"quantize: {_why_not_exported(model, image, error)}") from error
    return _Lowering(program).run()


def checked(model: Any) -> nn.Module:
    """The model, out of torch.compile; ValueError where it is none, or in training mode."""
    model = getattr(model, "_orig_mod", model)
    # an exported module is a graph whose eval() only raises
    exported = isinstance(model, GraphModule) and "eval" in vars(model)
    if exported or not isinstance(model, nn.Module):
        kind = "a module of torch.export" if exported else f"a {type(model).__name__}"
        raise ValueError(
            f"quantize: model: expected the torch.nn.Module itself, before any export, got {kind}"
        )
    if model.training:
        raise ValueError("quantize: model: expected model.eval(), got a model in training mode")
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise ValueError(f"quantize: {name}: expected loaded weights, got the meta device")
    return model


@contextmanager
def _normalize_without_branches() -> Iterator[None]:
    """torchvision's normalize looks at the values of std, which torch.export refuses."""
    functional: Any = sys.modules.get("torchvision.transforms.functional")
    if functional is None:
        yield
        return

    def normalize(tensor: Tensor, mean: Any, std: Any, inplace: bool = False) -> Tensor:
        mean, std = (torch.as_tensor(x).to(tensor).view(-1, 1, 1) for x in (mean, std))
        return (tensor - mean) / std

    kept, functional.normalize = functional.normalize, normalize
    try:
        yield
    finally:
        functional.normalize = kept


@torch.no_grad()
def _why_not_exported(model: nn.Module, image: Tensor, error: Exception) -> str:
    """Of a model that fails on any image, or returns no tensors, this; else what export says."""
    given = f"{type(model).__name__} on images {list(image.shape)}"
    try:
        output = model(image)
    except Exception as own:  # any: the model's own code runs here
        return f"{given} fails: {_line(own)}"
    if not isinstance(output, Tensor | tuple | list | Mapping):
        return (
            f"{type(model).__name__}: expected logits as a tensor [N, classes], got "
            f"{type(output).__name__}"
        )
    return f"torch.export of {given} fails: {_line(error)}; the int8 engine {_RUNS}"


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


_SQUEEZE_EXCITE = (
    "squeeze-excite (mean, 1x1, relu or hardswish, 1x1, hardsigmoid, mul by the mean's input)"
)
_RUNS = (
    "runs MobileNets (timm's mobilenetv1*, mobilenetv2*, mobilenetv3* and "
    "mobilenetv4_conv*, torchvision's mobilenet_v2 and mobilenet_v3_*) and what is made of the "
    "same operations"
)
_SAME_MODULE = "timm.layers.conv2d_same.Conv2dSame"


class _Lowering:
    """One walk over an exported graph, which it cleans in place; `run` is called once."""

    def __init__(self, program: ExportedProgram) -> None:
        self.graph = program.graph
        self.structure = program.call_spec.out_spec  # of what the model returns
        self.nodes: list[FloatNode] = []
        self.constants: dict[Node, Tensor] = {}
        self.names: dict[Node, str] = {}  # of the constants that are tensors of the model
        # what a map is: the node that makes it, and the zeros (top, left, bottom, right) around it
        self.maps: dict[Node, tuple[int, tuple[int, ...]]] = {}
        for node, spec in zip(
            self.graph.find_nodes(op="placeholder"),
            program.graph_signature.input_specs,
            strict=True,
        ):
            if spec.kind == InputKind.USER_INPUT:
                self.maps[node] = (-1, (0, 0, 0, 0))
            elif spec.kind != InputKind.CUSTOM_OBJ and spec.target is not None:
                value = program.state_dict.get(spec.target, program.constants.get(spec.target))
                if isinstance(value, Tensor):
                    self.constants[node], self.names[node] = value, spec.target
        self.gates: dict[Node, tuple[Node, ...]] = {}  # of squeeze-excites, by their products
        self.lowerings: dict[str, Callable[[Node, dict[str, Any]], None]] = {
            "conv2d": self._conv,
            "linear": self._linear,
            "avg_pool2d": self._average,
            "batch_norm": self._channelwise,
            "relu": self._activate,
            "relu6": self._activate,
            "hardswish": self._activate,
            "hardsigmoid": self._hard_sigmoid,
            **dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max", "hardtanh"), self._clamp),
            "add": self._add,
            "mul": self._multiply,
            **dict.fromkeys(("sub", "rsub", "div", "addcmul"), self._channelwise),
            "mean": self._pool,
            "adaptive_avg_pool2d": self._pool,
            "pad": self._pad,
            "constant_pad_nd": self._pad,
        }

    def run(self) -> tuple[FloatNode, ...]:
        (output,) = self.graph.find_nodes(op="output")
        returned = self._logits(output)
        self._clean()
        simplify(self.graph)
        (logits,) = output.args[0]
        for node in self.graph.nodes:
            if gate := find_gate(node, self.constants):
                self.gates[node] = gate
        inside = {node for gate in self.gates.values() for node in gate}
        calls = [
            node
            for node in self.graph.nodes
            if node.op not in ("placeholder", "get_attr", "output") and node not in self.constants
        ]
        for node in calls:  # unknown operations are reported before misplaced ones
            if op(node) not in self.lowerings:
                raise _unknown(node)
        written: set[Any] = set()
        for node in calls:
            # export gives later readers what is written in place, but not those through a view
            if not written.isdisjoint(node.all_input_nodes):
                raise _unsupported(node, "it reads a map after another operation wrote to it")
            if op(node) and node.target._schema.is_mutable:
                written.add(node.args[0])
            if node in inside:
                continue
            self.lowerings[op(node)](node, arguments(node))
        self._name_outputs(calls)
        last = self.nodes[-1] if self.nodes else None
        ends = self.maps.get(logits) == (len(self.nodes) - 1, (0, 0, 0, 0))
        if last is None or not ends or not _is_classifier(last) or len(returned) != 2:
            raise UnsupportedError(
                f"quantize: {last.name if last else 'the model'}: expected logits [N, classes], of "
                f"a linear layer or a 1x1 convolution, as the model's output, got {returned}"
            )
        if self.nodes[0].op == "normalize" and sum(-1 in node.inputs for node in self.nodes) > 1:
            raise UnsupportedError(
                "quantize: the model: expected the image to be read normalised or as it is, got "
                "both"
            )
        return tuple(self.nodes)

    def _name_outputs(self, calls: list[Node]) -> None:
        """Notes which modules' outputs the nodes make."""
        last = {self.maps[call][0]: call for call in calls if call in self.maps}
        ends: dict[str, Node] = {}  # the last call inside of each module
        for call in calls:
            for path, _ in call.meta.get("nn_module_stack", {}).values():
                ends[path] = call
        for index, call in last.items():
            paths = tuple(path for path, end in ends.items() if end is call and path)
            if not any(self.maps[call][1]):
                self.nodes[index] = replace(self.nodes[index], modules=paths)

    def _logits(self, output: Node) -> tuple[int, ...]:
        """Makes the logits the only output; their shape."""
        found: Any = self.structure.unflatten(output.args[0])
        given = type(found).__name__
        if isinstance(found, Mapping):
            given = f"{given} of {', '.join(map(str, found))}"
            found = found.get("logits")
        elif isinstance(found, tuple | list) and found:
            found = found[0]
        if not shape(found):
            raise UnsupportedError(
                "quantize: the model: expected logits as a tensor [N, classes], as the first of a "
                f"tuple or list, or under 'logits' in a dict, got {given}"
            )
        output.args = ((found,),)
        return shape(found)

    def _clean(self) -> None:
        """Drops what changes no value and computes what depends only on weights."""
        for node in list(self.graph.nodes):
            if node.op != "call_function":
                continue
            if op(node).startswith("_assert"):
                self.graph.erase_node(node)
            elif is_copy(node):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
            elif all(source in self.constants for source in node.all_input_nodes):
                if not isinstance(node.target, torch._ops.OpOverload):
                    raise _unsupported(node, "it is no ATen operation")
                if node.target._schema.is_mutable:
                    raise _unsupported(
                        node, "it changes the model, as in training; call model.eval()"
                    )
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self.constants.get)
                with torch.no_grad():
                    self.constants[node] = node.target(*args, **kwargs)
        self.graph.eliminate_dead_code()

    def _append(self, node: Node, **fields: Any) -> None:
        name = module(node)[0]
        if not name or any(other.name == name for other in self.nodes):
            name = f"{name}.{node.name}".lstrip(".")
        self.nodes.append(FloatNode(name=name, **fields))
        self.maps[node] = (len(self.nodes) - 1, (0, 0, 0, 0))

    def _constant(self, node: Node, value: Any) -> Tensor:
        if value not in self.constants:
            raise _unsupported(node, "its weights depend on the image")
        return self.constants[value].detach().to("cpu", torch.float64, copy=True)

    def _affine(self, node: Node, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Weight and bias of a convolution or a linear layer, a missing bias as zeros."""
        weight = self._constant(node, args["weight"])
        if args["bias"] is None:
            return weight, weight.new_zeros(weight.shape[0])
        return weight, self._constant(node, args["bias"])

    def _origin(self, args: dict[str, Any]) -> Origin:
        """Of weight and bias of a convolution or a linear layer."""
        weight, bias = (self.names.get(args[name]) for name in ("weight", "bias"))
        return Origin(weight=None if args["bias"] and not bias else weight, bias=bias)

    def _fold(self, node: Node, args: dict[str, Any]) -> BatchNorm | tuple[Tensor, Tensor]:
        """What `_scale_and_shift` is of."""
        if op(node) != "batch_norm":
            return self._scale_and_shift(node, args)
        keys = {"mean": "running_mean", "var": "running_var", "weight": "weight", "bias": "bias"}
        names: dict[str, Any] = {own: self.names.get(args[key]) for own, key in keys.items()}
        if any(names[own] is None and args[key] is not None for own, key in keys.items()):
            return self._scale_and_shift(node, args)
        return BatchNorm(eps=args["eps"], **names)

    def _padded(self, node: Node, value: Any) -> tuple[int, tuple[int, ...]]:
        if value not in self.maps:
            raise _unsupported(node, "an input is a constant")
        return self.maps[value]

    def _map(self, node: Node, value: Any) -> int:
        """The index of the node that makes a map read by what is no convolution."""
        index, zeros = self._padded(node, value)
        if index < 0 or any(zeros) or self.nodes[index].op == "normalize":
            raise _unsupported(node, "only a convolution reads the image or a padded map")
        return index

    def _foldable(self, node: Node, source: Node) -> int:
        """The conv or add before a batch norm or an activation, if nothing else reads it."""
        index = self._map(node, source)
        if self.nodes[index].op not in ("conv", "add") or self.nodes[index].activation:
            raise _unsupported(node, "expected after a convolution or an addition")
        if len(source.users) > 1:
            raise _unsupported(node, "the map before it is read by another operation too")
        self.maps[node] = (index, (0, 0, 0, 0))
        return index

    def _weigh(self, node: Node, source: Any, padding: Padding, **fields: Any) -> None:
        """Appends a convolution of a map that may be padded."""
        index, zeros = self._padded(node, source)
        if padding != "same":
            padding = _sum(zeros, padding)
        elif any(zeros):
            raise _unsupported(node, "SAME padding of a padded map")
        self._append(node, op="conv", inputs=(index,), padding=padding, **fields)

    def _conv(self, node: Node, args: dict[str, Any]) -> None:
        weight, bias = self._affine(node, args)
        if pair(args["dilation"]) != (1, 1):
            raise _unsupported(node, f"dilation: expected 1, got {args['dilation']}")
        groups = args["groups"]
        if groups != 1 and not (groups == weight.shape[0] and weight.shape[1] == 1):
            raise _unsupported(
                node,
                "groups: expected 1, or as many as input and output channels, got "
                f"{groups}, with {groups * weight.shape[1]} input and {weight.shape[0]} output "
                "channels",
            )
        padding: Padding = "same"
        if module(node)[1] != _SAME_MODULE and args["padding"] != "same":
            rows, columns = (0, 0) if args["padding"] == "valid" else pair(args["padding"])
            padding = (rows, columns, rows, columns)
        self._weigh(
            node,
            args["input"],
            padding,
            weight=weight,
            bias=bias,
            stride=pair(args["stride"]),
            groups=groups,
            origins=(self._origin(args),),
        )

    def _linear(self, node: Node, args: dict[str, Any]) -> None:
        if shape(node)[2:] or not is_vector(args["input"]):
            raise _unsupported(node, f"expected [N, C], got {shape(args['input'])}")
        weight, bias = self._affine(node, args)
        fields = {"weight": weight[:, :, None, None], "bias": bias}
        origins = (self._origin(args),)
        self._weigh(node, args["input"], (0, 0, 0, 0), **fields, origins=origins)

    def _average(self, node: Node, args: dict[str, Any]) -> None:
        kernel, (rows, columns) = pair(args["kernel_size"]), pair(args["padding"])
        if args["ceil_mode"] or args["divisor_override"] is not None:
            raise _unsupported(node, "expected no ceil_mode and no divisor_override")
        if (rows or columns) and not args["count_include_pad"]:
            raise _unsupported(node, "count_include_pad: expected True with padding, got False")
        channels = shape(node)[1]
        self._weigh(
            node,
            args["self"],
            (rows, columns, rows, columns),
            weight=torch.full((channels, 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64),
            bias=torch.zeros(channels, dtype=torch.float64),
            stride=pair(args["stride"]) if args["stride"] else kernel,
            groups=channels,
        )

    def _channelwise(self, node: Node, args: dict[str, Any]) -> None:
        """Folds x * scale + shift in the convolution before it, or in the image's normalize."""
        source = variable(node, self.constants)
        if source is None:
            raise _unsupported(node, "expected a map and constants")
        scale, shift = self._scale_and_shift(node, args)
        index, zeros = self._padded(node, source)
        ours = index >= 0 and self.nodes[index].op == "normalize" and len(source.users) == 1
        if index < 0:
            if any(zeros):
                raise _unsupported(node, "expected before the padding of the image, not after")
            three = torch.ones(3, dtype=torch.float64)
            weight, bias = (scale * three)[:, None, None, None], shift * three
            self._append(node, op="normalize", inputs=(-1,), weight=weight, bias=bias)
            return
        if ours and not any(zeros):
            self.maps[node] = (index, zeros)
        else:
            index = self._foldable(node, source)
        conv = self.nodes[index]
        if conv.weight is None or conv.bias is None:
            raise _unsupported(node, "expected after a convolution")
        weight, bias = conv.weight * scale.view(-1, 1, 1, 1), conv.bias * scale + shift
        fold = self._fold(node, args)
        origins = tuple(replace(origin, folds=(*origin.folds, fold)) for origin in conv.origins)
        self.nodes[index] = replace(conv, weight=weight, bias=bias, origins=origins)

    def _scale_and_shift(self, node: Node, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Of x * scale + shift, float64 [1] or [C]."""

        def constant(name: str) -> Tensor:
            return self._channels(node, args[name])

        one, name = torch.ones(1, dtype=torch.float64), op(node)
        if name == "batch_norm":
            if args["training"]:
                why = "it uses the statistics of the batch: training, or none kept"
                raise _unsupported(node, why)
            weight, bias = (args[key] and constant(key) for key in ("weight", "bias"))
            return batch_norm(
                constant("running_mean"), constant("running_var"), args["eps"], weight, bias
            )
        x = variable(node, self.constants)
        if name == "addcmul":
            factor = "tensor2" if args["tensor1"] is x else "tensor1"
            return constant(factor) * args["value"], constant("self")
        first = args["self"] is x
        other = constant("other" if first else "self")
        if name == "mul":
            return other, 0 * one
        if name == "div":
            if not first or args.get("rounding_mode"):
                raise _unsupported(node, "expected a map divided by a constant, not rounded")
            return 1 / other, 0 * one
        # a + alpha * b, a - alpha * b, b - alpha * a
        a, b = {"add": (1, 1), "sub": (1, -1), "rsub": (-1, 1)}[name]
        if name == "rsub":
            a *= args["alpha"]
        else:
            b *= args["alpha"]
        return (a * one, b * other) if first else (b * one, a * other)

    def _channels(self, node: Node, value: Any) -> Tensor:
        """A constant as float64 [1] or [C]."""
        if isinstance(value, int | float):
            return torch.tensor([value], dtype=torch.float64)
        constant, rank = self._constant(node, value), len(shape(node))
        if op(node) == "batch_norm":
            return constant
        sizes = (*[1] * (rank - constant.ndim), *constant.shape)
        if len(sizes) != rank or constant.numel() not in (1, sizes[1] if rank > 1 else 1):
            given = f"a constant of {tuple(constant.shape)} with {shape(node)}"
            raise _unsupported(node, f"expected one number, or one for each channel, got {given}")
        return constant.flatten()

    def _hard_sigmoid(self, node: Node, args: dict[str, Any]) -> None:
        raise _unsupported(node, f"expected in a {_SQUEEZE_EXCITE}")

    def _clamp(self, node: Node, args: dict[str, Any]) -> None:
        bounds = ", ".join(f"{k} {v}" for k, v in args.items() if k != "self")
        raise _unsupported(node, f"expected min 0, with max 6 or none, got {bounds}")

    def _activate(self, node: Node, args: dict[str, Any]) -> None:
        activation: Any = op(node)
        index = self._foldable(node, args["self"])
        if activation == "hardswish" and self.nodes[index].op == "add":
            raise _unsupported(node, "expected after a convolution")
        self.nodes[index] = replace(self.nodes[index], activation=activation)

    def _add(self, node: Node, args: dict[str, Any]) -> None:
        if variable(node, self.constants) is not None or not isinstance(args["other"], Node):
            return self._channelwise(node, args)
        sides = (args["self"], args["other"])
        if not all(isinstance(side, Node) for side in sides) or args["alpha"] != 1:
            raise _unsupported(node, "expected two maps, alpha 1")
        if any(shape(side) != shape(node) for side in sides):
            raise _unsupported(
                node, f"expected one shape, got {shape(sides[0])} and {shape(sides[1])}"
            )
        self._append(node, op="add", inputs=tuple(self._map(node, side) for side in sides))

    def _pool(self, node: Node, args: dict[str, Any]) -> None:
        if not is_global_pool(node):
            raise _unsupported(node, "expected the mean over all pixels")
        self._append(node, op="pool", inputs=(self._map(node, args["self"]),))

    def _pad(self, node: Node, args: dict[str, Any]) -> None:
        index, zeros = self._padded(node, args["self"])
        if args.get("mode", "constant") != "constant" or args["value"]:
            raise _unsupported(node, f"expected zeros, got {args.get('mode', '')} {args['value']}")
        left, right, top, bottom, *rest = (*args["pad"], 0, 0)[: max(4, len(args["pad"]))]
        if any(rest) or min(left, right, top, bottom) < 0:
            raise _unsupported(node, f"pad: expected rows and columns, not < 0, got {args['pad']}")
        if module(node)[1] != _SAME_MODULE:  # there it is the convolution's own
            zeros = _sum(zeros, (top, left, bottom, right))
        self.maps[node] = (index, zeros)

    def _multiply(self, node: Node, args: dict[str, Any]) -> None:
        if node in self.gates:
            return self._squeeze_excite(node)
        if variable(node, self.constants) is None:
            raise _unsupported(node, f"expected of two maps in a {_SQUEEZE_EXCITE}")
        return self._channelwise(node, args)

    def _squeeze_excite(self, node: Node) -> None:
        fields: dict[str, Any] = {}
        origins: list[Origin] = []
        number = "0"
        mean, *chain, _ = reversed(self.gates[node])
        for part in chain:
            if op(part) in ("conv2d", "linear"):
                number = "2" if number == "1" else "1"
                weight, fields["b" + number] = self._affine(part, arguments(part))
                if (*weight.shape[1:], 1, 1)[:3] != (shape(part.args[0])[1], 1, 1):
                    raise _unsupported(part, "expected in a squeeze-excite: a 1x1 kernel, 1 group")
                fields["w" + number] = weight.flatten(1)
                origins.append(self._origin(arguments(part)))
            elif op(part) in ("relu", "hardswish"):
                fields["hidden"] = op(part)
            else:
                scale, shift = self._scale_and_shift(part, arguments(part))
                fields["w" + number] = fields["w" + number] * scale[:, None]
                fields["b" + number] = fields["b" + number] * scale + shift
                fold = self._fold(part, arguments(part))
                origins[-1] = replace(origins[-1], folds=(*origins[-1].folds, fold))
        fields |= {"inputs": (self._map(node, mean.args[0]),), "origins": tuple(origins)}
        self._append(node, op="squeeze_excite", **fields)


def _is_classifier(node: FloatNode) -> bool:
    """Whether it is linear; its result is 1x1, so without stride its input is 1x1 too."""
    return (
        node.weight is not None
        and node.weight.shape[2:] == (1, 1)
        and (node.stride, node.groups, node.activation) == ((1, 1), 1, None)
    )


def _sum(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, int, int, int]:
    top, left, bottom, right = (x + y for x, y in zip(a, b, strict=True))
    return top, left, bottom, right


def _unsupported(node: Node, why: str) -> UnsupportedError:
    path, kind = module(node)
    return UnsupportedError(
        f"quantize: {path or 'the model'} ({kind or 'module not known'}): {node.target}: {why}"
    )


def _unknown(node: Node) -> UnsupportedError:
    """Of an operation that the engine does not have, whatever its arguments."""
    if str(node.target).startswith("wrap_with_"):
        what = "torch.autocast" if "autocast" in str(node.target) else "a change of gradient mode"
        return _unsupported(node, f"{what} inside forward; expected around the call")
    return _unsupported(node, f"not an operation of the int8 engine, which {_RUNS}")
