r"""How a denoiser responds to a change of its input, from a few network calls.

The tangents need :math:`J\,\delta x_k` for K draws, with :math:`J = \partial D/\partial x` the Jacobian of the
denoiser :math:`D(x) = E[x_0\,|\,x]`. A network call for each draw is not needed. J acts strongly on few directions only,
and for an exact denoiser it is symmetric and positive, :math:`J = \alpha\,\mathrm{Cov}[x_0|x]/\sigma^2` (Tweedie's
identity of second order; Efron 2011). So p calls, along p orthonormal directions V, give the response to any number of
draws:

    Y = (J − γI)V                            p calls
    J δ ≈ γδ + Y c + Y M⁺ Yᵀ ρ               c = Vᵀδ,  ρ = δ − Vc,  M = sym(VᵀY)

The first two terms are exact within span(V). The last is Nyström's extension to what lies outside
(Williams & Seeger 2001), of the part of J that exceeds its isotropic part γ. A network's J is symmetric only
to 5–20 %, so an eigenvalue m of M with eigenvector q can be small by chance, and 1/m large. For a positive matrix
m ≥ ‖Yq‖²/λ_max; with ‖Y‖ for λ_max, that bound takes the place of m where m is less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Eigenvalues of M below this share of the largest are left out of M⁺.
EIGENVALUE_FLOOR = 0.01


@dataclass(frozen=True)
class Response:
    """The action of J near a point, for each of B samples of P numbers.

    Args:
        directions: V, ``(B, p, P)``, orthonormal rows.
        excess: Y, ``(B, p, P)``.
        extension: M^{-1/2}Yᵀ, ``(B, p, P)``.
        gain: γ, ``(B, 1, 1)``.
    """

    directions: Tensor
    excess: Tensor
    extension: Tensor
    gain: Tensor

    def __call__(self, delta: Tensor) -> Tensor:
        """J δ for δ of shape ``(B, K, P)``."""
        inside = delta @ self.directions.mT
        outside = delta - inside @ self.directions
        return self.gain * delta + inside @ self.excess + (outside @ self.extension.mT) @ self.extension

    @classmethod
    def measure(
        cls, jacobian: Callable[[Tensor], Tensor], deltas: Tensor, num_directions: int, mixture: Tensor
    ) -> Response:
        r"""Measure J along the directions that K deviations have most of.

        Args:
            jacobian: δ ``(B, P)`` to Jδ, one network evaluation of the batch.
            deltas: ``(B, K, P)`` float64.
            num_directions: p, the number of calls.
            mixture: Weights of the deviations in the last direction, ``(K,)``.
        """
        chosen = Directions.choose(deltas, num_directions, mixture)
        return cls.fit(chosen, torch.stack([jacobian(v) for v in chosen.shifts()], dim=1))

    @classmethod
    def fit(cls, chosen: Directions, images: Tensor) -> Response:
        """From Jδ along the chosen directions, at their length: ``(B, p, P)`` float64."""
        directions, probe = chosen.directions, chosen.probe
        images = images / chosen.safe.unsqueeze(1)
        gain = torch.zeros_like(chosen.length).unsqueeze(1)
        if probe:
            gain = (directions[:, -1:] * images[:, -1:]).sum(2, keepdim=True)
        excess = images - gain * directions
        within = directions @ excess.mT
        values, vectors = torch.linalg.eigh((within + within.mT) / 2)
        kept = (values > EIGENVALUE_FLOOR * values.amax(1, keepdim=True)) & (values > 0)
        rotated = vectors.mT @ excess
        least = rotated.square().sum(2) / torch.linalg.matrix_norm(excess, ord=2).unsqueeze(1)
        scale = torch.where(kept, torch.maximum(values, least).where(kept, torch.ones_like(values)).rsqrt(), 0.0)
        extension = scale.unsqueeze(2) * rotated
        return cls(directions, excess, extension, gain)

    def to(self, dtype: torch.dtype) -> Response:
        return Response(*(v.to(dtype) for v in (self.directions, self.excess, self.extension, self.gain)))


@dataclass(frozen=True)
class Directions:
    r"""Where to measure J: p − 1 principal directions of the deviations, and a mixture of what these leave.

    The Rayleigh quotient of the last is γ. If there are no more deviations than calls, they span V, γ = 0, and J is exact
    on them.

    Args:
        directions: V, ``(B, p, P)`` float64, orthonormal rows.
        length: ``(B, 1)``, that of a typical deviation: small enough for a derivative, and no smaller.
        probe: Whether the last direction is such a mixture.
    """

    directions: Tensor
    length: Tensor
    probe: bool

    @classmethod
    def choose(cls, deltas: Tensor, num_directions: int, mixture: Tensor) -> Directions:
        """From ``(B, K, P)`` float64 deviations and the weights of the mixture, ``(K,)``."""
        number = min(num_directions, *deltas.shape[1:])
        probe = number < min(deltas.shape[1:])
        directions = _principal(deltas, number - probe)
        if probe:
            rest = (mixture.to(deltas) @ (deltas - (deltas @ directions.mT) @ directions)).unsqueeze(1)
            directions = _orthonormal(torch.cat([directions, rest], dim=1))
        length = deltas.square().sum((1, 2)).div(deltas.shape[1]).sqrt().unsqueeze(1)
        return cls(directions, length, probe)

    @property
    def safe(self) -> Tensor:
        """The length, 1 where it is 0."""
        return torch.where(self.length > 0, self.length, 1.0)

    def shifts(self) -> list[Tensor]:
        """What to move the sample by, ``(B, P)`` for each call."""
        return [v * self.length for v in self.directions.unbind(1)]


def _principal(deltas: Tensor, number: int) -> Tensor:
    """The leading right singular vectors of ``(B, K, P)``: ``(B, number, P)``, by way of the smaller Gram matrix."""
    if number == 0:
        return deltas[:, :0]
    wide = deltas.shape[1] <= deltas.shape[2]
    gram = deltas @ deltas.mT if wide else deltas.mT @ deltas
    vectors = torch.linalg.eigh(gram).eigenvectors[:, :, -number:].flip(2).mT
    return _orthonormal(vectors @ deltas) if wide else vectors


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows that span the given ones, in their order: ``(B, p, P)``."""
    length = rows.square().sum(2, keepdim=True).sqrt()
    return torch.linalg.qr((rows / torch.where(length > 0, length, 1.0)).mT).Q.mT
