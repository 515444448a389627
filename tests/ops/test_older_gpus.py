"""GPUs that are older than those that the CUDA kernels were built for, as torch describes them."""

from pathlib import Path

import pytest

from support.process_tools import python
from vitkd_fast import _ops


@pytest.mark.parametrize(
    ("built_for", "capability", "want"),
    [
        ("13.0 (8.0;8.6;8.9;9.0+PTX;10.0;12.0)", (7, 5), False),
        ("13.0 (8.0;8.6;8.9;9.0+PTX;10.0;12.0)", (8, 7), True),
        ("13.0 (8.0;8.6;8.9;9.0+PTX;10.0;12.0)", (10, 3), True),
        ("13.0 (9.0+PTX)", (8, 9), False),
        ("13.0 (9.0+PTX)", (12, 0), True),
        ("13.0 (9.0)", (12, 0), False),
        ("13.0 (8.6)", (8, 0), False),
        ("12.8 (8.0 9.0)", (8, 6), True),
        ("12.8 (9.0a)", (8, 6), True),
        ("12.8 (Hopper)", (8, 6), True),
    ],
    ids=str,
)
def test_architectures_that_a_gpu_runs(
    built_for: str, capability: tuple[int, int], want: bool
) -> None:
    """By CUDA's rules: of its generation, or from PTX that is not newer; if in doubt, yes."""
    assert _ops._runs_on(built_for, capability) == want


SERVED = """if True:
    import sys
    import torch
    sys.modules["triton"] = {triton}
    torch.cuda.is_initialized = lambda: {initialised}
    torch.cuda.device_count = lambda: 2
    torch.cuda.get_device_capability = lambda i=None: [(12, 0), ({major}, 5)][i]
    from vitkd_fast import _ops
    print(sorted({{_ops.backends()[op.name]["CUDA"] for op in _ops.OPERATIONS if op.has_cuda}}))
    print(sorted({{_ops.backends()[op.name]["CUDA"] for op in _ops.OPERATIONS if not op.has_cuda}}))
"""


@pytest.mark.parametrize(
    ("major", "initialised", "triton", "want"),
    [
        (7, True, "__import__('triton')", "Triton"),
        pytest.param(7, True, "None", "reference", marks=pytest.mark.slow),
        pytest.param(12, True, "__import__('triton')", "CUDA C++", marks=pytest.mark.slow),
        # until torch has initialised CUDA, nothing is asked and nothing changed
        pytest.param(7, False, "__import__('triton')", "CUDA C++", marks=pytest.mark.slow),
    ],
)
def test_an_older_gpu_is_served_without_cuda_cpp(
    major: int, initialised: bool, triton: str, want: str, tmp_path: Path
) -> None:
    """One of two, as one kernel serves both."""
    pytest.importorskip("triton")
    if _ops.backends()["kd_fwd"]["CUDA"] != "CUDA C++":
        pytest.skip("the extension was built without CUDA")
    code = SERVED.format(major=major, initialised=initialised, triton=triton)
    result = python(code, tmp_path)
    assert result.stdout.splitlines() == [f"['{want}']", "['reference']"], result.stderr
