"""The int8 engines that ours is measured beside, each quantised the best way that it offers.

`PEERS` maps a name, the engine's and its variant's, to an Engine: `convert` makes its file from a
float model, `open` a Peer from the file. `peer(peer.prepare(images))` are logits; `prepare` turns
uint8 images [N, H, W, 3] into what the engine takes best and is never timed. `peer.layers()`
says in what type its convolutions and matrix products really run. Files are kept in
build/int8-peers/, made again when weights, images, versions or this module change. torch is
imported to convert alone, so that a process with a peer in it is as small as the peer.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Array = np.ndarray
CACHE = Path(__file__).parent.parent / "build" / "int8-peers"


@dataclass(frozen=True)
class Pixels:
    """Images of size x size become (pixel / 255 - mean) / std."""

    size: int = 224
    mean: float = 0.5
    std: float = 0.5

    def floats(self, images: Array) -> Array:
        """float32 [N, 3, H, W]."""
        scaled = (images.astype(np.float32) / 255 - self.mean) / self.std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)


@dataclass(frozen=True)
class Network:
    """A float model and the images, uint8 [N, H, W, 3], that it is calibrated on."""

    name: str
    module: torch.nn.Module
    images: Array
    pixels: Pixels = field(default_factory=Pixels)
    tflite: Path | None = None  # the same model in LiteRT's int8

    def logits(self, images: Array) -> Array:
        """The float model's."""
        import torch

        with torch.inference_mode():
            parts = torch.from_numpy(self.pixels.floats(images)).split(25)
            return torch.cat([self.module(part) for part in parts]).numpy()

    @functools.cached_property
    def key(self) -> str:
        digest = hashlib.sha256(Path(__file__).read_bytes())
        digest.update(self.images.tobytes())
        for value in self.module.state_dict().values():
            digest.update(value.contiguous().numpy().tobytes())
        return f"{self.name}-{digest.hexdigest()[:12]}"


def smooth_images(count: int, size: int = 224) -> Array:
    """uint8 [count, size, size, 3]: coarse noise, enlarged, and a little fine noise."""
    import torch

    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 8, 8)))
    enlarged = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").numpy()
    noisy = enlarged + rng.normal(0, 8, enlarged.shape)
    return np.ascontiguousarray(noisy.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def random_network(name: str, images: Array) -> Network:
    """Random weights; batch norms hold the statistics of the images, so that ranges are sane.

    Biases are random, too: NNCF, for one, takes other layers of a squeeze-excite where they are 0.
    """
    import timm
    import torch

    torch.manual_seed(0)
    network = Network(name, timm.create_model(name, pretrained=False), images)
    for module in network.module.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.7, 1.3)
            torch.nn.init.normal_(module.bias, 0, 0.2)
            module.momentum = None  # the mean over all that is seen
        elif getattr(module, "bias", None) is not None:
            torch.nn.init.normal_(module.bias, 0, 0.1)
    with torch.no_grad():
        network.module.train()(torch.from_numpy(network.pixels.floats(images[:16])))
    network.module.eval()
    return network


def trained_network(data: Path, images: Array) -> Network:
    """MobileNetV2 trained on ImageNet, and the LiteRT file that its weights were taken from."""
    import timm

    name, path = "mobilenetv2_100", data / "mobilenetv2_100.tf_in1k.safetensors"
    module = timm.create_model(name, pad_type="same", checkpoint_path=str(path)).eval()
    return Network(name, module, images, tflite=data / "tf2_mobilenet_v2_1.0_224_ptq.tflite")


@dataclass(frozen=True)
class Peer:
    """An open model: `peer(peer.prepare(images))` are the logits, kept until the next call."""

    prepare: Callable[[Array], Any]
    run: Callable[[Any], Array]
    layers: Callable[[], Counter[str]]  # convolutions and matrix products by type: int8, float

    def __call__(self, prepared: Any) -> Array:
        return self.run(prepared)


@dataclass(frozen=True)
class Engine:
    """How a model is converted and opened: open(file, pixels, batch, threads)."""

    needs: tuple[str, ...]  # packages
    convert: Callable[[Network], Path | None]  # None: it has no such model
    open: Callable[[Path, Pixels, int, int], Peer]
    needs_bf16: bool = False

    def missing(self) -> str:
        """Why it cannot run here, or nothing."""
        if absent := [name for name in self.needs if not importlib.util.find_spec(name)]:
            return f"no {', '.join(absent)}"
        if self.needs_bf16 and "BF16" not in _openvino_core().get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        ):
            return "no bf16 arithmetic in this CPU"
        return ""


def cached(network: Network, packages: str, ending: str, make: Callable[[Path], None]) -> Path:
    """A file in CACHE, made where it is missing; a crash leaves nothing under its name."""
    versions = "-".join(f"{n}{importlib.metadata.version(n)}" for n in packages.split())
    path = CACHE / f"{network.key}-{versions}{ending}"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = CACHE / f"part-{path.name}"
        make(part)
        if (weights := part.with_suffix(".bin")).exists():  # openvino's are beside the model
            weights.rename(path.with_suffix(".bin"))
        part.rename(path)
    return path


def float_onnx(network: Network) -> Path:
    """The float model in ONNX, opset 18, of any batch."""

    def make(path: Path) -> None:
        import torch

        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            network.module,
            (torch.from_numpy(network.pixels.floats(network.images[:2])),),
            str(path),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=18,
        )

    return cached(network, "torch onnx", ".onnx", make)


def onnxruntime_int8(network: Network, prepared: bool) -> Path:
    """u8 activations from percentiles (better here than its default, the extremes), s8 weights.

    prepared: by quant_pre_process, as its documents advise; it makes another model, and not always
    a faster one.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __len__(self) -> int:
            return len(network.images)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.images = iter(network.images[start_index:end_index])

        def get_next(self) -> dict[str, Array] | None:
            image = next(self.images, None)
            return None if image is None else {"images": network.pixels.floats(image[None])}

    count = len(network.images)
    # it keeps every map of so many images; the name of the option is older than the method
    stride = max(n for n in range(1, 26) if count % n == 0)

    def make(path: Path) -> None:
        source = ready = path.with_name(f"ready-{path.name}")
        if prepared:
            quant_pre_process(str(float_onnx(network)), str(ready))
        else:
            source = float_onnx(network)
        quantization.quantize_static(
            str(source),
            str(path),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            calibrate_method=quantization.CalibrationMethod.Percentile,
            extra_options={"CalibStridedMinMax": stride},
        )
        ready.unlink(missing_ok=True)

    ending = "-prepared.onnx" if prepared else "-int8.onnx"
    return cached(network, "torch onnx onnxruntime", ending, make)


def open_onnxruntime(path: Path, pixels: Pixels, batch: int, threads: int) -> Peer:
    import onnxruntime as ort

    def open_session(optimised: str = "") -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = optimised
        options.log_severity_level = 3
        options.add_free_dimension_override_by_name("batch", batch)
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def layers() -> Counter[str]:
        import onnx

        with tempfile.TemporaryDirectory() as folder:
            open_session(f"{folder}/optimised.onnx")
            graph = onnx.load(f"{folder}/optimised.onnx", load_external_data=False).graph
        types = {"QLinearConv": "int8", "QGemm": "int8", "QLinearMatMul": "int8"}
        types |= dict.fromkeys(("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul"), "float")
        return Counter(types[node.op_type] for node in graph.node if node.op_type in types)

    session = open_session()
    binding = session.io_binding()
    logits = np.empty((batch, session.get_outputs()[0].shape[1]), np.float32)
    binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)

    def run(value: Any) -> Array:
        binding.bind_ortvalue_input("images", value)
        session.run_with_iobinding(binding)
        return logits

    return Peer(lambda p: ort.OrtValue.ortvalue_from_numpy(pixels.floats(p)), run, layers)


def openvino_int8(network: Network, controlled: bool = False) -> Path:
    """NNCF's mixed preset, for activations other than ReLU, and extremes (better than default).

    A depthwise weight of an ONNX file reaches its convolution through a Reshape. NNCF quantises
    before that, which keeps the convolution in float, unless constants are folded first.

    controlled: with its slower and better bias correction, and with accuracy control: layers go
    back to float until the answers on the calibration images are the float model's (no labels).
    """
    import nncf
    from nncf.quantization import advanced_parameters as advanced
    from nncf.quantization import range_estimator

    def make(path: Path) -> None:
        import openvino
        from openvino import passes

        nncf.set_log_level(logging.ERROR)
        model = _openvino_core().read_model(str(float_onnx(network)))
        model.reshape([1, 3, network.pixels.size, network.pixels.size])
        manager = passes.Manager()
        manager.register_pass(passes.ConstantFolding())
        manager.run_passes(model)
        images = nncf.Dataset(network.images, lambda p: network.pixels.floats(p[None]))
        ranges = range_estimator.RangeEstimatorParametersSet.MINMAX
        common: dict[str, Any] = {
            "preset": nncf.QuantizationPreset.MIXED,
            "subset_size": len(network.images),
        }
        parameters = advanced.AdvancedQuantizationParameters(
            activations_range_estimator_params=ranges
        )
        if controlled:
            answers = network.logits(network.images).argmax(1)
            # of some images or all, and not as the transformation makes them
            answered = nncf.Dataset(list(zip(network.images, answers, strict=True)))

            def agreement(compiled: Any, items: Any) -> tuple[float, None]:
                found = [
                    compiled(network.pixels.floats(image[None]))[0].argmax() == answer
                    for image, answer in items
                ]
                return float(np.mean(found)), None

            quantized = nncf.quantize_with_accuracy_control(
                model,
                images,
                answered,
                agreement,
                max_drop=0.5 / len(answers),
                fast_bias_correction=False,
                advanced_quantization_parameters=parameters,
                # ranked by all of them, a fold had not ended after five CPU minutes
                advanced_accuracy_restorer_parameters=advanced.AdvancedAccuracyRestorerParameters(
                    ranking_subset_size=25
                ),
                **common,
            )
        else:
            quantized = nncf.quantize(model, images, advanced_parameters=parameters, **common)
        openvino.save_model(quantized, str(path), compress_to_fp16=False)

    ending = "-controlled.xml" if controlled else "-int8.xml"
    return cached(network, "torch onnx openvino nncf", ending, make)


@functools.cache
def _openvino_core() -> Any:
    import openvino

    return openvino.Core()


def open_openvino(path: Path, pixels: Pixels, batch: int, threads: int, precision: str) -> Peer:
    """precision: of what is not int8. The plugin's own choice is bf16 where the CPU has it."""
    import openvino
    from openvino.preprocess import PrePostProcessor

    model = _openvino_core().read_model(str(path))
    model.reshape([batch, 3, pixels.size, pixels.size])
    # bytes in, a little faster than floats
    steps = PrePostProcessor(model)
    steps.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    steps.input().model().set_layout(openvino.Layout("NCHW"))
    to_float = steps.input().preprocess().convert_element_type(openvino.Type.f32)
    to_float.mean([255 * pixels.mean] * 3).scale([255 * pixels.std] * 3)
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,
    }
    compiled = _openvino_core().compile_model(steps.build(), "CPU", config)
    request = compiled.create_infer_request()
    logits = request.get_output_tensor().data

    def run(tensor: Any) -> Array:
        request.set_input_tensor(tensor)
        request.infer()
        return logits

    def layers() -> Counter[str]:
        found: Counter[str] = Counter()
        for node in compiled.get_runtime_model().get_ordered_ops():
            info = {key: value.astype(str) for key, value in node.get_rt_info().items()}
            if info["layerType"] in ("Convolution", "FullyConnected", "MatMul"):
                found["int8" if info["runtimePrecision"] in ("i8", "u8") else "float"] += 1
        return found

    return Peer(openvino.Tensor, run, layers)


def litert_int8(network: Network) -> Path | None:
    """The LiteRT file without what follows the logits; it is of any batch then."""
    if network.tflite is None:
        return None
    source = network.tflite

    def make(path: Path) -> None:
        import flatbuffers
        from ai_edge_litert import schema_py_generated as schema

        model = schema.ModelT.InitFromPackedBuf(source.read_bytes(), 0)
        graph = model.subgraphs[0]
        # ... convolution, reshape, softmax, quantize
        graph.operators = graph.operators[:-3]
        graph.outputs = graph.operators[-1].outputs
        model.signatureDefs = None
        builder = flatbuffers.Builder()
        builder.Finish(model.Pack(builder), b"TFL3")
        path.write_bytes(builder.Output())

    return cached(network, "ai-edge-litert", ".tflite", make)


def open_litert(path: Path, pixels: Pixels, batch: int, threads: int) -> Peer:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads)  # runs in XNNPACK
    source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    interpreter.resize_tensor_input(source["index"], [batch, pixels.size, pixels.size, 3])
    interpreter.allocate_tensors()
    scale, zero_point = target["quantization"]  # 0, 0 of floats

    def prepare(images: Array) -> Array:
        if source["dtype"] == np.uint8:
            return np.ascontiguousarray(images)
        values = np.ascontiguousarray(pixels.floats(images).transpose(0, 2, 3, 1))
        if source["dtype"] == np.float32:
            return values
        own, zero = source["quantization"]
        levels = np.trunc(values / own + np.copysign(0.5, values)) + zero  # as its QUANTIZE rounds
        return levels.clip(-128, 127).astype(np.int8)

    def run(images: Array) -> Array:
        interpreter.set_tensor(source["index"], images)
        interpreter.invoke()
        # its first class is the background, which the float model has not
        logits = interpreter.get_tensor(target["index"]).reshape(batch, -1)[:, 1:]
        return (logits.astype(np.float32) - zero_point) * np.float32(scale or 1.0)

    def layers() -> Counter[str]:
        types = {t["index"]: t["dtype"] for t in interpreter.get_tensor_details()}
        return Counter(
            "int8" if all(types[i] == np.int8 for i in node["inputs"][:2]) else "float"
            for node in interpreter._get_ops_details()
            if node["op_name"] in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
        )

    return Peer(prepare, run, layers)


def quantize_ai_edge(source: Path, floats: np.ndarray, path: Path) -> None:
    """ai-edge-quantizer's static int8 of a float .tflite file, on images [N, H, W, 3].

    In a random order: it follows ranges by a moving average from the first image on.
    """
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer, recipe

    ((signature, named),) = Interpreter(str(source)).get_signature_list().items()
    images = floats[np.random.default_rng(0).permutation(len(floats))]
    tool = quantizer.Quantizer(str(source), recipe.static_wi8_ai8())
    found = tool.calibrate(
        {signature: [{named["inputs"][0]: np.ascontiguousarray(x[None])} for x in images]},
        num_threads=1,
    )
    path.write_bytes(tool.quantize(found, enable_progress_report=False).quantized_model)


def litert_torch_int8(network: Network) -> Path:
    """litert-torch's float model of images [1, H, W, 3], in ai-edge-quantizer's static int8."""

    def make(path: Path) -> None:
        import litert_torch
        import torch

        class Rows(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = network.module

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                return self.network(images.permute(0, 3, 1, 2))

        floats = network.pixels.floats(network.images).transpose(0, 2, 3, 1)
        converted = litert_torch.convert(Rows().eval(), (torch.from_numpy(floats[:1].copy()),))
        converted.export(str(source := path.with_name(f"float-{path.name}")))
        quantize_ai_edge(source, floats, path)
        source.unlink()

    return cached(network, "torch litert-torch ai-edge-quantizer", "-own.tflite", make)


def open_litert_torch(path: Path, pixels: Pixels, batch: int, threads: int) -> Peer:
    """Of int8 in and out: an image is rounded once, when it is prepared."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads)
    source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    interpreter.resize_tensor_input(source["index"], [batch, pixels.size, pixels.size, 3])
    interpreter.allocate_tensors()
    (scale, zero_point), (out_scale, out_zero) = source["quantization"], target["quantization"]

    def prepare(images: Array) -> Array:
        scaled = pixels.floats(images).transpose(0, 2, 3, 1) / scale + zero_point
        return np.rint(scaled).clip(-128, 127).astype(np.int8)

    def run(images: Array) -> Array:
        interpreter.set_tensor(source["index"], images)
        interpreter.invoke()
        logits = interpreter.get_tensor(target["index"])
        return (logits.astype(np.float32) - out_zero) * np.float32(out_scale)

    return Peer(prepare, run, Counter)


def torchao_int8(network: Network) -> Path:
    """PT2E with the x86 quantizer, exported at batch 1 and 8; it compiles when it is opened."""

    def make(path: Path) -> None:
        import torch
        from torchao.quantization.pt2e import quantize_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        images = torch.from_numpy(network.pixels.floats(network.images))
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        batch = torch.export.Dim("batch", max=64)
        with torch.no_grad():
            exported = torch.export.export(
                network.module, (images[:2],), dynamic_shapes=({0: batch},)
            )
            prepared = quantize_pt2e.prepare_pt2e(exported.module(), quantizer)
            for part in images.split(8):
                prepared(part)
            converted = quantize_pt2e.convert_pt2e(prepared)
            torch.export.save(
                torch.export.export(converted, (images[:2],), dynamic_shapes=({0: batch},)), path
            )

    return cached(network, "torch torchao", ".pt2", make)


def open_torchao(path: Path, pixels: Pixels, batch: int, threads: int) -> Peer:
    import torch
    import torch._inductor.config as inductor
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401  its operations
    from torch._dynamo.utils import counters

    torch.set_num_threads(threads)
    model = torch.export.load(path).module()
    torch.compiler.reset()
    counters.clear()

    with torch.no_grad(), inductor.patch(freezing=True):
        compiled = torch.compile(model, dynamic=False)
        compiled(torch.zeros(batch, 3, pixels.size, pixels.size))

    def run(images: Any) -> Array:
        with torch.no_grad():
            return compiled(images).numpy()

    def layers() -> Counter[str]:
        found = counters["inductor"]
        return Counter(
            {
                kind: sum(found[f"{stem}_weight_{pack}_matcher_count"] for stem in stems)
                for kind, pack, stems in (
                    ("int8", "prepack", ("qconv", "qlinear")),
                    ("float", "pack", ("mkldnn_conv", "mkldnn_linear")),
                )
            }
        )

    return Peer(lambda p: torch.from_numpy(pixels.floats(p)), run, layers)


_TO_ONNX = ("onnx", "onnxscript")
_ORT = ("onnxruntime", *_TO_ONNX)
_OPENVINO = ("openvino", *_TO_ONNX)
_RAW = functools.partial(onnxruntime_int8, prepared=False)
_PREPARED = functools.partial(onnxruntime_int8, prepared=True)
_F32 = functools.partial(open_openvino, precision="f32")
_BF16 = functools.partial(open_openvino, precision="bf16")
PEERS = {
    "openvino int8": Engine((*_OPENVINO, "nncf"), openvino_int8, _F32),
    "openvino int8+bf16": Engine((*_OPENVINO, "nncf"), openvino_int8, _BF16, needs_bf16=True),
    "openvino bf16": Engine(_OPENVINO, float_onnx, _BF16, needs_bf16=True),
    "openvino fp32": Engine(_OPENVINO, float_onnx, _F32),
    "onnxruntime int8": Engine(_ORT, _RAW, open_onnxruntime),
    "onnxruntime int8 prepared": Engine(_ORT, _PREPARED, open_onnxruntime),
    "onnxruntime fp32": Engine(_ORT, float_onnx, open_onnxruntime),
    "litert int8": Engine(("ai_edge_litert",), litert_int8, open_litert),
    "litert-torch": Engine(
        ("litert_torch", "ai_edge_quantizer"), litert_torch_int8, open_litert_torch
    ),
    "torchao int8": Engine(("torchao",), torchao_int8, open_torchao),
}


def best(times: dict[str, float]) -> dict[str, str]:
    """The fastest variant of each engine among PEERS, and the fastest of those in float32."""
    fastest: dict[str, str] = {}
    for name in sorted(PEERS.keys() & times.keys(), key=times.__getitem__):
        for group in (name.split()[0], *["float32"] * name.endswith("fp32")):
            fastest.setdefault(group, name)
    order = [*dict.fromkeys(name.split()[0] for name in PEERS), "float32"]
    return {group: fastest[group] for group in order if group in fastest}
