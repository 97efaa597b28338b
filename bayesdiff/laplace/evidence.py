r"""The evidence of Bayesian linear regression, and what maximises it.

With Λ = Σ_b A_b/σ_b² + τI, A_b = Σ φφᵀ over the draws of timestep bin b, and W the weights,

    log p(data) = log p(data | W) − ½ Σ_c [ log det Λ − D log τ_c + τ_c ‖W_c‖² ]

(MacKay 1992, eq. 4.7, in the form of Immer et al. 2021). At its maximum

    τ ‖W‖² = γ,   γ = Σ λ/(λ + τ),            σ_b² = RSS_b / (N_b − γ_b),   γ_b = C tr(Λ⁻¹ A_b/σ_b²)

with λ the eigenvalues of Λ − τI: γ is the number of weights that the data determine. Pixels count as independent here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from scipy.optimize import brentq
from torch import Tensor

from bayesdiff.checks import BayesdiffWarning

ITERATIONS = 100


def log_evidence(log_likelihood: float, spectrum: Tensor, prior_precision: Tensor, weight: Tensor) -> float:
    """The equation above, in nats.

    Args:
        log_likelihood: log p(data | W).
        spectrum: λ by channel, ``(C, D)`` (or ``(1, D)``, the same for all).
        prior_precision: τ by channel, ``(C,)``.
        weight: W, ``(C, D)``.
    """
    tau = prior_precision[:, None]
    log_det = torch.log1p(spectrum.clamp(min=0) / tau).expand(weight.shape).sum()  # log det Λ − D log τ
    return log_likelihood - 0.5 * float(log_det + (tau * weight.square()).sum())


def evidence_prior_precision(spectrum: Tensor, weight: Tensor) -> float:
    r"""The prior precision τ that maximises the evidence.

    τ‖W‖² grows with τ and γ(τ) falls (MacKay 1992, eq. 4.9), so there is one root, found by bracketing in log τ.

    Args:
        spectrum: Eigenvalues λ of the precision without the prior: ``(C, D)``, or ``(D,)`` for all channels alike.
        weight: W, ``(C, D)``.

    Returns:
        τ; 1 with a :class:`BayesdiffWarning` when W or the spectrum vanishes and no root exists.
    """
    values = spectrum.double().clamp(min=0).expand(weight.shape)  # of a Gram matrix: below 0 only by rounding
    norm = float(weight.double().square().sum())
    if norm == 0 or float(values.max()) == 0:
        warnings.warn(
            "the evidence has no maximum in the prior precision (zero weights or features): using 1.0",
            BayesdiffWarning,
            stacklevel=2,
        )
        return 1.0

    def slope(log_tau: float) -> float:
        tau = math.exp(log_tau)
        return tau * norm - float((values / (values + tau)).sum())

    # γ ≤ C·D bounds the root from above; there γ(τ) ≥ γ(τ_max) bounds it from below.
    high = math.log(values.numel() / norm)
    low = math.log(max(float((values / (values + math.exp(high))).sum()) / norm, 1e-300)) - 1e-9
    return math.exp(brentq(slope, low, high + 1e-9, xtol=1e-12))


def evidence_noise(
    gram: Tensor,
    squares: Tensor,
    counts: Tensor,
    weight: Tensor,
    noise: Tensor,
    choose_prior: Callable[[Tensor], Tensor],
    *,
    diagonal: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The noise variances σ_b² that maximise the evidence, with the prior chosen along, by the fixed point above.

    Args:
        gram: A_b, ``(T, D, D)``.
        squares: RSS_b, ``(T,)``.
        counts: N_b, scalar observations by bin, ``(T,)``; bins without any keep their noise.
        weight: W, ``(C, D)``.
        noise: Where to start, ``(T,)``.
        choose_prior: From Λ without the prior to τ by channel, ``(C,)``.
        diagonal: Take the diagonals of the A_b only.

    Returns:
        σ_b² ``(T,)`` and τ ``(C,)``; with a :class:`BayesdiffWarning` if they still moved by more than 1e-8 at the end.
    """
    if diagonal:
        gram = torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    seen = counts > 0
    moved = math.inf
    tau = torch.ones(len(weight), dtype=gram.dtype)
    for _ in range(ITERATIONS):
        precision = torch.einsum("bij,b->ij", gram, 1 / noise)
        tau = choose_prior(precision)
        determined = torch.zeros_like(noise)
        for t, times in zip(*tau.unique(return_counts=True), strict=True):
            eye = torch.eye(len(precision), dtype=gram.dtype, device=gram.device)
            inverse = torch.linalg.inv(precision + t * eye)
            determined += times * torch.einsum("bij,ij->b", gram, inverse) / noise
        free = counts - determined
        if bool((free[seen] < 1).any()):
            warnings.warn(
                f"{int((free[seen] < 1).sum())} timestep bins have no more observations than weights that they determine: "
                "their noise variance stays as it was; give more images, or fewer bins",
                BayesdiffWarning,
                stacklevel=2,
            )
            seen = seen & (free >= 1)
        fresh = torch.where(seen, squares / torch.where(seen, free, 1.0), noise)
        moved = float((fresh / noise - 1).abs().max())
        noise = fresh
        if moved < 1e-8:
            return noise, tau
    warnings.warn(
        f"the evidence's fixed point for the noise still moved by {moved:.2g} after {ITERATIONS} steps",
        BayesdiffWarning,
        stacklevel=2,
    )
    return noise, tau
