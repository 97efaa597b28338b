r"""What the data leave open along a run: Var[x_0 | x_t] at every network call, from the responses that were measured.

By Tweedie's identity of second order :math:`\mathrm{Cov}[x_0|x_t] = (\sigma^2/\alpha)\,\partial D/\partial x` (Efron 2011).
Tangents measure ∂D/∂x at a few calls along a few directions, extend it outside them and interpolate in between: their
diagonals are all that is kept, one for each measurement.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, repr=False)
class Denoising:
    """A sequence: item n is the variance at network call n, ``(B, …)`` float32, in the network's space squared.

    Variances may be negative where the response is not known well, or the network is no conditional expectation. They are NaN
    at a call whose input is pure noise (α = 0, where flows begin): 0/0, the variance of the data themselves.

    Args:
        nodes: Diagonals of the response of √α D at the calls that were measured, ``(R, B, …)`` float32.
        weights: Of each call's interpolation, times σ²/α and 1/√α: ``(n, R)`` float64.
    """

    nodes: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, n: int) -> Tensor:
        return torch.tensordot(self.weights[n].to(self.nodes), self.nodes, dims=1)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[n] for n in range(len(self)))

    def __repr__(self) -> str:
        """One line."""
        return f"Denoising({len(self)} calls, variances {tuple(self.nodes.shape[1:])})"
