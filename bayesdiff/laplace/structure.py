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

What is kept of each is :mod:`bayesdiff.laplace.covariance`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesdiff.checks import ArgumentError, NotPositiveDefiniteError
from bayesdiff.laplace.covariance import Covariance

STRUCTURES = ("full", "kron", "diag", "lowrank")
COVARIANCES = ("sandwich", "ggn", "ef")
KRON_ITERATIONS = 30
#: The power method of ``kron`` ends where B moves by less, relative.
KRON_CHANGE = 1e-9
#: The same where features are many and an iteration is dear: what is left then is a hundredth of it, far below a sketch's error.
KRON_CHANGE_MANY = 1e-5
#: Features that its first iterations are done in, mixed at random from all; the last ones have all.
KRON_MIXED = 128
#: The share of the mean predictive variance that a low-rank covariance leaves to its diagonal, unless a rank is given.
TOLERANCE = 0.01


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
    parts = _fisher(scores, tau)
    if structure == "lowrank":
        return _lowrank(parts["factors"], c, precision, rank, tolerance)
    return Covariance("fisher", parts, (c, scores.shape[2]))


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
    if c > 1:
        if d > 4 * KRON_MIXED:  # a start that is nearly right, for less
            mix = torch.randn(d, KRON_MIXED, generator=torch.Generator().manual_seed(0), dtype=scores.dtype)
            channels = _iterated(scores @ mix.to(scores.device), channels, KRON_CHANGE_MANY)
        channels = _iterated(scores, channels, KRON_CHANGE_MANY if d > 4 * KRON_MIXED else KRON_CHANGE)
    # The last A_g belongs to the last B before; one more half step makes the pair consistent.
    mixed = torch.einsum("ncd,ce->ned", scores, channels).flatten(0, 1)
    features = mixed.T @ scores.flatten(0, 1) / channels.square().sum()
    inner = float(channels.square().sum() * features.square().sum())
    return (channels + channels.T) / 2, (features + features.T) / 2, max(0.0, 1 - inner / norm) ** 0.5


def _iterated(scores: Tensor, channels: Tensor, change: float) -> Tensor:
    """B, from a start, by the power method, until it moves by no more than ``change``, relative."""
    for _ in range(KRON_ITERATIONS):
        mixed = torch.einsum("ncd,ce->ned", scores, channels).flatten(0, 1)
        features = mixed.T @ scores.flatten(0, 1) / channels.square().sum()
        fresh = torch.einsum("ncd,ned->ce", scores @ features, scores) / features.square().sum()
        before, channels = channels, fresh * (len(channels) / fresh.trace())
        if float((channels - before).norm()) <= change * float(channels.norm()):
            break
    return channels


def _diag(covariance: str, precision: Tensor, scores: Tensor, prior: Tensor) -> Covariance:
    squares = scores[0].square() if len(scores) else scores.new_zeros(0)
    if covariance == "ef":
        variances = 1 / (squares + prior[:, None])
    else:
        inverse = 1 / (precision + prior[:, None])
        variances = inverse if covariance == "ggn" else squares * inverse.square()

    same = bool((variances == variances[:1]).all())
    return Covariance(
        "diagonal", {"variances": variances[:1] if same else variances}, (len(variances), variances.shape[1])
    )


def _channelwise(factors: Tensor, channels: int) -> Covariance:
    """Independent channels with Σ_c = F_cᵀF_c; factors ``(1 or C, R, D)``."""
    return Covariance("channels", {"factors": factors}, (channels, factors.shape[2]))


def _joint(root: Tensor) -> Covariance:
    """Σ = JᵀJ over all channels, J ``(R, C, D)``."""
    parts = {"root": root}
    if root.shape[0] > root.shape[2]:
        parts["rows"] = torch.linalg.qr(root.movedim(1, 0), mode="r").R
    return Covariance("joint", parts, (root.shape[1], root.shape[2]))


def _product(rows: Tensor, channels: Tensor, error: float) -> Covariance:
    """Σ = B ⊗ RᵀR."""
    parts = {"features": rows, "mix": _root(channels).T.contiguous()}
    return Covariance("product", parts, (len(channels), rows.shape[1]), error)


def _spectral(channels: Tensor, features: Tensor, tau: float, error: float) -> Covariance:
    """Σ = (B ⊗ A_g + τI)⁻¹, through the eigenvectors of B and A_g."""
    lambda_c, q_c = torch.linalg.eigh(channels)
    lambda_d, q_d = torch.linalg.eigh(features)
    # Both are positive semidefinite; below 0 only by rounding.
    inverse = 1 / (lambda_c.clamp(min=0)[:, None] * lambda_d.clamp(min=0) + tau)
    return Covariance("spectral", {"channels": q_c, "features": q_d, "variances": inverse}, (len(q_c), len(q_d)), error)


def _fisher(scores: Tensor, tau: float) -> dict[str, Tensor]:
    """(GᵀG + τI)⁻¹ over all C·D weights: factors of its diagonal blocks, and what draws need; never whole if G has few rows."""
    c, d = scores.shape[1:]
    g = scores.flatten(1)
    parts = {"scores": scores, "tau": torch.tensor([tau], dtype=torch.float64)}
    if len(g) >= g.shape[1]:
        eye = torch.eye(g.shape[1], dtype=g.dtype, device=g.device)
        inverse = parts["inverse"] = torch.cholesky_inverse(_cholesky(g.T @ g + tau * eye))
        blocks = [inverse[i : i + d, i : i + d] for i in range(0, c * d, d)]
    else:  # Woodbury: Σ = (I − Bᵀ B)/τ, B = L⁻¹G, LLᵀ = τI + GGᵀ
        eye = torch.eye(len(g), dtype=g.dtype, device=g.device)
        half = parts["half"] = torch.linalg.solve_triangular(_cholesky(g @ g.T + tau * eye), g, upper=False)
        one = torch.eye(d, dtype=g.dtype, device=g.device)
        blocks = [(one - half[:, i : i + d].T @ half[:, i : i + d]) / tau for i in range(0, c * d, d)]
    return {**parts, "factors": torch.stack([_triangular(block) for block in blocks])}


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

    return Covariance("channels", {"factors": rows.contiguous(), "rest": rest}, (channels, rows.shape[2]), left)


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

    return Covariance("joint", {"root": rows.contiguous(), "rest": rest}, (rows.shape[1], rows.shape[2]), left)


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
