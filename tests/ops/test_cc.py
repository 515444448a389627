"""cc_loss: what the paper says of it; test_gram.py has the rest."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from support.feature_tools import DOUBLE, assert_near, draw
from vitkd_fast.functional import cc_loss


def test_is_the_paper_form() -> None:
    """With gamma 0.4 and order 2, written out; the Gaussian kernel for large orders."""
    s, t = F.normalize(draw(6, 5, dtype=DOUBLE)), F.normalize(draw(6, 7, dtype=DOUBLE))

    def kernel(x: Tensor) -> Tensor:
        cosine = x @ x.mT
        return math.exp(-0.8) * (1 + 0.8 * cosine + 0.32 * cosine**2)

    assert_near(cc_loss(3 * s, t), (kernel(s) - kernel(t)).square().mean(), 16)
    gaussian = [torch.exp(-0.7 * torch.cdist(x, x) ** 2) for x in (s, t)]
    given = cc_loss(s, t, gamma=0.7, order=25)
    assert (given - (gaussian[0] - gaussian[1]).square().mean()).abs() < 1e-12


def test_nan_stays() -> None:
    for side in (0, 1):
        pair = [draw(4, 3), draw(4, 3)]
        pair[side][1, 1] = torch.nan
        assert cc_loss(*pair).isnan()
