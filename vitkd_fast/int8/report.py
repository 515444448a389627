"""What `quantize` gives back: the graph, and how close it is to the float model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import file
from .graph import Classifier, Graph


@dataclass(frozen=True)
class LayerReport:
    """How well the bytes of one map stand for its float values."""

    name: str
    op: str
    lo: float  # what byte 0 and byte 255 stand for
    hi: float
    sqnr: float  # dB, of all errors up to here
    clipped: float  # share of the float values outside of lo..hi
    # shares of the logits' squared error, estimated (sensitivity.py)
    map_share: float  # of what rounding this map costs
    weight_share: float  # of what rounding the layer's weights costs


@dataclass(frozen=True)
class Report:
    """How close the quantised graph is to the model, on the calibration images."""

    layers: tuple[LayerReport, ...]  # on the first images
    agreement: float  # share of images with the same top-1 class
    sqnr: float  # dB, of the logits
    images: int
    classifier_share: float = 0.0  # of the logits' squared error, by the classifier's weights
    warnings: tuple[str, ...] = ()  # what is amiss with the calibration, a sentence each

    def __str__(self) -> str:
        head = f"{'layer':44} {'op':14} {'range':>20} {'SQNR dB':>8} {'clipped':>8}"
        rows = [f"{head} {'map':>6} {'weights':>8}  of the loss"]
        for layer in self.layers:
            span = f"{layer.lo:.3g} to {layer.hi:.3g}"
            rows.append(
                f"{layer.name:44} {layer.op:14} {span:>20} {layer.sqnr:8.1f} {layer.clipped:8.2%} "
                f"{layer.map_share:6.1%} {layer.weight_share:8.1%}"
            )
        rows.append(
            f"top-1 agreement with the float model {self.agreement:.2%} of {self.images} "
            f"images, logit SQNR {self.sqnr:.1f} dB"
        )
        return "\n".join([*rows, *(f"warning: {warning}" for warning in self.warnings)])


class QuantizedModel:
    """What `quantize` makes: a graph that `load` runs as it is, or from a file."""

    def __init__(self, graph: Graph, report: Report) -> None:
        self.graph = graph
        self._report = report

    def report(self) -> Report:
        """How close it is to the float model, layer by layer; print it."""
        return self._report

    def save(self, path: str | Path) -> None:
        """Writes the file that `load` reads."""
        file.save(self.graph, path)

    def __repr__(self) -> str:
        size, classifier = self.graph.image_size, self.graph.nodes[-1]
        assert isinstance(classifier, Classifier)
        return (
            f"QuantizedModel({len(self.graph.nodes)} nodes, {size}x{size}, "
            f"{len(classifier.weight)} classes, logit SQNR {self._report.sqnr:.1f} dB)"
        )
