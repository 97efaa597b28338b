r"""The space that a run's measurements span, and coordinates in it.

R measurements of p directions and their images are m = 2pR vectors of P numbers, P often a thousand times m. All that is made of
them (Nyström's extensions, Schur complements, interpolations) stays in their span. With the norms n of the vectors S ``(m, P)``
and :math:`N = \mathrm{diag}(n)`, the Gram matrix :math:`N^{-1}SS^\top N^{-1} = U\Lambda U^\top` gives orthonormal rows
:math:`Q = \Lambda^{-1/2}U^\top N^{-1}S` and coordinates :math:`NU\Lambda^{1/2}` of the vectors. So the algebra is done on a few
hundred numbers. Directions are unit vectors and images as small as the deviations are, hence the norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.propagation.response import gram, pieces


@dataclass(frozen=True)
class Span:
    r"""Of the rows of S, for each of B samples.

    Args:
        basis: Q, ``(B, r, P)``.
        coordinates: :math:`NU\Lambda^{1/2}`, ``(B, m, r)`` float64: the rows of S.
    """

    basis: Tensor
    coordinates: Tensor

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> Span:
        """The span of some ``(B, m_i, P)`` together. Of dimensions that one sample has less, others have zeros.

        Of each vector at most 3·√ε is left out, ε the rounding of the rows' dtype: a thousandth in float32.
        """
        products = gram(parts)
        norms = products.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(2)
        scale = torch.where(norms > 0, norms, 1.0)
        values, vectors = torch.linalg.eigh(products / scale / scale.mT)
        kept = values > 8 * torch.finfo(parts[0].dtype).eps
        size = torch.where(kept, values, 1.0).sqrt()
        vectors = vectors * kept.unsqueeze(1)
        number = int(kept.sum(1).max())
        vectors, size = vectors[..., len(values[0]) - number :], size[:, len(values[0]) - number :]
        combined = (vectors / scale).mT / size.unsqueeze(2)
        basis = parts[0].new_zeros(len(norms), number, parts[0].shape[2])
        for some, piece in pieces(parts):  # never a copy of all parts
            basis[..., some] = combined @ piece
        return cls(basis, scale * vectors * size.unsqueeze(1))

    def into(self, delta: Tensor) -> Tensor:
        """Qδ for ``(B, K, P)``: coordinates ``(B, K, r)`` of what lies in the span."""
        return delta @ self.basis.mT.to(delta.dtype)

    def out_of(self, coordinates: Tensor, added: Tensor) -> Tensor:
        """The vectors of coordinates ``(B, K, r)``, added to ``(B, K, P)`` in place."""
        return added.baddbmm_(coordinates, self.basis.to(coordinates.dtype))
