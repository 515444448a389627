"""The Triton kernels of kd_loss: interpreted, compiled without a GPU, and on one.

Interpreter and GPU run the other files of kd, whose comparisons with the float64 reference hold
for every backend.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from support.process_tools import files_of, run_in_interpreter, run_tests
from support.triton_tools import (
    INTERPRETED,
    assert_nothing_is_spilled,
    compile_only,
)

pytest.importorskip("triton")

from vitkd_fast import reference

pytestmark = pytest.mark.triton

SHARED = files_of("kd")

# in the interpreter


def test_in_the_interpreter(tmp_path: Path) -> None:
    run_in_interpreter(tmp_path, *SHARED, __file__, "-m", "interpreted and not gpu and not slow")


@pytest.mark.slow
def test_all_in_the_interpreter(tmp_path: Path) -> None:
    run_in_interpreter(tmp_path, *SHARED, "-m", "every_isa and not gpu")


# what Triton alone does, in the interpreter or on a GPU

only_triton = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter"),
        ),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    os.environ.get("VITKD_FAST_BACKEND") != "triton", reason="run by test_on_a_gpu"
                ),
            ],
        ),
    ],
)


@pytest.mark.interpreted
@only_triton
@pytest.mark.parametrize(
    ("shape", "kd_weight", "ce_weight"),
    [((4, 10), 1.0, 1.0), ((4, 10), 1.0, 0.0), ((4, 10), 0.0, 1.0), ((4, 5000), 1.0, 1.0)],
    ids=str,
)
def test_alone_label_out_of_range_gives_nan(
    shape: tuple[int, int], kd_weight: float, ce_weight: float, device: str
) -> None:
    """For its row alone, and nothing is read out of bounds; other rows are as without it."""
    from vitkd_fast.functional import kd_loss

    student, teacher = torch.randn(2, *shape, device=device)
    student.requires_grad_()
    good = torch.tensor([0, 1, 2, 3], device=device)
    options: dict[str, Any] = {"kd_weight": kd_weight, "ce_weight": ce_weight}
    for wrong in (shape[1], -1, 2**32 + 1):
        bad = torch.tensor([0, wrong, -100, 3], device=device)
        for labels in (bad, (good, bad, 0.5)):
            loss = kd_loss(student, teacher, labels=labels, reduction="none", **options)
            (grad,) = torch.autograd.grad(loss.sum(), student)
            assert loss.isnan().tolist() == [False, True, False, False]
            assert grad.isfinite().all(1).tolist() == [True, False, True, True]
            assert kd_loss(student, teacher, labels=labels, **options).isnan()


@pytest.mark.interpreted
@only_triton
@pytest.mark.parametrize("shape", [(4, 10), (4, 5000)], ids=str)
def test_alone_temperature_not_positive_gives_nan(shape: tuple[int, int], device: str) -> None:
    from vitkd_fast.functional import kd_loss

    student, teacher = torch.randn(2, *shape, device=device)
    student.requires_grad_()
    temperature = torch.tensor([4.0, 0.0, -1.0, torch.nan], device=device)
    for reduction in ("none", "sum"):
        loss = kd_loss(student, teacher, temperature=temperature, reduction=reduction)
        (grad,) = torch.autograd.grad(loss.sum(), student)
        assert loss.isnan().tolist() == ([False, True, True, True] if loss.dim() else True)
        assert grad.isfinite().all(1).tolist() == [True, False, False, False]


@pytest.mark.gpu
class TestGPU:
    def test_on_a_gpu(self, tmp_path: Path) -> None:
        """The quick forms, and what Triton alone does, where the operations are Triton's."""
        run_tests(
            tmp_path, ["-m", "pytest"], *SHARED, __file__,
            "-m", "interpreted and gpu and not slow", VITKD_FAST_BACKEND="triton",
        )  # fmt: skip


# compiled without a GPU


@pytest.fixture(params=[80, 90], ids="sm_{}".format)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return compile_only(monkeypatch, request.param, "kd")


FORMS = {
    "10": ((4096, 10), 1),
    "1000": ((4096, 1000), 1),
    "21841": ((4096, 21841), 1),
    "65536": ((640, 65536), 1),
    "dense": ((8, 150, 128, 128), 1),
}


def compile_all(form: str, dtype: torch.dtype, everything: bool) -> None:
    from vitkd_fast.kernels import kd

    def new(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    shape, class_dim = FORMS[form]
    logits = new(shape, dtype)
    rows = shape[:class_dim] + shape[class_dim + 1 :]
    options = reference.KDOptions(4.0, 1.0, class_dim, reference.MEAN)
    if everything:
        labels = new(rows, torch.int64)
        options = options._replace(
            labels=labels, labels_b=labels, lam_rows=new(rows), temperature_rows=new(()),
            row_weights=new(rows), ce_weight=0.5, label_smoothing=0.1,
        )  # fmt: skip
    loss, stats = kd.kd_fwd(logits, logits, *options)
    kd.kd_bwd(loss, logits, logits, stats, *options)
    loss, grad = kd.kd_fwd_grad(logits, logits, *options)
    kd.kd_scale_(grad, loss)


every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@every_dtype
@pytest.mark.parametrize("form", FORMS)
def test_compiled_without_spills(
    form: str, dtype: torch.dtype, compiled: list[Any], tmp_path: Path
) -> None:
    compile_all(form, dtype, everything=False)
    assert_nothing_is_spilled(compiled, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@every_dtype
@pytest.mark.parametrize("form", FORMS)
def test_compiled_with_every_option_without_spills(
    form: str, dtype: torch.dtype, compiled: list[Any], tmp_path: Path
) -> None:
    compile_all(form, dtype, everything=True)
    assert_nothing_is_spilled(compiled, tmp_path)
