"""KDLoss is kd_loss; what it and the losses like it say of arguments that are not accepted."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from support.kd_tools import (
    BFLOAT,
    NAN,
    OPTIONS,
    REDUCTIONS,
    draw,
    every_device,
    loss_and_grad,
    options_for,
    pair,
)
from vitkd_fast.functional import dkd_loss, js_loss, kd_loss, reverse_kl_loss, tv_loss
from vitkd_fast.nn import KDLoss

pytestmark = pytest.mark.usefixtures("one_thread")


# the module


@every_device
@pytest.mark.parametrize("name", OPTIONS)
def test_module_is_the_function(name: str, device: str) -> None:
    student, teacher = pair(2, 13, 5, dtype=BFLOAT, device=device)
    options = options_for(name, student, 1)
    for reduction in REDUCTIONS:
        options["reduction"] = reduction
        beside = {k: options[k] for k in ("labels", "row_weights") if k in options}
        module = KDLoss(**{k: v for k, v in options.items() if k not in beside})
        given = loss_and_grad(student, teacher, module, **beside)
        want = loss_and_grad(student, teacher, **options)
        assert torch.equal(given[0], want[0])
        assert torch.equal(given[1], want[1])


def test_module_says_what_it_is() -> None:
    text = repr(KDLoss(temperature=4.0, kd_weight=0.7, ce_weight=0.3, reduction="sum"))
    for said in ("temperature=4.0", "kd_weight=0.7", "ce_weight=0.3", "reduction='sum'"):
        assert said in text
    assert not KDLoss().state_dict()
    assert "compat" not in text
    assert "compat='hf'" in repr(KDLoss(compat="hf"))


def test_module_takes_a_library_s_scale() -> None:
    student, teacher = pair(6, 10)
    labels = torch.arange(6)
    module = KDLoss(temperature=2.0, kd_weight=0.3, compat="deit")
    want = kd_loss(
        student, teacher, labels=labels, temperature=2.0, kd_weight=0.3 / 10, ce_weight=0.7
    )
    assert_close(module(student, teacher, labels), want)


# bad input

STUDENT = torch.zeros(4, 10)
IDS = torch.tensor([0, 1, 2, 3])
DTYPES = "expected float32, float16, bfloat16 or float64"
LABELS = "an int64 tensor of class ids, or mixup's (labels_a, labels_b, lam)"
NUMBERS = "expected a number, a 0-dim tensor or one number per row, [4]"
POSITIVE = "expected a number > 0"


def on_meta(*shape: int) -> Tensor:
    return torch.ones(shape, device="meta")


BAD: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    # name: options, error, what is said of what was given, and of what is accepted
    "classes differ": ({"teacher": torch.zeros(4, 9)}, ValueError,
                       "teacher: [4, 9]", "the classes of student [4, 10]"),
    "rows differ": ({"teacher": torch.zeros(5, 10)}, ValueError,
                    "teacher: [5, 10]", "the shape of student [4, 10]"),
    "ranks differ": ({"teacher": torch.zeros(10)}, ValueError,
                     "teacher: [10]", "the shape of student [4, 10]"),
    "no dimension": ({"student": torch.zeros(()), "teacher": torch.zeros(())}, ValueError,
                     "class_dim: -1", "student []"),
    "no classes": ({"student": torch.zeros(4, 0), "teacher": torch.zeros(4, 0)}, ValueError,
                   "student: [4, 0]", "2 classes or more"),
    "class_dim high": ({"class_dim": 2}, ValueError, "class_dim: 2", "student [4, 10]"),
    "class_dim low": ({"class_dim": -3}, ValueError, "class_dim: -3", "student [4, 10]"),
    "student int": ({"student": STUDENT.long()}, TypeError, "student: torch.int64", DTYPES),
    "teacher int": ({"teacher": STUDENT.int()}, TypeError, "teacher: torch.int32", DTYPES),
    "student complex": ({"student": STUDENT.cfloat()}, TypeError,
                        "student: torch.complex64", DTYPES),
    "teacher float8": ({"teacher": STUDENT.to(torch.float8_e4m3fn)}, TypeError,
                       "teacher: torch.float8_e4m3fn", DTYPES),
    "teacher device": ({"teacher": on_meta(4, 10)}, ValueError,
                       "teacher: meta", "the device of student, cpu"),
    "labels device": ({"labels": IDS.to("meta")}, ValueError,
                      "labels: meta", "the device of student, cpu"),
    "temperature device": ({"temperature": on_meta(4)}, ValueError,
                           "temperature: meta", "the device of student, cpu"),
    "lam device": ({"labels": (IDS, IDS, on_meta())}, ValueError,
                   "lam: meta", "the device of student, cpu"),
    "weights device": ({"row_weights": on_meta(4)}, ValueError,
                       "row_weights: meta", "the device of student, cpu"),
    "reduction": ({"reduction": "avg"}, ValueError,
                  "reduction: 'avg'", "expected mean, sum or none"),
    "T 0": ({"temperature": 0}, ValueError, "temperature: 0", POSITIVE),
    "T negative": ({"temperature": -1.5, "labels": IDS}, ValueError,
                   "temperature: -1.5", POSITIVE),
    "T nan": ({"temperature": NAN}, ValueError, "temperature: nan", POSITIVE),
    "T shape": ({"temperature": torch.ones(10)}, ValueError,
                "temperature: [10]", NUMBERS),
    "T tensor 0": ({"temperature": torch.tensor([1.0, 2.0, 0.0, 1.0])}, RuntimeError,
                   "temperature: 0 for row 2", POSITIVE),
    "T tensor nan": ({"temperature": torch.tensor(NAN), "reduction": "none"}, RuntimeError,
                     "temperature: nan for row 0", POSITIVE),
    "no labels": ({"ce_weight": 0.5}, ValueError, "labels: None", LABELS),
    "smoothing < 0": ({"labels": IDS, "label_smoothing": -0.1}, ValueError,
                      "label_smoothing: -0.1", "expected 0 to 1"),
    "smoothing > 1": ({"labels": IDS, "label_smoothing": 1.5}, ValueError,
                      "label_smoothing: 1.5", "expected 0 to 1"),
    "labels int32": ({"labels": IDS.int()}, ValueError, "labels: torch.int32 [4]", LABELS),
    "labels shape": ({"labels": IDS[:3]}, ValueError,
                     "labels: torch.int64 [3]", "the rows' shape [4]"),
    "labels dense": ({"labels": STUDENT.softmax(-1), "ce_weight": 1.0}, ValueError,
                     "labels: torch.float32 [4, 10] (dense soft labels are not", LABELS),
    "labels one-hot": ({"labels": F.one_hot(IDS, 10)}, ValueError,
                       "labels: torch.int64 [4, 10]", "the rows' shape [4]"),
    "labels number": ({"labels": 3}, TypeError, "labels: a int", LABELS),
    "labels list": ({"labels": [0, 1, 2, 3]}, ValueError, "labels: a list of 4", LABELS),
    "mixup of 2": ({"labels": (IDS, IDS)}, ValueError, "labels: a tuple of 2", LABELS),
    "mixup a": ({"labels": (IDS[:2], IDS, 0.5)}, ValueError, "labels: torch.int64 [2]", "[4]"),
    "mixup b": ({"labels": (IDS, IDS.float(), 0.5)}, ValueError,
                "labels_b: torch.float32 [4]", LABELS),
    "mixup None": ({"labels": (IDS, None, 0.5)}, TypeError, "labels_b: a NoneType", LABELS),
    "lam > 1": ({"labels": (IDS, IDS, 1.5)}, ValueError, "lam: 1.5", "expected 0 to 1"),
    "lam < 0": ({"labels": (IDS, IDS, -0.5)}, ValueError, "lam: -0.5", "expected 0 to 1"),
    "lam shape": ({"labels": (IDS, IDS, torch.ones(4, 1))}, ValueError,
                  "lam: [4, 1]", NUMBERS),
    "weights list": ({"row_weights": [1, 1, 1, 1]}, TypeError,
                     "row_weights: a list of 4", "one tensor"),
    "weight tensor": ({"kd_weight": torch.ones(())}, TypeError, "kd_weight: a tensor", "a number"),
    "ce_weight tensor": ({"ce_weight": torch.ones(()), "labels": IDS}, TypeError,
                         "ce_weight: a tensor", "a number"),
    "teacher grad": ({"teacher": STUDENT.clone().requires_grad_()}, ValueError,
                     "teacher: a tensor that requires grad", "a constant"),
    "student list": ({"student": [STUDENT]}, TypeError, "student: a list of 1", "one tensor"),
    "weights shape": ({"row_weights": torch.ones(4, 10)}, ValueError,
                      "row_weights: [4, 10]", "one number per row, [4]"),
    "label high": ({"labels": torch.tensor([0, 10, 2, 3])}, RuntimeError,
                   "labels: 10 for row 1", "expected 0 to 9 or ignore_index -100"),
    "label low": ({"labels": torch.tensor([0, 1, 2, -1]), "ignore_index": 255}, RuntimeError,
                  "labels: -1 for row 3", "expected 0 to 9 or ignore_index 255"),
    "label b high": ({"labels": (IDS, torch.tensor([9, 8, 99, 0]), 0.5), "ce_weight": 1.0},
                     RuntimeError, "labels: 99 for row 2", "expected 0 to 9"),
}  # fmt: skip


# of the losses that take more than the rows' options
OF_ONE: dict[str, tuple[str, dict[str, Any], type[Exception], str, str]] = {
    "js beta 0": ("js", {"beta": 0}, ValueError, "beta: 0", "a number between 0 and 1"),
    "js beta 1": ("js", {"beta": 1.0}, ValueError, "beta: 1.0", "a number between 0 and 1"),
    "js beta nan": ("js", {"beta": NAN}, ValueError, "beta: nan", "a number between 0 and 1"),
    "js beta tensor": ("js", {"beta": torch.tensor(0.5, requires_grad=True)}, TypeError,
                       "beta: a tensor", "a number"),
    "dkd alpha tensor": ("dkd", {"alpha": torch.ones(())}, TypeError,
                         "alpha: a tensor", "a number"),
    "dkd beta tensor": ("dkd", {"beta": torch.ones(4)}, TypeError, "beta: a tensor", "a number"),
    "dkd no labels": ("dkd", {"labels": None}, TypeError,
                      "labels: NoneType", "an int64 tensor of class ids"),
    "dkd mixup": ("dkd", {"labels": (IDS, IDS, 0.5)}, TypeError,
                  "labels: tuple", "an int64 tensor of class ids"),
}  # fmt: skip
LOSSES: dict[str, Callable[..., Tensor]] = {
    "kd": kd_loss,
    "kd standardised": partial(kd_loss, standardize=True),
    "reverse_kl": reverse_kl_loss,
    "js": js_loss,
    "tv": tv_loss,
    "dkd": partial(dkd_loss, labels=IDS),
}


def applies(name: str, loss: str) -> bool:
    """Not where dkd_loss, which always has labels and none that are mixed, says its own."""
    labels = BAD[name][0].get("labels", IDS)
    return loss != "dkd" or (isinstance(labels, Tensor) and name != "no labels")


@pytest.mark.parametrize(
    ("loss", "name"),
    [(loss, name) for loss in LOSSES for name in BAD if applies(name, loss)],
)
def test_bad_input(loss: str, name: str) -> None:
    """The error names the argument, what was given and what is accepted, whatever is asked for."""
    assert_said(loss, *BAD[name])


@pytest.mark.parametrize("name", OF_ONE)
def test_bad_input_of_one_loss(name: str) -> None:
    assert_said(*OF_ONE[name])


def assert_said(
    loss: str, options: dict[str, Any], error: type[Exception], given: str, accepted: str
) -> None:
    argument, got = given.split(": ")
    # what is in a tensor is looked at by the operation, which is of several losses
    operation = "row_loss" if error is RuntimeError and loss != "kd" else f"{loss.split()[0]}_loss"
    for student in (STUDENT, STUDENT.clone().requires_grad_()):
        with pytest.raises(error) as caught:
            LOSSES[loss](**{"student": student, "teacher": STUDENT} | options)
        said = str(caught.value)
        assert f"{operation}: {argument}: expected " in said
        assert f"got {got}" in said
        assert accepted in said


def test_label_out_of_range_is_no_error_where_its_row_is_ignored() -> None:
    """-1 and 255 are common for "no label"."""
    labels = torch.tensor([255, 1, 2, 255])
    student = draw(4, 10)
    loss = kd_loss(student, STUDENT, labels=labels, ce_weight=1.0, ignore_index=255)
    assert_close(loss, kd_loss(student[1:3], STUDENT[1:3], labels=labels[1:3], ce_weight=1.0))


@pytest.mark.gpu
def test_tensors_on_different_devices() -> None:
    student = STUDENT.cuda()
    for name, options in {
        "teacher": {"teacher": STUDENT},
        "labels": {"labels": IDS},
        "temperature": {"temperature": torch.ones(())},
        "row_weights": {"row_weights": torch.ones(4)},
    }.items():
        with pytest.raises(
            ValueError, match=f"{name}: expected the device of student, cuda:0, got cpu"
        ):
            kd_loss(**{"student": student, "teacher": student} | options)
