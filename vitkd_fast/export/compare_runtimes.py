"""The runtimes that `vitkd compare` runs models in: how each opens a file, and what it says of it.

`RUNTIMES` is the whole list; one more runtime is one more row, whose `open` returns a Model with as
many threads as are asked. A process holds one of them: each is imported when it is opened.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..int8.graph import Array

# what computes nothing: bytes are moved, or become numbers
_MOVES = frozenset(
    "CONCATENATION Concat Const Convert DEQUANTIZE DequantizeLinear FakeQuantize Flatten Input "
    "Output PAD Pad QUANTIZE QuantizeLinear RESHAPE Reorder Reshape Split TRANSPOSE Transpose "
    "DELEGATE".split()
)


@dataclass(frozen=True)
class Model:
    """A model that a runtime has opened."""

    run: Callable[[Array], Array]  # uint8 [1, H, W, 3] -> float32 [1, classes]
    # names of types as NumPy's, and shapes; what is not an int is free
    inputs: list[tuple[str, list[Any]]]
    outputs: list[tuple[str, list[Any]]]
    metadata: dict[str, Any]  # what `vitkd export` left there
    # which operators are computed in float and which in int8; None: the runtime does not say
    operators: Callable[[Array], dict[str, Counter[str]] | None]


@dataclass(frozen=True)
class Runtime:
    """What a file needs, and `open(path, threads)`."""

    suffix: str
    package: str  # that is installed
    module: str  # of it that is imported
    open: Callable[[Path, int], Model]
    extra: str = "compare"  # of this package; brings it
    settings: str = ""  # that differ from what it does if nothing is asked

    @property
    def version(self) -> str:
        return version(self.package)

    @property
    def is_installed(self) -> bool:
        return find_spec(self.module.partition(".")[0]) is not None


def _counted(operators: Iterable[tuple[str, str]]) -> dict[str, Counter[str]]:
    """Of operators and the type of what each computes."""
    found: dict[str, Counter[str]] = {"float": Counter(), "int8": Counter()}
    for name, dtype in operators:
        if name not in _MOVES and dtype != "dynamic":  # OpenVINO's, of weights
            found["float" if "f" in dtype else "int8"][name] += 1
    return found


def _open_onnxruntime(path: Path, threads: int) -> Model:
    import onnxruntime as ort  # type: ignore[import-untyped]

    def session(profile: str = "") -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        options.enable_profiling = bool(profile)
        options.profile_file_prefix = profile
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    opened = session()
    name = opened.get_inputs()[0].name

    def run(image: Array) -> Array:
        return opened.run(None, {name: image})[0]

    def operators(image: Array) -> dict[str, Counter[str]]:
        """What ran, after all optimisations, by the type of its first input."""
        with tempfile.TemporaryDirectory() as folder:
            profiled = session(os.path.join(folder, "profile"))
            profiled.run(None, {name: image})
            events = json.loads(Path(profiled.end_profiling()).read_text())
        kernels = [e["args"] for e in events if e["name"].endswith("_kernel_time")]
        return _counted((k["op_name"], next(iter(k["input_type_shape"][0]), "")) for k in kernels)

    def types(values: Any) -> list[tuple[str, list[Any]]]:
        names = {"tensor(float)": "float32"}
        return [
            (names.get(v.type, v.type.removeprefix("tensor(").rstrip(")")), v.shape) for v in values
        ]

    metadata = opened.get_modelmeta().custom_metadata_map
    return Model(
        run, types(opened.get_inputs()), types(opened.get_outputs()), _read(metadata), operators
    )


def _read(metadata: dict[str, str]) -> dict[str, Any]:
    """JSON values; what is none was not written by us."""
    found = {}
    for key, value in metadata.items():
        try:
            found[key] = json.loads(value)
        except ValueError:
            continue
    return found


def _open_openvino(path: Path, threads: int) -> Model:
    import openvino  # type: ignore[import-not-found]

    core = openvino.Core()
    model = core.read_model(str(path))
    try:
        kept = model.get_rt_info("framework").value
        metadata = _read({key: str(getattr(v, "value", v)) for key, v in kept.items()})
    except RuntimeError:  # no metadata
        metadata = {}
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }

    def types(ports: Any) -> list[tuple[str, list[Any]]]:
        return [
            (
                np.dtype(port.get_element_type().to_dtype()).name,
                [n.get_length() if n.is_static else "?" for n in port.get_partial_shape()],
            )
            for port in ports
        ]

    inputs, outputs = types(model.inputs), types(model.outputs)
    if len(inputs) == 1 and len(inputs[0][1]) == 4:
        model.reshape([1, *(n if isinstance(n, int) else -1 for n in inputs[0][1][1:])])
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()

    def run(image: Array) -> Array:
        return request.infer([image])[0].copy()

    def operators(image: Array) -> dict[str, Counter[str]]:
        """What the compiled model holds, by the precision in which it runs."""
        nodes = []
        for node in compiled.get_runtime_model().get_ordered_ops():
            info = {key: value.astype(str) for key, value in node.get_rt_info().items()}
            nodes.append((info["layerType"], info["runtimePrecision"]))
        return _counted(nodes)

    return Model(run, inputs, outputs, metadata, operators)


def _open_litert(path: Path, threads: int) -> Model:
    from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-untyped]

    interpreter = Interpreter(str(path), num_threads=threads)  # runs in XNNPACK
    interpreter.allocate_tensors()
    given, made = interpreter.get_input_details(), interpreter.get_output_details()

    def types(details: Any) -> list[tuple[str, list[Any]]]:
        return [
            (np.dtype(d["dtype"]).name, [n if n > 0 else "?" for n in d["shape_signature"]])
            for d in details
        ]

    def run(image: Array) -> Array:
        interpreter.set_tensor(given[0]["index"], image)
        interpreter.invoke()
        return interpreter.get_tensor(made[0]["index"])

    def operators(image: Array) -> dict[str, Counter[str]]:
        """What the file holds, by the type of its first input; of it XNNPACK runs what it can."""
        held = {t["index"]: np.dtype(t["dtype"]).name for t in interpreter.get_tensor_details()}
        nodes = interpreter._get_ops_details()
        return _counted((node["op_name"], held.get(node["inputs"][0], "")) for node in nodes)

    return Model(run, types(given), types(made), _litert_metadata(path), operators)


def _litert_metadata(path: Path) -> dict[str, Any]:
    from ai_edge_litert import schema_py_generated as schema  # type: ignore[import-untyped]

    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    for i in range(model.MetadataLength()):
        entry = model.Metadata(i)
        if entry.Name() == b"vitkd_fast":
            return json.loads(model.Buffers(entry.Buffer()).DataAsNumpy().tobytes())
    return {}


def _open_executorch(path: Path, threads: int) -> Model:
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime as ExecuTorch

    from .executorch import METADATA

    portable_lib._unsafe_reset_threadpool(threads)
    program = ExecuTorch.get().load_program(path)
    method = program.load_method("forward")
    has = METADATA in program.method_names
    about = program.load_method(METADATA).execute([])[0] if has else "{}"
    # torch's numbers of types, as ExecuTorch's metadata has them
    names = {0: "uint8", 1: "int8", 3: "int32", 4: "int64", 6: "float32"}

    def types(count: int, tensor: Callable[[int], Any]) -> list[tuple[str, list[Any]]]:
        held = map(tensor, range(count))
        return [(names.get(t.dtype(), f"type {t.dtype()}"), list(t.sizes())) for t in held]

    def run(image: Array) -> Array:
        return method.execute([torch.from_numpy(image)])[0].numpy().copy()

    meta = method.metadata
    inputs = types(meta.num_inputs(), meta.input_tensor_meta)
    outputs = types(meta.num_outputs(), meta.output_tensor_meta)
    return Model(run, inputs, outputs, json.loads(about), lambda image: None)


RUNTIMES = {
    "onnxruntime": Runtime(".onnx", "onnxruntime", "onnxruntime", _open_onnxruntime),
    "openvino": Runtime(
        ".onnx", "openvino", "openvino", _open_openvino, extra="",
        settings="INFERENCE_PRECISION_HINT f32",
    ),
    "litert": Runtime(".tflite", "ai-edge-litert", "ai_edge_litert", _open_litert),
    "executorch": Runtime(
        ".pte", "executorch", "executorch.runtime", _open_executorch, extra="export-executorch"
    ),
}  # fmt: skip
SUFFIXES = tuple(dict.fromkeys(runtime.suffix for runtime in RUNTIMES.values()))
