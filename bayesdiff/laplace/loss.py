r"""The loss that a network was trained with, as an M-estimator (Huber 1967).

The loss is Σ w ρ(r), r = target − Wφ. Its minimiser has the covariance H⁻¹ S H⁻¹, with the gradients of the images in S and

    g = Σ w ψ(r) φ,   H = Σ w E[ψ'(r)] φφᵀ,   ψ = ρ'

===============  ======================  ===============  ==========================
squares          r²/2                    r                1
Huber            r²/2, outside |r| ≤ δ   clamp(r, ±δ)     1 where |r| ≤ δ
                 δ|r| − δ²/2
pseudo-Huber     δ²(√(1 + r²/δ²) − 1)    r/√(1 + r²/δ²)   (1 + r²/δ²)^(−3/2)
L1               \|r\|                   sign(r)          2 p(0), p the density of r
===============  ======================  ===============  ==========================

A constant factor in ρ leaves the covariance as it is: so smooth-L1 is Huber's, and the mean or the sum of squares is the same.
L1 has no curvature of its own: what takes its place is the density of residuals at 0, estimated *where the features are* by
counting those with |r| < h and dividing by h (Powell 1991; Koenker 2005, §3.4). One number for a bin would not do: residuals
are small where a picture is flat, and the features there are others than at an edge. h is a small part of the draw's own median
|r|, so it follows t by itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bayesdiff.checks import ArgumentError, check_choice, check_positive

#: h of L1 as a part of the draw's median |r|: the bias of the curvature is −(0.67 h/σ)²/6 for Gaussian residuals, here −0.2 %.
BANDWIDTH = 0.15
#: Fewer numbers in a draw than this do not tell their median.
LEAST = 32


class Loss(Protocol):
    """ψ and ψ' of a loss; residuals ``(B, …)``, one row for each draw."""

    def score(self, residuals: Tensor) -> Tensor:
        """ψ(r), shaped as r."""
        ...

    def curvature(self, residuals: Tensor) -> Tensor | None:
        """ψ'(r), shaped as r; None where it is 1."""
        ...


@dataclass(frozen=True)
class Squares:
    """r²/2."""

    def score(self, residuals: Tensor) -> Tensor:
        """r."""
        return residuals

    def curvature(self, residuals: Tensor) -> None:
        """1."""


@dataclass(frozen=True)
class _Scaled:
    """A loss with a scale δ."""

    delta: float = 1.0

    def __post_init__(self) -> None:
        check_positive("delta", self.delta)


@dataclass(frozen=True)
class Huber(_Scaled):
    """Squares up to δ, straight lines beyond.

    Args:
        delta: δ > 0, in the units of the network's target.

    Raises:
        ArgumentError: δ is not positive.
    """

    def score(self, residuals: Tensor) -> Tensor:
        """r, no further from 0 than δ."""
        return residuals.clamp(-self.delta, self.delta)

    def curvature(self, residuals: Tensor) -> Tensor:
        """1 where |r| ≤ δ."""
        return (residuals.abs() <= self.delta).to(residuals)


@dataclass(frozen=True)
class PseudoHuber(_Scaled):
    """Huber's loss without corners (Charbonnier et al. 1994).

    Args:
        delta: δ > 0, in the units of the network's target.

    Raises:
        ArgumentError: δ is not positive.
    """

    def score(self, residuals: Tensor) -> Tensor:
        """r/√(1 + r²/δ²)."""
        return residuals / (1 + (residuals / self.delta).square()).sqrt()

    def curvature(self, residuals: Tensor) -> Tensor:
        """(1 + r²/δ²)^(−3/2)."""
        return (1 + (residuals / self.delta).square()) ** -1.5


@dataclass(frozen=True)
class L1:
    """|r|.

    Args:
        bandwidth: h > 0, in the units of the network's target; None: a small part of each draw's median size, which needs
            draws of at least 32 numbers.

    Raises:
        ArgumentError: h is not positive.
    """

    bandwidth: float | None = None

    def __post_init__(self) -> None:
        if self.bandwidth is not None:
            check_positive("bandwidth", self.bandwidth)

    def score(self, residuals: Tensor) -> Tensor:
        """sign(r)."""
        return residuals.sign()

    def curvature(self, residuals: Tensor) -> Tensor:
        """1/h where |r| < h.

        Raises:
            ArgumentError: There is no bandwidth, and the draws are too small to choose one by.
        """
        size = residuals.abs()
        if self.bandwidth is not None:
            return (size < self.bandwidth).to(residuals) / self.bandwidth
        if residuals[0].numel() < LEAST:
            raise ArgumentError(
                f"expected draws of at least {LEAST} numbers to choose the bandwidth of the L1 loss by, got "
                f"{residuals[0].numel()}: "
                "give it, as bayesdiff.L1(bandwidth=…), about a tenth of the typical |residual|"
            )
        h = (BANDWIDTH * size.flatten(1).median(1).values).view(-1, *(1,) * (residuals.ndim - 1))
        return torch.where((size < h) & (h > 0), 1 / h, 0.0)


LOSSES: dict[str, Loss] = {
    "squares": Squares(), "l1": L1(), "huber": Huber(), "smooth-l1": Huber(), "pseudo-huber": PseudoHuber(),
}  # fmt: skip
_KINDS = {kind.__name__: kind for kind in (Squares, Huber, PseudoHuber, L1)}


def as_loss(choice: str | Loss) -> Loss:
    """A loss by its name, with δ = 1, or as given.

    Raises:
        ArgumentError: Another name, or not a loss.
    """
    if isinstance(choice, str):
        return LOSSES[check_choice("loss", choice, tuple(LOSSES))]
    if type(choice) not in _KINDS.values():
        raise ArgumentError(f"expected a loss among {', '.join(map(repr, LOSSES))}, Huber(δ), …, got {choice!r}")
    return choice


def to_dict(loss: Loss) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {"kind": type(loss).__name__, **asdict(loss)}  # type: ignore[call-overload]


def from_dict(values: dict[str, Any]) -> Loss:
    """The inverse of :func:`to_dict`."""
    settings = dict(values)
    loss: Loss = _KINDS[settings.pop("kind")](**settings)
    return loss
