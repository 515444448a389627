"""pkt_loss: what the paper says of it; test_gram.py has the rest."""

import torch
from torch import Tensor

from support.feature_tools import DOUBLE, assert_near, draw, loss_and_grad
from vitkd_fast import reference
from vitkd_fast.functional import pkt_loss


def test_is_the_public_form() -> None:
    """The authors': the mean over all pairs, with an epsilon that no number feels."""
    x, t = draw(6, 5, dtype=DOUBLE), draw(6, 7, dtype=DOUBLE)

    def public(output_net: Tensor, target_net: Tensor, eps: float = 1e-7) -> Tensor:
        output_net = output_net / (output_net.pow(2).sum(1, keepdim=True).sqrt() + eps)
        target_net = target_net / (target_net.pow(2).sum(1, keepdim=True).sqrt() + eps)
        model = (output_net.mm(output_net.t()) + 1.0) / 2.0
        target = (target_net.mm(target_net.t()) + 1.0) / 2.0
        model = model / model.sum(1, keepdim=True)
        target = target / target.sum(1, keepdim=True)
        return torch.mean(target * torch.log((target + eps) / (model + eps)))

    assert (pkt_loss(x, t) - 6 * public(x, t)).abs() < 1e-6


def test_opposite_embeddings_are_finite() -> None:
    """Where the student's probability is 0, and where the teacher's is."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    t = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    for a, b in ((x, t), (t, x)):
        value, grad = loss_and_grad(pkt_loss, a, b)
        want, want_grad = loss_and_grad(reference.pkt_loss, a.double(), b.double())
        assert_near(value, want, 64)
        # of (1 + cosine) / 2 at cosine -1, an epsilon is all that is left: 1 / it times a rounding
        assert (grad - want_grad).abs().max() < 0.5 * want_grad.abs().max()


def test_nan_stays() -> None:
    for side in (0, 1):
        pair = [draw(4, 3), draw(4, 3)]
        pair[side][1, 1] = torch.nan
        assert pkt_loss(*pair).isnan()
