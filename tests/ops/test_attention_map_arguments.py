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
    "q_s int": ({"q_s": GIVEN["q_s"].int()}, TypeError, "q_s is torch.int32", DTYPES),
    "k_s complex": ({"k_s": GIVEN["k_s"].cfloat()}, TypeError, "k_s is torch.complex64", DTYPES),
    "q_t bool": ({"q_t": GIVEN["q_t"].bool()}, TypeError, "q_t is torch.bool", DTYPES),
    "k_t float8": ({"k_t": GIVEN["k_t"].to(torch.float8_e4m3fn)}, TypeError,
                   "k_t is torch.float8_e4m3fn", DTYPES),
    "q_s 3-D": ({"q_s": sized(3, 5, 4)}, ValueError, "q_s has shape [3, 5, 4]",
                "accepted is [batch, heads, tokens, dim]"),
    "k_s 5-D": ({"k_s": sized(1, 2, 3, 7, 4)}, ValueError, "k_s has shape [1, 2, 3, 7, 4]",
                "accepted is [batch, heads, tokens, dim]"),
    "k_t 0-D": ({"k_t": sized()}, ValueError, "k_t has shape []",
                "accepted is [batch, heads, tokens, dim]"),
    "k_s device": ({"k_s": GIVEN["k_s"].to("meta")}, ValueError, "q_s is on cpu",
                   "k_s on meta"),
    "q_t device": ({"q_t": GIVEN["q_t"].to("meta")}, ValueError, "q_s is on cpu",
                   "q_t on meta"),
    "batch": ({"k_s": sized(1, 3, 7, 4)}, ValueError,
              "q_s [2, 3, 5, 4] and k_s [1, 3, 7, 4]", "differ in batch"),
    "heads": ({"k_s": sized(2, 1, 7, 4)}, ValueError,
              "q_s [2, 3, 5, 4] and k_s [2, 1, 7, 4]", "differ in heads"),
    "dim": ({"k_s": sized(2, 3, 7, 6)}, ValueError,
            "q_s [2, 3, 5, 4] and k_s [2, 3, 7, 6]", "differ in dim"),
    "teacher's batch": ({"k_t": sized(1, 3, 7, 6)}, ValueError,
                        "q_t [2, 3, 5, 6] and k_t [1, 3, 7, 6]", "differ in batch"),
    "teacher's heads": ({"k_t": sized(2, 6, 7, 6)}, ValueError,
                        "q_t [2, 3, 5, 6] and k_t [2, 6, 7, 6]", "differ in heads"),
    "teacher's dim": ({"k_t": sized(2, 3, 7, 4)}, ValueError,
                      "q_t [2, 3, 5, 6] and k_t [2, 3, 7, 4]", "differ in dim"),
    "both batch": ({"q_t": sized(4, 3, 5, 6), "k_t": sized(4, 3, 7, 6)}, ValueError,
                   "q_s [2, 3, 5, 4] and q_t [4, 3, 5, 6]", "differ in batch"),
    "both heads": ({"q_t": sized(2, 12, 5, 6), "k_t": sized(2, 12, 7, 6)}, ValueError,
                   "q_s [2, 3, 5, 4] and q_t [2, 12, 5, 6]", "differ in heads"),
    "queries": ({"q_t": sized(2, 3, 6, 6)}, ValueError,
                "q_s [2, 3, 5, 4] and q_t [2, 3, 6, 6]", "differ in tokens"),
    "keys": ({"k_t": sized(2, 3, 8, 6)}, ValueError,
             "k_s [2, 3, 7, 4] and k_t [2, 3, 8, 6]", "differ in tokens"),
    "dtypes": ({"k_s": GIVEN["k_s"].half()}, TypeError,
               "q_s is torch.float32 and k_s torch.float16", "accepted is one dtype"),
    "teacher's dtypes": ({"q_t": GIVEN["q_t"].double()}, TypeError,
                         "q_t is torch.float64 and k_t torch.float32", "accepted is one dtype"),
    "no keys": ({"k_s": sized(2, 3, 0, 4), "k_t": sized(2, 3, 0, 6)}, ValueError,
                "k_s [2, 3, 0, 4]", "is empty"),
    "no dim": ({"q_s": sized(2, 3, 5, 0), "k_s": sized(2, 3, 7, 0)}, ValueError,
               "q_s [2, 3, 5, 0]", "is empty"),
    "teacher without dim": ({"q_t": sized(2, 3, 5, 0), "k_t": sized(2, 3, 7, 0)}, ValueError,
                            "q_t [2, 3, 5, 0]", "is empty"),
    "kind": ({"kind": "l2"}, ValueError, "kind is 'l2'",
             "accepted are kl, reverse_kl, js, mse"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction is 'avg'",
                  "accepted are mean, sum and none"),
    "T 0": ({"temperature": 0}, ValueError, "temperature is 0", "accepted are numbers > 0"),
    "T negative": ({"temperature": -1.5}, ValueError, "temperature is -1.5",
                   "accepted are numbers > 0"),
    "T nan": ({"temperature": NAN}, ValueError, "temperature is nan", "accepted are numbers > 0"),
    "mask dtype": ({"key_mask": sized(2, 7)}, ValueError, "key_mask is torch.float32 [2, 7]",
                   "accepted is torch.bool, one per key, [2, 7]"),
    "mask of queries": ({"key_mask": sized(2, 5).bool()}, ValueError,
                        "key_mask is torch.bool [2, 5]",
                        "accepted is torch.bool, one per key, [2, 7]"),
    "mask of a map": ({"key_mask": sized(2, 1, 5, 7).bool()}, ValueError,
                      "key_mask is torch.bool [2, 1, 5, 7]",
                      "accepted is torch.bool, one per key, [2, 7]"),
    "mask device": ({"key_mask": sized(2, 7, dtype=torch.bool, device="meta")}, ValueError,
                    "the student is on cpu", "key_mask on meta"),
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
        assert "attention_map_loss: " in str(caught.value)
        assert given in str(caught.value)
        assert accepted in str(caught.value)


@pytest.mark.gpu
def test_tensors_on_different_devices() -> None:
    given = {name: x.cuda() for name, x in GIVEN.items()}
    for name in ("k_s", "q_t", "k_t"):
        with pytest.raises(ValueError, match=f"q_s is on cuda:0 and {name} on cpu"):
            attention_map_loss(**given | {name: GIVEN[name]})
    with pytest.raises(ValueError, match="q_s is on cuda:0 and key_mask on cpu"):
        attention_map_loss(**given, key_mask=torch.ones(2, 7, dtype=torch.bool))


BAD_FOR_OPERATIONS = {  # arguments, and what is said
    "q_s double": ({"q_s": GIVEN["q_s"].double()}, "q_s is Double; accepted are float32, float16"),
    "k_t int": ({"k_t": GIVEN["k_t"].int()}, "k_t is Int; accepted are float32, float16"),
    "k_s 3-D": ({"k_s": sized(3, 7, 4)}, "k_s has shape [3, 7, 4]; accepted is [batch, heads,"),
    "batch": ({"k_s": sized(1, 3, 7, 4)},
              "q_s [2, 3, 5, 4] and k_s [1, 3, 7, 4] differ in batch"),
    "heads": ({"k_t": sized(2, 4, 7, 6)},
              "q_t [2, 3, 5, 6] and k_t [2, 4, 7, 6] differ in heads"),
    "dim": ({"k_s": sized(2, 3, 7, 5)}, "q_s [2, 3, 5, 4] and k_s [2, 3, 7, 5] differ in dim"),
    "queries": ({"q_t": sized(2, 3, 6, 6)},
                "q_s [2, 3, 5, 4] and q_t [2, 3, 6, 6] differ in tokens"),
    "keys": ({"k_t": sized(2, 3, 8, 6)},
             "k_s [2, 3, 7, 4] and k_t [2, 3, 8, 6] differ in tokens"),
    "both batch": ({"q_t": sized(4, 3, 5, 6), "k_t": sized(4, 3, 7, 6)},
                   "q_s [2, 3, 5, 4] and q_t [4, 3, 5, 6] differ in batch"),
    "dtypes": ({"k_s": GIVEN["k_s"].half()}, "queries and keys differ in dtype"),
    "no keys": ({"k_s": sized(2, 3, 0, 4), "k_t": sized(2, 3, 0, 6)},
                "keys [2, 3, 0, 4] and [2, 3, 0, 6] must not be empty"),
    "no dim": ({"q_s": sized(2, 3, 5, 0), "k_s": sized(2, 3, 7, 0)},
               "keys [2, 3, 7, 0] and [2, 3, 7, 6] must not be empty"),
    "mask dtype": ({"key_mask": sized(2, 7)}, "key_mask is [2, 7]; accepted is bool [2, 7]"),
    "mask shape": ({"key_mask": sized(2, 5).bool()},
                   "key_mask is [2, 5]; accepted is bool [2, 7]"),
    "mask rank": ({"key_mask": sized(7).bool()}, "key_mask is [7]; accepted is bool [2, 7]"),
    "kind": ({"kind": 7}, "kind is 7; accepted are 0 to 3"),
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
