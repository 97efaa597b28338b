r"""The space that a run's measurements span, and coordinates in it.

R measurements of p directions and their images are m = 2pR vectors of P numbers, P often a thousand times m. All that is made of
them (Nyström's extensions, Schur complements, interpolations) stays in their span. With the Gram matrix :math:`SS^\top =
U\Lambda U^\top` of the vectors S ``(m, P)``, the rows of :math:`Q = \Lambda^{-1/2}U^\top S` are orthonormal and the vectors' own
coordinates are :math:`U\Lambda^{1/2}`. So the algebra is done on a few hundred numbers, and Q is never formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.propagation.response import gram


@dataclass(frozen=True)
class Span:
    r"""Of the rows of S, for each of B samples.

    Args:
        rows: S, ``(B, m, P)``.
        basis: :math:`\Lambda^{-1/2}U^\top`, ``(B, r, m)`` float64.
        coordinates: :math:`U\Lambda^{1/2}`, ``(B, m, r)`` float64: the rows of S.
    """

    rows: Tensor
    basis: Tensor
    coordinates: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Span:
        """The span of ``(B, m, P)``. Of dimensions that one sample has less, others have zeros."""
        values, vectors = torch.linalg.eigh(gram(rows))
        kept = values > torch.finfo(rows.dtype).eps * values[:, -1:].clamp(min=0)  # less is rounding
        size = torch.where(kept, values, 1.0).sqrt()
        vectors = vectors * kept.unsqueeze(1)
        number = int(kept.sum(1).max())
        vectors, size = vectors[..., len(values[0]) - number :], size[:, len(values[0]) - number :]
        return cls(rows, vectors.mT / size.unsqueeze(2), vectors * size.unsqueeze(1))

    def into(self, delta: Tensor) -> Tensor:
        """Qδ for ``(B, K, P)``: coordinates ``(B, K, r)`` of what lies in the span."""
        return (delta @ self.rows.mT) @ self.basis.mT.to(delta)

    def out_of(self, coordinates: Tensor, added: Tensor) -> Tensor:
        """``added`` plus the vectors of coordinates ``(B, K, r)``: ``(B, K, P)``."""
        return torch.baddbmm(added, coordinates @ self.basis.to(coordinates), self.rows.to(coordinates.dtype))
