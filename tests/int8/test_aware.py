"""Quantisation-aware training: the engine's bytes before, in and after it; its gradients."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.int8_graphs import random_images

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")

from support.int8_models import PIXELS, Block, create, sqnr  # noqa: E402
from vitkd_fast import models  # noqa: E402
from vitkd_fast.int8 import (  # noqa: E402
    QuantizationAware,
    _aware,
    aware,
    file,
    load,
    quantize,
    reference,
    straight_through,
)
from vitkd_fast.int8.graph import Array  # noqa: E402
from vitkd_fast.int8.straight_through import (  # noqa: E402
    Convolution,
    Gated,
    OrderedLinear,
    Range,
    Rounded,
    RoundedWeight,
    Shape,
)
from vitkd_fast.taps import Taps  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

FRESH = random_images(1, (4, 32, 32, 3))


def nchw(images: Array) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def begin(model: nn.Module, size: int = 32, **options: Any) -> QuantizationAware:
    images = random_images(0, (8, size, size, 3))
    return QuantizationAware(model, quantize(model.eval(), [images], **PIXELS, **options))


def step(module: QuantizationAware, steps: int = 1, lr: float = 1e-2) -> None:
    """Moves everything that learns, by a loss of logits."""
    optimizer = torch.optim.Adam(module.parameters(), lr)
    images = nchw(random_images(2, (8, 32, 32, 3)))
    for _ in range(steps):
        logits = module(images)
        F.cross_entropy(logits, torch.arange(8) % logits.shape[1]).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def assert_engines_bytes(module: QuantizationAware, images: Array = FRESH) -> None:
    """Every map is the reference's, and the logits are the engine's."""
    graph, maps = module.graph(), []
    logits = module(nchw(images), lambda _, levels: maps.append(levels)).numpy()
    *expected, last = reference.outputs(graph, images)
    for node, levels, bytes_ in zip(graph.nodes, maps, expected, strict=False):
        found = levels.permute(0, 2, 3, 1).numpy() + node.zero_point
        assert np.array_equal(found, bytes_), node.name
    assert len(maps) == len(expected) and np.array_equal(logits, last)
    assert np.array_equal(logits, load(graph)(images))


EVERY_DAY = "mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small_035".split()
MODELS = """
mobilenetv1_100h mobilenetv2_100 tf_mobilenetv3_small_075 mobilenetv3_large_100
mobilenetv4_conv_small mobilenetv4_conv_aa_medium mobilenetv4_conv_blur_medium efficientnet_lite0
torchvision/mobilenet_v2 torchvision/mobilenet_v3_small torchvision/mobilenet_v3_large
""".split()


@pytest.mark.parametrize(
    "name", [*EVERY_DAY, *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS)]
)
def test_the_engines_bytes(name: str) -> None:
    """Before and after steps with statistics of the batch, and with frozen ones."""
    torch.manual_seed(0)
    model = create(name)
    images = random_images(0, (8, 32, 32, 3))
    start = quantize(model, [images], **PIXELS)
    module = QuantizationAware(model, start)
    # what was quantized is where training begins
    for before, now in zip(start.graph.nodes, module.graph().nodes, strict=True):
        for array in before.arrays:
            assert np.array_equal(getattr(before, array), getattr(now, array)), before.name
    assert_engines_bytes(module)
    module.train()
    step(module, 2)
    assert_engines_bytes(module.eval())
    module.train().freeze_batch_norm()
    step(module, 2)
    assert_engines_bytes(module)  # in training mode
    assert_engines_bytes(module.eval())
    assert module.ranges.map_log.abs().max() > 0.01 < module.ranges.weight_log.abs().max()


def test_a_portable_start_stays_one() -> None:
    torch.manual_seed(0)
    model = create("mobilenetv2_035")
    start = quantize(model, [random_images(0, (8, 32, 32, 3))], **PIXELS, portable=True)
    module = QuantizationAware(model, start)
    assert_engines_bytes(module.eval())
    step(module.train(), 2)
    assert_engines_bytes(module.eval())
    kinds = [[node.op for node in graph.nodes] for graph in (start.graph, module.graph())]
    assert kinds[0] == kinds[1] and "add" in kinds[0]


def test_more_than_eight_bits_cannot_be_trained() -> None:
    torch.manual_seed(0)
    model = create("mobilenetv2_035")
    start = quantize(model, [random_images(0, (8, 32, 32, 3))], **PIXELS, mixed="auto", budget=1.05)
    with pytest.raises(ValueError, match=r"start: expected maps of eight bits, .* without mixed"):
        QuantizationAware(model, start)


@pytest.fixture
def block() -> QuantizationAware:
    """Every kind of node but a squeeze-excite; no batch norms."""
    torch.manual_seed(0)
    return begin(Block())


def test_every_kind_of_node(block: QuantizationAware, tmp_path: Path) -> None:
    step(block.train(), 5)
    assert_engines_bytes(block)
    assert block.ranges.map_shift.abs().max() > 0
    with torch.no_grad():
        block.ranges.map_shift += 2  # five levels
    assert_engines_bytes(block)
    assert any(zero != node.zero_point for zero, node in zip(
        block.ranges.map_zero.tolist(), block.graph().nodes, strict=False))  # fmt: skip
    block.save(tmp_path / "block.safetensors")
    assert (tmp_path / "block.safetensors").read_bytes() == file.dump(block.graph())


def test_sums_that_float32_does_not_hold() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 640, 3), nn.ReLU6(), nn.Conv2d(640, 8, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    with torch.no_grad():
        model[0].bias.add_(10)
        model[2].weight.uniform_(0.9, 1)
    module = begin(model)
    assert_engines_bytes(module)
    assert [layer.exact for layer in module.weighed] == [False, True, False]


def test_dead_channels() -> None:
    """No weights, no batch norm, and both."""
    torch.manual_seed(0)
    model = create("mobilenetv2_035")
    with torch.no_grad():
        model.conv_stem.weight[0] = 0
        model.bn1.weight[:2] = 0
        model.blocks[1][0].conv_pw.weight[1:3] = 0
    module = begin(model).train()
    step(module, 2)
    assert_engines_bytes(module.eval())
    values = [*module.state_dict().values()]
    assert all(value.isfinite().all() for value in values)


# gradients


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same function without its roundings: nothing but the float network, cut off."""
    for part in (straight_through, _aware, aware):
        monkeypatch.setattr(part, "replaced", lambda x, value: x, raising=False)
    monkeypatch.setattr(straight_through, "_round_", lambda x: x)
    monkeypatch.setattr(Range, "round", lambda own, v, inplace: v.clamp(own.lo, own.hi))


NAMES = ["mobilenetv2_035", "mobilenetv3_small_050", "mobilenetv4_conv_small_035"]


@pytest.mark.usefixtures("unrounded")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("live", [False, True])
def test_gradients_are_those_of_the_float_model(name: str, live: bool) -> None:
    """Of every parameter, where nothing is rounded or cut off; and the running statistics."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
    images = nchw(random_images(3, (8, 32, 32, 3)))
    pixels = {"mean": (0.4,) * 3, "std": (0.25,) * 3}  # a mean that is a byte: the border is exact
    predict = nn.Sequential(models.Normalize(**pixels), model)
    norms = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # once, for statistics that are the batch's
    with torch.no_grad():
        predict.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    twin = copy.deepcopy(predict)
    start = quantize(model.eval(), [images.permute(0, 2, 3, 1)], bias_correction=False,
                     calibration="minmax", **pixels)  # fmt: skip
    module = QuantizationAware(model, start)
    ranges = module.ranges
    with torch.no_grad():  # nothing but a ReLU6 cuts off
        capped = ranges.most.isfinite()
        ranges.map_step.copy_(ranges.most.where(capped, 2 * ranges.map_step))
        ranges.most.fill_(torch.inf)
        ranges.weight_step *= 2
        ranges.correction.zero_()
    module.train().freeze_batch_norm(not live)
    twin.train(live)
    target = torch.randn(8, 5)
    logits, expected = module(images), twin(images)
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()
    for x in (logits, expected):
        (x * target).sum().backward()
    others = dict(twin[1].named_parameters())
    largest = max(p.grad.norm() for p in others.values())
    for key, p in model.named_parameters():
        error = (p.grad - others[key].grad).norm()
        # statistics of a batch make more of the last digits, at ReLUs' corners
        own, all_ = (0.05, 1e-4) if live else (1e-3, 1e-6)
        assert error < own * others[key].grad.norm() + all_ * largest, key
    state, wanted = model.state_dict(), twin[1].state_dict()
    for key in state:
        assert torch.allclose(state[key], wanted[key], rtol=1e-3, atol=1e-4), key


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.usefixtures("unrounded")
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("kind", ["plain", "hardswish", "residual"])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolutions_gradients(live: bool, kind: str, groups: int) -> None:
    """Against finite differences, of the function that is not rounded."""
    torch.manual_seed(0)
    x, weight, bias = double(2, 4, 5, 4), double(4, 4 // groups, 3, 3), double(4)
    multiplier = (torch.rand(4, dtype=torch.float64) + 0.5).requires_grad_()
    k, other, ratio = double(), double(2, 4, 3, 2), double()
    span, shape = Range(-3.0, 2.5), Shape((2, 2), (1, 1), groups)
    eps = torch.rand(4, dtype=torch.float64) if live else None

    def convolution(*tensors: Tensor) -> Tensor:
        main, more = tensors[:4], tensors[4:]
        tail: Any = (None, None, None, 0.0)
        if kind == "hardswish":
            tail = (more[0], None, None, 0.0)
        elif kind == "residual":
            tail = (None, *more, float(more[1].detach()))
        zero = torch.zeros((), dtype=torch.float64)
        return Convolution.apply(*main, *tail, zero, span, shape, eps)[0]

    more = {"plain": (), "hardswish": (k,), "residual": (other, ratio)}[kind]
    assert torch.autograd.gradcheck(convolution, (x, weight, multiplier, bias, *more))


@pytest.mark.usefixtures("unrounded")
def test_the_other_nodes_gradients() -> None:
    torch.manual_seed(0)
    zero, span = torch.zeros((), dtype=torch.float64), Range(-1.0, 1.5)
    assert torch.autograd.gradcheck(lambda v: Rounded.apply(v, zero, span), double(2, 3, 2, 2))
    gated = double(2, 3, 4, 4), double(2, 3)
    assert torch.autograd.gradcheck(lambda x, gate: Gated.apply(x, gate, zero, span), gated)
    linear = double(3, 40), double(40, 5), double(5)
    assert torch.autograd.gradcheck(OrderedLinear.apply, linear)


def test_lsq() -> None:
    """The step's gradient of s * clamp(rne(x / s), -Q, P), as the paper has it, in float64."""
    torch.manual_seed(0)
    # weights, a step for each channel
    weight, step_ = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    step_ = ((step_ + 0.5) / 60).requires_grad_()
    grad = torch.randn_like(weight)
    rows = step_.view(-1, 1, 1, 1)
    q = RoundedWeight.apply(weight, 1 / step_).double()
    ((q * rows) * grad).sum().backward()
    v = weight / rows.detach()
    slope = torch.where(v.abs() < 127.5, v.round() - v, 127 * v.sign())
    assert (v.abs() > 127.5).any()
    assert torch.allclose(step_.grad, (grad * slope).sum((1, 2, 3)), rtol=0, atol=1e-3)
    # a map, and its zero point as in LSQ+
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    s, zero = (torch.tensor(value, dtype=torch.float64).requires_grad_() for value in (0.01, 140.0))
    lo, hi = -140.0, 115.0
    y = Rounded.apply(x / s, zero, Range(lo, hi))
    grad = torch.randn_like(x)
    (s * y * grad).sum().backward()
    v = (x / s).detach()
    inside = (v > lo) & (v < hi)
    slope = torch.where(inside, v.round() - v, v.clamp(lo, hi))
    assert torch.allclose(s.grad, (grad * slope).sum(), rtol=1e-12)
    # the offset -s * zero of LSQ+ has the gradient 1 of what is cut off
    assert torch.allclose(zero.grad / -s.detach(), (grad * ~inside).sum(), rtol=1e-12)
    assert torch.allclose(x.grad, grad * inside, rtol=1e-12)


def test_a_step_of_sgd_is_that_of_lsq(block: QuantizationAware) -> None:
    """But for a hundredth; steps are learned as logarithms, for which gradient scales make up."""
    ranges = block.ranges
    steps, zeros = ranges.maps()
    grads = torch.randn(2, len(steps), dtype=torch.float64)
    (steps * grads[0] + zeros * grads[1]).sum().backward()
    begun, rate = steps.detach().clone(), 1e-6
    with torch.no_grad():
        ranges.map_log -= rate * ranges.map_log.grad
    moved = ranges.maps()[0].detach() - begun
    # 1 / sqrt(N Q), N the features of a map
    sizes = [8 * 64, 12 * 64, 12 * 64, *[8 * 64] * 5, 8, 16]
    gain = (torch.tensor(sizes, dtype=torch.float64) * 255).rsqrt()
    assert len(sizes) == len(steps)
    assert torch.allclose(moved, -0.01 * rate * gain * grads[0], rtol=1e-4)


# in use


def test_taps_of_maps_and_pooled_features() -> None:
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050", num_classes=5).eval()
    module, images = begin(model, 64), nchw(random_images(4, (4, 64, 64, 3)))
    module.eval()
    plain = Taps(model, maps=(2, 8, 32), pooled=True)
    plain.model = models.predictor(model)
    with torch.no_grad():
        expected, found = plain(images), Taps(module, maps=(2, 8, 32), pooled=True)(images)
    assert torch.equal(found.logits, module(images))
    for stride in (2, 8, 32):
        assert found.maps[stride].shape == expected.maps[stride].shape
        assert sqnr(expected.maps[stride].numpy(), found.maps[stride].numpy()) > 15
    assert found.pooled is not None and expected.pooled is not None
    assert found.pooled.shape == expected.pooled.shape == (4, 1024)
    assert sqnr(expected.pooled.numpy(), found.pooled.numpy()) > 15
    tapped = Taps(module, maps=(8,))(images)
    tapped.maps[8].square().mean().backward()
    assert model.conv_stem.weight.grad.abs().max() > 0
    assert module.ranges.map_log.grad.abs().max() > 0
    assert model.classifier.weight.grad is None or not model.classifier.weight.grad.any()


def test_statistics_take_over_from_bias_correction() -> None:
    torch.manual_seed(0)
    module = begin(create("mobilenetv2_035")).train()
    counts = torch.tensor(module.ranges.counts)
    normed = torch.tensor([layer.norm is not None for layer in module.weighed])
    normed = normed.repeat_interleave(counts)
    before = module.ranges.correction.clone()
    with torch.no_grad():
        module(nchw(FRESH))
    assert torch.allclose(module.ranges.correction[normed], before[normed] * 0.9)
    assert torch.equal(module.ranges.correction[~normed], before[~normed])
    frozen = module.freeze_batch_norm().state_dict()
    kept = {key: value.clone() for key, value in frozen.items()}
    with torch.no_grad():
        module(nchw(FRESH))
    assert all(torch.equal(kept[key], value) for key, value in module.state_dict().items())


def test_state_and_copies() -> None:
    torch.manual_seed(0)
    module = begin(create("mobilenetv3_small_050")).train()
    step(module)
    other = QuantizationAware(
        create("mobilenetv3_small_050"),
        quantize(create("mobilenetv3_small_050"), [FRESH], **PIXELS),
    )
    other.load_state_dict(module.state_dict())
    assert file.dump(other.graph()) == file.dump(module.graph())
    twin, before = copy.deepcopy(module), file.dump(module.graph())
    step(twin)
    assert file.dump(module.graph()) == before != file.dump(twin.graph())


def test_fixed_ranges(block: QuantizationAware) -> None:
    module = QuantizationAware(block.model, quantize(block.model, [FRESH], **PIXELS),
                               learn_ranges=False)  # fmt: skip
    before = [x.clone() for x in module.ranges.maps()]
    step(module.train())
    assert all(torch.equal(a, b) for a, b in zip(before, module.ranges.maps(), strict=True))
    assert_engines_bytes(module)


def test_images_and_autocast(block: QuantizationAware) -> None:
    images = nchw(FRESH)
    with torch.no_grad():
        logits = block(images)
        assert torch.equal(block(images.float() + 0.3), logits)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(block(images), logits)
    with pytest.raises(ValueError, match=r"images: expected \[N, 3, H, W\], got \[4, 32, 32, 3\]"):
        block(torch.from_numpy(FRESH))


def test_ranges_that_are_found_again() -> None:
    """Those of the weights as they are; biases keep what training made of their corrections."""
    torch.manual_seed(0)
    model: Any = create("mobilenetv3_small_050")
    module = begin(model).train()
    step(module, 3)
    with torch.no_grad():
        model.conv_head.weight *= 3
        model.conv_head.bias *= 3
    again = quantize(model.eval(), [random_images(0, (8, 32, 32, 3))], **PIXELS)
    kept = module.ranges.correction.clone()
    before = module.ranges.map_step.clone()
    assert module.train().take_ranges(again).model.training
    fresh = QuantizationAware(copy.deepcopy(model).eval(), again)
    for name in ("map_step", "map_zero", "weight_step", "map_log", "map_shift", "weight_log"):
        assert torch.equal(getattr(module.ranges, name), getattr(fresh.ranges, name)), name
    assert module.ranges.map_step[-1] > 1.5 * before[-1]
    assert torch.equal(module.ranges.correction, kept) and not torch.equal(
        kept, fresh.ranges.correction
    )
    assert_engines_bytes(module.eval())
    step(module.train(), 1)
    assert_engines_bytes(module.eval())


def test_another_models_graph_is_refused(block: QuantizationAware) -> None:
    start = quantize(create("mobilenetv2_035"), [FRESH], **PIXELS)
    with pytest.raises(ValueError, match="start: expected the graph of this Block, got that of"):
        QuantizationAware(Block(), start)


def test_computed_weights_are_refused() -> None:
    model = Block().eval()
    start = quantize(model, [FRESH], **PIXELS)
    nn.utils.parametrizations.weight_norm(model.expand)
    with pytest.raises(ValueError, match="expand: expected weights that are the model's own"):
        QuantizationAware(model, start)


def test_the_models_own_normalisation() -> None:
    torch.manual_seed(0)
    predict = models.predictor(create("mobilenetv2_035")).eval()
    module = QuantizationAware(predict, quantize(predict, [random_images(0, (8, 32, 32, 3))]))
    assert_engines_bytes(module)
    step(module.train().freeze_batch_norm())
    assert_engines_bytes(module)
