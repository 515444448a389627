"""nst_loss: what is said of arguments that are not accepted."""

import pytest

from support.feature_tools import Bad, assert_refused, draw
from vitkd_fast.functional import nst_loss

X, T = draw(2, 5, 4, 4), draw(2, 7, 4, 4)
BAD: dict[str, Bad] = {
    "nst_batch": (lambda: nst_loss(X, T[:1]), ValueError, "f_t: expected the batch of f_s"),
    "nst_form": (lambda: nst_loss(X, T[:, 0, 0]), ValueError, "f_t: expected [batch, "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_refused(name, *BAD[name])
