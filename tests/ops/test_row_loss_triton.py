"""The Triton kernel of the row losses: interpreted, compiled without a GPU, and on one.

Interpreter and GPU run test_row_loss_ops.py, whose comparisons with the float64 reference hold for
every backend.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from support.process_tools import files_of, run_in_interpreter, run_tests
from support.triton_tools import INTERPRETED, assert_nothing_is_spilled, compile_only
from vitkd_fast import reference

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]

SHARED = files_of("row_loss")


def test_in_the_interpreter(tmp_path: Path) -> None:
    run_in_interpreter(tmp_path, *SHARED, "-m", "interpreted and not gpu and not slow")


@pytest.mark.slow
def test_all_in_the_interpreter(tmp_path: Path) -> None:
    run_in_interpreter(tmp_path, *SHARED, "-m", "(every_isa or interpreted) and not gpu")


@pytest.mark.gpu
class TestGPU:
    def test_on_a_gpu(self, tmp_path: Path) -> None:
        run_tests(
            tmp_path, ["-m", "pytest"], *SHARED, "-m", "interpreted and gpu and not slow",
            VITKD_FAST_BACKEND="triton",
        )  # fmt: skip


@pytest.fixture(params=[80, 90], ids="sm_{}".format)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    compile_only(monkeypatch, request.param, "kd")  # what adds up the rows' weights
    return compile_only(monkeypatch, request.param, "row_loss")


FORMS = {
    "10": ((4096, 10), 1),
    "1000": ((4096, 1000), 1),
    "4096": ((4096, 4096), 1),
    "32768": ((640, 32768), 1),
    "dense": ((8, 150, 128, 128), 1),
}


def compile_all(form: str, divergence: str, dtype: torch.dtype, everything: bool) -> None:
    from vitkd_fast.kernels import row_loss

    def new(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    shape, class_dim = FORMS[form]
    logits = new(shape, dtype)
    rows = shape[:class_dim] + shape[class_dim + 1 :]
    labels = new(rows, torch.int64)
    options: dict[str, Any] = {"labels": labels} if divergence in ("dkd", "ofa") else {}
    if everything:
        if not options:
            options = {"labels": labels, "labels_b": labels, "lam_rows": new(rows)}
        options |= {"temperature_rows": new(()), "row_weights": new(rows), "ce_weight": 0.5}
        options |= {"label_smoothing": 0.1, "standardize": True, "wants_temperature": True}
    o = reference.RowLossOptions(
        reference.DIVERGENCES[divergence], 4.0, 1.0, class_dim, reference.MEAN, **options
    )
    loss, _, _ = row_loss.row_loss_fwd_grad(logits, logits, *o)
    if not everything:
        row_loss.row_loss_fwd(logits, logits, *o)
        row_loss.row_loss_bwd(loss, logits, logits, *o)


def compile_and_check(
    form: str, divergence: str, dtype: torch.dtype, everything: bool, compiled: list[Any],
    folder: Path,
) -> None:  # fmt: skip
    compile_all(form, divergence, dtype, everything)
    assert_nothing_is_spilled(compiled, folder)


@pytest.mark.parametrize(
    ("form", "divergence", "dtype", "everything"),
    [("1000", "js", torch.bfloat16, False), ("32768", "dkd", torch.float32, True)],
    ids=str,
)
def test_compiled_without_spills(
    form: str, divergence: str, dtype: torch.dtype, everything: bool, compiled: list[Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    compile_and_check(form, divergence, dtype, everything, compiled, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("divergence", reference.DIVERGENCES)
@pytest.mark.parametrize("form", FORMS)
def test_all_compiled_without_spills(
    form: str, divergence: str, dtype: torch.dtype, everything: bool, compiled: list[Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    compile_and_check(form, divergence, dtype, everything, compiled, tmp_path)
