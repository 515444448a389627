"""What attention_map_loss and its operations say of arguments that are not accepted."""

from typing import Any

import pytest
import torch
from torch import Tensor

from support.attention_map_tools import DOUBLE, DTYPES, HALF, NAN, OPERATIONS, OPS, Maps, sized
from vitkd_fast import _ops, reference
from vitkd_fast.functional import attention_map_loss

pytestmark = pytest.mark.usefixtures("one_thread")

GIVEN = dict(
    zip(Maps._fields, (torch.zeros(2, 3, n, d) for d in (4, 6) for n in (5, 7)), strict=True)
)

BAD: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    # name: arguments, error, what is said of what was given, and of what is accepted
    "q_s int": ({"q_s": GIVEN["q_s"].int()}, TypeError, "q_s: torch.int32", DTYPES),
    "k_s complex": ({"k_s": GIVEN["k_s"].cfloat()}, TypeError, "k_s: torch.complex64", DTYPES),
    "q_t bool": ({"q_t": GIVEN["q_t"].bool()}, TypeError, "q_t: torch.bool", DTYPES),
    "k_t float8": ({"k_t": GIVEN["k_t"].to(torch.float8_e4m3fn)}, TypeError,
                   "k_t: torch.float8_e4m3fn", DTYPES),
    "q_s 3-D": ({"q_s": sized(3, 5, 4)}, ValueError, "q_s: [3, 5, 4]",
                "expected [batch, heads, tokens, dim]"),
    "k_s 5-D": ({"k_s": sized(1, 2, 3, 7, 4)}, ValueError, "k_s: [1, 2, 3, 7, 4]",
                "expected [batch, heads, tokens, dim]"),
    "k_t 0-D": ({"k_t": sized()}, ValueError, "k_t: []",
                "expected [batch, heads, tokens, dim]"),
    "k_s device": ({"k_s": GIVEN["k_s"].to("meta")}, ValueError, "k_s: meta",
                   "the device of q_s, cpu"),
    "q_t device": ({"q_t": GIVEN["q_t"].to("meta")}, ValueError, "q_t: meta",
                   "the device of q_s, cpu"),
    "batch": ({"k_s": sized(1, 3, 7, 4)}, ValueError,
              "k_s: [1, 3, 7, 4]", "the batch of q_s [2, 3, 5, 4]"),
    "heads": ({"k_s": sized(2, 1, 7, 4)}, ValueError,
              "k_s: [2, 1, 7, 4]", "the heads of q_s [2, 3, 5, 4]"),
    "dim": ({"k_s": sized(2, 3, 7, 6)}, ValueError,
            "k_s: [2, 3, 7, 6]", "the dim of q_s [2, 3, 5, 4]"),
    "teacher's batch": ({"k_t": sized(1, 3, 7, 6)}, ValueError,
                        "k_t: [1, 3, 7, 6]", "the batch of q_t [2, 3, 5, 6]"),
    "teacher's heads": ({"k_t": sized(2, 6, 7, 6)}, ValueError,
                        "k_t: [2, 6, 7, 6]", "the heads of q_t [2, 3, 5, 6]"),
    "teacher's dim": ({"k_t": sized(2, 3, 7, 4)}, ValueError,
                      "k_t: [2, 3, 7, 4]", "the dim of q_t [2, 3, 5, 6]"),
    "both batch": ({"q_t": sized(4, 3, 5, 6), "k_t": sized(4, 3, 7, 6)}, ValueError,
                   "q_t: [4, 3, 5, 6]", "the batch of q_s [2, 3, 5, 4]"),
    "both heads": ({"q_t": sized(2, 12, 5, 6), "k_t": sized(2, 12, 7, 6)}, ValueError,
                   "q_t: [2, 12, 5, 6]", "the heads of q_s [2, 3, 5, 4]"),
    "queries": ({"q_t": sized(2, 3, 6, 6)}, ValueError,
                "q_t: [2, 3, 6, 6]", "the tokens of q_s [2, 3, 5, 4]"),
    "keys": ({"k_t": sized(2, 3, 8, 6)}, ValueError,
             "k_t: [2, 3, 8, 6]", "the tokens of k_s [2, 3, 7, 4]"),
    "dtypes": ({"k_s": GIVEN["k_s"].half()}, TypeError,
               "k_s: torch.float16", "the dtype of q_s, torch.float32"),
    "teacher's dtypes": ({"q_t": GIVEN["q_t"].double()}, TypeError,
                         "k_t: torch.float32", "the dtype of q_t, torch.float64"),
    "no keys": ({"k_s": sized(2, 3, 0, 4), "k_t": sized(2, 3, 0, 6)}, ValueError,
                "k_s: [2, 3, 0, 4]", "1 token and 1 dim at least"),
    "no dim": ({"q_s": sized(2, 3, 5, 0), "k_s": sized(2, 3, 7, 0)}, ValueError,
               "q_s: [2, 3, 5, 0]", "1 token and 1 dim at least"),
    "teacher without dim": ({"q_t": sized(2, 3, 5, 0), "k_t": sized(2, 3, 7, 0)}, ValueError,
                            "q_t: [2, 3, 5, 0]", "1 token and 1 dim at least"),
    "kind": ({"kind": "l2"}, ValueError, "kind: 'l2'",
             "expected kl, reverse_kl, js or mse"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction: 'avg'",
                  "expected mean, sum or none"),
    "T 0": ({"temperature": 0}, ValueError, "temperature: 0", "expected a number > 0"),
    "T negative": ({"temperature": -1.5}, ValueError, "temperature: -1.5",
                   "expected a number > 0"),
    "T nan": ({"temperature": NAN}, ValueError, "temperature: nan", "expected a number > 0"),
    "mask dtype": ({"key_mask": sized(2, 7)}, ValueError, "key_mask: torch.float32 [2, 7]",
                   "expected torch.bool, one per key, [2, 7]"),
    "mask of queries": ({"key_mask": sized(2, 5).bool()}, ValueError,
                        "key_mask: torch.bool [2, 5]",
                        "expected torch.bool, one per key, [2, 7]"),
    "mask of a map": ({"key_mask": sized(2, 1, 5, 7).bool()}, ValueError,
                      "key_mask: torch.bool [2, 1, 5, 7]",
                      "expected torch.bool, one per key, [2, 7]"),
    "mask device": ({"key_mask": sized(2, 7, dtype=torch.bool, device="meta")}, ValueError,
                    "key_mask: meta", "the device of the student, cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    """The error names the argument, what was given and what is accepted, whatever is asked for."""
    options, error, given, accepted = BAD[name]
    for required in (False, True):
        arguments = GIVEN | options
        if required and arguments["k_s"].is_floating_point():
            arguments["k_s"] = arguments["k_s"].clone().requires_grad_()
        with pytest.raises(error) as caught:
            attention_map_loss(**arguments)
        argument, got = given.split(": ")
        said = str(caught.value)
        assert f"attention_map_loss: {argument}: expected " in said
        assert f"got {got}" in said
        assert accepted in said


@pytest.mark.gpu
def test_tensors_on_different_devices() -> None:
    given = {name: x.cuda() for name, x in GIVEN.items()}
    for name in ("k_s", "q_t", "k_t"):
        with pytest.raises(ValueError, match=f"q_s: on cuda:0 and {name} on cpu"):
            attention_map_loss(**given | {name: GIVEN[name]})
    with pytest.raises(ValueError, match="q_s: on cuda:0 and key_mask on cpu"):
        attention_map_loss(**given, key_mask=torch.ones(2, 7, dtype=torch.bool))


BAD_FOR_OPERATIONS = {  # arguments, and what is said
    "q_s double": ({"q_s": GIVEN["q_s"].double()},
                   "q_s: expected float32, float16 or bfloat16, got Double"),
    "k_t int": ({"k_t": GIVEN["k_t"].int()}, "k_t: expected float32, float16 or bfloat16, got Int"),
    "k_s 3-D": ({"k_s": sized(3, 7, 4)},
                "k_s: expected [batch, heads, tokens, dim], got [3, 7, 4]"),
    "batch": ({"k_s": sized(1, 3, 7, 4)},
              "k_s: expected the batch of q_s [2, 3, 5, 4], got [1, 3, 7, 4]"),
    "heads": ({"k_t": sized(2, 4, 7, 6)},
              "k_t: expected the heads of q_t [2, 3, 5, 6], got [2, 4, 7, 6]"),
    "dim": ({"k_s": sized(2, 3, 7, 5)},
            "k_s: expected the dim of q_s [2, 3, 5, 4], got [2, 3, 7, 5]"),
    "queries": ({"q_t": sized(2, 3, 6, 6)},
                "q_t: expected the tokens of q_s [2, 3, 5, 4], got [2, 3, 6, 6]"),
    "keys": ({"k_t": sized(2, 3, 8, 6)},
             "k_t: expected the tokens of k_s [2, 3, 7, 4], got [2, 3, 8, 6]"),
    "both batch": ({"q_t": sized(4, 3, 5, 6), "k_t": sized(4, 3, 7, 6)},
                   "q_t: expected the batch of q_s [2, 3, 5, 4], got [4, 3, 5, 6]"),
    "dtypes": ({"k_s": GIVEN["k_s"].half()}, "k_s: expected the dtype of q_s, Float, got Half"),
    "no keys": ({"k_s": sized(2, 3, 0, 4), "k_t": sized(2, 3, 0, 6)},
                "k_s: expected 1 token and 1 dim at least, got [2, 3, 0, 4]"),
    "no dim": ({"q_s": sized(2, 3, 5, 0), "k_s": sized(2, 3, 7, 0)},
               "q_s: expected 1 token and 1 dim at least, got [2, 3, 5, 0]"),
    "mask dtype": ({"key_mask": sized(2, 7)}, "key_mask: expected Bool [2, 7], got Float [2, 7]"),
    "mask shape": ({"key_mask": sized(2, 5).bool()},
                   "key_mask: expected Bool [2, 7], got Bool [2, 5]"),
    "mask rank": ({"key_mask": sized(7).bool()}, "key_mask: expected Bool [2, 7], got Bool [7]"),
    "kind": ({"kind": 7}, "kind: expected 0 to 3, got 7"),
    "row without keys": ({"key_mask": torch.tensor([[True] * 7, [False] * 7])},
                         "key_mask keeps no key of batch element 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FOR_OPERATIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_bad_input_to_operations(operation: str, name: str) -> None:
    """C++ looks at no memory that is not there, whoever calls."""
    if _ops.backends()[operation]["CPU"] != "C++":
        pytest.skip("CPU tensors are not served by C++")
    if operation == "attention_map_bwd" and name == "row without keys":
        pytest.skip("its forward has said so")
    options, said = BAD_FOR_OPERATIONS[name]
    given: dict[str, Any] = GIVEN | {"scale_s": 1.0, "scale_t": 1.0, "temperature": 1.0}
    given |= {"kind": reference.KL, "reduction": reference.MEAN}
    if operation == "attention_map_bwd":
        given |= {"grad_loss": torch.ones(()), "stats": torch.zeros(3, 2, 3, 5)}
    with pytest.raises(RuntimeError) as caught:
        getattr(OPS, operation)(**given | options)
    assert f"attention_map_loss: {said}" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"stats": torch.zeros(3, 2, 3, 4)}, {"stats": torch.zeros(2, 2, 3, 5)},
        {"grad_loss": torch.ones(2, 3, 4)}, {"grad_loss": torch.ones(())},
        {"grad_loss": torch.ones(2, 3, 5, dtype=DOUBLE)},
        {"stats": torch.zeros(3, 2, 3, 5, dtype=HALF)},
    ],
    ids=["short stats", "2 stats", "short grad", "one grad", "double grad", "half stats"],
)  # fmt: skip
def test_bad_input_to_the_backward(options: dict[str, Tensor]) -> None:
    """Numbers per row that are fewer than the rows would be read beyond their end."""
    if _ops.backends()["attention_map_bwd"]["CPU"] != "C++":
        pytest.skip("CPU tensors are not served by C++")
    given: dict[str, Any] = {"grad_loss": torch.ones(2, 3, 5), "stats": torch.zeros(3, 2, 3, 5)}
    given |= options
    arguments = (1.0, 1.0, 1.0, reference.KL, reference.NONE)
    with pytest.raises(RuntimeError):
        OPS.attention_map_bwd(given["grad_loss"], *GIVEN.values(), given["stats"], *arguments)
