"""at_loss, feature_loss, nst_loss, rkd_loss and the operation under the last.

Values and gradients are compared with the usual, materialising forms in float64 on the same rounded
inputs. Tests whose names hold "match" or "extreme" also run once per instruction set of the host,
and on the reference backend.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitkd_fast import int8, reference
from vitkd_fast.functional import _features, at_loss, feature_loss, nst_loss, rkd_loss

from .cuda_tools import GPU, captured, needs_gpu_or_emulator
from .triton_tools import (
    INTERPRETED,
    assert_nothing_is_spilled,
    compile_only,
    run_in_interpreter,
    run_tests,
)

OPS = torch.ops.vitkd_fast
HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

every_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
every_dtype = pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT, DOUBLE], ids=str)
KINDS = ["mse", "cosine", "smooth_l1"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(*shape: int, dtype: torch.dtype = FLOAT, device: str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=DOUBLE).to(device, dtype)


def as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).mT


def as_map(x: Tensor, height: int, width: int) -> Tensor:
    return x.mT.unflatten(2, (height, width))


# each loss by one name: how it is called here, its usual form, and what it takes


def feature(x: Tensor, t: Tensor, kind: str = "mse", **options: Any) -> Tensor:
    """feature_loss with a projection that depends on the channels alone."""
    if (weight := options.pop("weight", None)) is None:
        generator = torch.Generator().manual_seed(1)
        c_s = x.shape[1] if x.dim() == 4 else x.shape[2]
        c_t = t.shape[1] if t.dim() == 4 else t.shape[2]
        weight = torch.randn(c_t, c_s, generator=generator, dtype=DOUBLE)
        weight = weight.to(x.device, x.dtype)
    return feature_loss(x, t, weight, kind=kind, **options)


def usual_feature(x: Tensor, t: Tensor, kind: str = "mse") -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(t.shape[1], x.shape[1], generator=generator, dtype=DOUBLE)
    return reference.feature_loss(as_tokens(x), as_tokens(t), weight.to(x.device), kind=kind)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "at": at_loss,
    "at_p1": partial(at_loss, p=1.0),
    "at_p3": partial(at_loss, p=3.0),
    "mse": partial(feature, kind="mse"),
    "cosine": partial(feature, kind="cosine"),
    "smooth_l1": partial(feature, kind="smooth_l1"),
    "nst": nst_loss,
    "rkd": lambda x, t, **options: rkd_loss(x.flatten(1), t.flatten(1), **options),
}
USUAL: dict[str, Callable[..., Tensor]] = {
    "at": lambda x, t: reference.at_loss(x, t).mean(),
    "at_p1": lambda x, t: reference.at_loss(x, t, 1.0).mean(),
    "at_p3": lambda x, t: reference.at_loss(x, t, 3.0).mean(),
    "mse": partial(usual_feature, kind="mse"),
    "cosine": partial(usual_feature, kind="cosine"),
    "smooth_l1": partial(usual_feature, kind="smooth_l1"),
    "nst": lambda x, t: reference.nst_loss(x, t).mean(),
    "rkd": lambda x, t: reference.rkd_loss(x.flatten(1), t.flatten(1)),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
SPATIAL = [name for name in LOSSES if name != "rkd"]
every_spatial = pytest.mark.parametrize("name", SPATIAL)


def loss_and_grad(loss: Callable[..., Tensor], x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    value = loss(leaf, t)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def assert_near(given: Tensor, want: Tensor, roundings: int = 8, size: float = 0.0) -> None:
    """Off by a few float32 (float64) roundings of the largest number, and one of given's dtype.

    Args:
        size: of the numbers of which the result is a difference, where they are larger.
    """
    wide = FLOAT if given.dtype != DOUBLE else DOUBLE
    largest = max(size, want.abs().max().item() if want.numel() else 0.0)
    allowed = roundings * torch.finfo(wide).eps * largest + torch.finfo(given.dtype).tiny
    if given.dtype in (HALF, BFLOAT):  # formed in the forward, and scaled after it
        allowed = allowed + torch.finfo(given.dtype).eps * want.abs()
        allowed = allowed + (2**-25 if given.dtype == HALF else 0)
    assert given.shape == want.shape
    error = (given.double() - want).abs()
    assert (error <= allowed).all(), f"{(error / allowed).max():.3g} times what is allowed"


# rounding errors of each loss in float32, on the largest number of the result: a sum over channels
# or triplets, whose order torch chooses
ROUNDINGS = {"nst": 64, "rkd": 32}


def check(name: str, x: Tensor, t: Tensor, t_form: Tensor | None = None) -> None:
    """Loss and gradient beside the usual form's in float64; t_form: the same teacher as given."""
    value, grad = loss_and_grad(LOSSES[name], x, t if t_form is None else t_form)
    want, want_grad = loss_and_grad(USUAL[name], x.double(), t.double())
    wide = DOUBLE if DOUBLE in (x.dtype, t.dtype) else FLOAT
    assert value.dtype == wide
    assert grad.dtype == x.dtype
    roundings = ROUNDINGS.get(name, 16)
    if x.dtype != DOUBLE and t.dtype != DOUBLE and name in ("mse", "cosine", "smooth_l1"):
        roundings = 32  # the projection's weight is rounded to the student's dtype
        if x.dtype != FLOAT:
            pytest.skip("test_weights_in_low_precision_match has the rounded weight")
    assert_near(value, want, roundings)
    assert_near(grad, want_grad, roundings)


# values


@every_device
@every_loss
@pytest.mark.parametrize(
    "shape",
    [(4, 6, 5, 7, 4), (1, 1, 1, 1, 1), (3, 5, 1, 1, 2), (3, 3, 4, 4, 3), (7, 33, 3, 3, 17)],
    ids=str,
)
def test_shapes_match(name: str, shape: tuple[int, ...], device: str) -> None:
    """[batch, C_s, H, W] beside [batch, C_t, H, W]."""
    batch, c_s, height, width, c_t = shape
    if name == "cosine":  # of one channel, it is +-1 and has no gradient
        c_s, c_t = max(c_s, 2), max(c_t, 2)
    check(
        name,
        draw(batch, c_s, height, width, device=device),
        draw(batch, c_t, height, width, device=device),
    )


@every_device
@every_loss
@every_dtype
def test_dtypes_match(name: str, dtype: torch.dtype, device: str) -> None:
    check(name, draw(6, 5, 4, 4, dtype=dtype, device=device), draw(6, 7, 4, 4, device=device))


@every_device
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_low_precision_match(kind: str, dtype: torch.dtype, device: str) -> None:
    x, t = draw(3, 5, 4, 4, dtype=dtype, device=device), draw(3, 7, 4, 4, device=device)
    given = [x, draw(7, 5, dtype=dtype, device=device), draw(7, dtype=dtype, device=device)]
    leaves = [a.requires_grad_() for a in given]
    loss = feature_loss(leaves[0], t, *leaves[1:], kind=kind)
    exact = [a.detach().double().requires_grad_() for a in given]
    want = reference.feature_loss(as_tokens(exact[0]), as_tokens(t.double()), *exact[1:], kind=kind)
    assert_near(loss.detach(), want.detach(), 16)
    for got, wanted in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(want, exact), strict=True
    ):
        assert_near(got, wanted, 16)


@every_device
@every_spatial
@pytest.mark.parametrize("form", ["tokens", "with_cls", "channels_last", "crop", "expanded"])
def test_teachers_in_any_form_match(name: str, form: str, device: str) -> None:
    """Read in place, whatever the strides."""
    x, t = draw(3, 5, 4, 6, device=device), draw(3, 8, 4, 6, device=device)
    given = {
        "tokens": as_tokens(t).contiguous(),
        "with_cls": torch.cat([draw(3, 5, 8, device=device), as_tokens(t)], 1)[:, 5:],
        "channels_last": t.to(memory_format=torch.channels_last),
        "crop": F.pad(t, (1, 2, 3, 1))[:, :, 3:7, 1:7],
        "expanded": t[:1].expand(3, -1, -1, -1),
    }[form]
    check(name, x, given if form == "expanded" else t, given)


@every_device
@every_spatial
@pytest.mark.parametrize("form", ["tokens", "channels_last", "crop", "expanded", "transposed"])
def test_students_in_any_form_match(name: str, form: str, device: str) -> None:
    x, t = draw(3, 5, 4, 6, device=device), draw(3, 8, 4, 6, device=device)
    if form == "tokens":
        value, grad = loss_and_grad(LOSSES[name], as_tokens(x).contiguous(), t)
        want, want_grad = loss_and_grad(LOSSES[name], x, t)
        assert_near(value, want.double(), 64)
        assert_near(grad, as_tokens(want_grad).double(), 64)
        return
    given = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "crop": F.pad(x, (1, 2, 3, 1))[:, :, 3:7, 1:7],
        "expanded": x[:1].expand(3, -1, -1, -1),
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
    }[form]
    check(name, given, t)


@every_device
def test_ready_map_matches(device: str) -> None:
    """The teacher's attention from the CLS token is a map already."""
    x, row = draw(3, 5, 4, 6, device=device), draw(3, 25, device=device).softmax(1)[:, 1:]
    value, grad = loss_and_grad(at_loss, x, row)
    want, want_grad = loss_and_grad(
        lambda a, b: reference.at_loss(a, b).mean(), x.double(), row.double()
    )
    assert_near(value, want, 16)
    assert_near(grad, want_grad, 16)


@every_device
@pytest.mark.parametrize(
    ("grid", "teacher"),
    [((14, 14), (7, 7)), ((7, 7), (14, 14)), ((6, 4), (3, 8)), ((8, 6), (5, 3))],
    ids=str,
)
@every_spatial
def test_grids_that_differ_match(
    name: str, grid: tuple[int, int], teacher: tuple[int, int], device: str
) -> None:
    """The student is resized: its map q for at, else its features."""
    x, t = draw(2, 5, *grid, device=device), draw(2, 4, *teacher, device=device)

    def resized(a: Tensor) -> Tensor:
        if grid[0] >= teacher[0] and grid[1] >= teacher[1]:
            return F.adaptive_avg_pool2d(a, teacher)
        return F.interpolate(a, teacher, mode="bilinear", align_corners=False)

    def usual(a: Tensor, b: Tensor) -> Tensor:
        if not name.startswith("at"):
            return USUAL[name](resized(a), b)
        p = {"at": 2.0, "at_p1": 1.0, "at_p3": 3.0}[name]
        q_s = resized(a.abs().pow(p).sum(1, keepdim=True)).flatten(1)
        q_t = b.abs().pow(p).sum(1).flatten(1)
        return (F.normalize(q_s) - F.normalize(q_t)).square().sum(1).mean()

    want, want_grad = loss_and_grad(usual, x.double(), t.double())
    for given, options in ((t, {}), (as_tokens(t), {"teacher_grid": teacher})):
        value, grad = loss_and_grad(partial(LOSSES[name], **options), x, given)
        assert_near(value, want, 64)
        assert_near(grad, want_grad, 64)
    if teacher[0] == teacher[1]:  # a square needs no telling
        assert torch.equal(LOSSES[name](x, as_tokens(t)), value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", ["layer_norm", "l2"])
def test_normalized_teachers_match(kind: str, normalize: str) -> None:
    x, t = draw(3, 5, 4, 4), 3 * draw(3, 5, 4, 4)
    rows = F.layer_norm(as_tokens(t), (5,)) if normalize == "layer_norm" else None
    rows = F.normalize(as_tokens(t), dim=2) if rows is None else rows
    options = {"kind": kind, "beta": 0.3}
    value, grad = loss_and_grad(partial(feature_loss, normalize_teacher=normalize, **options), x, t)
    want, want_grad = loss_and_grad(
        lambda a, b: reference.feature_loss(as_tokens(a), b, **options), x.double(), rows.double()
    )
    assert_near(value, want, 16)
    assert_near(grad, want_grad, 16)


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0, 5.0])
def test_beta_matches(beta: float) -> None:
    x, t = draw(3, 5, 4, 4), draw(3, 5, 4, 4)
    given = loss_and_grad(partial(feature_loss, kind="smooth_l1", beta=beta), x, t)
    want = loss_and_grad(partial(F.smooth_l1_loss, beta=beta), x.double(), t.double())
    for a, b in zip(given, want, strict=True):
        assert_near(a, b, 16)


@pytest.mark.parametrize("tile", [1, 40, 200, 1000])
@pytest.mark.parametrize("name", [*SPATIAL])
def test_tiles_match(name: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of parts of a sample, of one and of a few."""
    monkeypatch.setattr(_features, "TILE", tile)
    x, t = draw(5, 6, 4, 3), draw(5, 7, 4, 3)
    check(name, x, t)
    check(name, x.to(memory_format=torch.channels_last), t)


@every_device
@every_spatial
def test_reductions_match(name: str, device: str) -> None:
    x, t = draw(4, 5, 3, 3, device=device), draw(4, 6, 3, 3, device=device)
    value, grad = loss_and_grad(LOSSES[name], x, t)
    total, total_grad = loss_and_grad(partial(LOSSES[name], reduction="sum"), x, t)
    count = {"mse": 4 * 6 * 9, "smooth_l1": 4 * 6 * 9, "cosine": 4 * 9}.get(name, 4)
    assert_near(total, count * value.double())
    assert_near(total_grad, count * grad.double())
    if count != 4:
        return
    leaf = x.clone().requires_grad_()
    rows = LOSSES[name](leaf, t, reduction="none")
    assert rows.shape == (4,)
    assert_near(rows.detach().mean(), value.double())
    by = draw(4, device=device)
    (given,) = torch.autograd.grad(rows, leaf, by)
    assert_near(given, by.double().view(4, 1, 1, 1) * total_grad.double())


# rkd


@every_device
@pytest.mark.parametrize("weights", [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 15, 16, 17, 33, 64, 71])
def test_rkd_matches(batch: int, weights: tuple[float, float], device: str) -> None:
    x, t = draw(batch, 12, device=device), draw(batch, 20, device=device)
    options = dict(zip(("distance_weight", "angle_weight"), weights, strict=True))
    for scale, shift in ((1.0, 0.0), (1e-3, 0.0), (1e3, 0.0), (1.0, 3.0)):
        given = scale * x + shift
        value, grad = loss_and_grad(partial(rkd_loss, **options), given, t)
        want, want_grad = loss_and_grad(
            partial(reference.rkd_loss, **options), given.double(), t.double()
        )
        if batch == 2:  # the one distance is its own mean: all is rounding
            assert value <= 1e-12 + want
        else:
            # h(x) = x^2 / 2 of differences x of numbers around 1: x times their rounding
            size = (2 * sum(weights) * want.item()) ** 0.5
            assert_near(value, want, 32 if shift == 0 else 128, size)
            assert_near(grad, want_grad, 64 if shift == 0 else 512)


@every_device
@pytest.mark.parametrize("batch", [1, 5, 40])
def test_rkd_operation_matches_its_reference(batch: int, device: str) -> None:
    """Float64 too has a kernel."""
    x, t = (draw(batch, dim, dtype=DOUBLE, device=device) for dim in (9, 30))
    grams = [(a - a.mean(0)) @ (a - a.mean(0)).T for a in (x, t)]
    want = reference.rkd_fwd_grad(*grams, 25.0, 50.0)
    for dtype in (DOUBLE, FLOAT):
        given = OPS.rkd_fwd_grad(*(a.to(dtype) for a in grams), 25.0, 50.0)
        assert [a.dtype for a in given] == [dtype] * 2
        for a, b in zip(given, want, strict=True):
            assert_near(a, b, 64)
        strided = [F.pad(a, (1, 2, 3, 4))[3:-4, 1:-2] for a in grams]
    for a, b in zip(OPS.rkd_fwd_grad(*strided, 25.0, 50.0), want, strict=True):
        assert_near(a, b, 64)


@every_device
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_extreme_rkd_of_identical_embeddings(dtype: torch.dtype, device: str) -> None:
    """Pairs of distance 0, in one model or in both: as the usual form, and the gradient finite."""
    new = partial(draw, dtype=dtype, device=device)
    x, t = new(12, 8), new(12, 8)
    x[3], x[4], x[7] = x[1], x[1], x[0]
    t[3], t[10] = t[1], t[11]
    value, grad = loss_and_grad(rkd_loss, x, t)
    want, want_grad = loss_and_grad(reference.rkd_loss, x.double(), t.double())
    assert_near(value, want, 64)
    assert_near(grad, want_grad, 256)
    same = torch.ones_like(x) * new(8)
    for a, b in ((same, t), (x, same), (same, same), (torch.zeros_like(x), t)):
        value, grad = loss_and_grad(rkd_loss, a, b)
        assert_near(value, reference.rkd_loss(a.double(), b.double()), 64)
        assert grad.isfinite().all()


@every_device
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_extreme_rkd_nan_stays(bad: float, device: str) -> None:
    x, t = draw(20, 8, device=device), draw(20, 8, device=device)
    for a, b in ((x, t.clone()), (x.clone(), t)):
        (b if a is x else a)[3, 2] = bad
        value, grad = loss_and_grad(rkd_loss, a, b)
        assert value.isnan()
        assert grad.isnan().any()


@every_device
def test_rkd_of_large_batches_matches_its_reference(device: str) -> None:
    """More columns than a tile has."""
    x, t = draw(301, 6, device=device), draw(301, 6, device=device)
    grams = [(a - a.mean(0)) @ (a - a.mean(0)).T for a in (x, t)]
    given = OPS.rkd_fwd_grad(*grams, 25.0, 50.0)
    want = reference.rkd_fwd_grad(*(a.double() for a in grams), 25.0, 50.0)
    for a, b in zip(given, want, strict=True):
        assert_near(a, b, 128)


def test_rkd_is_the_same_on_any_number_of_threads() -> None:
    x, t = draw(150, 30), draw(150, 30)
    want = loss_and_grad(rkd_loss, x, t)
    gram = x @ x.T, t @ t.T
    one = OPS.rkd_fwd_grad(*gram, 25.0, 50.0)
    torch.set_num_threads(3)
    for a, b in zip(OPS.rkd_fwd_grad(*gram, 25.0, 50.0), one, strict=True):
        assert torch.equal(a, b)
    torch.set_num_threads(1)
    for a, b in zip(loss_and_grad(rkd_loss, x, t), want, strict=True):
        assert torch.equal(a, b)


# what holds for all


@every_device
@every_loss
@every_dtype
def test_extreme_identical_inputs_give_zero(name: str, dtype: torch.dtype, device: str) -> None:
    """Exactly, where no product stands between the features and their difference."""
    x = draw(5, 6, 4, 4, dtype=dtype, device=device)
    loss = feature_loss if name in KINDS else LOSSES[name]
    if name in KINDS:
        loss = partial(feature_loss, kind=name)
    value, grad = loss_and_grad(loss, x, x.clone())
    if name in ("cosine", "nst"):
        eps = torch.finfo(value.dtype).eps
        assert value.abs() <= (4 * eps if name == "cosine" else 64 * eps**2)
        assert grad.abs().max() <= 8 * eps
    else:
        assert value == 0
        assert (grad == 0).all()


@every_device
@every_loss
def test_empty_batch(name: str, device: str) -> None:
    x, t = draw(0, 5, 4, 4, device=device), draw(0, 6, 4, 4, device=device)
    value, grad = loss_and_grad(LOSSES[name], x, t)
    assert value == 0
    assert grad.shape == x.shape
    if name != "rkd":
        value, grad = loss_and_grad(LOSSES[name], draw(0, 5, 8, 8, device=device), t)
        assert value == 0


@every_device
@every_loss
def test_bitwise_the_same_twice(name: str, device: str) -> None:
    torch.set_num_threads(2)
    x, t = draw(40, 12, 7, 7, device=device), draw(40, 16, 7, 7, device=device)
    first, second = (loss_and_grad(LOSSES[name], x, t) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    x, t = draw(3, 4, 2, 3, dtype=DOUBLE), draw(3, 5, 2, 3, dtype=DOUBLE)
    assert torch.autograd.gradcheck(lambda a: LOSSES[name](a, t), x.requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck_of_the_projection(kind: str, reduction: str) -> None:
    given = [draw(*shape, dtype=DOUBLE) for shape in ((2, 3, 2, 3), (4, 3, 1, 1), (4,))]
    t = draw(2, 7, 4, dtype=DOUBLE)[:, 1:]
    assert torch.autograd.gradcheck(
        lambda x, w, b: feature_loss(x, t, w, b, kind=kind, reduction=reduction),
        [x.requires_grad_() for x in given],
    )
    for needed in itertools.product([False, True], repeat=3):  # of some inputs alone
        leaves = [x.detach().requires_grad_(n) for x, n in zip(given, needed, strict=True)]
        loss = feature_loss(leaves[0], t, *leaves[1:], kind=kind, reduction=reduction)
        assert loss.requires_grad == any(needed)
        if any(needed):
            loss.backward()
        assert [x.grad is not None for x in leaves] == list(needed)


@every_device
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    grams = [a @ a.T for a in (draw(9, dim, dtype=dtype, device=device) for dim in (5, 6))]
    torch.library.opcheck(OPS.rkd_fwd_grad.default, (*grams, 25.0, 50.0))


@every_device
@every_loss
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT], ids=str)
def test_loss_times_a_factor(name: str, dtype: torch.dtype, device: str) -> None:
    """A loss scale reaches float16 before it is rounded."""
    x = draw(6, 5, 4, 4, dtype=dtype, device=device)
    t = draw(6, 7, 4, 4, dtype=dtype, device=device)
    wide = LOSSES[name]
    if name in KINDS:
        weight = draw(7, 5, dtype=dtype, device=device)
        wide = partial(feature_loss, weight=weight.float(), kind=name)
    _, want = loss_and_grad(wide, x.float(), t.float())
    narrow = partial(wide, weight=weight) if name in KINDS else wide
    for factor in (1.0, 1024.0, -0.5):
        _, grad = loss_and_grad(lambda a, b, by=factor: by * narrow(a, b), x, t)
        assert grad.dtype == dtype
        assert_near(grad, factor * want.double(), 64)


@every_loss
def test_backward_twice_and_used_twice(name: str) -> None:
    x, t = draw(6, 5, 4, 4).requires_grad_(), draw(6, 7, 4, 4)
    loss = LOSSES[name](x, t)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(2 * loss, x, retain_graph=True)
    assert torch.equal(first, kept)
    assert torch.equal(second, 2 * kept)
    (loss + 3 * loss).backward()
    assert torch.equal(x.grad, 4 * kept)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@every_loss
def test_differentiable_once(name: str) -> None:
    x, t = draw(6, 5, 4, 4).requires_grad_(), draw(6, 7, 4, 4)
    loss = LOSSES[name](x, t)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.square().sum().backward()


@every_loss
def test_teacher_is_a_constant(name: str) -> None:
    """Also where it comes from inference mode; the loss is the same without a gradient."""
    x = draw(6, 5, 4, 4)
    with torch.inference_mode():
        t = draw(6, 7, 4, 4)
    want = loss_and_grad(LOSSES[name], x, t.clone())
    given = loss_and_grad(LOSSES[name], x, t)
    assert all(map(torch.equal, given, want))
    x.requires_grad_()
    with torch.no_grad():
        assert torch.equal(LOSSES[name](x, t), want[0])
    with torch.inference_mode():
        assert torch.equal(LOSSES[name](x, t), want[0])


@every_spatial
def test_layout_of_the_gradient(name: str) -> None:
    """As the student's, so that what comes before it need not be reordered."""
    x, t = draw(2, 5, 4, 4).to(memory_format=torch.channels_last), draw(2, 6, 4, 4)
    _, grad = loss_and_grad(LOSSES[name], x, t)
    assert grad.is_contiguous(memory_format=torch.channels_last)


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that any operation gave back as its own memory."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and not func.is_view:
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_large_is_made(name: str) -> None:
    """Nothing of the teacher's size, of the projected size, or of pairs of channels or triplets."""
    x, t = draw(16, 8, 14, 14), draw(16, 197, 384)[:, 1:]
    if name == "rkd":
        x, t = draw(64, 500), draw(64, 3000)
    with Largest() as largest:
        loss_and_grad(LOSSES[name], x, t)
    assert 0 < largest.numel <= max(x.numel(), _features.TILE)
    assert largest.numel < t.numel() / 4


# compilers


@every_device
@every_loss
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_compile(name: str, dtype: torch.dtype, device: str) -> None:
    torch.compiler.reset()
    new = partial(draw, dtype=dtype, device=device)
    x, t, weight = new(4, 5, 4, 4), new(4, 17, 7)[:, 1:], new(7, 5)
    loss = partial(LOSSES[name], weight=weight) if name in KINDS else LOSSES[name]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = loss_and_grad(loss, x, t)
    for a, b in zip(loss_and_grad(compiled, x, t), want, strict=True):
        assert a.dtype == b.dtype
        tolerance = 1e-5 if a.dtype == FLOAT else 1e-2
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("name", ["at", "rkd"])
def test_compile_with_dynamic_shapes(name: str) -> None:
    """Batch and grid."""
    torch.compiler.reset()
    weight = draw(7, 5)
    loss = partial(LOSSES[name], weight=weight) if name in KINDS else LOSSES[name]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, side in ((4, 4), (6, 3)):
        x, t = draw(batch, 5, side, side), draw(batch, side * side + 1, 7)[:, 1:]
        want = loss_and_grad(loss, x, t)
        for a, b in zip(loss_and_grad(compiled, x, t), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@every_device
def test_compile_with_inductor(device: str) -> None:
    def losses(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        total = at_loss(x, t) + nst_loss(x, t) + feature_loss(x, t, w)
        return total + rkd_loss(x.flatten(1), t.flatten(1))

    torch.compiler.reset()
    x, t, w = (draw(*shape, device=device) for shape in ((4, 5, 4, 4), (4, 16, 7), (7, 5)))
    want = loss_and_grad(partial(losses, w=w), x, t)
    given = loss_and_grad(torch.compile(partial(losses, w=w), fullgraph=True), x, t)
    for a, b in zip(given, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


# errors

X, T, TOKENS = draw(2, 5, 4, 4), draw(2, 7, 4, 4), draw(2, 16, 7)
E = draw(4, 5)
BAD: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "at_dtype": (lambda: at_loss(X.int(), T), TypeError, "f_s is torch.int32; accepted are float"),
    "at_teacher_dtype": (lambda: at_loss(X, T.int()), TypeError, "f_t is torch.int32; accepted"),
    "at_form": (lambda: at_loss(X[0, 0], T), ValueError, "f_s has shape [4, 4]; accepted are"),
    "at_teacher_form": (lambda: at_loss(X, T[0, 0, 0]), ValueError, "f_t has shape [4]; accepted"),
    "at_batch": (lambda: at_loss(X, T[:1]), ValueError, "differ in batch"),
    "at_p": (lambda: at_loss(X, T, p=0.5), ValueError, "p is 0.5; accepted are numbers >= 1"),
    "at_tokens": (lambda: at_loss(X, TOKENS[:, 1:]), ValueError, "f_t has 15 positions"),
    "at_grid": (
        lambda: at_loss(X, TOKENS, teacher_grid=(3, 5)), ValueError,
        "teacher_grid is (3, 5), and f_t has 16 positions",
    ),
    "at_map_grid": (
        lambda: at_loss(X, T, teacher_grid=(2, 8)), ValueError,
        "teacher_grid is (2, 8), and f_t has (4, 4)",
    ),
    "at_empty": (lambda: at_loss(X[:, :, :0], T), ValueError, "f_s [2, 5, 0, 4] is empty"),
    "at_reduction": (
        lambda: at_loss(X, T, reduction="max"), ValueError,
        "reduction is 'max'; accepted are mean, sum and none",
    ),
    "feature_channels": (
        lambda: feature_loss(X, T), ValueError, "differ in channels; accepted is a weight [7, 5]",
    ),
    "feature_weight": (
        lambda: feature_loss(X, T, draw(5, 7)), ValueError, "weight has shape [5, 7]; accepted",
    ),
    "feature_bias": (
        lambda: feature_loss(X, T, draw(7, 5), draw(5)), ValueError,
        "bias has shape [5]; accepted is [7]",
    ),
    "feature_bias_alone": (
        lambda: feature_loss(X, X, None, draw(5)), ValueError, "bias [5] is given without weight",
    ),
    "feature_kind": (
        lambda: feature_loss(X, X, kind="l3"), ValueError,
        "kind is 'l3'; accepted are mse, cosine, smooth_l1",
    ),
    "feature_beta": (lambda: feature_loss(X, X, beta=-1), ValueError, "beta is -1; accepted"),
    "feature_normalize": (
        lambda: feature_loss(X, X, normalize_teacher="batch"), ValueError,
        "normalize_teacher is 'batch'; accepted are None, 'layer_norm' and 'l2'",
    ),
    "feature_reduction": (
        lambda: feature_loss(X, X, reduction="none"), ValueError,
        "reduction is 'none'; accepted are mean and sum",
    ),
    "feature_students_tokens": (
        lambda: feature_loss(draw(2, 15, 5), draw(2, 9, 5)), ValueError,
        "f_s has 15 tokens and f_t 9",
    ),
    "nst_batch": (lambda: nst_loss(X, T[:1]), ValueError, "differ in batch"),
    "nst_form": (lambda: nst_loss(X, T[:, 0, 0]), ValueError, "f_t has shape [2, 4]; accepted"),
    "rkd_form": (lambda: rkd_loss(X, E), ValueError, "x_s has shape [2, 5, 4, 4]; accepted is"),
    "rkd_batch": (
        lambda: rkd_loss(E, E[:3]), ValueError, "x_s [4, 5] and x_t [3, 5] differ in batch",
    ),
    "rkd_dtype": (lambda: rkd_loss(E, E.int()), TypeError, "x_t is torch.int32; accepted are"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, words = BAD[name]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(name.split("_")[0])
    assert words in str(caught.value)


# instruction sets and backends, each in a process of its own

RKD = ["-m", "pytest", __file__, "-m", "not gpu", "-k", "rkd and match or extreme and rkd"]


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_every_instruction_set(isa: str, tmp_path: Path) -> None:
    if isa not in int8.isa() or isa == int8.isa()[0]:
        pytest.skip(f"{isa} is not below what this CPU has: {', '.join(int8.isa())}")
    run_tests(tmp_path, RKD, VITKD_FAST_ISA=isa)


def test_reference_backend(tmp_path: Path) -> None:
    run_tests(tmp_path, RKD, VITKD_FAST_BACKEND="reference")


# what only a GPU has


def on_gpu(name: str) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """A loss, its projection already on the GPU, and a student and a teacher for it."""
    loss = LOSSES[name]
    if name in KINDS:
        loss = partial(loss, weight=draw(17, 12, device="cuda"))
    return loss, draw(16, 12, 7, 7, device="cuda"), draw(16, 17, 7, 7, device="cuda")


@pytest.mark.gpu
@every_loss
def test_cuda_graph(name: str) -> None:
    """Forward and backward replayed, while student and teacher change."""
    loss, x, t = on_gpu(name)
    leaf = x.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        value = loss(leaf, t)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    graph, results = captured(step)
    for _ in range(3):
        with torch.no_grad():
            leaf.copy_(draw(*x.shape))
            t.copy_(draw(*t.shape))
        graph.replay()
        given = [y.clone() for y in results]
        for y, want in zip(given, step(), strict=True):
            assert_near(y, want.double(), 64)


@pytest.mark.gpu
@every_loss
def test_no_host_synchronisation(name: str) -> None:
    loss, x, t = on_gpu(name)
    loss_and_grad(loss, x, t)  # compiles, loads and allocates what may synchronise the first time
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_grad(loss, x, t)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@needs_gpu_or_emulator
class TestSanitize:
    """Every way through rkd's kernels once, small enough for compute-sanitizer."""

    @pytest.mark.parametrize("weights", [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0)], ids=str)
    @pytest.mark.parametrize("batch", [1, 16, 17, 40])
    @pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
    def test_rkd(self, dtype: torch.dtype, batch: int, weights: tuple[float, float]) -> None:
        grams = [a @ a.T for a in (draw(batch, dim, dtype=dtype, device=GPU) for dim in (5, 6))]
        for result in OPS.rkd_fwd_grad(*grams, *weights):
            assert result.isfinite().all()


# Triton, interpreted and compiled without a GPU


@pytest.mark.triton
def test_triton_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    quick = "(operation_matches and not 40) or (rkd_matches and 17-weights0)"
    quick += " or (extreme and rkd and float32)"
    run_in_interpreter(tmp_path, __file__, "-m", "not gpu", "-k", quick)


@pytest.mark.triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("n", [256, 1024])
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("weights", [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0)], ids=str)
def test_triton_compiles_without_spills(
    weights: tuple[float, float], dtype: torch.dtype, n: int, capability: int,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    pytest.importorskip("triton")
    compiled = compile_only(monkeypatch, capability, "rkd")
    from vitkd_fast.kernels import rkd

    gram = torch.empty(n, n, dtype=dtype, device="meta")
    rkd.rkd_fwd_grad(gram, gram, *weights)
    assert_nothing_is_spilled(compiled, tmp_path)
