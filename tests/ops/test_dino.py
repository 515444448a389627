"""dino_loss beside its authors' double loop, and the centre of DINOLoss, in one process and two."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from support.feature_tools import assert_near
from support.kd_tools import BFLOAT, DOUBLE, FLOAT, HALF, draw, every_device
from vitkd_fast import reference
from vitkd_fast.functional import _features, dino_loss
from vitkd_fast.nn import DINOLoss

pytestmark = pytest.mark.usefixtures("one_thread")


def results(loss: Any, student: Tensor, *rest: Tensor, **options: Any) -> list[Tensor]:
    leaf = student.detach().requires_grad_()
    value = loss(leaf, *rest, **options)
    return [value.detach(), *torch.autograd.grad(value, leaf)]


def check(student: Tensor, teacher: Tensor, *centre: Tensor, **options: float) -> None:
    found = results(dino_loss, student, teacher, *centre, **options)
    wide = [x.double() for x in (student, teacher, *centre)]
    want = results(reference.dino_loss, *wide, **options)
    for x, y in zip(found, want, strict=True):
        assert_near(x, y, 64)


@every_device
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("views", [(2, 2), (6, 2), (10, 2), (3, 1), (4, 3), (3, 3)], ids=str)
@pytest.mark.parametrize("centred", [False, True])
def test_matches_the_reference(
    centred: bool, views: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    of_student, of_teacher = views
    centre = [draw(21, device=device, scale=0.3)] if centred else []
    student = draw(of_student, 5, 21, dtype=dtype, device=device, scale=0.5)
    check(student, draw(of_teacher, 5, 21, dtype=dtype, device=device, scale=0.3), *centre)


@pytest.mark.parametrize("tile", [1, 50, 1000])
def test_tiles_match(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_features, "TILE", tile)
    check(draw(4, 7, 21), draw(2, 7, 21), draw(21))


@every_device
@pytest.mark.parametrize("temperatures", [(0.1, 0.04), (0.1, 0.07), (1.0, 1.0), (4.0, 20.0)])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_extreme_logits(scale: float, temperatures: tuple[float, float], device: str) -> None:
    """Where all of the teacher's probabilities but one are 0."""
    temperature, teacher_temperature = temperatures
    student = draw(4, 3, 30, device=device, scale=scale)
    teacher = draw(2, 3, 30, device=device, scale=scale)
    teacher[:, :, 7] = -torch.inf
    options = {"temperature": temperature, "teacher_temperature": teacher_temperature}
    assert dino_loss(student, teacher, **options).isfinite()
    check(student, teacher, **options)


@every_device
def test_formula_of_the_paper(device: str) -> None:
    """Algorithm 1, of two views: H(t1, s2) / 2 + H(t2, s1) / 2."""
    s, t, c = (draw(*x, device=device) for x in ((2, 6, 9), (2, 6, 9), (9,)))

    def h(t: Tensor, s: Tensor) -> Tensor:
        t, s = F.softmax((t - c) / 0.04, 1), F.log_softmax(s / 0.1, 1)
        return -(t * s).sum(1).mean()

    assert_close(dino_loss(s, t, c), h(t[0], s[1]) / 2 + h(t[1], s[0]) / 2)


@given(seed=st.integers(0, 99), shift=st.floats(-9, 9), views=st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_what_does_not_show(seed: int, shift: float, views: int) -> None:
    """A shift of logits, an order of classes, of images, and of local views."""
    generator = torch.Generator().manual_seed(seed)
    new = partial(torch.randn, generator=generator, dtype=DOUBLE)
    s, t, c = new(views, 4, 6), new(2, 4, 6), new(6)
    want = dino_loss(s, t, c)
    classes, images = (torch.randperm(n, generator=generator) for n in (6, 4))
    local = torch.cat([torch.arange(2), 2 + torch.randperm(views - 2, generator=generator)])
    assert_close(dino_loss(s + shift, t - shift, c), want)
    assert_close(dino_loss(s[..., classes], t[..., classes], c[classes]), want)
    assert_close(dino_loss(s[:, images], t[:, images], c), want)
    assert_close(dino_loss(s[local], t, c), want)
    # and it is no less than the entropy of the teacher
    p = ((t - c) / 0.04).softmax(-1)
    assert want > torch.special.entr(p).sum(-1).mean() - 1e-12


X, Y = torch.zeros(4, 3, 10), torch.zeros(2, 3, 10)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student": X[0]}, ValueError, "student: expected [views, batch, classes]"),
    ({"student": X[:1]}, ValueError, "student: expected 2 views or more"),
    ({"student": X[..., :1]}, ValueError, "student: expected [views, batch, classes] of 2"),
    ({"teacher": torch.zeros(5, 3, 10)}, ValueError, "teacher: expected the first of"),
    ({"teacher": Y[:, :2]}, ValueError, "teacher: expected the first of"),
    ({"teacher": Y[:0]}, ValueError, "teacher: expected the first of"),
    ({"teacher": Y.clone().requires_grad_()}, ValueError, "teacher: expected a constant"),
    ({"centre": torch.zeros(9)}, ValueError, "centre: expected [10], got [9]"),
    ({"centre": torch.zeros(10).requires_grad_()}, ValueError, "centre: expected a constant"),
    ({"temperature": 0.0}, ValueError, "temperature: expected a number > 0, got 0.0"),
    ({"teacher_temperature": -1.0}, ValueError, "teacher_temperature: expected a number > 0"),
    ({"teacher_temperature": torch.ones(())}, TypeError, "teacher_temperature: expected a number"),
    ({"student": [X]}, TypeError, "student: expected one tensor"),
    ({"teacher": Y.long()}, TypeError, "teacher: expected float32"),
]


@pytest.mark.parametrize(("changed", "error", "words"), BAD, ids=str)
def test_bad_input(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        dino_loss(**{"student": X, "teacher": Y} | changed)
    assert str(caught.value).startswith("dino_loss: ")
    assert words in str(caught.value)


# the centre


@every_device
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_centre_follows_the_teacher(dtype: torch.dtype, device: str) -> None:
    """After the loss; not in eval mode."""
    module, centre = DINOLoss(10, momentum=0.8).to(device), torch.zeros(10, device=device)
    for _ in range(3):
        s, t = (draw(*x, 3, 10, dtype=dtype, device=device) for x in ((4,), (2,)))
        leaf = s.requires_grad_()
        loss = module(leaf, t)
        assert_close(loss, dino_loss(leaf, t, centre))
        centre = 0.8 * centre + 0.2 * t.float().mean((0, 1))
        assert_close(module.centre, centre)
        loss.backward(retain_graph=True)  # from the centre of its forward
        loss.backward()
        assert_close(module.centre, centre)
        (want,) = torch.autograd.grad(loss := dino_loss(leaf, t, centre), leaf)
    module.eval()
    assert_close(module(leaf, t), loss)
    assert_close(module.centre, centre)
    assert list(module.state_dict()) == ["centre"]
    assert want.isfinite().all()


def test_empty_batch_leaves_the_centre() -> None:
    module = DINOLoss(10)
    module.centre.fill_(2.0)
    assert module(X[:, :0], Y[:, :0]) == 0
    assert (module.centre == 2).all()


def test_temperatures_of_a_call() -> None:
    module, s, t = DINOLoss(10, temperature=0.2, teacher_temperature=0.05), X + 0, draw(2, 3, 10)
    s = draw(4, 3, 10)
    want = dino_loss(s, t, torch.zeros(10), temperature=0.2, teacher_temperature=0.05)
    assert_close(module.eval()(s, t), want)
    want = dino_loss(s, t, torch.zeros(10), temperature=0.2, teacher_temperature=0.07)
    assert_close(module(s, t, 0.07), want)
    assert "teacher_temperature=0.05" in repr(module)
    with pytest.raises(ValueError, match="DINOLoss: momentum: expected 0 to 1, got 2"):
        DINOLoss(10, momentum=2)


PROCESS = """
import sys, torch, torch.distributed as dist
from vitkd_fast.nn import DINOLoss
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
s, t = (torch.randn(n, 6, 10, generator=generator) for n in (4, 2))
module, alone = DINOLoss(10), DINOLoss(10)
module(s[:, rank::2], t[:, rank::2])
dist.destroy_process_group()
alone(s, t)
torch.testing.assert_close(module.centre, alone.centre)
assert module.centre.abs().sum() > 0
"""


def test_centre_is_the_mean_over_processes(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path / "store")], cwd=tmp_path
        )
        for rank in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]


def test_compiled_module(compiled: Any) -> None:
    """In one graph, the centre's move included."""
    module, plain = DINOLoss(10), DINOLoss(10)
    function = compiled(module)
    for _ in range(2):
        s, t = draw(4, 3, 10), draw(2, 3, 10)
        for x, y in zip(results(function, s, t), results(plain, s, t), strict=True):
            assert_close(x, y)
        assert_close(module.centre, plain.centre)
