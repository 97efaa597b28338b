r"""Classifier-free guidance, read off what a pipeline did.

A guided output is :math:`g = f_u + s(f_c - f_u)` (Ho & Salimans 2022). Both branches have the same head W,
so the guided output is the head applied to guided features, :math:`g = W\psi` with
:math:`\psi = \varphi_u + s(\varphi_c - \varphi_u)`, and its variance is :math:`\psi^\top\Sigma\psi`. Adding the branches'
variances as if they were independent is an order of magnitude too large. The weights (1 − s, s) need
not be known: they are solved for, sample by sample, from the branch outputs and from what the scheduler was given.

Guidance rescale (Lin et al. 2023) gives the scheduler :math:`g' = \lambda g`,
:math:`\lambda = \phi\,\mathrm{std}(f_c)/\mathrm{std}(g) + 1 - \phi`, the standard deviation over a sample's elements. It is not
linear; where it is recognised, s and φ are solved for, and deviations obey its derivative

    δg' = λ δg + φ g (δstd(f_c)/std(g) − std(f_c) δstd(g)/std(g)²),   δstd(f) = ⟨f − mean f, δf⟩/((n − 1) std(f)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.checks import UnsupportedPipelineError, check_finite

#: Rounding steps that the largest residual of a linear relation may have, relative to its largest term.
ROUNDING = 32
#: The same for its root mean square.
ROUNDING_RMS = 4


@dataclass(frozen=True)
class Guidance:
    r"""What the scheduler is given, as a function of the M branch outputs of one step.

    Args:
        weights: w, ``(M, B)`` float64 on the CPU, :math:`\sum_m w_m = 1` for each sample.
        amount: φ of the rescaling, ``(B,)`` float64 on the CPU; None: there is none.
        conditional: The branch whose standard deviation is that of the rescaling.
        slack: How well φ is determined, ``(B,)``: not at all where std(f_c) and std(g) are alike.
    """

    weights: Tensor
    amount: Tensor | None = None
    conditional: int = -1
    slack: Tensor | None = None

    def combine(self, branches: Sequence[Tensor]) -> Tensor:
        r""":math:`\sum_m w_m f_m` of tensors ``(B, …)``, in float32 or better: outputs, or features."""
        total = torch.zeros_like(branches[0], dtype=torch.promote_types(branches[0].dtype, torch.float32))
        for weight, branch in zip(self.weights, branches, strict=True):
            total = total + _column(weight, total) * branch.to(total)
        return total

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """g' ``(B, C, H, W)`` in float32 or better, from the M outputs."""
        g = self.combine(outputs)
        if self.amount is None:
            return g
        share = _column(self.amount, g)
        return g * (share * _std(outputs[self.conditional].to(g)) / _std(g) + 1 - share)

    def push(self, outputs: Sequence[Tensor], d_guided: Tensor, d_conditional: Tensor | None) -> Tensor:
        """δg' of deviations ``(K, B, C, H, W)``: of g, and of the conditional output where there is rescaling."""
        if self.amount is None or d_conditional is None:
            return d_guided
        f, g = outputs[self.conditional].to(d_guided), self.combine(outputs).to(d_guided)
        share, std_f, std_g = _column(self.amount, g), _std(f), _std(g)
        slope = _d_std(f, std_f, d_conditional) / std_g - std_f * _d_std(g, std_g, d_guided) / std_g.square()
        return (share * std_f / std_g + 1 - share) * d_guided + share * g * slope


def solve(branches: Sequence[Tensor], output: Tensor) -> Guidance:
    r"""Find the guidance that made ``output`` of the branches.

    Args:
        branches: The M network outputs of one step, each ``(B, C, H, W)``.
        output: g', what the scheduler was given.

    Returns:
        Weights and, where :math:`g'` is rescaled, its amount; each sample's from its own numbers alone.

    Raises:
        NonFiniteError: An output is NaN or infinite.
        UnsupportedPipelineError: No guidance of this kind reproduces g' to rounding; the message has the residual.
    """
    for f in (*branches, output):
        check_finite("network outputs", f, "the network overflows in this dtype: use bfloat16 or float32")
    # The coarser of the two dtypes sets the rounding.
    eps = max(torch.finfo(branches[0].dtype).eps, torch.finfo(output.dtype).eps)
    rows = [torch.stack([f[b].double().flatten() for f in branches]) for b in range(len(output))]
    targets = [g.double().flatten() for g in output]
    solved = [_affine(f, g) for f, g in zip(rows, targets, strict=True)]
    excess = [fit.excess(eps) for fit in solved]
    # In half precision rounding hides much: a second look where a free gain explains clearly more than rounding leaves.
    gains = [_gain(f, g) for f, g in zip(rows, targets, strict=True)] if len(branches) == 2 else []
    clear = any(e * ROUNDING_RMS > 1 and 2 * g.rms < f.rms for e, f, g in zip(excess, solved, gains, strict=False))
    if gains and (max(excess) > 1 or clear) and max(fit.excess(eps) for fit in gains) <= 1:
        rescaled = _rescaled(rows, gains, eps)
        if rescaled is not None:
            return rescaled
    if max(excess) <= 1:
        return Guidance(torch.stack([fit.weights for fit in solved], dim=1))
    fit = solved[excess.index(max(excess))]
    raise UnsupportedPipelineError(
        f"expected what the scheduler is given to be a combination of the {len(branches)} network output(s) of the "
        f"step with weights that sum to 1, or one rescaled to the standard deviation of a branch, got a residual of "
        f"{fit.worst:.3g} (allowed: {fit.worst / max(excess):.3g}) with the weights "
        f"{[round(w, 4) for w in fit.weights.tolist()]}: other nonlinear guidance cannot be followed"
    )


@dataclass(frozen=True)
class _Fit:
    """Weights ``(M,)``, the residual's largest element and root mean square, and those of the terms."""

    weights: Tensor
    worst: float
    rms: float
    largest_term: float
    rms_term: float

    @classmethod
    def of(cls, weights: Tensor, residual: Tensor, terms: Tensor) -> _Fit:
        return cls(
            weights, float(residual.abs().max()), float(residual.square().mean().sqrt()), float(terms.abs().max()),
            float(terms.square().mean(1).amax().sqrt()),
        )  # fmt: skip

    def excess(self, eps: float) -> float:
        """The residual in what rounding may leave; more than 1 is too much."""
        if self.worst == 0:
            return 0.0
        if self.rms_term == 0:
            return float("inf")
        return max(self.worst / (ROUNDING * eps * self.largest_term), self.rms / (ROUNDING_RMS * eps * self.rms_term))


def _affine(branches: Tensor, output: Tensor) -> _Fit:
    """Weights that sum to 1 with Σ w f nearest to g."""
    base, rest = branches[0], output - branches[0]
    differences = branches[1:] - base
    weights = torch.zeros(len(branches), dtype=torch.float64)
    terms = base[None]
    if len(differences) and bool(differences.abs().max() > 0):
        # Branches that agree to the last bit need no weight of their own: lstsq gives the least one.
        solution = torch.linalg.lstsq(differences.T.cpu(), rest[:, None].cpu(), driver="gelsd").solution[:, 0]
        weights[1:] = solution
        moved = solution.to(rest.device)[:, None] * differences
        rest, terms = rest - moved.sum(0), torch.cat([terms, moved])
    weights[0] = 1 - weights[1:].sum()
    return _Fit.of(weights, rest, terms)


def _gain(branches: Tensor, output: Tensor) -> _Fit:
    """Free weights of two branches."""
    solution = torch.linalg.lstsq(branches.T.cpu(), output[:, None].cpu(), driver="gelsd").solution[:, 0]
    moved = solution.to(output.device)[:, None] * branches
    return _Fit.of(solution, output - moved.sum(0), torch.cat([branches, moved]))


def _rescaled(branches: list[Tensor], gains: list[_Fit], eps: float) -> Guidance | None:
    """The guidance of g' = λ(f_u + s(f_c − f_u)), λ = φ std(f_c)/std(g) + 1 − φ, if that is what it is."""
    lambdas = [float(fit.weights.sum()) for fit in gains]
    if min(lambdas) <= 0:
        return None
    weights = [fit.weights / gain for fit, gain in zip(gains, lambdas, strict=True)]
    for conditional in (1, 0):  # diffusers puts it last
        amounts, slack = [], []
        for f, w, gain in zip(branches, weights, lambdas, strict=True):
            ratio = float(f[conditional].std() / (w.to(f) @ f).std()) - 1
            amounts.append((gain - 1) / ratio if ratio else float("inf"))
            slack.append(ROUNDING * eps * (1 + float(w.abs().sum())) / abs(ratio) if ratio else 0.0)
        best = slack.index(min(slack))
        apart = [abs(a - amounts[best]) <= s + slack[best] for a, s in zip(amounts, slack, strict=True)]
        if -slack[best] <= amounts[best] <= 1 + slack[best] and all(apart):
            stacked = torch.stack(weights, dim=1)
            phi, uncertain = (torch.tensor(v, dtype=torch.float64) for v in (amounts, slack))
            return Guidance(stacked, phi, conditional, uncertain)
    return None


def _column(values: Tensor, like: Tensor) -> Tensor:
    """``(B,)`` to ``(B, 1, …)`` beside ``like``, ``(B, …)``."""
    return values.to(like).view(-1, *(1,) * (like.ndim - 1))


def by_sample(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A number for each sample, ``(B, 1, …)``, by sums whose order does not depend on the batch."""
    return torch.stack([function(row) for row in x]).view(-1, *(1,) * (x.ndim - 1))


def _std(x: Tensor) -> Tensor:
    return by_sample(torch.std, x)


def _d_std(x: Tensor, std: Tensor, d: Tensor) -> Tensor:
    """The derivative of the standard deviation of each sample along ``(K, B, …)``: ``(K, B, 1, …)``."""
    away = x - by_sample(torch.mean, x)
    inner = torch.stack([(away[b] * d[:, b]).flatten(1).sum(1) for b in range(len(x))], dim=1)
    return inner.view(*inner.shape, *(1,) * (x.ndim - 1)) / ((x[0].numel() - 1) * std)
