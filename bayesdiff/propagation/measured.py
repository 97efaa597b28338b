"""Measurements of a module's response, and which rows of a call are branches of one sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.propagation.response import Directions


@dataclass(frozen=True)
class Branches:
    """Which rows of a call are branches of which sample.

    Args:
        rows: ``(B, M)``, row numbers.
        weights: w, ``(B, M)`` float64, summing to 1.
        share: Of the whole call in what the scheduler is given, ``(B,)`` float64; other calls may have the rest.
    """

    rows: Tensor
    weights: Tensor
    share: Tensor

    @classmethod
    def alone(cls, number: int) -> Branches:
        """Each row a sample of its own."""
        ones = torch.ones(number, dtype=torch.float64)
        return cls(torch.arange(number)[:, None], ones[:, None], ones)

    def first(self, rows: Tensor) -> Tensor:
        """One row of each sample, ``(B, …)`` of ``(R, …)``."""
        return rows if self.rows.shape[1] == 1 and len(self.rows) == len(rows) else rows[self.rows[:, 0]]

    def combine(self, rows: Tensor) -> Tensor:
        """Σ_m w_m of the rows of each sample, ``(B, …)`` of ``(R, …)``."""
        if self.rows.shape[1] == 1:
            return self.first(rows)
        w = self.weights.to(rows.device, rows.dtype)
        return torch.einsum("bm,bm...->b...", w, rows[self.rows])

    def spread(self, samples: Tensor) -> Tensor:
        """What belongs to each sample to all its rows, ``(R, …)`` of ``(B, …)``."""
        if self.rows.shape[1] == 1 and torch.equal(self.rows[:, 0], torch.arange(len(samples))):
            return samples
        out = samples.new_empty(self.rows.numel(), *samples.shape[1:])
        out[self.rows.flatten()] = samples.repeat_interleave(self.rows.shape[1], dim=0)
        return out


@dataclass
class Measured:
    """One measurement.

    Args:
        chosen: V ``(B, p, P)`` and the length of the deviations.
        images: The combination's JV as a denoiser's, ``(B, p, P)``; None where input and output do not match.
        apart: What the rows' own outputs have beyond it, ``(R, p, Q)``; None where that is nothing.
        strengths: How much of the deviations lies along each direction, along a probe all that the others leave, ``(B, p)``.
        branches: Of the call.
        coefficients: (a, b) of the call.
    """

    chosen: Directions
    images: Tensor | None
    apart: Tensor | None
    strengths: Tensor
    branches: Branches
    coefficients: tuple[float, float]
