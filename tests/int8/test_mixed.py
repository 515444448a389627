"""Options of `quantize` beyond ranges: fitted weights, more than eight bits, each layer's share."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from support.int8_graphs import random_images

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")

from support.int8_models import PIXELS, Block, logits_of, normalised, sqnr  # noqa: E402
from vitkd_fast.int8 import (  # noqa: E402
    file,
    fine,
    isa,
    load,
    quantize,
    reconstruct,
    reference,
    simulate,
    twins,
)
from vitkd_fast.int8.calibrate import Histogram, Scale  # noqa: E402
from vitkd_fast.int8.float_graph import FloatNode, activated, pre_activation  # noqa: E402
from vitkd_fast.int8.graph import Array, Conv, Depthwise, Graph  # noqa: E402
from vitkd_fast.int8.lower import lower  # noqa: E402
from vitkd_fast.int8.quantizer import _steps  # noqa: E402
from vitkd_fast.int8.report import QuantizedModel  # noqa: E402
from vitkd_fast.int8.sensitivity import costs  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES, FRESH = random_images(0, (24, 32, 32, 3)), random_images(1, (24, 32, 32, 3))


class Inverted(nn.Module):
    """Three inverted residuals with ReLU6, two of them with an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.expand = nn.ModuleList(nn.Conv2d(16, 48, 1) for _ in range(3))
        self.depthwise = nn.ModuleList(nn.Conv2d(48, 48, 3, 1, 1, groups=48) for _ in range(3))
        self.project = nn.ModuleList(nn.Conv2d(48, 16, 1) for _ in range(3))
        self.head, self.fc = nn.Conv2d(16, 32, 1), nn.Linear(32, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.normal_(module.bias, 0, 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        relu6 = nn.functional.relu6
        x = relu6(self.stem(x))
        for index, (expand, depthwise, project) in enumerate(
            zip(self.expand, self.depthwise, self.project, strict=True)
        ):
            y = project(relu6(depthwise(relu6(expand(x)))))
            x = x + y if index else y
        return self.fc(relu6(self.head(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def inverted() -> nn.Module:
    torch.manual_seed(0)
    return Inverted().eval()


@pytest.fixture(scope="module")
def plain(inverted: nn.Module) -> QuantizedModel:
    return quantize(inverted, IMAGES, **PIXELS)


def positions(graph: Graph) -> list[int]:
    """Height times width of each node's map."""
    found = reference.outputs(graph, IMAGES[:1])
    return [int(np.prod(output.shape[1:3])) if output.ndim == 4 else 1 for output in found]


def multiply_adds(graph: Graph) -> int:
    return sum(
        node.weight.size * size
        for node, size in zip(graph.nodes, positions(graph), strict=True)
        if hasattr(node, "weight")
    )


# weights, fitted and rounded


def correlated(seed: int, count: int, inputs: int) -> torch.Tensor:
    """[1, count, inputs], of a third as many causes and a little noise."""
    random = torch.Generator().manual_seed(seed)
    causes = torch.randn(1, count, inputs // 3, generator=random)
    mixing = torch.randn(inputs // 3, inputs, generator=torch.Generator().manual_seed(7))
    return causes @ mixing + 0.1 * torch.randn(1, count, inputs, generator=random)


def moments(x: torch.Tensor, r: torch.Tensor) -> reconstruct.Moments:
    found = reconstruct.Moments.like(torch.empty(x.shape[0], r.shape[2], x.shape[2]))
    for part in zip(x.split(100, 1), r.split(100, 1), strict=True):
        found.add(*part)
    return found


def test_rounding_makes_up_for_what_it_loses() -> None:
    x, fresh = correlated(0, 2000, 24), correlated(1, 2000, 24).double().numpy()
    weight = np.random.default_rng(0).normal(0, 0.05, (1, 8, 24))
    unit = np.abs(weight).max(2) / 7  # four bits: there is something to lose
    q = reconstruct.rounded(weight, unit, moments(x, torch.zeros(1, 2000, 8)))
    assert np.array_equal(q, np.rint(q)) and np.abs(q).max() <= 127

    def loss(rounded: Array) -> float:
        return float(np.square((rounded * unit[:, :, None] - weight) @ fresh[0].T).mean())

    assert loss(q) < loss(np.rint(weight / unit[:, :, None])) / 3
    assert np.abs(q - weight / unit[:, :, None]).max() < 4


def test_inputs_without_correlation_round_to_the_nearest() -> None:
    x = torch.cat([torch.eye(6), -torch.eye(6)])[None]
    weight = np.random.default_rng(0).normal(0, 20, (1, 3, 6))
    q = reconstruct.rounded(weight, np.ones((1, 3)), moments(x, torch.zeros(1, 12, 3)))
    assert np.array_equal(q, np.rint(weight))


def test_weights_are_fitted_to_what_they_read() -> None:
    """The input is off by more in some directions: fitted weights lean on the others."""
    weight = np.random.default_rng(0).normal(0, 1, (1, 4, 12))
    w = torch.from_numpy(weight).float()

    def off(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = correlated(seed, 3000, 12)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 50))
        return x + 0.5 * noise, -(0.5 * noise) @ w.mT  # what is read, and what its product lacks

    def loss(fitted: Array) -> float:
        x, lack = off(9)
        step = torch.from_numpy(fitted - weight).float()
        return float((lack - x @ step.mT).square().mean())

    halves = moments(*off(0)), moments(*off(1))
    assert loss(reconstruct.refit(weight, halves)) < loss(weight) / 2


def test_weights_stay_where_nothing_is_to_be_learned() -> None:
    """What lacks on one half of the images is no rule on the other."""
    weight = np.ones((1, 4, 12))
    x, lack = correlated(0, 300, 12), torch.randn(1, 300, 4)
    halves = moments(x, lack), moments(x, -lack)
    assert reconstruct.refit(weight, halves) is weight


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize(("padding", "stride"), [((1, 1, 1, 1), 1), ("same", 2), ((0, 0, 0, 0), 2)])
@pytest.mark.parametrize("size", [9, 64])
def test_patches_are_what_a_convolution_reads(
    groups: int, padding: Any, stride: int, size: int
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 6 // groups, 3, 3, dtype=torch.float64)
    node = FloatNode(
        op="conv", name="c", inputs=(-1,), weight=weight, bias=torch.zeros(6),
        padding=padding, stride=(stride, stride), groups=groups,
    )  # fmt: skip
    x = torch.randn(2, 6, size, size)
    expected = reconstruct.grouped(node, reconstruct.seen(pre_activation(node, [x])))
    w = torch.from_numpy(reconstruct.flat(node, weight.numpy())).float()
    found = reconstruct.patches(node, x, (3, 3)) @ w.mT
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.shape[1] <= 2 * 28 * 28


def test_reconstruction_brings_the_logits_closer() -> None:
    """Of every kind of node; the same bytes each time."""
    torch.manual_seed(0)
    model = Block().eval()
    expected = logits_of(model, FRESH)
    graph = quantize(model, IMAGES, reconstruct=True, **PIXELS).graph
    logits = load(graph)(FRESH)
    assert np.array_equal(logits, reference.run(graph, FRESH))
    assert sqnr(expected, logits) > sqnr(
        expected, load(quantize(model, IMAGES, **PIXELS).graph)(FRESH)
    )
    again = quantize(model, IMAGES, reconstruct=True, **PIXELS)
    assert file.dump(again.graph) == file.dump(graph)


def test_reconstruction_of_dead_channels() -> None:
    torch.manual_seed(0)
    model = Block().eval()
    with torch.no_grad():
        model.expand.weight[0], model.expand.bias[0] = 0.0, -1.0  # always 0: nothing to fit on
        model.head.weight[3] = 0.0
    expected, found = logits_of(model, FRESH), {}
    for fitted in (True, False):
        graph = quantize(model, IMAGES, reconstruct=fitted, **PIXELS).graph
        found[fitted] = sqnr(expected, reference.run(graph, FRESH))
    assert found[True] > found[False] - 0.5, found


# twins


def test_a_channel_and_its_twin_are_half_a_level_fine() -> None:
    v = np.linspace(3, 200, 10_001)
    below, above = twins.offsets(1, np.array([0]))
    error = (np.rint(v + below) + np.rint(v + above)) / 2 - v
    assert np.abs(error).max() < 0.2501
    assert np.square(error).mean() == pytest.approx((1 - twins.SAVED) / 12, rel=0.01)
    assert np.rint(below) == np.rint(above) == 0  # zero stays exact


def test_halves_of_weights_add_up() -> None:
    q = np.arange(-127, 128).reshape(1, -1).repeat(2, 0).astype(float)
    copied = np.array([0, 3, 4, 127, 254])
    halved = twins.split(q, copied)
    assert halved.shape == (2, 255 + 5) and np.abs(halved).max() <= 127
    whole = halved[:, :255].copy()
    whole[:, copied] += halved[:, 255:]
    assert np.array_equal(whole, q)
    assert np.abs(halved[:, copied] - halved[:, 255:]).max() <= 1


def test_merged_is_the_mean_of_a_channel_and_its_twin() -> None:
    copied = np.array([1, 2])
    values = np.array([[5.0, 1.0, 7.0], [1.0, 1.0, 1.0]])
    both = twins.with_twins(values.T, copied).T
    both[:, 3:] += 1
    expected = values + np.array([0, 0.5, 0.5])
    assert np.array_equal(twins.merged(torch.from_numpy(both), copied, 1).numpy(), expected)


# fine maps


def test_both_halves_of_a_fine_map_are_a_sixteenth_of_a_level_fine() -> None:
    """And less of the error of a product is left than `SAVED` says, its weights rounded."""
    rng = np.random.default_rng(0)
    inputs, outputs, zero_point = 48, 24, 117
    v = torch.from_numpy(rng.normal(0, 30, (1, inputs, 40, 40))).float().clamp(-110, 130)
    eye = Conv(
        name="c", inputs=(0,), weight=np.eye(inputs, dtype=np.int8)[:, None, None] * 64,
        bias=np.zeros(inputs, np.int32), multiplier=np.full(inputs, 1 / 64, np.float32),
        zero_point=zero_point, fine=True,
    )  # fmt: skip
    y = simulate.compute(eye, [(v, torch.zeros(1, 1, 1))])
    assert y.shape[1] == 2 * inputs and y.dtype == torch.uint8
    found = fine.merged(y, zero_point, 1) - zero_point
    assert float((found - v).abs().max()) <= 1 / 16
    q = np.rint(rng.normal(0, 35, (outputs, inputs)).clip(-127, 127))
    both = fine.split(q)
    assert both.shape == (outputs, 2 * inputs) and np.array_equal(both[:, :inputs], q)
    centred = y.double().numpy()[0].reshape(2 * inputs, -1) - zero_point
    exact = q @ v.double().numpy()[0].reshape(inputs, -1)
    left = np.square(both @ centred - exact).mean()
    assert left < (1 - fine.SAVED) * np.square(q @ centred[:inputs] - exact).mean()


def test_which_maps_may_be_fine() -> None:
    """Linear, read by dense convolutions alone, with room on either side of the zero point."""
    torch.manual_seed(0)

    def able(model: nn.Module, zero_point: int = 128, fuses: bool = True) -> set[str]:
        steps = _steps(lower(model.eval(), 32), fuses)
        scales = {step.output: Scale(0.1, zero_point) for step in steps}
        found = fine.candidates(steps, scales)
        return {step.node.name for step in steps if step.output in found}

    assert able(Inverted()) == {"project.0", "project.1", "project.2"}
    assert able(Inverted(), zero_point=5) == able(Inverted(), zero_point=250) == set()
    assert able(Inverted(), fuses=False) == set()  # an addition on its own reads bytes
    assert able(Tied()) == {"project.2"}  # which the head reads


@pytest.mark.parametrize("budget", [1.05, 1.5])
def test_multiply_adds_are_within_the_budget(
    inverted: nn.Module, plain: QuantizedModel, budget: float
) -> None:
    graph = quantize(inverted, IMAGES, mixed="auto", budget=budget, **PIXELS).graph
    spent = multiply_adds(graph) / multiply_adds(plain.graph)
    assert 1 + 0.8 * (budget - 1) < spent <= budget


def test_maps_with_more_bits_are_closer(inverted: nn.Module, plain: QuantizedModel) -> None:
    """With twins for all channels that can have them and are not always 0, and bottlenecks fine."""
    rich = quantize(inverted, IMAGES, mixed="auto", budget=9.0, **PIXELS)
    layers = zip(plain.report().layers, rich.report().layers, strict=True)
    gained = [after.sqnr - before.sqnr for before, after in layers][:-2]
    assert min(gained) > 0.5 and np.mean(gained) > 2.5, gained
    both = pairs(plain.graph, rich.graph)[:-1]
    assert [index for index, (_, b) in enumerate(both) if getattr(b, "fine", False)] == [3, 6, 9]
    for index, (a, b) in enumerate(both):
        if index in (3, 6, 9):
            assert len(b.bias) == len(a.bias) and gained[index] > 2, gained
        else:
            assert 1.5 * len(a.bias) < len(b.bias) <= 2 * len(a.bias)


def test_more_bits_on_every_instruction_set(inverted: nn.Module) -> None:
    graph = quantize(inverted, IMAGES, mixed="auto", budget=1.3, reconstruct=True, **PIXELS).graph
    expected = reference.run(graph, FRESH[:2])
    for name in isa():
        assert np.array_equal(load(file.dump(graph), isa=name)(FRESH[:2]), expected), name


def pairs(before: Graph, after: Graph) -> list[tuple[Any, Any]]:
    """Convolutions of the one and of the other."""
    both = zip(before.nodes, after.nodes, strict=True)
    return [(a, b) for a, b in both if isinstance(a, Conv | Depthwise)]


class Tied(Inverted):
    """Depthwise convolutions read the sums, so that they have twins and are not fine."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Conv2d(16, 16, 3, 1, 1, groups=16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        relu6 = nn.functional.relu6
        x = relu6(self.stem(x))
        for index, (first, expand, project) in enumerate(
            zip(self.first, self.expand, self.project, strict=True)
        ):
            y = project(relu6(expand(first(x))))
            x = x + y if index else y
        return self.fc(relu6(self.head(x)).mean((2, 3)))


def test_which_maps_have_twins() -> None:
    """The same channels before and after a depthwise convolution and along a residual chain."""
    torch.manual_seed(0)
    model = Tied().eval()
    plain = quantize(model, IMAGES, **PIXELS)
    graph = quantize(model, IMAGES, mixed="auto", budget=1.4, **PIXELS).graph
    more = [len(b.bias) - len(a.bias) for a, b in pairs(plain.graph, graph)]
    for index, (_, node) in enumerate(pairs(plain.graph, graph)):
        if isinstance(node, Depthwise):
            assert more[index] == more[node.inputs[0]]
        if len(node.inputs) == 2:
            assert more[index] == more[node.inputs[1]]
    assert max(more) > 0 and more[-1] == 0  # what is pooled has none
    read = [graph.nodes[node.inputs[0]] for node in graph.nodes if isinstance(node, Depthwise)]
    assert not any(getattr(node, "fine", False) for node in read)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "mobilenetv4_conv_small_050"])
def test_families_with_twins(name: str) -> None:
    """Hard-swishes, squeeze-excites and kernels of five: what cannot have twins has none."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.1)
    options: dict[str, Any] = {"mixed": "auto", "budget": 1.2, "reconstruct": True}
    graph = quantize(model, IMAGES[:12], **options, **PIXELS).graph
    logits = load(graph)(FRESH[:4])
    assert np.array_equal(logits, reference.run(graph, FRESH[:4]))
    assert sqnr(logits_of(model, FRESH[:4]), logits) > 15


def test_other_runtimes_have_no_fine_maps(inverted: nn.Module) -> None:
    options: dict[str, Any] = {"mixed": "auto", "budget": 1.5, "portable": True}
    graph = quantize(inverted, IMAGES, **options, **PIXELS).graph
    assert not any(getattr(node, "fine", False) for node in graph.nodes)
    assert "fine" not in file.dump(graph).decode("latin-1")


def test_a_budget_for_nothing(inverted: nn.Module, plain: QuantizedModel) -> None:
    graph = quantize(inverted, IMAGES, mixed="auto", budget=1.0, **PIXELS).graph
    assert file.dump(graph) == file.dump(plain.graph)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixed": "all"}, "quantize: mixed: expected 'auto' or None, got 'all'"),
        ({"budget": 0.9}, "quantize: budget: expected 1 or more, got 0.9"),
        ({"budget": float("nan")}, "quantize: budget: expected 1 or more, got nan"),
        ({"budget": float("inf")}, "quantize: budget: expected 1 or more, got inf"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(Block().eval(), IMAGES, **options, **PIXELS)


# shares


def test_shares_are_those_of_one_layer_at_a_time(inverted: nn.Module) -> None:
    """Each map rounded alone, and the logits' squared error measured."""
    nodes = lower(inverted, 32)
    x = normalised(np.concatenate([IMAGES, FRESH]))
    maps: dict[int, torch.Tensor] = {-1: x}

    def run(first: int, changed: dict[int, torch.Tensor]) -> torch.Tensor:
        found = {**maps, **changed}
        for index in range(first, len(nodes)):
            if index not in changed:
                inputs = [found[source] for source in nodes[index].inputs]
                found[index] = activated(
                    pre_activation(nodes[index], inputs), nodes[index].activation
                )
        maps.update(found if not changed else {})
        return found[len(nodes) - 1].flatten(1)

    with torch.no_grad():
        expected, scales, exact = run(0, {}), {}, {}
        for index in range(0, len(nodes) - 1, 3):
            histogram = Histogram()
            histogram.add(maps[index])
            scales[index] = histogram.range("mse")
            got = run(index + 1, {index: scales[index].rounded(maps[index])})
            exact[index] = float((got - expected).double().square().sum())
    found = costs(nodes, [*x.split(12)], scales, {})
    # of 48 images and random signs for each: a deviation of some 20%
    for index, value in exact.items():
        assert 0.5 < float(found.maps[index].sum()) / value < 2, index


def test_shares_in_the_report(inverted: nn.Module) -> None:
    report = quantize(inverted, IMAGES, **PIXELS).report()
    shares = [layer.map_share + layer.weight_share for layer in report.layers]
    assert sum(shares) + report.classifier_share == pytest.approx(1)
    assert all(share >= 0 for share in shares)
    assert "of the loss" in str(report).splitlines()[0]
    assert f"{report.layers[3].map_share:6.1%}" in str(report).splitlines()[4]
