"""Weights that undo what rounding did to a layer's input, and are rounded with its statistics.

Layer by layer, x the centred bytes that a convolution reads and y what the float model has there:

    refit:   argmin_w' E |f(y) - f(w' x)|^2, from w by one damped Gauss-Newton step
    rounded: column after column, what is lost in one is made up for by those still to come

Both need E[x x^T] alone, no gradient: as GPTQ (Frantar et al., 2022, arXiv:2210.17323) for the
rounding, with the float model's outputs as target as in GPTAQ (Li et al., 2025, arXiv:2504.02692).
Means are left to the bias correction. Of large maps some rows and columns are seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .float_graph import FloatNode
from .graph import Array, padding_of

_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # shares of the mean variance
_ROUNDING = 1e-2  # the same, when weights are rounded: GPTQ's
_POSITIONS = 28  # seen per row and column of a map


@dataclass
class Moments:
    """Sums over positions: of x [P, G, K] and of what its products should gain, r [P, G, O].

    G groups (1, or the channels of a depthwise convolution) of K inputs and O outputs.
    """

    count: int
    x: Tensor  # [G, K]
    r: Tensor  # [G, O]
    xx: Tensor  # [G, K, K]
    xr: Tensor  # [G, K, O]

    @classmethod
    def like(cls, weight: Tensor) -> Moments:
        """Of nothing yet; for weights [G, O, K]."""
        groups, outputs, inputs = weight.shape
        shapes = (inputs,), (outputs,), (inputs, inputs), (inputs, outputs)
        zeros = [weight.new_zeros((groups, *shape), dtype=torch.float64) for shape in shapes]
        return cls(0, *zeros)

    def add(self, x: Tensor, r: Tensor) -> None:
        """x [G, P, K], r [G, P, O]."""
        self.count += x.shape[1]
        self.x += x.sum(1).double()
        self.r += r.sum(1).double()
        self.xx += (x.mT @ x).double()
        self.xr += (x.mT @ r).double()

    def __add__(self, other: Moments) -> Moments:
        names = ("count", "x", "r", "xx", "xr")
        return Moments(*(getattr(self, name) + getattr(other, name) for name in names))

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Of x with itself [G, K, K], and with r [G, K, O]."""
        mean = self.x[:, :, None] / self.count
        xx = self.xx / self.count - mean @ mean.mT
        return xx, self.xr / self.count - mean @ (self.r[:, None] / self.count)


def patches(node: FloatNode, x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """What each position seen reads: [G, P, K] of centred x [N, C, H, W]."""
    (top, bottom), (left, right) = (
        padding_of(x.shape[axis + 2], kernel[axis], stride, node.padding, axis)
        for axis, stride in enumerate(node.stride)
    )
    if max(top, bottom, left, right):
        x = F.pad(x, (left, right, top, bottom))
    windows = x.unfold(2, kernel[0], node.stride[0]).unfold(3, kernel[1], node.stride[1])
    windows = seen(windows)  # [N, C, h, w, kh, kw]
    n, channels, h, w = windows.shape[:4]
    if node.groups > 1:
        return windows.permute(1, 0, 2, 3, 4, 5).reshape(channels, n * h * w, -1)
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(1, n * h * w, -1)


def seen(x: Tensor) -> Tensor:
    """Some rows and columns of [N, C, H, W, ...]."""
    rows, columns = (-(-size // _POSITIONS) for size in x.shape[2:4])
    return x[:, :, rows // 2 :: rows, columns // 2 :: columns]


def grouped(node: FloatNode, y: Tensor) -> Tensor:
    """[N, O, h, w] as [G, P, O]: what `patches` goes with."""
    y = y.transpose(0, 1).flatten(1)  # [O, P]
    return y[:, :, None] if node.groups > 1 else y.T[None]


def refit(weight: Array, halves: tuple[Moments, Moments]) -> Array:
    """[G, O, K]: weights moved so that their products with x gain r; a least-squares step.

    Its damping is the one with which a step from either half of the images does best on the other;
    where none helps there, the weights stay.
    """
    both = [half.covariances() for half in halves]
    best, least = 0.0, 0.0
    for damping in _DAMPINGS:
        change = 0.0  # of E |r - step x|^2
        for (xx, xr), (other_xx, other_xr) in (both, both[::-1]):
            step = torch.linalg.solve(_damped(xx, damping), xr)
            change += float((step * (other_xx @ step - 2 * other_xr)).sum())
        if change < least:
            best, least = damping, change
    if not best:
        return weight
    xx, xr = (halves[0] + halves[1]).covariances()
    return weight + torch.linalg.solve(_damped(xx, best), xr).mT.cpu().numpy()


def rounded(weight: Array, unit: Array, moments: Moments) -> Array:
    """Integers [G, O, K] in -127..127 of weights in units of `unit` [G, O]."""
    # the fewer positions were seen for the inputs, the less is built on what they have in common
    damping = _ROUNDING + weight.shape[2] / moments.count
    xx = _damped(moments.covariances()[0], damping)
    order = torch.argsort(torch.diagonal(xx, dim1=1, dim2=2), descending=True, stable=True)
    xx = xx.gather(1, order[:, :, None].expand_as(xx)).gather(2, order[:, None].expand_as(xx))
    # row k, from its diagonal on: how what is lost in column k is shared by those after it
    upper = torch.linalg.cholesky(torch.linalg.inv(xx), upper=True).cpu().numpy()
    index = order.cpu().numpy()[:, None]
    left = np.take_along_axis(weight, index, 2) / unit[:, :, None]
    q = np.empty_like(left)
    for k in range(left.shape[2]):
        q[:, :, k] = np.rint(left[:, :, k]).clip(-127, 127)
        lost = (left[:, :, k] - q[:, :, k]) / upper[:, k, k, None]
        left[:, :, k:] -= lost[:, :, None] * upper[:, None, k, k:]
    result = np.empty_like(q)
    np.put_along_axis(result, np.broadcast_to(index, q.shape), q, 2)
    return result


def _damped(xx: Tensor, damping: float) -> Tensor:
    """Covariances with a share of their mean variance added; positive definite."""
    variance = torch.diagonal(xx, dim1=1, dim2=2).mean(1)
    floor = damping * variance + 1e-6 * (variance.max() + 1e-6)
    return xx + floor[:, None, None] * torch.eye(xx.shape[1]).to(xx)


def flat(node: FloatNode, weight: Array) -> Array:
    """[C_out, C_in / groups, kh, kw] as [G, O, K]."""
    groups = len(weight) if node.groups > 1 else 1
    return weight.reshape(groups, len(weight) // groups, -1)
