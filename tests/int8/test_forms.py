"""The forms in which a model may write the same: activations, batch norms, normalisation, outputs.

Each lowers to the nodes of its plain form, or is refused in one sentence.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

from timm.layers import SqueezeExcite, freeze_batch_norm_2d  # noqa: E402
from torchvision.transforms import functional as transforms  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from support.int8_models import Call, check, conv, create, head, network  # noqa: E402
from vitkd_fast import models  # noqa: E402
from vitkd_fast.int8.float_graph import FloatNode  # noqa: E402
from vitkd_fast.int8.lower import UnsupportedError, lower  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

# forms in which the same is written


def same(nodes: tuple[FloatNode, ...], expected: tuple[FloatNode, ...]) -> bool:
    """Bit by bit, but for the names."""
    for node, other in zip(nodes, expected, strict=True):
        for key, value in vars(node).items():
            wanted = getattr(other, key)
            if isinstance(value, Tensor):
                if not torch.equal(value, wanted):
                    return False
            elif key != "name" and value != wanted:
                return False
    return True


def reduced(x: Tensor) -> Tensor:
    y = (x + 3).clamp_(0, 6).div_(6)
    return y.mul_(x)


@pytest.mark.parametrize(
    ("module", "forms"),
    [
        (
            nn.ReLU6(),
            [
                lambda x: x.clamp(0, 6),
                lambda x: x.clamp_(0, 6),
                lambda x: torch.clip(x, min=0.0, max=6.0),
                lambda x: F.relu(x).clamp_max(6),
                lambda x: x.clamp(max=6).clamp(min=0),
                lambda x: x.clamp_max_(6).relu_(),
                nn.Hardtanh(0, 6),
            ],
        ),
        (nn.ReLU(), [lambda x: x.clamp(min=0), lambda x: x.clamp_min_(0)]),
        (
            nn.Hardswish(),
            [
                lambda x: x * F.relu6(x + 3) / 6,
                lambda x: x * F.relu6(x + 3, inplace=True) / 6.0,
                lambda x: x * (F.relu6(x + 3) / 6),
                lambda x: F.relu6(3 + x) / 6 * x,
                lambda x: x * F.hardtanh(x + 3, 0, 6) * (1 / 6),
                lambda x: 0.16667 * (x * torch.clamp(x + 3, 0, 6)),
                lambda x: x * F.hardsigmoid(x),
                lambda x: x * nn.Hardsigmoid()(x).contiguous(),
                reduced,
            ],
        ),
    ],
    ids=["relu6", "relu", "hardswish"],
)
def test_hand_written_activations(module: nn.Module, forms: list[Any]) -> None:
    model = network(conv(padding=1), nn.BatchNorm2d(8), module)
    expected = lower(model, 16)
    for form in forms:
        model[3] = form if isinstance(form, nn.Module) else Call(form)
        assert same(lower(model, 16), expected)


@pytest.mark.parametrize(
    "gate",
    [
        lambda x: F.relu6(x + 3) / 6,
        lambda x: F.relu6(x + 3, inplace=True).mul_(1 / 6),
        lambda x: (x + 3).clamp(min=0, max=6) / 6.0,
    ],
)
def test_a_hand_written_gate(gate: Callable[[Tensor], Tensor]) -> None:
    model = network(nn.ReLU(), SqueezeExcite(8, rd_channels=4, gate_layer=nn.Hardsigmoid))
    expected = lower(model, 16)
    assert [node.op for node in expected] == ["conv", "squeeze_excite", "pool", "conv"]
    model[2].gate = Call(gate)
    nodes = lower(model, 16)
    assert same(nodes, expected)
    check(model, nodes, 16, 21)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d], ids=["batch norm", "frozen"]
)
@pytest.mark.parametrize("act", [nn.ReLU, nn.Hardswish])
def test_batch_norms_in_a_squeeze_excite(
    norm: Callable[[int], nn.Module], act: Callable[[], nn.Module]
) -> None:
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), norm(4), act(),
                         nn.Conv2d(4, 8, 1, bias=False), norm(8), nn.Hardsigmoid())  # fmt: skip
    model = network(nn.ReLU(), Call(lambda x, gate: x * gate(x), gate))
    for name, value in model.named_buffers():
        if value.dtype == torch.float32:
            value.copy_(torch.rand_like(value) + (0.5 if "var" in name else 0))
    nodes = lower(model, 16)
    assert [node.op for node in nodes] == ["conv", "squeeze_excite", "pool", "conv"]
    check(model, nodes, 16, 21)


@pytest.mark.parametrize("name", ["mobilenetv2_035", "mobilenetv3_small_050"])
def test_frozen_batch_norms_of_timm(name: str) -> None:
    model = create(name)
    expected = lower(model, 32)
    frozen = freeze_batch_norm_2d(model).eval()
    assert not any(isinstance(x, nn.BatchNorm2d) for x in frozen.modules())
    nodes = lower(frozen, 32)
    assert [(x.op, x.activation) for x in nodes] == [(x.op, x.activation) for x in expected]
    check(frozen, nodes, 32, 45)


def test_frozen_batch_norms_of_torchvision() -> None:
    norm = torchvision.ops.FrozenBatchNorm2d
    model = torchvision.models.mobilenet_v2(width_mult=0.35, norm_layer=norm).eval()
    for name, value in model.named_buffers():
        value.copy_(torch.rand_like(value) + (0.5 if "var" in name or "weight" in name else -0.5))
    check(model, lower(model, 32), 32, 45)


def test_constants_are_folded_in_the_convolution_before() -> None:
    eight = torch.rand(8, 1, 1) + 0.5
    for form in (
        lambda x: 2 * x - 1,
        lambda x: 3 - x,
        lambda x: torch.sub(x, 2, alpha=0.5) / 0.3,
        lambda x: torch.rsub(x, 1, alpha=2),
        lambda x: eight - x.mul_(eight),
        lambda x: torch.add(eight[None], x, alpha=3),
        lambda x: torch.addcmul(eight, x, eight, value=0.5),
        lambda x: torch.addcmul(eight, eight, x),
    ):
        model = network(conv(), Call(form), nn.ReLU()).append(Call(lambda x: x / 0.07))
        nodes = lower(model, 16)
        assert [node.op for node in nodes] == ["conv", "conv", "pool", "conv"]
        check(model, nodes, 16, 21)


def write_through_view_of_a_gate(x: Tensor) -> Tensor:
    view = x.reshape(x.shape)
    y = x.clamp_(0, 6)
    return y + view


def test_a_view_of_what_is_clamped_in_place() -> None:
    with pytest.raises(UnsupportedError, match="the map before it is read by another operation"):
        lower(network(conv(), Call(write_through_view_of_a_gate)), 16)


# a model that normalises its input itself

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Buffers(nn.Module):
    """As many hand-written models and kornia-like layers do it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


NORMALISERS: dict[str, nn.Module] = {
    "ours": models.Normalize(MEAN, STD),
    "torchvision": torchvision.transforms.Normalize(MEAN, STD),
    "torchvision v2": v2.Normalize(MEAN, STD),
    "torchvision's function": Call(lambda x: transforms.normalize(x, MEAN, STD)),
    "buffers": Buffers(),
    "numbers": Call(lambda x: x.float() / 127.5 - 1),
    "in steps": nn.Sequential(Call(lambda x: x / 255), Buffers()),
}


@pytest.mark.parametrize("name", NORMALISERS)
def test_a_model_that_normalises(name: str) -> None:
    kept = transforms.normalize
    model = nn.Sequential(NORMALISERS[name], network(conv(padding=1))).eval()
    nodes = lower(model, 16)
    assert [node.op for node in nodes] == ["normalize", "conv", "conv", "pool", "conv"]
    assert nodes[0].inputs == (-1,) and nodes[1].inputs == (0,)
    check(model, nodes, 16, 21)
    assert transforms.normalize is kept


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, stem: stem(F.pad(x, (1, 1)) * 2), "aten.mul.Tensor: expected before the padd"),
        (
            lambda x, stem: stem(x * 2) + stem(x),
            "expected the image to be read .*, got both",
        ),
        (
            lambda x, stem: stem(x * 2) + stem(x * 3),
            "expected the image to be read .*, got both",
        ),
        (lambda x, stem: stem(F.relu(x * 2)), "aten.relu.default: only a convolution reads"),
    ],
)
def test_normalisations_that_are_refused(function: Callable[..., Tensor], message: str) -> None:
    stem = nn.Conv2d(3, 8, 3)
    model = nn.Sequential(Call(function, stem), nn.AdaptiveAvgPool2d(1), *head()).eval()
    with pytest.raises(UnsupportedError, match=message):
        lower(model, 16)


# what a model is and returns


@pytest.mark.parametrize(
    "function",
    [
        lambda x, layer: (layer(x), F.gelu(x)),
        lambda x, layer: [layer(x)],
        lambda x, layer: {"loss": F.gelu(x).sum(), "logits": layer(x)},
    ],
)
def test_logits_among_other_outputs(function: Callable[..., Any]) -> None:
    model = network()
    nodes = lower(Call(function, model).eval(), 16)
    assert len(nodes) == 3
    check(model, nodes, 16)


def autocast(x: Tensor, layer: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


def with_gradients(x: Tensor, layer: nn.Module) -> Tensor:
    with torch.enable_grad():
        return layer(x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (autocast, r"the model \(.*Call\): wrap_with_autocast: torch.autocast inside forward; "),
        (with_gradients, r"the model \(.*Call\): wrap_with_set.*: a change of gradient mode insi"),
        (lambda x, layer: {"a": layer(x)}, "the model: expected logits as a .*, got dict of a"),
        (lambda x, layer: ((layer(x),),), "the model: expected logits as a tensor .*, got tuple"),
        (lambda x, layer: (), "the model: expected .*, got tuple"),
        (lambda x, layer: None, "the model: expected .*, got NoneType"),
        (lambda x, layer: layer(x).numpy(), "Call: expected logits as a tensor .*, got ndarray"),
        (lambda x, layer: layer(x).tolist(), "the model: expected logits .*, got list"),
        (lambda x, layer: layer(x[:, :1]), r"Call on images \[2, 3, 16, 16\] fails: Given groups"),
        (lambda x, layer: layer(x) if x.sum() > 0 else x, "torch.export of Call .* MobileNets"),
    ],
)
def test_forwards_that_are_refused(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        lower(Call(function, network()).eval(), 16)
    assert len(str(caught.value).splitlines()) == 1 and "submod" not in str(caught.value)


def test_exported_and_compiled_models() -> None:
    model = network()
    program = torch.export.export(model, (torch.zeros(2, 3, 16, 16),))
    for given, kind in ((program, "a ExportedProgram"), (program.module(), "of torch.export")):
        with pytest.raises(ValueError, match=f"model: expected the .*Module .*, got .*{kind}"):
            lower(given, 16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0.weight: expected loaded weights, got the meta"):
        lower(network().to("meta"), 16)
    with pytest.raises(ValueError, match=r"model: expected the torch.nn.Module .*, got a str"):
        lower("mobilenetv2_100", 16)  # type: ignore[arg-type]
    nodes = lower(torch.compile(model, backend="eager"), 16)  # type: ignore[arg-type]
    assert same(nodes, lower(model, 16)) and nodes[0].name == "0"
    assert same(lower(torch.fx.symbolic_trace(model), 16), nodes)


def test_a_batch_norm_left_in_training() -> None:
    model = network(conv(), nn.BatchNorm2d(8))
    model[2].train()
    with pytest.raises(UnsupportedError, match=r"2 \(.*BatchNorm2d\): .*; call model.eval"):
        lower(model, 16)


def test_biases_change_no_structure() -> None:
    """A fresh MobileNetV3's squeeze-excites have biases of 0, a trained one's have not."""
    model = timm.create_model("mobilenetv3_small_050").eval()
    structures = []
    for value in (0.0, 0.3):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.fill_(value)
        nodes = lower(model, 32)
        structures.append([(x.op, x.name, x.inputs, x.activation, x.hidden) for x in nodes])
    assert structures[0] == structures[1]
    assert [x[0] for x in structures[0]].count("squeeze_excite") == 9
