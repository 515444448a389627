"""Core ML: an ML program for iOS 17 and macOS 14, whose weights and activations are 8 bits (W8A8).

Written by coremltools' builder, which runs anywhere; only macOS predicts. In between, numbers are
float16, as the Neural Engine has no others: scales and biases are rounded to that.
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .._extras import require
from ..int8.graph import Graph
from . import scales
from .scales import Map
from .walk import Layer, Pads, Walk

_UNIT = 1 / 128  # of a pixel: float16 has every multiple, and the first layer's scales
# passes that would write other scales, and zero points, than the graph's
_CHANGES_SCALES = {
    "common::nullify_redundant_quantization_zero_point",
    "common::distributive_quantized_binary_op_scale_normalization",
}


def write(graph: Graph, path: Path, exact: bool = False) -> None:
    """Writes the package, a folder, in place of what is there; `exact`: float32, no rounding."""
    require("export-coreml", "export: a .mlpackage file")
    made = model(graph, exact)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        beside = Path(folder) / path.name
        made.save(str(beside))
        if path.exists():
            path.rename(Path(folder) / "before")
        beside.rename(path)


def model(graph: Graph, exact: bool = False) -> Any:
    """The coremltools model, with an image as input.

    Where the graph names its classes, and they exclude each other, it gives a label and the
    probabilities, else logits.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)  # of the torch that it does not need
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb

    size, target = graph.image_size, ct.target.iOS17
    # what pads it is subtracted with the scale, so that zeros pad
    around = np.array(graph.padding_bytes, np.float32)
    labelled = bool(graph.classes) and not graph.multilabel

    @mb.program(input_specs=[mb.TensorSpec((1, 3, size, size))], opset_version=target)
    def program(image: Any) -> Any:
        logits = _Writer(graph, exact, image).logits()
        return mb.softmax(x=logits, axis=1, name="probabilities") if labelled else logits

    pipeline = ct.PassPipeline.DEFAULT
    pipeline.remove_passes(_CHANGES_SCALES)
    kind = ct.precision.FLOAT32 if exact else ct.precision.FLOAT16
    made = ct.convert(
        program,
        inputs=[
            ct.ImageType(
                "image", (1, 3, size, size), scale=_UNIT, bias=list(-around * _UNIT),
                color_layout=ct.colorlayout.RGB,
            )
        ],
        classifier_config=ct.ClassifierConfig(list(graph.classes)) if labelled else None,
        minimum_deployment_target=target,
        compute_precision=kind,
        pass_pipeline=pipeline,
        skip_model_load=True,
    )  # fmt: skip
    made.short_description = "A MobileNet in int8, of vitkd_fast"
    about = {key: json.dumps(value) for key, value in scales.preparation(graph).items()}
    made.user_defined_metadata.update(about)
    return made


class _Writer(Walk):
    def __init__(self, graph: Graph, exact: bool, image: Any) -> None:
        from coremltools.converters.mil.mil import Builder

        super().__init__(graph, exact)
        self.mb, self.given = Builder, image

    def image_map(self) -> Map:
        return Map(_UNIT, super().image_map().zero_point)

    def image(self, of: Map, pads: Pads | None) -> Any:
        x, real = self.given, np.array(self.graph.padding_bytes, np.float32) - of.zero_point
        if pads is not None:
            (top, bottom), (left, right) = pads
            by = [0, 0, 0, 0, top, bottom, left, right]
            x = self.mb.pad(x=x, pad=by, constant_val=np.float32(0), name="padded")
        if not real.any():
            return x
        return self.mb.add(x=x, y=real.reshape(1, 3, 1, 1) * np.float32(_UNIT), name="bytes")

    def quantized(self, x: Any, of: Map, name: str) -> Any:
        if (of.lo, of.hi) != (0, 255):
            x = self.clipped(x, *of.range, f"{name}.clipped")
        return self.mb.quantize(
            input=x, scale=np.float32(of.scale), zero_point=np.uint8(of.zero_point),
            output_dtype="uint8", name=name,
        )  # fmt: skip

    def real(self, x: Any, of: Map, name: str) -> Any:
        return self.mb.dequantize(
            input=x, scale=np.float32(of.scale), zero_point=np.uint8(of.zero_point), name=name
        )

    def clipped(self, x: Any, least: float, most: float, name: str) -> Any:
        return self.mb.clip(x=x, alpha=np.float32(least), beta=np.float32(most), name=name)

    def _weights(self, layer: Layer, name: str) -> Any:
        if self.exact:
            return layer.real_weight
        return self.mb.constexpr_affine_dequantize(
            quantized_data=layer.weight, scale=layer.scale, zero_point=np.int8(0), axis=0, name=name
        )

    def convolution(
        self, x: Any, layer: Layer, stride: tuple[int, int], pads: Pads, groups: int, name: str
    ) -> Any:
        return self.mb.conv(
            x=x, weight=self._weights(layer, f"{name}.weight"), bias=layer.real_bias,
            strides=list(stride), groups=groups, pad_type="custom", pad=[*pads[0], *pads[1]],
            name=name,
        )  # fmt: skip

    def linear(self, x: Any, layer: Layer, name: str) -> Any:
        y = self._linear(x, layer, name, name)
        return self.mb.expand_dims(x=y, axes=[2, 3], name=f"{name}.maps")

    def classified(self, x: Any, layer: Layer, name: str) -> Any:
        return self._linear(x, layer, name, "logits")

    def _linear(self, x: Any, layer: Layer, name: str, output: str) -> Any:
        x = self.mb.squeeze(x=x, axes=[2, 3], name=f"{name}.flat")
        weight = self._weights(layer, f"{name}.weight")
        return self.mb.linear(x=x, weight=weight, bias=layer.real_bias, name=output)

    def sum(self, x: Any, y: Any, name: str) -> Any:
        return self.mb.add(x=x, y=y, name=name)

    def product(self, x: Any, y: Any, name: str) -> Any:
        return self.mb.mul(x=x, y=y, name=name)

    def mean(self, x: Any, name: str) -> Any:
        return self.mb.reduce_mean(x=x, axes=[2, 3], keep_dims=True, name=name)

    def relu(self, x: Any, name: str) -> Any:
        return self.mb.relu(x=x, name=name)

    def hard_swish(self, x: Any, name: str) -> Any:
        return self.mb.mul(x=x, y=self.hard_sigmoid(x, f"{name}.sigmoid"), name=name)

    def hard_sigmoid(self, x: Any, name: str) -> Any:
        return self.mb.sigmoid_hard(x=x, alpha=np.float32(1 / 6), beta=np.float32(0.5), name=name)
