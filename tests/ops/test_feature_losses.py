"""What holds for the losses of features and embeddings alike.

Values and gradients are compared with the usual, materialising forms in float64 on the same rounded
inputs. Tests marked every_isa also run once per instruction set of the host, and on the reference
backend (test_rkd.py).
"""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.feature_tools import (
    BFLOAT,
    EMBEDDED,
    FLOAT,
    HALF,
    KINDS,
    LOSSES,
    SPATIAL,
    USUAL,
    Largest,
    as_tokens,
    assert_near,
    check,
    draw,
    every_device,
    every_dtype,
    every_loss,
    every_spatial,
    loss_and_grad,
)
from support.process_tools import python
from vitkd_fast.functional import _features, feature_loss

pytestmark = pytest.mark.usefixtures("one_thread")


# values


@pytest.mark.every_isa
@pytest.mark.emulated(name=["rkd"])
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
    if name == "mmd":  # of one position, channels are +-1
        height = max(height, 2)
    check(
        name,
        draw(batch, c_s, height, width, device=device),
        draw(batch, c_t, height, width, device=device),
    )


@pytest.mark.every_isa
@pytest.mark.emulated(name=["rkd"])
@every_device
@every_loss
@every_dtype
def test_dtypes_match(name: str, dtype: torch.dtype, device: str) -> None:
    check(name, draw(6, 5, 4, 4, dtype=dtype, device=device), draw(6, 7, 4, 4, device=device))


@pytest.mark.every_isa
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


@pytest.mark.every_isa
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


@pytest.mark.every_isa
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
        if name.startswith("wkd"):  # of moments, which need no grid in common
            return USUAL[name](a, b)
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


@pytest.mark.every_isa
@pytest.mark.parametrize("tile", [1, 40, 200, 1000])
@pytest.mark.parametrize("name", [*SPATIAL])
def test_tiles_match(name: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of parts of a sample, of one and of a few."""
    monkeypatch.setattr(_features, "TILE", tile)
    x, t = draw(5, 6, 4, 3), draw(5, 7, 4, 3)
    check(name, x, t)
    check(name, x.to(memory_format=torch.channels_last), t)


@pytest.mark.every_isa
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


# what holds for all


@pytest.mark.every_isa
@pytest.mark.emulated(name=["rkd"])
@pytest.mark.interpreted(name=["rkd"], dtype=[FLOAT])
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
    if name in ("cosine", "nst", "mmd"):
        eps = torch.finfo(value.dtype).eps
        assert value.abs() <= (4 * eps if name == "cosine" else 64 * eps**2)
        assert grad.abs().max() <= 8 * eps
    else:
        assert value == 0
        assert (grad == 0).all()


@every_device
@every_spatial
def test_empty_batch_that_is_resized(name: str, device: str) -> None:
    x, t = draw(0, 5, 8, 8, device=device), draw(0, 6, 4, 4, device=device)
    assert loss_and_grad(LOSSES[name], x, t)[0] == 0


@pytest.mark.every_isa
@pytest.mark.emulated(name=["rkd"])
@every_device
@every_loss
def test_bitwise_the_same_twice(name: str, device: str) -> None:
    torch.set_num_threads(2)
    x, t = draw(40, 12, 7, 7, device=device), draw(40, 16, 7, 7, device=device)
    first, second = (loss_and_grad(LOSSES[name], x, t) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.every_isa
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
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """Arithmetic is not bfloat16's inside such a region."""
    loss = partial(feature_loss, weight=draw(7, 5), kind=name) if name in KINDS else LOSSES[name]
    x, t = draw(6, 5, 4, 4, dtype=dtype), draw(6, 7, 4, 4, dtype=dtype)
    want = loss_and_grad(loss, x, t)
    with torch.autocast("cpu", dtype=BFLOAT):
        given = loss_and_grad(loss, x, t)
    for a, b in zip(given, want, strict=True):
        assert torch.equal(a, b)


@every_spatial
def test_layout_of_the_gradient(name: str) -> None:
    """As the student's, so that what comes before it need not be reordered."""
    x, t = draw(2, 5, 4, 4).to(memory_format=torch.channels_last), draw(2, 6, 4, 4)
    _, grad = loss_and_grad(LOSSES[name], x, t)
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_large_is_made(name: str) -> None:
    """Nothing of the teacher's size, of the projected size, or of pairs of channels or triplets."""
    x, t = draw(16, 8, 14, 14), draw(16, 197, 384)[:, 1:]
    if name in EMBEDDED:
        x, t = draw(64, 500), draw(64, 3000)
    if name == "sliced":
        t = t.mT
    with Largest() as largest:
        loss_and_grad(LOSSES[name], x, t)
    assert 0 < largest.numel <= max(x.numel(), _features.TILE)
    assert largest.numel < t.numel() / 4


ALLOW_TF32 = {
    "older": 'torch.set_float32_matmul_precision("medium")',
    "newer": 'torch.backends.cuda.matmul.fp32_precision = "tf32"',
}


@pytest.mark.parametrize("way", ALLOW_TF32)
def test_threads_leave_torchs_precision_as_it_was(way: str, tmp_path: Path) -> None:
    """In a process of its own, as torch's two ways are not to be mixed."""
    code = f"""if True:
        import threading, torch
        from vitkd_fast.functional import rkd_loss
        {ALLOW_TF32[way]}
        def found():
            return [of.matmul.fp32_precision for of in (torch.backends.cuda, torch.backends.mkldnn)]
        before = found()
        def run():
            for _ in range(50):
                rkd_loss(torch.randn(4, 5, requires_grad=True), torch.randn(4, 6)).backward()
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        rounds = {{"bf16", "tf32"}}
        assert before[0] == found()[0] == "tf32", (before, found())
        assert rounds & {{before[1]}} == rounds & {{found()[1]}}, (before, found())
        if "older" == {way!r}:
            assert torch.get_float32_matmul_precision() == "medium"
            assert torch.backends.cuda.matmul.allow_tf32
    """
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr
