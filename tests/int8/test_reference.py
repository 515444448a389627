"""The reference against fractions rounded by hand, and the simulation against the reference."""

from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from support.int8_graphs import random_graph, random_images
from vitkd_fast.int8 import reference, simulate
from vitkd_fast.int8.graph import (
    Add,
    Array,
    Classifier,
    Conv,
    Depthwise,
    Pool,
    SqueezeExcite,
    padding_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def single(x: Fraction | float) -> Fraction:
    """The nearest float32, ties to even, by integers alone."""
    x = Fraction(x)
    if x == 0:
        return x
    exponent = abs(x).numerator.bit_length() - abs(x).denominator.bit_length()
    if abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    return round(x / unit) * unit


def to_byte(v: Fraction, node: Any) -> int:
    rounded = round(min(max(v, Fraction(-32768)), Fraction(32767)))  # ties to even
    return min(max(rounded + node.zero_point, node.lo), node.hi)


def bytes_of(*values: int) -> Array:
    """One image of one row, one channel."""
    return np.array(values, np.uint8)[None, None, :, None]


def pad(value: int = 0) -> Array:
    return np.array([value], np.uint8)


def scaling(multiplier: float, bias: int = 0, **fields: Any) -> Conv:
    """y = requantise((x + bias) * multiplier)."""
    return Conv(
        name="conv",
        inputs=(0,) if "residual_multiplier" not in fields else (0, 1),
        weight=np.ones((1, 1, 1, 1), np.int8),
        bias=np.array([bias], np.int32),
        multiplier=np.array([multiplier], np.float32),
        **fields,
    )


def test_ties_go_to_even_and_the_zero_point_is_added_after() -> None:
    x = bytes_of(*range(12))
    # -2.5, -2, -1.5, ..., 3
    y = reference.compute(scaling(0.5, -5, zero_point=100), [(x, pad())])
    assert (y.ravel() - 100.0).tolist() == [-2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2, 3]
    # rne(0.5) + 1 is 1, rne(1.5) is 2
    assert reference.compute(scaling(0.5, 0, zero_point=1), [(bytes_of(1), pad())]).item() == 1


def test_saturation_and_lo_and_hi() -> None:
    x = bytes_of(0, 100, 255)
    huge = scaling(1e6, -100, zero_point=7)
    assert reference.compute(huge, [(x, pad())]).ravel().tolist() == [0, 7, 255]
    narrow = scaling(1.0, -100, zero_point=100, lo=20, hi=180)
    assert reference.compute(narrow, [(x, pad())]).ravel().tolist() == [20, 100, 180]
    # int16 first: -32768 + 255 is under 0, 32767 over 255
    high = scaling(1e6, -100, zero_point=255)
    assert reference.compute(high, [(x, pad())]).ravel().tolist() == [0, 255, 255]


def test_the_sum_is_rounded_to_float32_first() -> None:
    # 2^24 + 1 becomes 2^24, so that v is a tie: 0.5, to 0
    assert reference.compute(scaling(2.0**-25, 2**24), [(bytes_of(1), pad())]).item() == 0
    assert reference.compute(scaling(2.0**-25, 2**24), [(bytes_of(2), pad())]).item() == 1


@pytest.mark.parametrize("seed", range(3))
def test_each_step_of_hard_swish_rounds_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = bytes_of(*range(256))
    m, k = (float(np.float32(v)) for v in (rng.uniform(0.01, 0.06), rng.uniform(5, 10)))
    node = scaling(m, -128, hardswish_scale=k, zero_point=20)
    expected = []
    for q in range(256):
        t = single(Fraction(q - 128) * Fraction(m))
        u = min(max(single(t + 3), Fraction(0)), Fraction(6))
        expected.append(to_byte(single(single(t * u) * Fraction(k)), node))
    assert reference.compute(node, [(x, pad())]).ravel().tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_each_step_of_a_residual_and_an_addition_rounds_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(0, 256, 500) for _ in range(2))
    m_a, m_b = (float(np.float32(v)) for v in rng.uniform(0.1, 0.9, 2))
    inputs = [(bytes_of(*a), pad(100)), (bytes_of(*b), pad(30))]
    conv = scaling(m_a, -100, residual_multiplier=m_b, zero_point=90)
    plain = Add(name="add", inputs=(0, 1), multipliers=(m_a, m_b), zero_point=90)
    expected = [
        to_byte(single(single((p - 100) * Fraction(m_a)) + single((q - 30) * Fraction(m_b))), plain)
        for p, q in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert reference.compute(conv, inputs).ravel().tolist() == expected
    assert reference.compute(plain, inputs).ravel().tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_each_step_of_a_fine_map_rounds_once(seed: int) -> None:
    """With a residual that is fine: both halves of it are added, and what is lost is kept."""
    rng = np.random.default_rng(seed)
    a, b, eighths = (rng.integers(0, 256, 500) for _ in range(3))
    m_a, m_b = (float(np.float32(v)) for v in rng.uniform(0.1, 1.2, 2))
    conv = scaling(m_a, -100, residual_multiplier=m_b, zero_point=90, fine=True)
    residual = np.concatenate([bytes_of(*b), bytes_of(*eighths)], 3)
    y = reference.compute(conv, [(bytes_of(*a), pad(100)), (residual, pad(30))])
    assert y.shape[3] == 2
    values = (x.tolist() for x in (a, b, eighths, y[0, 0, :, 0], y[0, 0, :, 1]))
    for p, q, part, first, second in zip(*values, strict=True):
        v = single(single((p - 100) * Fraction(m_a)) + single((q - 30) * Fraction(m_b)))
        v = single(v + single((part - 30) * Fraction(m_b / 8)))
        assert first == to_byte(v, conv)
        assert second == to_byte(single(single(v - (first - 90)) * 8), conv)


def test_order_of_a_residual() -> None:
    """Had the two products been summed unrounded, the tie would go the other way."""
    m_a, m_b = float(np.float32(0.1)), float(np.float32(0.3))
    telling = (
        (p, q)
        for p in range(256)
        for q in range(256)
        if round(single(single(p * Fraction(m_a)) + single(q * Fraction(m_b))))
        != round(p * Fraction(m_a) + q * Fraction(m_b))
    )
    pairs = list(islice(telling, 5))
    assert len(pairs) == 5
    for p, q in pairs:
        conv = scaling(m_a, residual_multiplier=m_b)
        y = reference.compute(conv, [(bytes_of(p), pad()), (bytes_of(q), pad())])
        assert y.item() == round(single(single(p * Fraction(m_a)) + single(q * Fraction(m_b))))


@pytest.mark.parametrize("hardswish", [False, True])
def test_pool_and_squeeze_excite_by_hand(hardswish: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (1, 3, 3, 5), dtype=np.uint8)
    z = 11
    totals = [int(x[..., c].sum()) - 9 * z for c in range(5)]

    pool = Pool(name="pool", inputs=(0,), ratio=1.3, zero_point=5)
    m = single(1.3 / 9)
    expected = [to_byte(single(total * m), pool) for total in totals]
    assert reference.compute(pool, [(x, pad(z))]).ravel().tolist() == expected

    q1, s1 = SqueezeExcite.rounded(rng.normal(0, 1, (5, 3)))
    q2, s2 = SqueezeExcite.rounded(rng.normal(0, 1, (3, 5)))
    b1, b2 = (rng.normal(0, 1, size).astype(np.float32) for size in (3, 5))
    gate = SqueezeExcite(
        name="se", inputs=(0,), q1=q1, s1=s1, b1=b1, q2=q2, s2=s2, b2=b2, scale=0.013, ratio=1.25,
        zero_point=9, hidden_hardswish=hardswish,
    )  # fmt: skip

    def linear(values: list[Fraction], q: Array, s: Array, bias: Array) -> list[Fraction]:
        result = []
        for j in range(len(bias)):
            h = Fraction(float(bias[j]))
            for c, value in enumerate(values):
                weight = single(int(q[c, j]) * Fraction(float(s[j])))
                h = single(h + single(weight * value))
            result.append(h)
        return result

    means = [single(total * single(0.013 / 9)) for total in totals]

    def relu6(h: Fraction) -> Fraction:
        return min(max(h, Fraction(0)), Fraction(6))

    hidden = linear(means, q1, s1, b1)
    if hardswish:
        hidden = [single(single(h * relu6(single(h + 3))) * single(1 / 6)) for h in hidden]
    else:
        hidden = [max(h, Fraction(0)) for h in hidden]
    factors = []
    for h in linear(hidden, q2, s2, b2):
        u = relu6(single(h + 3))
        factors.append(single(single(u * single(1 / 6)) * Fraction(1.25)))
    wanted = [to_byte(single((int(q) - z) * factors[c % 5]), gate) for c, q in enumerate(x.ravel())]
    assert reference.compute(gate, [(x, pad(z))]).ravel().tolist() == wanted


@pytest.mark.parametrize("padding", ["same", (1, 0, 2, 1), (0, 0, 0, 0)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1)])
def test_convolutions_by_loops(padding: Any, stride: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    zeros = np.array([7, 8, 9], np.uint8)
    weight = rng.integers(-127, 128, (2, 3, 2, 3)).astype(np.int8)
    bias = np.array([1000, -1000], np.int32)
    window: Any = {"stride": stride, "padding": padding}
    sums: Any = {"bias": bias, "multiplier": np.array([0.001, 0.002], np.float32)}
    conv = Conv(name="", inputs=(0,), weight=weight, zero_point=128, **sums, **window)
    (top, bottom), (left, right) = (
        padding_of(x.shape[1 + a], weight.shape[1 + a], stride[a], padding, a) for a in (0, 1)
    )
    big = np.empty((2, 5 + top + bottom, 6 + left + right, 3), np.int64)
    big[:] = zeros
    big[:, top : top + 5, left : left + 6] = x
    rows = range(0, big.shape[1] - 2, stride[0])
    columns = range(0, big.shape[2] - 1, stride[1])
    windows = np.stack(
        [np.stack([big[:, r : r + 3, c : c + 2] for c in columns], 1) for r in rows], 1
    )
    acc = np.einsum("nrcijk,oijk->nrco", windows, weight.astype(np.int64)) + bias
    assert np.array_equal(reference.sums(conv, x, zeros), acc)
    v = acc.astype(np.float32) * conv.multiplier
    assert np.array_equal(
        reference.compute(conv, [(x, zeros)]), np.clip(np.rint(v) + 128, 0, 255).astype(np.uint8)
    )
    taps = weight[0].transpose(0, 1, 2)
    three: Any = {"bias": np.array([1, 2, 3], np.int32), "multiplier": np.ones(3, np.float32)}
    depthwise = Depthwise(name="", inputs=(0,), weight=taps, **three, **window)
    acc = np.einsum("nrcijk,ijk->nrck", windows, taps.astype(np.int64)) + three["bias"]
    assert np.array_equal(reference.sums(depthwise, x, zeros), acc)


def test_logits() -> None:
    x = np.array([[[[3, 200]]]], np.uint8)
    node = Classifier(
        name="",
        inputs=(0,),
        weight=np.array([[1, 2], [-3, 4]], np.int8),
        bias=np.array([5, 2**24], np.int32),
        multiplier=np.array([0.1, 0.3], np.float32),
    )
    logits = reference.compute(node, [(x, pad(9))])
    expected = [float(single(single(acc) * Fraction(float(np.float32(m))))) for acc, m in
                ((5 + 3 + 400, 0.1), (2**24 - 9 + 800, 0.3))]  # fmt: skip
    assert logits.dtype == np.float32 and logits.tolist() == [expected]


def test_observed_outputs_and_other_sizes() -> None:
    graph = random_graph(3)
    size = graph.image_size
    images = random_images(0, (3, size, size, 3))
    outputs = reference.outputs(graph, images)
    assert len(outputs) == len(graph.nodes)
    logits = reference.run(graph, images)
    assert np.array_equal(outputs[-1], logits) and logits.dtype == np.float32
    assert np.array_equal(reference.run(graph, images[1:2]), logits[1:2])
    assert all(output.dtype == np.uint8 for output in outputs[:-1])
    assert reference.run(graph, random_images(1, (2, size + 5, size + 2, 3))).shape == (
        2,
        logits.shape[1],
    )
    assert reference.run(graph, images[:0]).shape == (0, logits.shape[1])


@pytest.mark.parametrize(
    "images",
    [np.zeros((1, 3, 8, 8), np.uint8), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3))],
)
def test_refused_images(images: Array) -> None:
    with pytest.raises(ValueError, match=r"run: images: expected uint8 \[N, H, W, 3\], got"):
        reference.run(random_graph(0), images)


@pytest.mark.parametrize("seed", range(6))
def test_the_simulation_gives_the_same_bytes(seed: int) -> None:
    graph = random_graph(seed)
    images = random_images(seed + 50, (2, graph.image_size, graph.image_size, 3))
    outputs = reference.outputs(graph, images)
    maps = {-1: images} | dict(enumerate(outputs))
    for index, node in enumerate(graph.nodes):
        inputs = [
            (
                torch.from_numpy(maps[source]).permute(0, 3, 1, 2),
                torch.from_numpy(reference.padding_bytes(graph, source)).float().view(-1, 1, 1),
            )
            for source in node.inputs
        ]
        simulated = simulate.compute(node, inputs).permute(0, 2, 3, 1).numpy()
        if isinstance(node, Classifier):
            np.testing.assert_allclose(simulated[:, 0, 0], outputs[index], rtol=1e-5, atol=1e-5)
            continue
        difference = np.abs(simulated.astype(int) - outputs[index])
        # a squeeze-excite is summed in another order
        assert difference.max() <= isinstance(node, SqueezeExcite), node
        assert (difference > 0).mean() < 0.001
