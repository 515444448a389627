"""Functions of `vitkd_fast.functional` as modules that keep their options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from .. import functional


class Loss(nn.Module):
    """A function whose options, its keyword-only arguments, are kept; tensors are the call's.

    Raises:
        TypeError: an option that the function does not have, or a tensor of each call, such as
            labels or a mask.
    """

    function: ClassVar[Callable[..., Tensor]]

    def __init_subclass__(cls) -> None:
        """Gives `help` the names and defaults of the options."""
        options = [p for p in _parameters(cls) if p.kind is p.KEYWORD_ONLY and not _is_given(p)]
        cls.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = inspect.signature(type(self)).parameters
        if options.keys() - known:
            raise TypeError(
                f"{type(self).__name__}: expected options among {', '.join(known) or 'none'}, got "
                f"{', '.join(options)}"
            )
        self.options = options

    def forward(self, *inputs: Any, **given: Any) -> Tensor:
        """The function of these inputs, in its order; labels, masks and weights also by name."""
        return type(self).function(*inputs, **self.options, **given)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _parameters(cls: type[Loss]) -> list[inspect.Parameter]:
    function = getattr(cls, "function", None)
    return [*inspect.signature(function).parameters.values()] if function else []


def _is_given(parameter: inspect.Parameter) -> bool:
    """Whether it is a tensor of each call."""
    return str(parameter.annotation) in ("Tensor | None", "Labels | None")


class ATLoss(Loss):
    """|| q_s/||q_s|| - q_t/||q_t|| ||^2, q the energy of a map: `functional.at_loss`."""

    function = staticmethod(functional.at_loss)


class AttentionMapLoss(Loss):
    """A divergence of attention maps, which are never formed: `functional.attention_map_loss`."""

    function = staticmethod(functional.attention_map_loss)


class BinaryKDLoss(Loss):
    """Distillation of classes that are not exclusive: `functional.binary_kd_loss`."""

    function = staticmethod(functional.binary_kd_loss)


class CCLoss(Loss):
    """Correlation congruence: `functional.cc_loss`."""

    function = staticmethod(functional.cc_loss)


class DeiTHardLoss(Loss):
    """Cross-entropy with labels and with the teacher's choice: `functional.deit_hard_loss`."""

    function = staticmethod(functional.deit_hard_loss)


class FeatureLoss(Loss):
    """Distance of features, of a projection too: `functional.feature_loss`."""

    function = staticmethod(functional.feature_loss)


class FusedLinearKDLoss(Loss):
    """A classifier's product and kd_loss, in chunks: `functional.fused_linear_kd_loss`."""

    function = staticmethod(functional.fused_linear_kd_loss)


class MLKDLoss(Loss):
    """Rows, batch and classes at several temperatures: `functional.mlkd_loss`."""

    function = staticmethod(functional.mlkd_loss)


class MMDLoss(Loss):
    """Maximum mean discrepancy of features: `functional.mmd_loss`."""

    function = staticmethod(functional.mmd_loss)


class NSTLoss(Loss):
    """Neuron selectivity transfer: `functional.nst_loss`."""

    function = staticmethod(functional.nst_loss)


class OFALoss(Loss):
    """One-for-all distillation of branches: `functional.ofa_loss`."""

    function = staticmethod(functional.ofa_loss)


class PKTLoss(Loss):
    """Probabilistic knowledge transfer: `functional.pkt_loss`."""

    function = staticmethod(functional.pkt_loss)


class RelationLoss(Loss):
    """A divergence of how samples attend to one another: `functional.relation_loss`."""

    function = staticmethod(functional.relation_loss)


class RKDLoss(Loss):
    """Distances and angles between samples: `functional.rkd_loss`."""

    function = staticmethod(functional.rkd_loss)


class SlicedWassersteinLoss(Loss):
    """Sorted projections of two sets of points: `functional.sliced_wasserstein_loss`."""

    function = staticmethod(functional.sliced_wasserstein_loss)


class SpearmanLoss(Loss):
    """Correlation of soft ranks: `functional.spearman_loss`."""

    function = staticmethod(functional.spearman_loss)


class SPLoss(Loss):
    """Similarities between samples: `functional.sp_loss`."""

    function = staticmethod(functional.sp_loss)


class WKDFeatureLoss(Loss):
    """Wasserstein distance of features' Gaussians: `functional.wkd_feature_loss`."""

    function = staticmethod(functional.wkd_feature_loss)


class WKDLogitLoss(Loss):
    """Transport between classes by their cost: `functional.wkd_logit_loss`."""

    function = staticmethod(functional.wkd_logit_loss)
