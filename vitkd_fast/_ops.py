"""The table of operations: schema, fake and reference of each, and the backend of each device.

Importing this module registers `torch.ops.vitkd_fast.*`. The reference is the composite kernel;
the compiled extension `_C`, where it was built, overrides it on the CPU and, where it was built
with CUDA, on the GPU; Triton implements CUDA where C++ does not, or was built for newer GPUs.
`VITKD_FAST_BACKEND` (read here, once) forces `reference`, `triton` or `cuda`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from . import reference

_NAMESPACE = "vitkd_fast"
_BUILD = (
    'beside torch, "setuptools>=77", pybind11 and ninja, `pip install --no-build-isolation '
    "--no-deps .` in a checkout builds it for this torch, and VITKD_FAST_BACKEND=reference goes "
    "without it"
)
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key


def _loss_like(student: Tensor, o: Any) -> Tensor:
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    shape = list(student.shape)
    del shape[o.class_dim]
    return student.new_empty(shape if o.reduction == reference.NONE else [], dtype=dtype)


def _kd_fwd_fake(student: Tensor, teacher: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    o = reference.KDOptions(*options)
    rows = 1
    for i, size in enumerate(student.shape):
        rows = rows if i == o.class_dim else rows * size
    loss = _loss_like(student, o)
    return loss, loss.new_empty([6, rows])


def _kd_fwd_grad_fake(student: Tensor, teacher: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _loss_like(student, reference.KDOptions(*options)), torch.empty_like(student)


def _kd_bwd_fake(grad_loss: Tensor, student: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(student)


def _kd_topk_loss_like(student: Tensor, reduction: int) -> Tensor:
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.new_empty(student.shape[:-1] if reduction == reference.NONE else [], dtype=dtype)


def _kd_topk_fwd_fake(
    student: Tensor, indices: Tensor, values: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    loss = _kd_topk_loss_like(student, reference.KDTopKOptions(*options).reduction)
    rows = 1
    for size in student.shape[:-1]:
        rows = rows * size
    return loss, loss.new_empty([6, rows])


def _kd_topk_fwd_grad_fake(
    student: Tensor, indices: Tensor, values: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    loss = _kd_topk_loss_like(student, reference.KDTopKOptions(*options).reduction)
    return loss, torch.empty_like(student)


def _attention_map_fwd_fake(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    rows = q_s.shape[:3]
    every = reference.AttentionMapOptions(*options).reduction == reference.NONE
    loss = q_s.new_empty(rows if every else [], dtype=torch.float32)
    return loss, loss.new_empty([3, *rows])


def _attention_map_bwd_fake(
    grad_loss: Tensor, q_s: Tensor, k_s: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_s), torch.empty_like(k_s)


def _attention_map_fwd_grad_fake(
    q_s: Tensor, k_s: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    loss = q_s.new_empty([], dtype=torch.float32)
    return loss, torch.empty_like(q_s), torch.empty_like(k_s)


def _nothing(*args: Any) -> None:
    return None


def _int8_dwconv_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(reference.int8_dwconv_shape(x, *rest))


def _int8_pwconv_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(reference.int8_pwconv_shape(x, *rest))


def _rkd_fwd_grad_fake(gram_s: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return gram_s.new_empty([]), gram_s.new_empty(gram_s.shape)


def _row_loss_fwd_fake(student: Tensor, teacher: Tensor, *options: Any) -> Tensor:
    return _loss_like(student, reference.RowLossOptions(*options))


def _row_loss_bwd_fake(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    o = reference.RowLossOptions(*options)
    rows = _loss_like(student, o._replace(reduction=reference.NONE))
    if not o.wants_temperature:
        rows = rows.new_empty(0)
    return torch.empty_like(student), rows


def _row_loss_fwd_grad_fake(
    student: Tensor, teacher: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    loss = _row_loss_fwd_fake(student, teacher, *options)
    return loss, *_row_loss_bwd_fake(loss, student, teacher, *options)


def _dist_moments_fake(student: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows, classes = student.shape
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    columns = student.new_empty([5, classes], dtype=torch.float64)
    return student.new_empty([7, rows], dtype=wide), columns


def _dist_bwd_fake(grad_loss: Tensor, student: Tensor, *rest: Any) -> Tensor:
    return student.new_empty(student.shape)


def _binary_kd_fwd_fake(student: Tensor, teacher: Tensor, *options: Any) -> Tensor:
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    every = reference.BinaryKDOptions(*options).reduction == reference.NONE
    return student.new_empty(student.shape[:1] if every else [], dtype=dtype)


def _binary_kd_fwd_grad_fake(
    student: Tensor, teacher: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    loss = _binary_kd_fwd_fake(student, teacher, *options)
    return loss, student.new_empty(student.shape)


def _binary_kd_bwd_fake(grad_loss: Tensor, student: Tensor, *rest: Any) -> Tensor:
    return student.new_empty(student.shape)


def _at_fwd_grad_fake(
    f_s: Tensor, f_t: Tensor, p: int, reduction: int, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if f_s.dtype == torch.float64 else torch.float32
    loss = f_s.new_empty(f_s.shape[:1] if reduction == reference.NONE else [], dtype=dtype)
    if not wants_grad:
        return loss, f_s.new_empty(0)
    return loss, torch.empty_like(f_s, dtype=reference.formed_dtype(f_s))


def _wkd_feature_fwd_grad_fake(
    f_s: Tensor, f_t: Tensor, mean_weight: float, reduction: int, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    return _at_fwd_grad_fake(f_s, f_t, 2, reduction, wants_grad)


class Operation(NamedTuple):
    schema: str
    fake: Callable
    reference: Callable
    stem: str  # kernels/<stem>.py holds the Triton launchers; none: CUDA runs the reference

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]

    @property
    def has_cuda(self) -> bool:
        """Else the reference serves CUDA, whatever VITKD_FAST_BACKEND says."""
        return importlib.util.find_spec(f"vitkd_fast.kernels.{self.stem}") is not None


def _schema_of(options: type) -> str:
    """The fields of a NamedTuple, as in "int kind, int reduction, bool allow_tf32=False"."""
    types = {float: "float", int: "int", bool: "bool", Tensor | None: "Tensor?"}
    defaults = options._field_defaults  # type: ignore[attr-defined]
    return ", ".join(
        f"{types[kind]} {name}" + (f"={defaults[name]}" if name in defaults else "")
        for name, kind in get_type_hints(options).items()
    )


_KD_OPTIONS = _schema_of(reference.KDOptions)
_ROW_OPTIONS = _schema_of(reference.RowLossOptions)
_TOPK_OPTIONS = _schema_of(reference.KDTopKOptions)
_TOPK = "Tensor student, Tensor indices, Tensor values"
_MAP_OPTIONS = _schema_of(reference.AttentionMapOptions)
_BINARY_OPTIONS = _schema_of(reference.BinaryKDOptions)
_MAPS = "Tensor q_s, Tensor k_s, Tensor q_t, Tensor k_t"

OPERATIONS = [
    Operation(
        f"kd_fwd(Tensor student, Tensor teacher, {_KD_OPTIONS}) -> (Tensor loss, Tensor stats)",
        _kd_fwd_fake, reference.kd_fwd, "kd",
    ),
    Operation(
        f"kd_fwd_grad(Tensor student, Tensor teacher, {_KD_OPTIONS}) -> (Tensor loss, Tensor grad)",
        _kd_fwd_grad_fake, reference.kd_fwd_grad, "kd",
    ),
    Operation(
        "kd_bwd(Tensor grad_loss, Tensor student, Tensor teacher, Tensor stats, "
        f"{_KD_OPTIONS}) -> Tensor",
        _kd_bwd_fake, reference.kd_bwd, "kd",
    ),
    Operation(
        "kd_scale_(Tensor(a!) grad, Tensor factor) -> ()",
        _nothing, reference.kd_scale_, "kd",
    ),
    Operation(
        f"row_loss_fwd(Tensor student, Tensor teacher, {_ROW_OPTIONS}) -> Tensor",
        _row_loss_fwd_fake, reference.row_loss_fwd, "row_loss",
    ),
    Operation(
        f"row_loss_fwd_grad(Tensor student, Tensor teacher, {_ROW_OPTIONS}) "
        "-> (Tensor loss, Tensor grad, Tensor grad_temperature)",
        _row_loss_fwd_grad_fake, reference.row_loss_fwd_grad, "row_loss",
    ),
    Operation(
        "row_loss_bwd(Tensor grad_loss, Tensor student, Tensor teacher, "
        f"{_ROW_OPTIONS}) -> (Tensor grad, Tensor grad_temperature)",
        _row_loss_bwd_fake, reference.row_loss_bwd, "row_loss",
    ),
    Operation(
        f"kd_topk_fwd({_TOPK}, {_TOPK_OPTIONS}) -> (Tensor loss, Tensor stats)",
        _kd_topk_fwd_fake, reference.kd_topk_fwd, "kd_topk",
    ),
    Operation(
        f"kd_topk_fwd_grad({_TOPK}, {_TOPK_OPTIONS}) -> (Tensor loss, Tensor grad)",
        _kd_topk_fwd_grad_fake, reference.kd_topk_fwd_grad, "kd_topk",
    ),
    Operation(
        f"kd_topk_bwd(Tensor grad_loss, {_TOPK}, Tensor stats, {_TOPK_OPTIONS}) -> Tensor",
        _kd_bwd_fake, reference.kd_topk_bwd, "kd_topk",
    ),
    Operation(
        f"attention_map_fwd({_MAPS}, {_MAP_OPTIONS}) -> (Tensor loss, Tensor stats)",
        _attention_map_fwd_fake, reference.attention_map_fwd, "attention_map",
    ),
    Operation(
        f"attention_map_fwd_grad({_MAPS}, {_MAP_OPTIONS}) -> (Tensor loss, Tensor d_q, Tensor d_k)",
        _attention_map_fwd_grad_fake, reference.attention_map_fwd_grad, "attention_map",
    ),
    Operation(
        f"attention_map_bwd(Tensor grad_loss, {_MAPS}, Tensor stats, {_MAP_OPTIONS}) "
        "-> (Tensor d_q, Tensor d_k)",
        _attention_map_bwd_fake, reference.attention_map_bwd, "attention_map",
    ),
    Operation(
        "int8_dwconv(Tensor x, Tensor weight, Tensor bias, Tensor multiplier, int[2] stride, "
        "int[4] padding, int x_zero_point, int y_zero_point, int lo, int hi, "
        "float? hardswish_scale=None) -> Tensor",
        _int8_dwconv_fake, reference.int8_dwconv, "int8_dwconv",
    ),
    Operation(
        "int8_pwconv(Tensor x, Tensor weight, Tensor bias, Tensor multiplier, int y_zero_point, "
        "int lo, int hi, float? hardswish_scale=None) -> Tensor",
        _int8_pwconv_fake, reference.int8_pwconv, "int8_pwconv",
    ),
    Operation(
        "rkd_fwd_grad(Tensor gram_s, Tensor gram_t, float distance_weight, float angle_weight) "
        "-> (Tensor loss, Tensor grad)",
        _rkd_fwd_grad_fake, reference.rkd_fwd_grad, "rkd",
    ),
    Operation(
        "dist_moments(Tensor student, Tensor teacher, float temperature) "
        "-> (Tensor stats, Tensor columns)",
        _dist_moments_fake, reference.dist_moments, "dist",
    ),
    Operation(
        "dist_bwd(Tensor grad_loss, Tensor student, Tensor teacher, Tensor stats, "
        "Tensor row_factors, Tensor column_factors, float temperature) -> Tensor",
        _dist_bwd_fake, reference.dist_bwd, "dist",
    ),
    Operation(
        f"binary_kd_fwd(Tensor student, Tensor teacher, {_BINARY_OPTIONS}) -> Tensor",
        _binary_kd_fwd_fake, reference.binary_kd_fwd, "binary_kd",
    ),
    Operation(
        f"binary_kd_fwd_grad(Tensor student, Tensor teacher, {_BINARY_OPTIONS}) "
        "-> (Tensor loss, Tensor grad)",
        _binary_kd_fwd_grad_fake, reference.binary_kd_fwd_grad, "binary_kd",
    ),
    Operation(
        "binary_kd_bwd(Tensor grad_loss, Tensor student, Tensor teacher, "
        f"{_BINARY_OPTIONS}) -> Tensor",
        _binary_kd_bwd_fake, reference.binary_kd_bwd, "binary_kd",
    ),
    Operation(
        "at_fwd_grad(Tensor f_s, Tensor f_t, int p, int reduction, bool wants_grad) "
        "-> (Tensor loss, Tensor grad)",
        _at_fwd_grad_fake, reference.at_fwd_grad, "at",
    ),
    Operation(
        "wkd_feature_fwd_grad(Tensor f_s, Tensor f_t, float mean_weight, int reduction, "
        "bool wants_grad) -> (Tensor loss, Tensor grad)",
        _wkd_feature_fwd_grad_fake, reference.wkd_feature_fwd_grad, "wkd_feature",
    ),
]  # fmt: skip


def _backend() -> str:
    backend = os.environ.get("VITKD_FAST_BACKEND", "")
    if backend not in ("", "reference", "triton", "cuda"):
        raise ValueError(f"VITKD_FAST_BACKEND: expected reference, triton or cuda, got {backend!r}")
    return backend


def _exactly(function: Callable) -> Callable:
    """In the dtypes that are written, inside an autocast region too."""

    @functools.wraps(function)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return run


def _register(backend: str) -> torch.library.Library:
    library = torch.library.Library(_NAMESPACE, "DEF")
    for op in OPERATIONS:
        library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(op.name, _exactly(op.reference), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{op.name}", op.fake, lib=library)
    if backend == "reference":
        return library
    if importlib.util.find_spec("vitkd_fast._C"):
        try:
            importlib.import_module("vitkd_fast._C")
        except ImportError as error:  # such as no libcudart, in a torch without CUDA
            raise ImportError(
                f"vitkd_fast._C does not load in torch {torch.__version__}: {error}; {_BUILD}"
            ) from error
    elif backend != "triton":
        raise ImportError(
            f"torch {torch.__version__} is here, but vitkd_fast was built without torch, and so "
            f"without its operations (vitkd_fast._C); {_BUILD}"
        )
    core: Any = sys.modules.get(f"{__package__}._C")
    for op in OPERATIONS:
        if not op.has_cuda:
            continue
        compiled = _has_kernel(f"{_NAMESPACE}::{op.name}", "CUDA")
        if backend == "cuda" and not compiled:
            raise ImportError(
                f"VITKD_FAST_BACKEND=cuda: {op.name} has no CUDA C++ kernel in this build; "
                "rebuild with VITKD_FAST_CUDA=1"
            )
        if importlib.util.find_spec("triton") and (backend == "triton" or not compiled):
            _serve_by_triton(op, library)
    if backend == "" and core and core.cuda:
        # torch calls this once it has initialised CUDA, which an import must not do
        torch.cuda._lazy_call(functools.partial(_replace_unfit_kernels, library, core.cuda))
    return library


def _serve_by_triton(op: Operation, library: torch.library.Library) -> None:
    kernels = importlib.import_module(f"vitkd_fast.kernels.{op.stem}")
    library.impl(op.name, getattr(kernels, op.name), "CUDA", allow_override=True)
    _replaced[op.name] = "Triton"


def _runs_on(built_for: str, capability: tuple[int, int]) -> bool:
    """Whether a build such as "13.0 (8.0;9.0+PTX)" has kernels for that compute capability."""
    for name in re.split("[; ]+", built_for.partition("(")[2].rstrip(")")):
        found = re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", name)
        if found is None:  # a family's name, or a feature set such as 9.0a
            return True
        major, minor = int(found[1]), int(found[2])
        if (major == capability[0] and minor <= capability[1]) or (
            found[3] and (major, minor) <= capability
        ):
            return True
    return False


def _replace_unfit_kernels(library: torch.library.Library, built_for: str) -> None:
    """Triton, else the reference, in place of CUDA C++ that was built for none but newer GPUs."""
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if all(_runs_on(built_for, gpu) for gpu in gpus):
        return
    for op in OPERATIONS:
        if not _has_kernel(f"{_NAMESPACE}::{op.name}", "CUDA"):
            continue
        if importlib.util.find_spec("triton"):
            _serve_by_triton(op, library)
        else:
            library.impl(op.name, _exactly(op.reference), "CUDA", allow_override=True)
            _replaced[op.name] = "reference"


_replaced: dict[str, str] = {}  # what implements operations on CUDA that C++ does not
_library = _register(_backend())  # kept: a Library that is collected takes its kernels along


def backends() -> dict[str, dict[str, str]]:
    """The backend of each operation, e.g. {"kd_fwd": {"CPU": "C++", "CUDA": "CUDA C++"}}."""

    def cuda(name: str) -> str:
        if name in _replaced:
            return _replaced[name]
        return "CUDA C++" if _has_kernel(f"{_NAMESPACE}::{name}", "CUDA") else "reference"

    def cpu(name: str) -> str:
        return "C++" if _has_kernel(f"{_NAMESPACE}::{name}", "CPU") else "reference"

    return {op.name: {"CPU": cpu(op.name), "CUDA": cuda(op.name)} for op in OPERATIONS}
