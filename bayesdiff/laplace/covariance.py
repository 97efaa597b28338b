r"""Σ as tensors: what predictions and draws are made of, and nothing else.

A covariance of the head's weights has one of six forms. Each is a set of named tensors, so that it can be saved, sent to other
processes, and read again without factorising anything:

=============  =============================================  ==========================================================
``diagonal``   variances                                      Σ = diag(v)
``channels``   factors F (and rest d)                         Σ_c = F_cᵀF_c (+ diag(d_c)), channels independent
``joint``      root J (and rest d; and rows R)                Σ = JᵀJ (+ diag(d)) over all channels at once
``product``    features F, mix M                              Σ = MMᵀ ⊗ FᵀF
``spectral``   channel and feature vectors Q, variances v     Σ = (Q_c ⊗ Q_d) diag(v) (Q_c ⊗ Q_d)ᵀ
``fisher``     factors F, scores G, and half B or inverse     Σ = (GᵀG + τI)⁻¹ over all channels at once
=============  =============================================  ==========================================================

Prediction needs each channel's :math:`\Sigma_c = R_c^\top\mathrm{diag}(s_c)R_c + \mathrm{diag}(d_c)` only, so that
:math:`\varphi^\top\Sigma_c\varphi` is a sum of squares and never negative. Draws are joint over the channels where Σ is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from bayesdiff.checks import ArgumentError, ShapeError
from bayesdiff.rng import normal, orthogonal_normal

#: Makes standard normal numbers of a shape; the first dimension is that of the draws.
Noise = Callable[[tuple[int, ...]], Tensor]

#: Terms that are this many times larger than their sum lose more than a thousandth of it in float32.
AMPLIFIED = 1e4
#: Draws by which that is measured.
MEASURED = 16

#: The parts of each form and their shapes: C channels, D features, 1 or C ("c"), or any number of rows ("R", "S").
FORMS: dict[str, dict[str, str]] = {
    "diagonal": {"variances": "cD"},
    "channels": {"factors": "cRD", "rest?": "cD"},
    "joint": {"root": "RCD", "rest?": "CD", "rows?": "CSD"},
    "product": {"features": "RD", "mix": "CC"},
    "spectral": {"channels": "CC", "features": "DD", "variances": "CD"},
    "fisher": {"factors": "CRD", "scores": "SCD", "half?": "SP", "inverse?": "PP", "tau": "1"},
}


@dataclass(frozen=True, eq=False)
class Covariance:
    r"""Σ, by channel for prediction and jointly for draws.

    Args:
        form: One of :data:`FORMS`.
        parts: Its tensors, float64.
        shape: (C, D).
        approximation_error: For ``kron`` the relative Frobenius distance to the matrix of gradients; for ``lowrank`` the
            share of the mean predictive variance that the diagonal carries; 0 for the others.

    Raises:
        ShapeError: The parts are not those of the form, or not of this shape.
        ArgumentError: A variance is negative.
    """

    form: str
    parts: Mapping[str, Tensor]
    shape: tuple[int, int]
    approximation_error: float = 0.0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ShapeError(f"expected a covariance of form {', '.join(FORMS)}, got {self.form!r}")
        wanted = FORMS[self.form]
        names = {name.rstrip("?") for name in wanted}
        needed = {name for name in wanted if not name.endswith("?")}
        if self.form == "fisher":
            needed.add("half" if "half" in self.parts else "inverse")
        if not needed <= set(self.parts) <= names:
            raise ShapeError(
                f"expected a {self.form} covariance of {', '.join(sorted(names))}, got {', '.join(sorted(self.parts))}"
            )
        c, d = self.shape
        sizes: dict[str, int] = {"C": c, "D": d, "P": c * d, "1": 1}
        for name, letters in wanted.items():
            part = self.parts.get(name.rstrip("?"))
            if part is None:
                continue
            fits = part.dtype == torch.float64 and part.ndim == len(letters)
            for size, letter in zip(part.shape, letters, strict=False):
                fits = fits and size == ((c if size == c else 1) if letter == "c" else sizes.setdefault(letter, size))
            if not fits:
                raise ShapeError(
                    f"expected {name.rstrip('?')} of a {self.form} covariance as float64 {'×'.join(letters)} with C = {c} and "
                    f"D = {d}, got {part.dtype} {tuple(part.shape)}"
                )
            if name.rstrip("?") in ("variances", "rest", "tau") and bool((part < 0).any()):
                raise ArgumentError(
                    f"expected {name.rstrip('?')} of a {self.form} covariance >= 0, got {float(part.min()):.3g}"
                )
        # As a file has them: another order in memory is another order of summing, and other last bits.
        object.__setattr__(self, "parts", {name: part.contiguous() for name, part in self.parts.items()})

    @cached_property
    def rows(self) -> Tensor | None:
        """R, ``(1 or C, rows, D)``; one for all channels, or one for each. None: there is only the diagonal."""
        p = self.parts
        if self.form == "diagonal":
            return None
        if self.form in ("channels", "fisher"):
            return p["factors"]
        if self.form == "joint":
            return p["rows"] if "rows" in p else p["root"].movedim(1, 0).contiguous()
        return p["features"].T[None].contiguous() if self.form == "spectral" else p["features"][None]

    @cached_property
    def scales(self) -> Tensor | None:
        """s ≥ 0, ``(C, rows)``; None is 1."""
        p = self.parts
        if self.form == "product":
            return p["mix"].square().sum(1, keepdim=True).expand(-1, len(p["features"])).contiguous()
        return p["channels"].square() @ p["variances"] if self.form == "spectral" else None

    @cached_property
    def diagonal(self) -> Tensor | None:
        """d ≥ 0, ``(1 or C, D)``; None is 0."""
        return self.parts.get("variances" if self.form == "diagonal" else "rest")

    def variances(self) -> Tensor:
        """The diagonal of Σ, ``(C, D)``."""
        total = next(iter(self.parts.values())).new_zeros(self.shape)
        if self.rows is not None:
            squares = self.rows.square()
            total = total + (squares.sum(1) if self.scales is None else (self.scales[:, None] @ squares)[:, 0])
        return total if self.diagonal is None else total + self.diagonal

    def draw(self, n: int, generator: Generator | None = None, orthogonal: bool = False) -> Tensor:
        """n draws of δW, ``(n, C, D)`` float64; see :meth:`bayesdiff.LaplacePosterior.deviations`."""
        source = orthogonal_normal if orthogonal else normal
        return self.transform(n, lambda shape: source(shape, generator))

    def transform(self, n: int, noise: Noise) -> Tensor:
        """Standard normal numbers to n draws of δW ~ N(0, Σ), ``(n, C, D)``; linear in the numbers."""
        p, (c, d) = self.parts, self.shape
        if self.form == "diagonal":
            return noise((n, c, d)) * p["variances"].sqrt()
        if self.form == "product":
            return p["mix"] @ (noise((n, c, len(p["features"]))) @ p["features"])
        if self.form == "spectral":
            return p["channels"] @ (noise((n, c, d)) * p["variances"].sqrt()) @ p["features"].T
        if self.form == "fisher":
            return self._fisher(n, noise)
        if self.form == "channels":
            factors = p["factors"].expand(c, *p["factors"].shape[1:])
            drawn = torch.einsum("ncr,crd->ncd", noise((n, c, factors.shape[1])), factors)
        else:
            drawn = (noise((n, len(p["root"]))) @ p["root"].flatten(1)).unflatten(1, (c, d))
        return drawn + noise((n, c, d)) * p["rest"].sqrt() if "rest" in p else drawn

    def _fisher(self, n: int, noise: Noise) -> Tensor:
        """Σ(Gᵀz + √τ z') has the covariance Σ(GᵀG + τI)Σ = Σ."""
        p = self.parts
        g, tau = p["scores"].flatten(1), float(p["tau"])
        z = noise((n, len(g))) @ g + tau**0.5 * noise((n, g.shape[1]))
        out = z @ p["inverse"] if "inverse" in p else (z - (z @ p["half"].T) @ p["half"]) / tau
        return out.unflatten(1, self.shape)

    def __repr__(self) -> str:
        """One line."""
        return f"Covariance({self.form!r}, {self.shape[0]} × {self.shape[1]})"


def amplification(sigma: Covariance, precision: Tensor) -> float:
    r"""How many times larger the terms of δWφ are than their sum: :math:`\sum_d s_d f_d / \sqrt{\mathrm{E}(\delta W\varphi)^2}`.

    Args:
        sigma: Σ; :math:`s_d` the standard deviations of the weights.
        precision: A, the Gram matrix of the features; :math:`f_d^2` its diagonal. 1 for a diagonal alone.
    """
    if precision.ndim < 2 or sigma.form == "diagonal":
        return 1.0
    metric = precision if precision.ndim == 2 else precision.mean(0)
    draws = sigma.draw(MEASURED, torch.Generator().manual_seed(0))
    sums = ((draws @ metric) * draws).sum((0, 2)) / MEASURED
    terms = sigma.variances().sqrt() @ metric.diagonal().clamp(min=0).sqrt()
    return max(1.0, float(terms.square().sum() / sums.sum()) ** 0.5) if float(sums.sum()) > 0 else 1.0
