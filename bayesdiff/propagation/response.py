r"""How a denoiser responds to a change of its input, from a few network calls.

The tangents need :math:`J\,\delta x_k` for K draws, with :math:`J = \partial D/\partial x` the Jacobian of the
denoiser :math:`D(x) = E[x_0\,|\,x]`. A network call for each draw is not needed. J acts strongly on few directions only,
and for an exact denoiser it is symmetric and positive, :math:`J = \alpha\,\mathrm{Cov}[x_0|x]/\sigma^2` (Tweedie's
identity of second order; Efron 2011). So p calls, along p orthonormal directions V, give the response to any number of
draws:

    Y = (J − γI)V                                p calls
    J δ ≈ γδ + Y c + (Y M⁺ Yᵀ + S) ρ             c = Vᵀδ,  ρ = δ − Vc,  M = sym(VᵀY)

The first two terms are exact within span(V). What lies outside is extended to. Y M⁺ Yᵀ is Nyström's extension (Williams & Seeger
2001) of the part of J that exceeds its isotropic part γ. A network's J is symmetric only to 10–30 %, so an eigenvalue m of M
with eigenvector q can be small by chance, and 1/m large. For a positive matrix m ≥ ‖Yq‖²/λ_max; with the largest value
that is known for λ_max, ‖Y‖ or ‖B‖, that bound takes the place of m where m is less.

S is what measurements at other steps of the same trajectory say. J changes slowly: its leading directions hardly turn
from one step to the next. Let B = EᵀE be the symmetric part found there, scaled down where it exceeds what V shows of J.
What V has measured of it must not count twice, so it enters by its Schur complement (a Gaussian's covariance given the
values along V),

    S = Eᵀ(I − F(FᵀF + μI)⁻¹Fᵀ)E,  F = EV,       J = B gives Y M⁺ Yᵀ + S = B for any V (μ → 0).

Where S is used, and where it is 0 because other measurements say something false, is decided in
:func:`bayesdiff.propagation.responder.finish`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

#: Eigenvalues of M below this share of the largest are left out of M⁺.
EIGENVALUE_FLOOR = 0.01
#: Eigenvalues of M below this share of ‖Y‖ are 0.
ROUNDING = 1e-9
#: μ, in the largest eigenvalue of B.
REGULARIZATION = 0.05
#: Weights of B from the measurements before and after one.
BEFORE, AFTER = 0.7, 0.3
#: Numbers of a sample that are multiplied at once in float64.
CHUNK = 2**20
#: The symmetric part is kept with so many rows for each direction; more change nothing.
ROWS_PER_DIRECTION = 2
#: Of the rows behind :func:`reduced`, the share of mixtures.
MIXED = 0.25


@dataclass(frozen=True)
class Response:
    """The action of J near a point, for each of B samples of P numbers.

    Args:
        directions: V, ``(B, p, P)``, orthonormal rows.
        excess: Y, ``(B, p, P)``.
        extension: E with EᵀE = Y M⁺ Yᵀ + S, ``(B, r, P)``.
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

    @cached_property
    def outside(self) -> Tensor:
        """E of δ − VᵀVδ as a matrix, E − (EVᵀ)V. As Eδ − (EVᵀ)(Vδ) it would cancel in float32."""
        return self.extension - (self.extension @ self.directions.mT) @ self.directions

    def diagonal(self, basis: Tensor | None = None) -> Tensor:
        """The diagonal of J, ``(B, P)``: γ, what was measured, and what is extended to.

        Args:
            basis: Orthonormal rows ``(B, r, P)`` that all else is in coordinates of; None: it is not.
        """
        total = self.gain[:, :, 0]
        for left, right in ((self.directions, self.excess), (self.outside, self.extension)):
            if basis is None:
                total = total + (left * right).sum(1)
                continue
            left, right = (rows[..., : basis.shape[1]] for rows in (left, right))
            some = basis.to(left).split(CHUNK // max(1, left.shape[1]) + 1, dim=2)
            total = total + torch.cat([((left @ b) * (right @ b)).sum(1) for b in some], dim=1)
        return total

    @staticmethod
    def weighted(pairs: Sequence[tuple[float, Response]], delta: Tensor) -> Tensor:
        """Σ w J δ of several responses, in two matrix products."""
        total = sum(weight * r.gain for weight, r in pairs) * delta
        inside = delta @ torch.cat([rows for _, r in pairs for rows in (r.directions, r.outside)], dim=1).mT
        right = torch.cat([weight * rows for weight, r in pairs for rows in (r.excess, r.extension)], dim=1)
        return total.baddbmm_(inside, right)

    @classmethod
    def fit(cls, chosen: Directions, images: Tensor, known: Tensor | None = None) -> Response:
        """From Jδ along the chosen directions.

        Args:
            chosen: V, and the length of δ.
            images: ``(B, p, P)``.
            known: E of measurements at other steps, ``(B, r, P)``, if there are any.

        Returns:
            In float64.
        """
        directions, probe = chosen.directions.double(), chosen.probe
        images = images.double() / chosen.safe.unsqueeze(1)
        gain = torch.zeros_like(chosen.length).unsqueeze(1)
        if known is not None:
            known = _no_larger(known.double(), directions[:, : -1 if probe else None], images)
        if probe:
            gain = (directions[:, -1:] * images[:, -1:]).sum(2, keepdim=True)
            if known is not None:  # what is known of this direction is not isotropic
                seen = (known @ directions[:, -1:].mT).square().sum((1, 2)).view(-1, 1, 1)
                gain = gain - torch.minimum(seen, gain.clamp(min=0))
        excess = images - gain * directions
        within = directions @ excess.mT
        values, vectors = torch.linalg.eigh((within + within.mT) / 2)
        norm = _largest(excess)
        # With one direction M is 0 but for rounding, which must not decide.
        kept = (values > EIGENVALUE_FLOOR * values.amax(1, keepdim=True)) & (values > ROUNDING * norm)
        rotated = vectors.mT @ excess
        largest = norm if known is None else torch.maximum(norm, _largest(known).square())
        least = rotated.square().sum(2) / largest
        scale = torch.where(kept, torch.maximum(values, least).where(kept, torch.ones_like(values)).rsqrt(), 0.0)
        extension = scale.unsqueeze(2) * rotated
        if known is not None:
            extension = _leading(torch.cat([extension, _complement(known, directions)], dim=1), len(directions[0]))
        return cls(directions, excess, extension, gain)

    def where(self, chosen: Tensor, other: Response) -> Response:
        """This one for the chosen samples, ``(B,)``, for others another on the same directions; its extension has more rows."""
        more = other.extension.shape[1] - self.extension.shape[1]
        mine = (self.excess, torch.nn.functional.pad(self.extension, (0, 0, 0, more)), self.gain)
        theirs = (other.excess, other.extension, other.gain)
        mask = chosen.view(-1, 1, 1)
        return Response(self.directions, *(torch.where(mask, a, b) for a, b in zip(mine, theirs, strict=True)))

    def to(self, dtype: torch.dtype, directions: Tensor) -> Response:
        """In another dtype, on the same directions, which are kept already."""
        return Response(directions.to(dtype), *(v.to(dtype) for v in (self.excess, self.extension, self.gain)))


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
        """From ``(B, K, P)`` deviations and the weights of the mixture, ``(K,)``."""
        number = min(num_directions, *deltas.shape[1:])
        probe = number < min(deltas.shape[1:])
        products = gram([deltas])
        directions = _principal(deltas, products, number - probe)
        if probe:
            mixed = (mixture.to(deltas.device, deltas.dtype) @ deltas).double().unsqueeze(1)
            rest = mixed - (mixed @ directions.mT) @ directions
            directions = _orthonormal(torch.cat([directions, rest], dim=1))
        length = products.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).sqrt()
        return cls(directions, length, probe)

    @property
    def safe(self) -> Tensor:
        """The length, 1 where it is 0."""
        return torch.where(self.length > 0, self.length, 1.0)

    def part(self, group: slice) -> Directions:
        """Those of some samples."""
        return Directions(self.directions[group], self.length[group], self.probe)

    def shifts(self) -> list[Tensor]:
        """What to move the sample by, ``(B, P)`` for each call."""
        return [v * self.length for v in self.directions.unbind(1)]


def smoothed(measured: Sequence[tuple[Directions, Tensor]]) -> Iterator[Response]:
    """The responses at R places of one trajectory, in their order, each extended by what all others know.

    Once from the last to the first, once from the first to the last, and each with its neighbour in both.

    Args:
        measured: Directions and Jδ of each, as :meth:`Response.fit` takes them. What is known is kept in their dtype.
    """
    backward = list(_chain(measured[:0:-1]))
    forward = _chain(measured[:-1])
    for n, (chosen, images) in enumerate(measured):
        known = [BEFORE**0.5 * next(forward)] if n else []
        if n + 1 < len(measured):
            known.append(AFTER**0.5 * backward.pop())
        yield Response.fit(chosen, images, torch.cat(known, dim=1) if known else None)


def _chain(measured: Sequence[tuple[Directions, Tensor]]) -> Iterator[Tensor]:
    """E at each place, from those before it."""
    known = None
    for chosen, images in measured:
        known = Response.fit(chosen, images, known).extension.to(images.dtype)
        yield known


def _no_larger(known: Tensor, directions: Tensor, images: Tensor) -> Tensor:
    """E scaled down so that tr(VᵀEᵀEV) is no larger than tr(VᵀJV); 0 if there is no direction to compare along."""
    measured = (directions * images[:, : directions.shape[1]]).sum((1, 2))
    found = (known @ directions.mT).square().sum((1, 2))
    share = torch.where(found > measured, measured.clamp(min=0) / torch.where(found > 0, found, 1.0), 1.0)
    if directions.shape[1] == 0:
        share = torch.zeros_like(share)
    return share.sqrt().view(-1, 1, 1) * known


def _complement(known: Tensor, directions: Tensor) -> Tensor:
    """A root of the Schur complement S, ``(B, r, P)``."""
    left, values, _ = torch.linalg.svd(known @ directions.mT, full_matrices=False)  # F
    floor = REGULARIZATION * _largest(known).square()
    total = values.square() + floor
    left_over = torch.where(total > 0, floor / torch.where(total > 0, total, 1.0), 1.0).sqrt()
    return known - left @ ((1 - left_over).unsqueeze(2) * (left.mT @ known))


def _largest(rows: Tensor) -> Tensor:
    """‖R‖, the spectral norm of some rows R, ``(B, 1)``; by way of RRᵀ, its entries of the order of 1."""
    if rows.shape[1] == 0:
        return rows.new_zeros(len(rows), 1)
    size = rows.abs().amax((1, 2)).unsqueeze(1)
    unit = rows / torch.where(size > 0, size, 1.0).unsqueeze(2)
    return size * torch.linalg.eigvalsh(unit @ unit.mT)[:, -1:].clamp(min=0).sqrt()


def _leading(rows: Tensor, number: int) -> Tensor:
    """Fewer rows E with nearly the same EᵀE, its leading part."""
    kept = ROWS_PER_DIRECTION * number
    if rows.shape[1] <= kept:
        return rows
    return torch.linalg.eigh(rows @ rows.mT).eigenvectors[:, :, -kept:].mT @ rows


def pieces(parts: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Some ``(B, m_i, P)`` together in float64, some of P at a time: where, and ``(B, m, …)``."""
    number, size = sum(part.shape[1] for part in parts), parts[0].shape[2]
    width = CHUNK // max(1, number) + 1
    for some in (slice(first, first + width) for first in range(0, size, width)):
        yield some, torch.cat([part[..., some] for part in parts], dim=1).double()


def gram(parts: Sequence[Tensor]) -> Tensor:
    """Inner products of some ``(B, m_i, P)`` together: ``(B, m, m)``, summed in float64."""
    number = sum(part.shape[1] for part in parts)
    total = parts[0].new_zeros(len(parts[0]), number, number, dtype=torch.float64)
    for _, piece in pieces(parts):
        total.baddbmm_(piece, piece.mT)
    return total


def _principal(deltas: Tensor, products: Tensor, number: int) -> Tensor:
    """The leading right singular vectors of ``(B, K, P)``, ``(B, number, P)`` float64, by way of the smaller Gram matrix."""
    if number == 0:
        return deltas[:, :0].double()
    if deltas.shape[1] > deltas.shape[2]:
        d = deltas.double()
        return torch.linalg.eigh(d.mT @ d).eigenvectors[:, :, -number:].flip(2).mT
    vectors = torch.linalg.eigh(products).eigenvectors[:, :, -number:].flip(2).mT
    return _orthonormal((vectors.to(deltas) @ deltas).double())


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows that span the given ones, in their order: ``(B, p, P)``."""
    length = rows.square().sum(2, keepdim=True).sqrt()
    return torch.linalg.qr((rows / torch.where(length > 0, length, 1.0)).mT).Q.mT


def reduced(deltas: Tensor, number: int, generator: Generator) -> Tensor:
    r"""Fewer rows with nearly the same sum of squares: principal rows, and random-sign mixtures of what they leave.

    With the rotated draws :math:`r_j = \sum_k u_{jk}\delta_k`, :math:`\sum_j (Jr_j)^2 = \sum_k (J\delta_k)^2` for any linear J.
    The largest are kept. A mixture :math:`\sum_j \xi_j r_j` of the others, :math:`\xi_j = \pm 1`, has their sum of squares on
    average (Hutchinson 1989); a quarter of the rows are such.

    Args:
        deltas: ``(1, K, P)`` float64.
        number: Of rows, less than K.
        generator: Of the signs.

    Returns:
        ``(1, number, P)``.
    """
    mixed = max(1, round(MIXED * number))
    vectors = torch.linalg.eigh(deltas @ deltas.mT).eigenvectors
    rows = vectors.flip(2).mT @ deltas
    kept, rest = rows[:, : number - mixed], rows[:, number - mixed :]
    signs = torch.randint(2, (mixed, rest.shape[1]), generator=generator).to(deltas) * 2 - 1
    return torch.cat([kept, (signs @ rest) / mixed**0.5], dim=1)
