"""What a graph must be to become a file, or to be read from one: a FileError for each rule."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from support.file_tools import assert_same, changed, f32, pack, small_graph, unpack
from vitkd_fast.int8.file import FileError, dump, read
from vitkd_fast.int8.graph import (
    Depthwise,
    Graph,
    Node,
    Pool,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class OtherPool(Pool):
    """Whoever reads the file would make a Pool of it."""


SUMS: dict[str, Any] = {"bias": np.array([0, 0], np.int32), "multiplier": f32(1, 1)}
FIELDS: dict[str, tuple[Callable[[], Graph], str]] = {
    "image_size": (lambda: replace(small_graph(), image_size=0), "image_size: .*1 to 8192, got 0"),
    "image_size bool": (
        lambda: replace(small_graph(), image_size=True),
        "image_size: expected an integer, got true",
    ),
    "image_size large": (
        lambda: replace(small_graph(), image_size=8193),
        "expected 1 to 8192, got 8193",
    ),
    "padding_bytes": (
        lambda: replace(small_graph(), padding_bytes=(0, 0, 256)),
        "expected 0 to 255, got 256",
    ),
    "padding_bytes two": (lambda: replace(small_graph(), padding_bytes=(0, 0)), "a list of 3"),
    "mean": (
        lambda: replace(small_graph(), mean=(0.5, 0.5, float("nan"))),
        "mean: expected a finite float, got nan",
    ),
    "mean int": (
        lambda: replace(small_graph(), mean=(0, 0.5, 0.5)),
        "mean: expected a finite float, got 0",
    ),
    "std": (lambda: replace(small_graph(), std=(1.0, 1.0, 0.0)), r"std: .*, got \(1.0, 1.0, 0.0\)"),
    "mean in 0..255": (
        lambda: replace(small_graph(), mean=(127.5, 127.5, 127.5)),
        "mean: .*divide by 255 what is for",
    ),
    "mean negative": (lambda: replace(small_graph(), mean=(-0.5, 0.5, 0.5)), r"mean: .*\[0, 1\]"),
    "std in 0..255": (
        lambda: replace(small_graph(), std=(58.4, 57.1, 57.4)),
        "std: .*divide by 255 what is for",
    ),
    "crop_pct in percent": (
        lambda: replace(small_graph(), crop_pct=87.5),
        "crop_pct: expected 0.1 to 2, got 87.5; divide a percentage by 100",
    ),
    "crop_pct tiny": (lambda: replace(small_graph(), crop_pct=1e-9), "crop_pct: .*, got 1e-09"),
    "crop_pct": (lambda: replace(small_graph(), crop_pct=-1.0), "crop_pct: .*, got -1.0"),
    "interpolation": (
        lambda: replace(small_graph(), interpolation="cubic"),
        "interpolation: expected nearest",
    ),
    "classes": (
        lambda: replace(small_graph(), classes=("a",)),
        "classes: expected one for each of 2 logits, got 1",
    ),
    "class": (lambda: replace(small_graph(), classes=("a", 1)), "classes: expected text .* got 1"),
    "long class": (lambda: replace(small_graph(), classes=("a", "b" * 2000)), "1024 characters"),
    "temperature": (
        lambda: replace(small_graph(), temperature=0.0),
        "temperature: expected 0.01 to 100, got 0.0",
    ),
    "temperature large": (
        lambda: replace(small_graph(), temperature=101.0),
        "temperature: expected 0.01 to 100, got 101.0",
    ),
    "temperature int": (
        lambda: replace(small_graph(), temperature=2),
        "temperature: expected a finite float, got 2",
    ),
    "no nodes": (lambda: replace(small_graph(), nodes=()), "nodes: expected 1 to 4096, got 0"),
    "no classifier": (
        lambda: replace(small_graph(), nodes=small_graph().nodes[:-1]),
        r"node 6 \(head\): op: expected classifier for the last node, and no other, got conv",
    ),
    "a plain node": (
        lambda: replace(small_graph(), nodes=(Node(name="x", inputs=(-1,)),)),
        r"node 0 \(x\): op: expected conv, .*, got None",
    ),
    "name": (lambda: changed(0, name=None), "node 0: name: expected text .*, got null"),
    "inputs": (lambda: changed(3, inputs=(2,)), r"node 3 \(project\): inputs: expected 2, got 1"),
    "later input": (lambda: changed(1, inputs=(1,)), r"inputs: .*earlier nodes, got 1"),
    "not contiguous": (
        lambda: changed(7, weight=np.ones((2, 2), np.int8).T[::-1]),
        "weight: expected a contiguous, aligned array",
    ),
    "a class of another's": (
        lambda: replace(small_graph(), nodes=(
            *small_graph().nodes[:5], OtherPool(name="pool", inputs=(4,), ratio=1.1),
            *small_graph().nodes[6:])),
        r"node 5 \(pool\): type: expected Pool, got OtherPool",
    ),
    "image": (lambda: changed(5, inputs=(-1,)), r"inputs: .*earlier nodes, got -1"),
    "image as residual": (lambda: changed(3, inputs=(2, -1)), "inputs: .*earlier nodes, got -1"),
    "input bool": (lambda: changed(1, inputs=(False,)), "inputs: expected an integer, got false"),
    "zero_point": (lambda: changed(0, zero_point=256), "zero_point: expected 0 to 255, got 256"),
    "zero_point bool": (lambda: changed(0, zero_point=True), "zero_point: .* integer, got true"),
    "lo": (lambda: changed(0, lo=201, hi=200), "lo: expected 0 to 200, got 201"),
    "hi": (lambda: changed(0, hi=-1), "hi: expected 0 to 255, got -1"),
    "stride": (lambda: changed(0, stride=(1, 9)), "stride: expected 1 to 8, got 9"),
    "stride one": (lambda: changed(0, stride=(1,)), "stride: expected a list of 2, got"),
    "padding": (lambda: changed(1, padding=(0, 3, 0, 0)), "padding: expected 0 to 2, got 3"),
    "padding word": (
        lambda: changed(1, padding="valid"),
        'padding: expected "same" or a list of 4, got valid',
    ),
    "kernel": (
        lambda: changed(0, weight=np.ones((2, 32, 1, 3), np.int8)),
        "kernel size: expected 1 to 31, got 32",
    ),
    "kernel over map": (
        lambda: changed(0, weight=np.ones((2, 7, 7, 3), np.int8), padding=(1, 1, 1, 1)),
        "kernel size: expected up to the padded input's size, 6, got 7",
    ),
    "weight dtype": (
        lambda: changed(0, weight=np.ones((2, 3, 3, 3), np.uint8)),
        "weight: expected int8, got uint8",
    ),
    "weight rank": (
        lambda: changed(0, weight=np.ones((2, 3, 3), np.int8)),
        r"weight: expected \[any, any, any, 3\], got \[2, 3, 3\]",
    ),
    "weight channels": (
        lambda: changed(0, weight=np.ones((2, 3, 3, 4), np.int8)),
        r"expected \[any, any, any, 3\], got \[2, 3, 3, 4\]",
    ),
    "no channels": (
        lambda: changed(0, weight=np.ones((0, 3, 3, 3), np.int8)),
        "output channels: expected 1 to 65536, got 0",
    ),
    "many channels": (
        lambda: changed(0, weight=np.ones((65537, 1, 1, 3), np.int8)),
        "output channels: expected 1 to 65536, got 65537",
    ),
    "no array": (lambda: changed(0, weight=None), "weight: .* int8, got NoneType"),
    "-128": (
        lambda: changed(7, weight=np.full((2, 2), -128, np.int8)),
        r"node 7 \(fc\): weight: expected -127 to 127, got -128 in channel 0",
    ),
    "bias length": (lambda: changed(0, bias=np.zeros(3, np.int32)), r"bias: .*\[2\], got \[3\]"),
    "bias dtype": (lambda: changed(0, bias=np.zeros(2, np.int64)), "bias: .*int32, got int64"),
    "bias large": (
        lambda: changed(7, bias=np.array([0, -(2**31)], np.int32)),
        r"bias: expected \|bias\| \+ 255 sum\|weight\| under 2\^31, got .* in channel 1",
    ),
    "multiplier dtype": (
        lambda: changed(0, multiplier=np.ones(2)),
        "multiplier: expected float32, got float64",
    ),
    "multiplier large": (
        lambda: changed(7, multiplier=f32(1, 2**20)),
        "multiplier: expected .* under 2\\^30, got .* in channel 1",
    ),
    **{
        f"multiplier {v}": (lambda v=v: changed(0, multiplier=f32(1, v)), "normal, .* in channel 1")
        for v in (0, -1, 1e-40, float("nan"), float("inf"))
    },
    "hardswish_scale": (
        lambda: changed(6, hardswish_scale=0.0),
        "hardswish_scale: expected a positive .* got 0",
    ),
    "hardswish_scale double": (
        lambda: changed(6, hardswish_scale=0.1),
        "hardswish_scale: expected a float32, got 0.1",
    ),
    "hardswish and residual": (
        lambda: changed(3, hardswish_scale=1.0),
        "residual_multiplier: expected no hardswish_scale beside it, got both",
    ),
    "residual_multiplier": (
        lambda: changed(3, residual_multiplier=2.0**20),
        "under 2\\^20, got 1048576",
    ),
    "fine": (lambda: changed(3, fine=1), "fine: expected true or false, got 1"),
    "fine and hardswish": (
        lambda: changed(6, fine=True), "fine: expected no hardswish_scale beside it, got both",
    ),
    "fine's readers": (
        lambda: changed(0, fine=True), r"weight: expected \[.*4\], got \[.*2\]",
    ),
    "residual's shape": (
        lambda: changed(3, weight=np.ones((1, 1, 1, 2), np.int8), bias=SUMS["bias"][:1],
                        multiplier=SUMS["multiplier"][:1]),
        r"inputs: expected two of one shape, got \[4, 4, 2\] and \[4, 4, 1\]",
    ),
    "add's shape": (lambda: changed(1, stride=(2, 2)), "inputs: expected two of one shape"),
    "multipliers": (
        lambda: changed(4, multipliers=(0.5, float("inf"))),
        "multipliers: expected .* got inf",
    ),
    "one multiplier": (lambda: changed(4, multipliers=(0.5,)), "multipliers: .*a list of 2, got"),
    "q1's shape": (
        lambda: changed(2, q1=np.ones((1, 2), np.int8)), r"q1: expected \[2, 1\], got \[1, 2\]",
    ),
    "hidden_hardswish": (
        lambda: changed(2, hidden_hardswish=1),
        "hidden_hardswish: expected true or false, got 1",
    ),
    "b1's rank": (lambda: changed(2, b1=f32(1)[None]), r"b1: expected \[any\], got \[1, 1\]"),
    "s2 not finite": (lambda: changed(2, s2=f32(np.nan, 1)), "s2: expected finite .* got nan"),
    "b2 large": (
        lambda: changed(2, b2=f32(1, 2**32)),
        "b2: expected finite numbers under 2\\^32, got 4.29",
    ),
    "squeeze-excite's sums": (
        lambda: changed(2, q1=np.full((2, 1), 127, np.int8), s1=f32(2**31), s2=f32(2**31, 1),
                        q2=np.full((1, 2), 127, np.int8), scale=2.0**19),
        r"sums under 2\^100",
    ),
    "scale": (lambda: changed(2, scale=-1.0), "scale: expected a positive .* got -1"),
    "ratio": (lambda: changed(2, ratio=0.0), "ratio: expected a positive .* got 0"),
    "ratio double": (lambda: changed(2, ratio=0.1), "ratio: expected a float32, got 0.1"),
    "pool's ratio": (lambda: changed(5, ratio=1), "ratio: expected a float, got 1"),
    "classifier's map": (lambda: changed(7, inputs=(4,)), r"input: .*1 pixel, got \[4, 4, 2\]"),
    "long rows": (
        lambda: replace(small_graph(), image_size=8192, nodes=(
            replace(small_graph().nodes[0], stride=(8, 1)),  # type: ignore[call-arg]
            *(Depthwise(name="dw", inputs=(i,), weight=np.ones((1, 1, 2), np.int8), **SUMS)
              for i in range(500)), *small_graph().nodes[5:])),
        r"node \d+ \(dw\): input: expected rows of up to 67108864 bytes in all, got 67\d{6}",
    ),
    "large pool": (
        lambda: replace(small_graph(), image_size=8192),
        "expected up to 2147483648 bytes|expected 1 to 4194304, got 67108864",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), FIELDS.values(), ids=FIELDS)
def test_rules(make: Callable[[], Graph], message: str) -> None:
    with pytest.raises(FileError, match=message) as error:
        dump(make())
    assert re.search(r": expected .+, got .|; accepted: ", str(error.value))


@pytest.mark.parametrize(("key", "value"), [("lo", 300), ("name", 3), ("stride", [0, 1])])
def test_rules_hold_for_files_too(key: str, value: Any) -> None:
    header, document, section = unpack(dump(small_graph()))
    document["nodes"][1][key] = value
    with pytest.raises(FileError, match=f"node 1.*: {key}: expected"):
        read(pack(header, document, section))


def test_sums_at_the_limit() -> None:
    """2^31 - 1 is accepted, 2^31 is not; 2^30 as a float neither."""
    weight = np.array([[127, -127], [0, 0]], np.int8)
    room = 2**31 - 1 - 255 * 254
    fit = changed(
        7, weight=weight, bias=np.array([-room, 2**30], np.int32), multiplier=f32(0.25, 0.5)
    )
    assert_same(read(dump(fit)), fit)
    for bias, multiplier in (([-room - 1, 0], (0.25, 1)), ([0, 2**30], (1, 1))):
        wrong = changed(
            7, weight=weight, bias=np.array(bias, np.int32), multiplier=f32(*multiplier)
        )
        with pytest.raises(FileError, match="in channel"):
            dump(wrong)
