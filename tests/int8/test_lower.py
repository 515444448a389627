"""The lowered float graph against the model that it came from, at other sizes than exported too."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

from support.int8_models import Call, check, conv, create, network, randomised  # noqa: E402
from vitkd_fast.int8.float_graph import forward  # noqa: E402
from vitkd_fast.int8.lower import UnsupportedError, lower  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

PATTERNS = "mobilenetv1* mobilenetv2* mobilenetv3* tf_mobilenetv3* mobilenetv4_conv*".split()
EVERY_DAY = """
mobilenetv1_100h mobilenetv2_050 mobilenetv3_small_050 tf_mobilenetv3_small_075
tf_mobilenetv3_large_minimal_100 mobilenetv4_conv_small_050 mobilenetv4_conv_aa_medium
mobilenetv4_conv_blur_medium torchvision/mobilenet_v3_small
""".split()
ALL = [name for pattern in PATTERNS for name in timm.list_models(pattern)]
ALL += [f"torchvision/mobilenet_{name}" for name in ("v2", "v3_large", "v3_small")]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.slow) for name in ALL],
)
def test_mobilenets(name: str) -> None:
    model = create(name)
    check(model, lower(model, 64), 64, 75, 128)


@pytest.mark.parametrize("name", ["mobilenetv2_100", "tf_mobilenetv3_large_100"])
def test_at_full_size(name: str) -> None:
    model = timm.create_model(name, num_classes=37)
    nodes = lower(randomised(model), 224)
    check(model, nodes, 224, 161)
    assert nodes[-1].weight.shape == (37, 1280, 1, 1)


def test_nodes_of_mobilenetv2() -> None:
    nodes = lower(create("mobilenetv2_100"), 64)
    assert [node.op for node in nodes].count("conv") == 53
    assert [node.op for node in nodes].count("add") == 10
    assert [node.op for node in nodes].count("pool") == 1
    stem, depthwise, project, *_, pool, classifier = nodes
    assert stem.name == "conv_stem" and stem.inputs == (-1,)
    assert (stem.stride, stem.padding, stem.activation) == ((2, 2), (1, 1, 1, 1), "relu6")
    assert (depthwise.groups, depthwise.weight.shape) == (32, (32, 1, 3, 3))
    assert project.activation is None
    assert (pool.op, classifier.name, classifier.activation) == ("pool", "classifier", None)
    assert all(node.weight.dtype == torch.float64 for node in nodes if node.op == "conv")
    assert len({node.name for node in nodes}) == len(nodes)
    assert all(source < index for index, node in enumerate(nodes) for source in node.inputs)


def test_nodes_of_a_same_model() -> None:
    nodes = lower(create("tf_mobilenetv3_small_075"), 64)
    assert nodes[0].padding == "same"
    assert [node.padding for node in nodes if node.stride == (2, 2)] == ["same"] * 5
    gates = [node for node in nodes if node.op == "squeeze_excite"]
    assert len(gates) == 9 and gates[0].name == "blocks.0.0.se"
    assert gates[0].w1.shape == (8, 16) and gates[0].w2.shape == (16, 8)
    assert [node.op for node in nodes].count("pool") == 1


class Plain(nn.Module):
    """Every operation that lowers, in torch's own functions and in forms that timm has not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=(2, 1))
        self.norm = nn.BatchNorm2d(8, eps=0.1, affine=False)
        self.even = nn.Conv2d(8, 8, 4, padding="same", groups=8)
        self.weight = nn.Parameter(torch.randn(12, 8, 1, 3) / 5)
        self.scale = nn.Parameter(torch.rand(12, 1, 1, 1) + 0.5)
        self.squeeze = nn.Linear(12, 4, bias=False)
        self.excite = nn.Linear(4, 12)
        self.head = nn.Conv2d(12, 10, 1)
        self.head_norm = nn.BatchNorm1d(10)
        self.fc = nn.Linear(10, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.norm(self.stem(F.pad(F.pad(x, (2, 1)), (0, 0, 1, 3)))), 0, 6)
        y = self.even(x)
        y += F.dropout(x, 0.5, self.training)
        y = F.relu_(y).contiguous()
        y = F.avg_pool2d(F.pad(y, (0, 1, 0, 0)), (3, 2), stride=2, padding=(1, 0))
        # the weights are computed from others; columns only
        y = F.conv2d(y, self.weight * self.scale, padding="valid")
        y = F.hardswish(y)
        gate = F.relu(self.squeeze(y.mean((-1, -2)))).clone()
        y = y * F.hardsigmoid(self.excite(gate)).view(x.shape[0], -1, 1, 1)
        y = F.relu6(y + y)
        y = F.adaptive_avg_pool2d(y, 1)
        y = self.head_norm(self.head(y).flatten(1)).to(torch.float32)
        return self.fc(F.hardswish(y.reshape(-1, 10)).detach())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_plain_torch_code() -> None:
    model = randomised(Plain())
    nodes = lower(model, 33)
    assert " ".join(node.op for node in nodes) == (
        "conv conv add conv conv squeeze_excite add pool conv conv"
    )
    assert nodes[0].padding == (1, 2, 3, 1) and nodes[1].padding == "same"
    assert nodes[3].padding == (1, 0, 1, 1)
    check(model, nodes, 33, 20, 47)


class Shared(nn.Module):
    """One convolution and its batch norm, used twice; += after the map was read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x += self.block(x)
        x = x + self.block(x)
        return self.head(x.mean((2, 3)))


def test_shared_modules_have_names_of_their_own() -> None:
    model = randomised(Shared())
    nodes = lower(model, 16)
    check(model, nodes, 16, 23)
    assert len({node.name for node in nodes}) == len(nodes) == 7


def test_the_model_is_left_as_it_is() -> None:
    # float64, so that a weight that needs no conversion would be shared
    model = create("mobilenetv3_small_050").double()
    model.blocks[0].register_forward_hook(lambda *_: None)
    before = copy.deepcopy(model)
    nodes = lower(model, 64)
    for module, other in zip(model.modules(), before.modules(), strict=True):
        assert module.training == other.training
        assert list(module.__dict__) == list(other.__dict__)
        assert len(module._forward_hooks) == len(other._forward_hooks)
    for (name, value), other in zip(
        model.state_dict(keep_vars=True).items(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other) and value.dtype == other.dtype, name
        assert isinstance(value, nn.Parameter) <= (value.requires_grad and value.grad is None)
    x = torch.randn(1, 3, 64, 64)
    logits = forward(nodes, x)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    assert torch.equal(forward(nodes, x), logits)


def test_training_mode() -> None:
    with pytest.raises(ValueError, match=r"model: expected model.eval\(\), got .* training mode"):
        lower(create("mobilenetv3_small_050").train(), 64)


def test_image_size() -> None:
    with pytest.raises(ValueError, match="image_size: expected 1 or more, got 0"):
        lower(create("mobilenetv3_small_050"), 0)


def test_observe() -> None:
    nodes = lower(create("mobilenetv3_small_050"), 64)
    activations = {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, None: lambda x: x}
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    seen = []

    def observe(index: int, pre_activation: Tensor, output: Tensor) -> None:
        assert torch.equal(activations[nodes[index].activation](pre_activation), output)
        assert output.is_contiguous(memory_format=torch.channels_last)
        seen.append((index, output.clone()))

    logits = forward(nodes, x, observe)
    assert [index for index, _ in seen] == list(range(len(nodes)))
    assert torch.equal(seen[-1][1].flatten(1), logits) and logits.shape == (2, 1000)
    assert torch.equal(forward(nodes, x), logits) and torch.equal(x, before)


def test_maps_are_freed_after_their_last_use() -> None:
    nodes = lower(create("mobilenetv2_100"), 64)
    maps: list[weakref.ref[Tensor]] = []
    alive = []

    def observe(index: int, pre_activation: Tensor, output: Tensor) -> None:
        maps.append(weakref.ref(output))
        alive.append(sum(ref() is not None for ref in maps))

    forward(nodes, torch.randn(1, 3, 64, 64), observe)
    assert max(alive) == 2  # the node's own, and one that waits for its addition


def test_images_of_another_shape() -> None:
    nodes = lower(create("mobilenetv3_small_050"), 64)
    with pytest.raises(ValueError, match=r"x: expected \[N, 3, H, W\], got \[2, 64, 64, 3\]"):
        forward(nodes, torch.zeros(2, 64, 64, 3))


def write_through_view(x: Tensor, layer: nn.Module) -> Tensor:
    y = layer(x)
    view = y.reshape(y.shape)
    y += x
    return y + view


def excite(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    return x * F.hardsigmoid(second(F.relu(first(x.mean((2, 3), keepdim=True)))))


def excite_by_vector(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    # [N, C, 1, 1] times [N, C] is [N, C, N, C]
    x = x.mean((2, 3), keepdim=True)
    return x * F.hardsigmoid(second(F.relu(first(x.mean((2, 3))))))


def dead_end(x: Tensor, layer: nn.Module, other: nn.Module) -> Tensor:
    x = layer(x.mean((2, 3)))
    F.relu_(other(x))
    return x


def shared_gate(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    gate = F.hardsigmoid(second(F.relu(first(x.mean((2, 3), keepdim=True)))))
    return x * gate + gate


def gate_of_another(x: Tensor, layer: nn.Module, first: nn.Module, second: nn.Module) -> Tensor:
    gate = F.hardsigmoid(second(F.relu(first(x.mean((2, 3), keepdim=True)))))
    return layer(x) * gate


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (
            [nn.GELU()],
            r"quantize: 1 \(.*GELU\): aten.gelu.default: not an .*, which runs MobileNets \(",
        ),
        ([nn.MaxPool2d(2)], r"1 \(.*MaxPool2d\): aten.max_pool2d"),
        ([nn.ConvTranspose2d(8, 8, 2)], r"1 \(.*\): aten.conv_transpose2d"),
        ([conv(dilation=2)], r"1 \(.*Conv2d\): aten.conv2d.default: dilation: .*, got \[2, 2\]"),
        ([conv(groups=2)], r"aten.conv2d.default: groups: .*, got 2, with 8 input and 8 output"),
        ([nn.Conv2d(8, 16, 1, groups=8), nn.Conv2d(16, 8, 1)], "got 8, with 8 input and 16 output"),
        (
            [conv(padding=1, padding_mode="reflect")],
            r"aten.pad.default: .* zeros, got reflect",
        ),
        ([nn.ConstantPad2d(1, 0.5), conv()], r"1 \(.*\): aten.pad.default: .*, got constant 0.5"),
        ([nn.ZeroPad2d((0, 0, -1, 0)), conv()], r"pad: .*, got \[0, 0, -1, 0\]"),
        ([nn.ZeroPad2d(1)], "aten.adaptive_avg_pool2d.default: only a convolution reads"),
        ([nn.AvgPool2d(2, ceil_mode=True)], "aten.avg_pool2d.default: .*no ceil_mode"),
        ([nn.AvgPool2d(2, divisor_override=3)], "aten.avg_pool2d.default: .*divisor_override"),
        ([nn.AvgPool2d(3, 2, 1, count_include_pad=False)], "count_include_pad: expected True"),
        (
            [nn.AdaptiveAvgPool2d(2)],
            "1 .*: aten.adaptive_avg_pool2d.default: .*mean over all",
        ),
        ([nn.ReLU(), nn.BatchNorm2d(8)], "2 .*: aten.batch_norm.default: expected after"),
        ([nn.BatchNorm2d(8, track_running_stats=False)], "statistics of the batch"),
        ([nn.ReLU(), nn.Hardswish()], "2 .*: aten.hardswish.default: expected after"),
        ([nn.AdaptiveAvgPool2d(1), nn.ReLU6()], r"2 .*: aten.\w+.default: expected after"),
        (
            [nn.Hardtanh()],
            r"1 .*: aten.hardtanh.default: .*, got min_val -1.0, max_val",
        ),
        ([Call(lambda x: F.hardswish(x + x))], "1 .*: aten.hardswish.default: expected after"),
        ([Call(lambda x: x + F.relu(x))], "1 .*: aten.relu.default: the map before it is read"),
        ([Call(lambda x: F.relu(x) + 1)], "aten.add.Tensor: expected after a convolution"),
        ([Call(lambda x: 1 / x)], "aten.reciprocal.default: not an operation"),
        ([Call(lambda x: torch.ones(8, 1, 1) / x)], "aten.div.Tensor: expected a map divided"),
        ([Call(lambda x: x.div(2, rounding_mode="floor"))], "aten.div.Tensor_mode: expected a"),
        ([Call(lambda x: x - x)], "aten.sub.Tensor: expected a map and constants"),
        (
            [Call(lambda x: x.clamp(0, 5))],
            "aten.clamp.default: .*, got min 0, max 5",
        ),
        ([Call(lambda x: F.relu6(x + 2) / 6)], "1 .*: aten.div.Tensor: expected after a conv"),
        ([Call(lambda x: F.relu6(x + 3) / 5)], "1 .*: aten.div.Tensor: expected after a conv"),
        ([Call(lambda x: F.relu6(x + 3) / 6)], "aten.hardsigmoid.default: expected in a squeeze"),
        ([Call(lambda x: torch.add(x, x, alpha=2))], "aten.add.Tensor: .*alpha 1"),
        (
            [Call(lambda x: x + x.mean((2, 3), True))],
            r"aten.add.Tensor: .* \(2, 8, 14, 14\) and",
        ),
        ([Call(lambda x: x + torch.ones(14))], r"aten.add.Tensor: .* a constant of \(14,\) with"),
        ([Call(lambda x: x * x)], "aten.mul.Tensor: expected of two maps in a squeeze-"),
        ([Call(lambda x: x.transpose(2, 3))], "aten.transpose.int"),
        ([Call(lambda x: x.flatten(2).unflatten(2, (14, 14)))], "aten.flatten.using_ints"),
        ([Call(write_through_view, conv(padding=1))], "aten.add.Tensor: it reads a map after"),
        ([Call(lambda x: x.mean(3, keepdim=True))], "aten.mean.dim: expected the mean over"),
        ([Call(lambda x: x.half().float())], "aten.to.dtype: not an operation"),
        (
            [nn.Linear(14, 14)],
            r"1 .*: aten.linear.default: expected \[N, C\], got \(2, 8, 14, 14\)",
        ),
        ([nn.ZeroPad2d(1), conv(padding="same")], "aten.conv2d.padding: SAME padding of a padded"),
        (
            [Call(excite, nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 8, 1))],
            "1.modules_.0 .*: expected in a squeeze-excite: a 1x1 kernel",
        ),
        (
            [Call(excite, nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1, groups=2))],
            "1.modules_.1 .*: expected in a squeeze-excite: a 1x1 kernel",
        ),
        ([Call(excite_by_vector, nn.Linear(8, 4), nn.Linear(4, 8))], "aten.hardsigmoid.default"),
        ([Call(shared_gate, nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1))], "aten.hardsigmoid.default"),
        (
            [Call(gate_of_another, conv(padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1))],
            "aten.hardsigmoid.default: expected",
        ),
    ],
)
def test_unsupported_operations(middle: list[nn.Module], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        lower(network(*middle), 16)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (network(nn.Dropout()).append(nn.Softmax(1)), r"5 \(.*Softmax\): aten.softmax.int"),
        (network().append(nn.ReLU()), r"quantize: 3: expected logits .*, got \(2, 5\)"),
        (network()[:-1], r"quantize: 1: expected logits .*, got \(2, 8\)"),
        (network()[:2].append(nn.Conv2d(8, 5, 1)), r"2: .*, got \(2, 5, 1, 1\)"),
        (network()[:1].append(nn.Conv2d(8, 5, 14)).append(nn.Flatten()), "1: expected logits"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)), "the image"),
        (
            network()[:1].append(Call(dead_end, nn.Linear(8, 5), nn.Linear(5, 5))),
            r"1.modules_.1: expected logits .*, got \(2, 5\)",
        ),
        (Call(lambda x: (x, x)), r"the model: expected logits .*, got \(2, 3, 16, 16\)"),
        (nn.Conv2d(1, 8, 3), r"Conv2d on images \[2, 3, 16, 16\] fails: Given groups=1"),
    ],
)
def test_models_that_are_no_classifier_of_images(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        lower(model.eval(), 16)


def test_dropout_that_was_left_in_training() -> None:
    model = network(nn.Dropout())
    model[1].train()
    with pytest.raises(UnsupportedError, match=r"1 \(.*Dropout\): aten.dropout.default"):
        lower(model, 16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mobilenetv4_hybrid_medium", r"blocks.2.4.attn \(.*\): aten\.\w+.* MobileNets "),
        ("mobilenetv4_hybrid_large", r"bn1.act \(.*GELU\): aten.gelu.default"),
        ("efficientnet_b0", r"bn1.act \(.*SiLU\): aten.silu_.default"),
        ("vit_tiny_patch16_224", r"patch_embed \(timm.*PatchEmbed\): aten.flatten.* MobileNets "),
    ],
)
def test_unsupported_models(name: str, message: str) -> None:
    size = {"img_size": 64} if name.startswith("vit") else {}
    with pytest.raises(UnsupportedError, match=message):
        lower(timm.create_model(name, **size).eval(), 64)
