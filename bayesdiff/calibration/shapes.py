r"""Distributions of one number, up to place and width: y = μ + sZ, with Z of one shape for all numbers.

    Normal        Z ~ N(0, 1)
    StudentT      Z ~ t_ν: heavier tails
    Quantiles     Z = h(G), G ~ N(0, 1), h increasing and piecewise linear through given quantiles

The last is quantile recalibration (Kuleshov et al. 2018): the p-quantile of Z is what was found on data, beyond the outermost
knots it goes on as a normal one does. Each knows its density, distribution function, quantiles, moments and CRPS

.. math:: \mathrm{CRPS}(F, y) = \int (F(x) - 1\{x \ge y\})^2\,dx

in closed form (normal: Gneiting & Raftery 2007; Student's t: Jordan, Krüger & Lerch 2019; piecewise: by
:math:`\int_{-\infty}^g \Phi^2 = g\Phi^2(g) + 2\Phi(g)\varphi(g) - \Phi(\sqrt2 g)/\sqrt\pi`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from scipy import special
from torch import Tensor

from bayesdiff.checks import ArgumentError, NegativeVarianceError, ShapeError, check_finite, check_positive
from bayesdiff.gaussian import Gaussian

_ROOT_PI = math.sqrt(math.pi)


class Shape(Protocol):
    """The distribution of Z. All functions work elementwise on float64 tensors of any shape."""

    @property
    def mean(self) -> float:
        """E Z."""

    @property
    def variance(self) -> float:
        """Var Z; infinite where it does not exist."""

    def log_density(self, z: Tensor) -> Tensor:
        """log f(z)."""

    def cdf(self, z: Tensor) -> Tensor:
        """P(Z ≤ z)."""

    def quantile(self, p: Tensor) -> Tensor:
        """The z with P(Z ≤ z) = p, 0 < p < 1."""

    def crps(self, z: Tensor) -> Tensor:
        """The continuous ranked probability score of Z at z."""


@dataclass(frozen=True)
class Normal:
    """Z ~ N(0, 1)."""

    mean: float = 0.0
    variance: float = 1.0

    def log_density(self, z: Tensor) -> Tensor:
        return -0.5 * z.square() - 0.5 * math.log(2 * math.pi)

    def cdf(self, z: Tensor) -> Tensor:
        return torch.special.ndtr(z)

    def quantile(self, p: Tensor) -> Tensor:
        return torch.special.ndtri(p)

    def crps(self, z: Tensor) -> Tensor:
        return z * (2 * self.cdf(z) - 1) + 2 * self.log_density(z).exp() - 1 / _ROOT_PI


@dataclass(frozen=True)
class StudentT:
    """Z ~ t with ν degrees of freedom (not scaled to variance 1).

    Args:
        dof: ν > 1: below that the CRPS is infinite.

    Raises:
        ArgumentError: ν ≤ 1.
    """

    dof: float

    def __post_init__(self) -> None:
        if check_positive("dof", self.dof) <= 1:
            raise ArgumentError(f"expected dof > 1, where the CRPS is finite, got {self.dof}")

    @property
    def mean(self) -> float:
        return 0.0

    @property
    def variance(self) -> float:
        return self.dof / (self.dof - 2) if self.dof > 2 else float("inf")

    def log_density(self, z: Tensor) -> Tensor:
        half = (self.dof + 1) / 2
        constant = math.lgamma(half) - math.lgamma(self.dof / 2) - 0.5 * math.log(self.dof * math.pi)
        return constant - half * torch.log1p(z.square() / self.dof)

    def cdf(self, z: Tensor) -> Tensor:
        return torch.as_tensor(special.stdtr(self.dof, z.detach().cpu().numpy())).to(z)

    def quantile(self, p: Tensor) -> Tensor:
        return torch.as_tensor(special.stdtrit(self.dof, p.detach().cpu().numpy())).to(p)

    def crps(self, z: Tensor) -> Tensor:
        nu = self.dof
        betas = math.exp(_log_beta(0.5, nu - 0.5) - 2 * _log_beta(0.5, nu / 2))
        f = self.log_density(z).exp()
        return z * (2 * self.cdf(z) - 1) + 2 * f * (nu + z.square()) / (nu - 1) - 2 * math.sqrt(nu) / (nu - 1) * betas


@dataclass(frozen=True)
class Scaled:
    """Another shape, stretched: Z = cZ'."""

    inner: Shape
    factor: float

    @property
    def mean(self) -> float:
        return self.factor * self.inner.mean

    @property
    def variance(self) -> float:
        return self.factor**2 * self.inner.variance

    def log_density(self, z: Tensor) -> Tensor:
        return self.inner.log_density(z / self.factor) - torch.tensor(self.factor, dtype=z.dtype).log()

    def cdf(self, z: Tensor) -> Tensor:
        return self.inner.cdf(z / self.factor)

    def quantile(self, p: Tensor) -> Tensor:
        return self.factor * self.inner.quantile(p)

    def crps(self, z: Tensor) -> Tensor:
        return self.factor * self.inner.crps(z / self.factor)


@dataclass(frozen=True)
class Quantiles:
    """Z = h(G) of a normal G, h linear between knots and beyond them.

    Args:
        levels: p₁ < … < p_n in (0, 1), n ≥ 2.
        values: The quantiles of Z there, increasing.

    Raises:
        ArgumentError: They are fewer than two, differ in number, or do not increase.
    """

    levels: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        levels, values = (torch.as_tensor(v, dtype=torch.float64) for v in (self.levels, self.values))
        check_finite("quantiles", values)
        if len(levels) < 2 or levels.shape != values.shape:
            raise ArgumentError(f"expected as many levels as values, two or more, got {len(levels)} and {len(values)}")
        if bool((levels.diff() <= 0).any()) or bool((values.diff() <= 0).any()) or levels[0] <= 0 or levels[-1] >= 1:
            raise ArgumentError("expected levels in (0, 1) and values that increase, got some that do not")

    def _pieces(self) -> tuple[Tensor, Tensor, Tensor]:
        """The knots g and h(g), and the slopes of the n + 1 pieces, the outer ones going on as their neighbours."""
        g = torch.special.ndtri(torch.tensor(self.levels, dtype=torch.float64))
        h = torch.tensor(self.values, dtype=torch.float64)
        slopes = h.diff() / g.diff()
        # Outside, the line through the outermost knot and the middle: steadier than the last two quantiles alone.
        low = (h[len(h) // 2] - h[0]) / (g[len(g) // 2] - g[0])
        high = (h[-1] - h[(len(h) - 1) // 2]) / (g[-1] - g[(len(g) - 1) // 2])
        return g, h, torch.cat([low[None], slopes, high[None]])

    def _g(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The normal number that h maps to z, and the slope of h there."""
        g, h, slopes = (v.to(z.device) for v in self._pieces())
        piece = torch.bucketize(z.contiguous(), h)
        knot = (piece - 1).clamp(min=0)
        return g[knot] + (z - h[knot]) / slopes[piece], slopes[piece]

    @property
    def mean(self) -> float:
        return self._moments()[0]

    @property
    def variance(self) -> float:
        return self._moments()[1]

    def _moments(self) -> tuple[float, float]:
        """Mean and variance, by those of a normal number between knots."""
        g, h, slopes = self._pieces()
        knot = torch.arange(len(slopes)).sub(1).clamp(min=0)
        a = h[knot] - slopes * g[knot]
        phi, edge, weighted = (torch.zeros(len(g) + 2, dtype=torch.float64) for _ in range(3))
        phi[1:-1], phi[-1] = torch.special.ndtr(g), 1.0
        edge[1:-1] = torch.exp(-g.square() / 2) / math.sqrt(2 * math.pi)
        weighted[1:-1] = g * edge[1:-1]
        m0, m1 = phi.diff(), -edge.diff()
        m2 = m0 - weighted.diff()
        first = float((a * m0 + slopes * m1).sum())
        second = float((a.square() * m0 + 2 * a * slopes * m1 + slopes.square() * m2).sum())
        return first, second - first**2

    def log_density(self, z: Tensor) -> Tensor:
        g, slope = self._g(z)
        return Normal().log_density(g) - slope.log()

    def cdf(self, z: Tensor) -> Tensor:
        return torch.special.ndtr(self._g(z)[0])

    def quantile(self, p: Tensor) -> Tensor:
        g, h, slopes = (v.to(p.device) for v in self._pieces())
        at = torch.special.ndtri(p)
        piece = torch.bucketize(at.contiguous(), g)
        knot = (piece - 1).clamp(min=0)
        return h[knot] + (at - g[knot]) * slopes[piece]

    def crps(self, z: Tensor) -> Tensor:
        knots, _, slopes = (v.to(z.device) for v in self._pieces())
        at, _ = self._g(z)
        inner = slopes[1:-1]
        below, above = _squared_cdf(knots), _squared_cdf(-knots)
        # ∫F² up to each knot, and ∫(1 − F)² from each knot on.
        up = slopes[0] * below[0] + torch.cat([below.new_zeros(1), (inner * below.diff()).cumsum(0)])
        down = slopes[-1] * above[-1] + torch.cat(
            [(inner * -above.diff()).flip(0).cumsum(0).flip(0), above.new_zeros(1)]
        )
        piece = torch.bucketize(at.contiguous(), knots)
        last, slope = (piece - 1).clamp(min=0), slopes[piece]
        f2 = up[last] + slope * (_squared_cdf(at) - below[last])
        q2 = down[last] + slope * (_squared_cdf(-at) - above[last])
        return f2 + q2


def _squared_cdf(g: Tensor) -> Tensor:
    """∫ Φ² up to g."""
    normal = Normal()
    cdf = normal.cdf(g)
    return g * cdf.square() + 2 * cdf * normal.log_density(g).exp() - normal.cdf(math.sqrt(2) * g) / _ROOT_PI


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


@dataclass(frozen=True)
class Prediction:
    r"""What is predicted of each element of a tensor: :math:`y_i = \mu_i + s_i Z`, Z of one shape for all.

    Args:
        location: μ, any shape.
        scale: s > 0, the shape of ``location``, in its units.
        shape: The distribution of Z.

    Raises:
        ShapeError: The two shapes differ.
        NegativeVarianceError: A scale is not positive: a prediction without any spread has no density.
    """

    location: Tensor
    scale: Tensor
    shape: Shape = Normal()

    def __post_init__(self) -> None:
        if self.location.shape != self.scale.shape:
            raise ShapeError(
                f"expected a location and a scale of one shape, got {tuple(self.location.shape)} and {tuple(self.scale.shape)}"
            )
        bad = ~(self.scale > 0)
        if bool(bad.any()):
            raise NegativeVarianceError(
                f"expected a spread > 0 everywhere, got {int(bad.sum())} of {bad.numel()} elements that are zero, negative or "
                "NaN; add what the data leave open (bayesdiff.calibration.noise_models)"
            )

    @classmethod
    def of(cls, given: Prediction | Gaussian) -> Prediction:
        """A Gaussian as a prediction; a prediction as it is.

        Raises:
            ArgumentError: It is neither.
        """
        if isinstance(given, Gaussian):
            return cls(given.mean, given.std)
        if not isinstance(given, Prediction):
            raise ArgumentError(f"expected a Gaussian or a Prediction, got {type(given).__name__}")
        return given

    @property
    def mean(self) -> Tensor:
        """E y, float64."""
        return self.location.double() + self.scale.double() * self.shape.mean

    @property
    def variance(self) -> Tensor:
        """Var y, float64."""
        return self.scale.double().square() * self.shape.variance

    def _z(self, y: Tensor) -> Tensor:
        return (y.double() - self.location.double()) / self.scale.double()

    def log_density(self, y: Tensor) -> Tensor:
        """log f(y), in nats, float64."""
        return self.shape.log_density(self._z(y)) - self.scale.double().log()

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y ≤ y), float64."""
        return self.shape.cdf(self._z(y))

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """The central interval that holds y with this probability: its ends, float64."""
        low, high = self.shape.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
        scale = self.scale.double()
        return self.location.double() + scale * low, self.location.double() + scale * high

    def crps(self, y: Tensor) -> Tensor:
        """The continuous ranked probability score, in the units of y, float64."""
        return self.scale.double() * self.shape.crps(self._z(y))
