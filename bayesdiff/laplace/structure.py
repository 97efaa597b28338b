r"""Covariances of a head's C·D weights: three ways to estimate them, four structures to keep them in.

From the same sums (:mod:`bayesdiff.laplace.statistics`), with A = Σ w φφᵀ and g_i the gradient of image i:

========  ======================================  =====================================================
ggn       Σ = (A + τI)⁻¹ ⊗ I_C                    generalised Gauss–Newton (MacKay 1992)
ef        Σ = (Σ_i g_i g_iᵀ + τI)⁻¹               empirical Fisher over images (BayesDiff, Kou et al. 2024)
sandwich  Σ = H⁻¹ (Σ_i g_i g_iᵀ) H⁻¹, H = A + τI  robust (Huber 1967, White 1980, Liang & Zeger 1986)
========  ======================================  =====================================================

``full`` keeps Σ as it is, ``diag`` the diagonals of what it is made from. ``kron`` replaces the matrix of gradients,
whose C·D rows would not fit for many channels, by the nearest Kronecker product :math:`B\otimes A_g` in Frobenius norm
(Van Loan & Pitsianis 1993); the GGN is a Kronecker product already, so there ``kron`` is ``full``. ``lowrank`` keeps the r
directions of Σ that carry most of the mean predictive variance :math:`\mathrm{tr}(\Sigma_c A)`, and a diagonal, shaped as that of
what they leave, that carries the rest: a share s. So the mean predictive variance over the features fitted to is exact, and the
mean absolute error at most 2s of it. The diagonal unscaled, which ignores that features are correlated, would be far too large.

Prediction needs each channel's Σ_c only, as :math:`R_c^\top \mathrm{diag}(v_c) R_c + \mathrm{diag}(d_c)`: then
:math:`\varphi^\top\Sigma_c\varphi` is a sum of squares and never negative. Draws are joint over the channels where Σ is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from bayesdiff.checks import ArgumentError, NotPositiveDefiniteError
from bayesdiff.rng import normal, orthogonal_normal

STRUCTURES = ("full", "kron", "diag", "lowrank")
COVARIANCES = ("sandwich", "ggn", "ef")
KRON_ITERATIONS = 30
#: The share of the mean predictive variance that a low-rank covariance leaves to its diagonal, unless a rank is given.
TOLERANCE = 0.01
#: Makes standard normal numbers of a shape; the first dimension is that of the draws.
Noise = Callable[[tuple[int, ...]], Tensor]


@dataclass(frozen=True, eq=False)
class Covariance:
    r"""Σ, by channel for prediction and jointly for draws.

    Args:
        rows: R, ``(1 or C, rows, D)``; one for all channels, or one for each. None: there is only the diagonal.
        scales: v ≥ 0, ``(C, rows)``; None is 1.
        diagonal: d ≥ 0, ``(1 or C, D)``; None is 0.
        transform: n and a source of standard normal numbers to n draws of δW ~ N(0, Σ), ``(n, C, D)`` float64; linear in the
            numbers.
        approximation_error: For ``kron`` the relative Frobenius distance to the matrix of gradients; for ``lowrank`` the
            share of the mean predictive variance that the diagonal carries; 0 for the others.
    """

    rows: Tensor | None
    scales: Tensor | None
    diagonal: Tensor | None
    transform: Callable[[int, Noise], Tensor]
    approximation_error: float = 0.0

    def draw(self, n: int, generator: Generator | None = None, orthogonal: bool = False) -> Tensor:
        """n draws of δW, ``(n, C, D)`` float64; see :meth:`bayesdiff.LaplacePosterior.deviations`."""
        source = orthogonal_normal if orthogonal else normal
        return self.transform(n, lambda shape: source(shape, generator))


def build(
    structure: str,
    covariance: str,
    precision: Tensor,
    scores: Tensor,
    prior_precision: Tensor,
    rank: int | None = None,
    tolerance: float = TOLERANCE,
) -> Covariance:
    r"""Σ from the sums.

    Args:
        structure: One of :data:`STRUCTURES`.
        covariance: One of :data:`COVARIANCES`.
        precision: A, ``(D, D)``; its diagonal ``(D,)`` for ``"diag"``. Not used by ``"ef"`` but as the metric of
            ``"lowrank"``. For the sandwich there may be one for each channel: ``(C, D, D)``, ``(C, D)``.
        scores: A matrix G with :math:`G^\top G = \sum_i g_i g_i^\top`, ``(rows, C, D)``; for ``"diag"`` one row, the root
            of the diagonal. Not used by ``"ggn"``.
        prior_precision: τ by channel, ``(C,)``; ``"ef"`` and ``"kron"`` need one τ for all.
        rank: r, for ``"lowrank"``.
        tolerance: Without a rank, the share that may be left to the diagonal.

    Raises:
        NotPositiveDefiniteError: A precision has no Cholesky factor in float64.
        ArgumentError: Several prior precisions where there can be only one.
    """
    c = len(prior_precision)
    shared = bool((prior_precision == prior_precision[0]).all())
    if not shared and structure in ("kron", "lowrank"):
        raise ArgumentError(f'expected one prior precision for structure "{structure}", got {c}, one for each channel')
    if not shared and covariance == "ef" and structure == "full":
        raise ArgumentError(f'expected one prior precision for a full "ef" covariance, got {c}, one for each channel')
    tau = float(prior_precision[0])
    if structure == "diag":
        return _diag(covariance, precision, scores, prior_precision)
    if covariance == "ggn":
        factors = torch.stack([_inverse_root(precision, t) for t in prior_precision[: 1 if shared else c].tolist()])
        return _lowrank(factors, c, precision, rank, tolerance) if structure == "lowrank" else _channelwise(factors, c)
    if covariance == "sandwich":
        if structure == "kron" and precision.ndim == 2:
            channels, features, error = nearest_kronecker(scores)
            return _product(_root(features) @ _solve(precision, tau), channels, error)
        if precision.ndim == 2:
            inverse = [_solve(precision, t) for t in (prior_precision[:1] if shared else prior_precision).tolist()]
        else:
            inverse = [_solve(h, t) for h, t in zip(precision, prior_precision.tolist(), strict=True)]
        root = torch.stack([scores[:, i] @ inverse[i % len(inverse)] for i in range(c)], dim=1)  # G H⁻¹, (R, C, D)
        if structure == "kron":  # no H for all channels: the nearest product is that of Σ itself
            channels, features, error = nearest_kronecker(root)
            return _product(_root(features), channels, error)
        metric = precision if precision.ndim == 2 else precision.mean(0)
        return _joint_lowrank(root, metric, rank, tolerance) if structure == "lowrank" else _joint(root)
    if structure == "kron":
        channels, features, error = nearest_kronecker(scores)
        return _spectral(channels, features, tau, error)
    solve = _Fisher(scores, tau)
    factors = torch.stack([_triangular(solve.block(i)) for i in range(c)])
    return _lowrank(factors, c, precision, rank, tolerance) if structure == "lowrank" else Covariance(
        factors, None, None, solve.draw
    )  # fmt: skip


def nearest_kronecker(scores: Tensor) -> tuple[Tensor, Tensor, float]:
    r"""B ``(C, C)`` and A_g ``(D, D)`` with :math:`B\otimes A_g` nearest to :math:`\sum_i g_i g_i^\top` in Frobenius norm.

    The power method on the rearranged matrix (Van Loan & Pitsianis 1993), which is never formed:
    :math:`A_g = \sum_i g_i^\top B g_i/\lVert B\rVert^2`, :math:`B = \sum_i g_i A_g g_i^\top/\lVert A_g\rVert^2`.

    Args:
        scores: ``(n, C, D)``.

    Returns:
        B with trace C, A_g, both positive semidefinite, and the relative distance.
    """
    n, c, d = scores.shape
    channels = torch.eye(c, dtype=scores.dtype, device=scores.device)
    flat = scores.flatten(1)
    rows = flat if n <= flat.shape[1] else flat.T
    norm = float((rows @ rows.T).square().sum())
    features = torch.zeros(d, d, dtype=scores.dtype, device=scores.device)
    for _ in range(1 if c == 1 else KRON_ITERATIONS):
        mixed = torch.einsum("ncd,ce->ned", scores, channels).flatten(0, 1)
        features = mixed.T @ scores.flatten(0, 1) / channels.square().sum()
        fresh = torch.einsum("ncd,ned->ce", scores @ features, scores) / features.square().sum()
        channels = fresh * (c / fresh.trace())
    # The last A_g belongs to the last B before; one more half step makes the pair consistent.
    mixed = torch.einsum("ncd,ce->ned", scores, channels).flatten(0, 1)
    features = mixed.T @ scores.flatten(0, 1) / channels.square().sum()
    inner = float(channels.square().sum() * features.square().sum())
    return (channels + channels.T) / 2, (features + features.T) / 2, max(0.0, 1 - inner / norm) ** 0.5


def _diag(covariance: str, precision: Tensor, scores: Tensor, prior: Tensor) -> Covariance:
    squares = scores[0].square() if len(scores) else scores.new_zeros(0)
    if covariance == "ef":
        variances = 1 / (squares + prior[:, None])
    else:
        inverse = 1 / (precision + prior[:, None])
        variances = inverse if covariance == "ggn" else squares * inverse.square()

    def draw(n: int, noise: Noise) -> Tensor:
        return noise((n, *variances.shape)) * variances.sqrt()

    same = bool((variances == variances[:1]).all())
    return Covariance(None, None, variances[:1] if same else variances, draw)


def _channelwise(factors: Tensor, channels: int) -> Covariance:
    """Independent channels with Σ_c = F_cᵀF_c; factors ``(1 or C, R, D)``."""

    def draw(n: int, noise: Noise) -> Tensor:
        return torch.einsum("ncr,crd->ncd", noise((n, channels, factors.shape[1])), _each(factors, channels))

    return Covariance(factors, None, None, draw)


def _joint(root: Tensor) -> Covariance:
    """Σ = JᵀJ over all channels, J ``(R, C, D)``."""
    rows = root.movedim(1, 0)
    if rows.shape[1] > rows.shape[2]:
        rows = torch.linalg.qr(rows, mode="r").R

    def draw(n: int, noise: Noise) -> Tensor:
        return (noise((n, len(root))) @ root.flatten(1)).unflatten(1, root.shape[1:])

    return Covariance(rows.contiguous(), None, None, draw)


def _product(rows: Tensor, channels: Tensor, error: float) -> Covariance:
    """Σ = B ⊗ RᵀR."""
    mix = _root(channels).T

    def draw(n: int, noise: Noise) -> Tensor:
        return mix @ (noise((n, len(channels), len(rows))) @ rows)

    scales = channels.diagonal()[:, None].expand(-1, len(rows)).contiguous()
    return Covariance(rows[None], scales, None, draw, error)


def _spectral(channels: Tensor, features: Tensor, tau: float, error: float) -> Covariance:
    """Σ = (B ⊗ A_g + τI)⁻¹, through the eigenvectors of B and A_g."""
    lambda_c, q_c = torch.linalg.eigh(channels)
    lambda_d, q_d = torch.linalg.eigh(features)
    # Both are positive semidefinite; below 0 only by rounding.
    inverse = 1 / (lambda_c.clamp(min=0)[:, None] * lambda_d.clamp(min=0) + tau)

    def draw(n: int, noise: Noise) -> Tensor:
        return q_c @ (noise((n, *inverse.shape)) * inverse.sqrt()) @ q_d.T

    return Covariance(q_d.T[None].contiguous(), q_c.square() @ inverse, None, draw, error)


class _Fisher:
    """(GᵀG + τI)⁻¹ over all C·D weights: by blocks and by draws, and nowhere as a whole if G has fewer rows than that."""

    def __init__(self, scores: Tensor, tau: float) -> None:
        self.scores, self.tau = scores, tau
        g = scores.flatten(1)
        self.dense: Tensor | None = None
        if len(g) >= g.shape[1]:
            eye = torch.eye(g.shape[1], dtype=g.dtype, device=g.device)
            self.dense = torch.cholesky_inverse(_cholesky(g.T @ g + tau * eye))
            self.half = g
        else:  # Woodbury: Σ = (I − Bᵀ B)/τ, B = L⁻¹G, LLᵀ = τI + GGᵀ
            eye = torch.eye(len(g), dtype=g.dtype, device=g.device)
            self.half = torch.linalg.solve_triangular(_cholesky(g @ g.T + tau * eye), g, upper=False)

    def block(self, channel: int) -> Tensor:
        """Σ_cc, ``(D, D)``."""
        d = self.scores.shape[2]
        part = slice(channel * d, (channel + 1) * d)
        if self.dense is not None:
            return self.dense[part, part]
        b = self.half[:, part]
        return (torch.eye(d, dtype=b.dtype, device=b.device) - b.T @ b) / self.tau

    def draw(self, n: int, noise: Noise) -> Tensor:
        """Σ(Gᵀz + √τ z') has the covariance Σ(GᵀG + τI)Σ = Σ."""
        g = self.scores.flatten(1)
        z = noise((n, len(g))) @ g + self.tau**0.5 * noise((n, g.shape[1]))
        out = z @ self.dense if self.dense is not None else (z - (z @ self.half.T) @ self.half) / self.tau
        return out.unflatten(1, self.scores.shape[1:])


def _kept(energies: Tensor, rank: int | None, tolerance: float) -> tuple[int, float]:
    """How many of the descending energies to keep, and the share of the rest."""
    share = 1 - energies.cumsum(0) / energies.sum()
    number = int((share > tolerance).sum()) + 1 if rank is None else rank
    if number >= len(energies):
        return len(energies), 0.0
    return number, max(0.0, float(share[number - 1]))


def _energy(factors: Tensor, metric: Tensor) -> Tensor:
    """tr(F_c A F_cᵀ), ``(C,)``."""
    return ((factors @ metric) * factors).sum((1, 2))


def _remainder(diagonal: Tensor, energy: Tensor, metric: Tensor) -> Tensor:
    """A diagonal ``(C, D)`` scaled to carry the mean predictive variance that is left; both are below 0 only by rounding."""
    diagonal = diagonal.clamp(min=0)
    carried = (diagonal * metric.diagonal()).sum(1)
    return diagonal * torch.where(carried > 0, energy.clamp(min=0) / carried, 0.0)[:, None]


def _lowrank(factors: Tensor, channels: int, metric: Tensor, rank: int | None, tolerance: float) -> Covariance:
    """The leading rows of each Σ_c = F_cᵀF_c in the metric of the features, and the diagonal of the rest."""
    values, vectors = torch.linalg.eigh(factors @ metric @ factors.mT)
    number, left = _kept(values.sum(0).flip(0).clamp(min=0), rank, tolerance)
    rows = vectors[:, :, -number:].mT @ factors
    rest = _remainder(
        factors.square().sum(1) - rows.square().sum(1), _energy(factors, metric) - _energy(rows, metric), metric
    )

    def draw(n: int, noise: Noise) -> Tensor:
        z, y = noise((n, channels, number)), noise((n, channels, rows.shape[2]))
        return torch.einsum("ncr,crd->ncd", z, _each(rows, channels)) + y * rest.sqrt()

    return Covariance(rows.contiguous(), None, rest, draw, left)


def _joint_lowrank(root: Tensor, metric: Tensor, rank: int | None, tolerance: float) -> Covariance:
    """The same of Σ = JᵀJ over all channels at once: r rows shared by the channels, so draws stay joint."""
    gram = torch.einsum("rcd,scd->rs", root @ metric, root)
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    number, left = _kept(values.flip(0).clamp(min=0), rank, tolerance)
    rows = torch.einsum("rk,rcd->kcd", vectors[:, -number:], root)
    by_channel, kept = root.movedim(1, 0), rows.movedim(1, 0)
    rest = _remainder(
        root.square().sum(0) - rows.square().sum(0), _energy(by_channel, metric) - _energy(kept, metric), metric
    )

    def draw(n: int, noise: Noise) -> Tensor:
        z, y = noise((n, number)), noise((n, *rest.shape))
        return torch.einsum("nk,kcd->ncd", z, rows) + y * rest.sqrt()

    return Covariance(rows.movedim(1, 0).contiguous(), None, rest, draw, left)


def _each(factors: Tensor, channels: int) -> Tensor:
    return factors.expand(channels, *factors.shape[1:])


def _cholesky(matrix: Tensor) -> Tensor:
    """L with LLᵀ = the matrix."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0 or not bool(torch.isfinite(factor).all()):
        values = torch.linalg.eigvalsh(matrix)
        raise NotPositiveDefiniteError(
            f"expected a positive definite matrix, got eigenvalues from {values[0].item():.3g} to {values[-1].item():.3g}: "
            "the data do not determine all weights and the prior does not mend it in float64; give a larger "
            "prior_precision, or more images"
        )
    return factor


def _inverse_root(precision: Tensor, tau: float) -> Tensor:
    """L⁻¹ with LLᵀ = A + τI: lower triangular, Σ = L⁻ᵀL⁻¹."""
    eye = torch.eye(len(precision), dtype=precision.dtype, device=precision.device)
    return torch.linalg.solve_triangular(_cholesky(precision + tau * eye), eye, upper=False)


def _solve(precision: Tensor, tau: float) -> Tensor:
    """(A + τI)⁻¹."""
    eye = torch.eye(len(precision), dtype=precision.dtype, device=precision.device)
    return torch.cholesky_inverse(_cholesky(precision + tau * eye))


def _triangular(covariance: Tensor) -> Tensor:
    """Upper triangular F with FᵀF = Σ."""
    return _cholesky((covariance + covariance.T) / 2).T.contiguous()


def _root(matrix: Tensor) -> Tensor:
    """F with FᵀF = a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T  # below 0 only by rounding
