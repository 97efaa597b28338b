"""How well a posterior predicts residuals that it was not fitted to, and the prior that predicts them best."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from bayesdiff.checks import ShapeError
from bayesdiff.laplace.evidence import evidence_prior_precision

if TYPE_CHECKING:
    from bayesdiff.laplace.posterior import LaplacePosterior


def log_likelihood(posterior: LaplacePosterior, features: Tensor, residuals: Tensor, timesteps: Tensor) -> float:
    """See :meth:`bayesdiff.LaplacePosterior.heldout_log_likelihood`."""
    variance, noise = posterior.variance(features).double(), posterior.noise_variance
    if residuals.shape != variance.shape or timesteps.shape != variance.shape[:1]:
        raise ShapeError(
            f"expected residuals {tuple(variance.shape)} and {len(variance)} timesteps, got {tuple(residuals.shape)} and "
            f"{tuple(timesteps.shape)}"
        )
    bins = (timesteps * len(noise) / posterior.num_timesteps).long().clamp(max=len(noise) - 1)
    total = variance + noise.to(variance)[bins].view(-1, *[1] * (variance.ndim - 1))
    return float(-0.5 * (torch.log(2 * math.pi * total) + residuals.double().square() / total).mean())


def best_prior(posterior: LaplacePosterior, features: Tensor, residuals: Tensor, timesteps: Tensor) -> float:
    """τ of :meth:`bayesdiff.LaplacePosterior.with_heldout_prior`."""
    start = math.log(evidence_prior_precision(posterior.spectrum, posterior.mean))

    def loss(log_tau: float) -> float:
        return -log_likelihood(posterior.recut(prior_precision=math.exp(log_tau)), features, residuals, timesteps)

    bounds = (start - math.log(1e4), start + math.log(1e8))
    best = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 0.05})
    return math.exp(float(best.x))
