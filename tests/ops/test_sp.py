"""sp_loss: what the paper says of it; test_gram.py has the rest."""

import torch
import torch.nn.functional as F
from torch import Tensor

from support.feature_tools import DOUBLE, assert_near, draw, loss_and_grad
from vitkd_fast.functional import sp_loss


def test_is_the_public_form() -> None:
    """RepDistiller's, of maps."""
    f_s, f_t = draw(6, 5, 4, 4, dtype=DOUBLE), draw(6, 7, 2, 2, dtype=DOUBLE)

    def public(f_s: Tensor, f_t: Tensor) -> Tensor:
        s, t = f_s.view(6, -1), f_t.view(6, -1)
        g_s, g_t = F.normalize(torch.mm(s, s.t())), F.normalize(torch.mm(t, t.t()))
        diff = g_t - g_s
        return (diff * diff).view(-1, 1).sum(0) / (6 * 6)

    assert_near(sp_loss(f_s.flatten(1), f_t.flatten(1)), public(f_s, f_t).squeeze(), 16)


def test_an_embedding_of_zeros_has_a_gradient_through_the_others_alone() -> None:
    x, t = draw(4, 3, dtype=DOUBLE), draw(4, 5, dtype=DOUBLE)
    x[1] = 0
    _, grad = loss_and_grad(sp_loss, x, t)
    h = 1e-7

    def others(a: Tensor) -> Tensor:
        rows = [F.normalize(y @ y.mT) for y in (a, t)]
        return (rows[0] - rows[1])[[0, 2, 3]].square().sum() / 16

    for j in range(3):
        up, down = x.clone(), x.clone()
        up[1, j], down[1, j] = h, -h
        assert abs((others(up) - others(down)) / (2 * h) - grad[1, j]) < 1e-6


def test_nan_stays() -> None:
    for side in (0, 1):
        pair = [draw(4, 3), draw(4, 3)]
        pair[side][1, 1] = torch.nan
        assert sp_loss(*pair).isnan()
