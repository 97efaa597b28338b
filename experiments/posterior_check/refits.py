r"""Refits of a head on resampled images, with fresh draws (t, ε) of each.

A refit takes n images with replacement, and for every one of them M of its J draws, chosen anew without replacement. Over such
refits the variance of an image's mean score is A + B/M without bias, whatever J ≥ M is: what the images' means over J draws
have too much, B/J, is what choosing M of J has too little.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.head.sums import add_weighted_gram, gram_matrix, outer_products
from bayesdiff.laplace.loss import Loss

#: Part of the median |r| below which ψ(r)/r is that of the median's part.
FLOOR = 0.05

Draws = Iterable[tuple[int, Tensor, Tensor, Tensor]]


def resample(images: int, pool: int, draws: int, number: int, generator: Generator) -> Tensor:
    """How often each draw is in each refit, ``(number, images·pool)`` float64; ``draws`` of the ``pool`` each time."""
    counts = torch.zeros(number, images * pool, dtype=torch.float64)
    for row in counts:
        chosen = torch.randint(images, (images, 1), generator=generator)
        which = torch.rand(images, pool, generator=generator, dtype=torch.float64).argsort(1)[:, :draws]
        index = (chosen * pool + which).flatten()
        row.index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
    return counts


def least_squares(
    geometry: HeadGeometry, draws: Draws, counts: Tensor, weight: Tensor, ridge: float
) -> tuple[Tensor, float]:
    """Ridge refits in closed form, one pass over the draws: heads minus ``weight``, ``(R, C, D)``, and 0.

    Args:
        geometry: The head's.
        draws: First draw's number, inputs, residuals, weights.
        counts: ``(R, draws)``.
        weight: W that the residuals belong to, ``(C, D)``.
        ridge: τ.
    """
    c, d = weight.shape
    upper = torch.triu_indices(d, d)
    grams = torch.zeros(len(counts), upper.shape[1], dtype=torch.float64)
    crosses = torch.zeros(len(counts), c * d, dtype=torch.float64)
    for first, x, r, weights in tqdm(draws, desc="moments of draws"):
        if geometry.kind == "linear":
            phi = geometry.design(x).double().reshape(len(x), -1, d)
            own = (phi.mT @ phi)[:, upper[0], upper[1]] * weights[:, None]
        else:
            own = torch.stack([gram_matrix(geometry, row[None])[upper[0], upper[1]] for row in x]) * weights[:, None]
        times = counts[:, first : first + len(x)]
        grams.addmm_(times, own)
        crosses.addmm_(times, outer_products(geometry, x.double(), r.double()).flatten(1) * weights[:, None])
    heads = []
    for gram, cross in zip(grams, crosses, strict=True):
        full = torch.zeros(d, d, dtype=torch.float64)
        full[upper[0], upper[1]] = gram
        full = full + full.triu(1).T + ridge * torch.eye(d, dtype=torch.float64)
        heads.append(torch.cholesky_solve((cross.view(c, d) - ridge * weight).T, torch.linalg.cholesky(full)).T)
    return torch.stack(heads), 0.0


def m_estimates(
    geometry: HeadGeometry, draws: Draws, counts: Tensor, weight: Tensor, ridge: float, loss: Loss, iterations: int
) -> tuple[Tensor, float]:
    """Refits under any loss: W ← W + P Σ w ψ(r − (W − W_0)φ) φᵀ, with one P for all iterations and all refits.

    The fixed point does not depend on P, so the judge has no estimate of the loss's curvature in it: P is the inverse of the
    matrix of iteratively reweighted least squares, Σ w ψ(r)/r φφᵀ, times a number, which a secant finds
    (Barzilai & Borwein 1988).

    Args:
        geometry: The head's.
        draws: First draw's number, inputs, residuals, weights; kept in memory.
        counts: ``(R, draws)``.
        weight: W_0 that the residuals belong to, ``(C, D)``.
        ridge: τ.
        loss: The loss.
        iterations: How many.

    Returns:
        Heads minus W_0, ``(R, C, D)``, and the last step relative to what varies over the refits (to all of the way, if there
        is one).
    """
    kept = [(first, x.half(), r.float(), weights) for first, x, r, weights in tqdm(draws, desc="features of draws")]
    number, (c, d) = len(counts), weight.shape
    gram = torch.zeros(d, d, dtype=torch.float64)
    channel = 1 if geometry.kind == "conv" else -1
    for first, x, r, weights in tqdm(kept, desc="reweighted squares"):
        size = r.abs().clamp(min=FLOOR * float(r.abs().median()))
        slope = (loss.score(size) / size).mean(channel).flatten(1)
        mean = counts[:, first : first + len(x)].mean(0) * weights
        add_weighted_gram(geometry, x.float(), mean[:, None] * slope, gram)
    inverse = torch.linalg.inv(gram + ridge * torch.eye(d, dtype=torch.float64))

    def gradient(heads: Tensor) -> Tensor:
        total = -ridge * (heads + weight)
        many = replace(geometry, out_channels=number * c)
        for first, x, r, weights in kept:
            away = geometry.apply(x.float(), heads.float())  # (R, B, C, …)
            psi = loss.score(r - away).transpose(0, 1)  # (B, R, …, C, …)
            psi = psi.flatten(1, 2) if channel == 1 else psi.movedim(1, -2).flatten(-2)
            scores = outer_products(many, x.float(), psi.contiguous()).unflatten(1, (number, c))  # (B, R, C, D)
            total += torch.einsum("rb,brcd->rcd", counts[:, first : first + len(x)] * weights, scores.double())
        return total

    heads = torch.zeros(number, c, d, dtype=torch.float64)
    rate = 1.0
    before: tuple[Tensor, Tensor] | None = None
    moved = math.inf
    bar = tqdm(range(iterations), desc="iterations")
    for _ in bar:
        g = gradient(heads)
        direction = g @ inverse
        if before is not None:
            step, change = heads - before[0], before[1] - g
            # ⟨s, P⁻¹s⟩/⟨s, y⟩: that matrix's curvature over the loss's along the last steps, of all refits together.
            curvature = float((step * change).sum())
            rate = float(((step @ gram) * step).sum()) / curvature if curvature > 0 else rate
        before = (heads, g)
        heads = heads + rate * direction
        last = rate * direction
        spread = heads - heads.mean(0) if number > 1 else heads
        moved = float(((last @ gram) * last).sum() / ((spread @ gram) * spread).sum()) ** 0.5
        bar.set_postfix(moved=f"{moved:.2g}")
    return heads, moved
