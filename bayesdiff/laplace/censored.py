r"""Moments of a censored Gaussian: one that is clipped to an interval.

With Q = 1 − Φ and φ the standard normal density, every moment that is needed of it is one of

    J₁(α, w) = E clip(Z − α, 0, w) = ∫_α^{α+w} Q(z) dz
    J₂(α, w) = E clip(Z − α, 0, w)² = 2 ∫_α^{α+w} (z − α) Q(z) dz          α, w ≥ 0

(the moments of the two-limit tobit model, Rosett & Nelson 1975, about the bound that is nearer).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

#: Standard deviations beyond which float64 has nothing but zeros: exp(−z²/2) is 0 from z = 38.6 on.
HORIZON = 60.0
_LEGENDRE = np.polynomial.legendre.leggauss(8)
#: Gauss–Legendre nodes and weights on [0, 1].
_NODES, _WEIGHTS = ((_LEGENDRE[0] + 1) / 2).tolist(), (_LEGENDRE[1] / 2).tolist()


def censored_moments(sigma: Tensor, gap: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    r"""σ J₁(α, w) and σ² J₂(α, w), with α = gap/σ and w = room/σ, in float64.

    Wide intervals: with :math:`\psi(x) = \varphi(x) - xQ(x)` and :math:`\chi(x) = (1 + x^2)Q(x) - x\varphi(x)`, the first
    two integrals of Q, and β = α + w,

        J₁ = ψ(α) − ψ(β)          J₂ = χ(α) − χ(β) − 2wψ(β)

    with exp(−α²/2) taken out, which leaves nothing that can underflow to the wrong sign. Narrow ones, (1 + α)w ≤ 1, where
    these differences would cancel: eight Gauss–Legendre nodes on the integrals of Q themselves, whose integrand is then so
    smooth that the rule is exact to rounding. Relative error, α being the distance to the bound in σ: 1e-12 + 4e-16 α⁴.
    """
    # σ = 0 makes both distances in σ 0 or infinite, and both results 0.
    safe = sigma.clamp(min=torch.finfo(sigma.dtype).tiny)
    alpha, width = (gap / safe).clamp(max=HORIZON), (room / safe).clamp(max=HORIZON)
    beta = alpha + width
    decay = torch.exp(-width * (alpha + beta) / 2)
    first = _psi(alpha) - decay * _psi(beta)
    second = _chi(alpha) - decay * (_chi(beta) + 2 * width * _psi(beta))
    scale = sigma * torch.exp(-alpha.square() / 2)
    first, second = scale * first, sigma * scale * second
    narrow = (1 + alpha) * width <= 1
    if not bool(narrow.any()):
        return first, second
    narrow_first, narrow_second = torch.zeros_like(first), torch.zeros_like(first)
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        tail = weight * torch.special.erfc((alpha + node * width) / math.sqrt(2)) / 2
        narrow_first += tail
        narrow_second += 2 * node * tail
    return torch.where(narrow, room * narrow_first, first), torch.where(narrow, room.square() * narrow_second, second)


def _mills(x: Tensor) -> Tensor:
    """Q(x) exp(x²/2)."""
    return torch.special.erfcx(x / math.sqrt(2)) / 2


def _psi(x: Tensor) -> Tensor:
    """ψ(x) exp(x²/2)."""
    return 1 / math.sqrt(2 * math.pi) - x * _mills(x)


def _chi(x: Tensor) -> Tensor:
    """χ(x) exp(x²/2)."""
    return (1 + x.square()) * _mills(x) - x / math.sqrt(2 * math.pi)
