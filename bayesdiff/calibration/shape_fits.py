"""The shape of standardised residuals: normal, Student's t by maximum likelihood, or the quantiles found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import minimize
from torch import Tensor

from bayesdiff.calibration.shapes import Normal, Quantiles, Scaled, Shape, StudentT
from bayesdiff.checks import check_choice

SHAPES = ("normal", "student-t", "quantiles")
#: Quantiles of Z that are kept.
LEVELS = (
    0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5,
    0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99, 0.995, 0.998,
)  # fmt: skip
#: Least and most degrees of freedom.
FREEDOM = (2.05, 200.0)


def fit_shape(z: Tensor, shape: str) -> Shape:
    """The distribution of standardised residuals; a normal one is standard, whatever they are.

    Args:
        z: ``(n,)``.
        shape: One of :data:`SHAPES`.

    Raises:
        ArgumentError: Another name.
    """
    check_choice("shape", shape, SHAPES)
    if shape == "normal":
        return Normal()
    if shape == "quantiles":
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        return Quantiles(LEVELS, tuple(_quantiles(z.double().cpu(), levels).tolist()))
    return _student(z.double().cpu())


def _student(z: Tensor) -> Scaled:
    """ν and the factor by maximum likelihood."""
    low, high = (torch.tensor(v, dtype=torch.float64).log().item() for v in FREEDOM)
    size = float(z.square().mean().sqrt())

    def loss(theta: Sequence[float]) -> float:
        nu, factor = (float(torch.tensor(v, dtype=torch.float64).exp()) for v in theta)
        return -float(Scaled(StudentT(nu), factor).log_density(z).mean())

    start = [torch.tensor(5.0).log().item(), torch.tensor(0.8 * size).log().item()]
    best = minimize(loss, start, method="L-BFGS-B", bounds=[(low, high), (start[1] - 5, start[1] + 5)])
    nu, factor = (float(torch.tensor(v, dtype=torch.float64).exp()) for v in best.x)
    return Scaled(StudentT(nu), factor)


def _quantiles(z: Tensor, levels: Tensor) -> Tensor:
    """Empirical quantiles (torch's own takes no more than 16 million numbers)."""
    ordered = z.sort().values
    place = levels * (len(ordered) - 1)
    low = place.floor().long()
    return torch.lerp(ordered[low], ordered[(low + 1).clamp(max=len(ordered) - 1)], place - low)
