r"""What becomes of a Gaussian network output under a map.

The posterior gives each element of a network's output a Gaussian, :math:`y \sim \mathcal N(\mu, \sigma^2)`. What is
shown or decided is often a function h(y): a pixel clipped to [0, 1], the event that a pixel is brighter than a
threshold, a mask's probability, a decoded image. Each link here is one such map, and knows which moments of h(y) have
a formula:

    "exact"        E h(y) and Var h(y) in closed form
    "linearized"   h(μ) and h'(μ)² σ², exact to first order: the mean's error is O(σ²), the variance's O(σ⁴)
    "probit"       E and Var by way of the integral ∫ Φ(y) N(y; μ, σ²) dy = Φ(μ/√(1 + σ²)) (MacKay 1992)
    "mc"           none of these: h applied to draws, ``link(y)``, by whoever holds the draws

A combination without a meaning is an error that names those that have one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdiff.checks import ArgumentError, ShapeError, check_choice, check_finite
from bayesdiff.gaussian import Gaussian
from bayesdiff.laplace.censored import censored_moments
from bayesdiff.laplace.push import push_deviations as push_deviations

LINK_APPROXIMATIONS = ("exact", "linearized", "probit", "mc")


class Link(ABC):
    """A map of network outputs, and the moments of what it makes of a Gaussian."""

    #: The approximations that :meth:`moments` refuses, and why.
    refused: ClassVar[dict[str, str]]
    #: Whether an element of h(y) depends on the same element of y alone.
    elementwise: bool = True

    @abstractmethod
    def __call__(self, y: Tensor) -> Tensor:
        """h(y), in the shape and dtype of y."""

    @abstractmethod
    def _moments(self, gaussian: Gaussian, link_approx: str) -> Gaussian:
        """The moments of h(y) of a finite float64 Gaussian, for an approximation that is not refused."""

    def moments(self, gaussian: Gaussian, link_approx: str) -> Gaussian:
        r"""Mean and variance of h(y), :math:`y \sim \mathcal N(\mu, \sigma^2)`, element by element.

        Computed in float64, returned in the dtypes that came.

        Args:
            gaussian: μ and σ² of the network's output, any shape.
            link_approx: ``"exact"``, ``"linearized"`` or ``"probit"``, as far as the link has it.

        Returns:
            A :class:`Gaussian` of the same shape, in the units of h; of a variable that is not Gaussian it holds the
            first two moments.

        Raises:
            ArgumentError: This link has no such approximation; the message says which it has.
            NonFiniteError: The mean or the variance is NaN or infinite.
        """
        self._check(gaussian, link_approx)
        result = self._moments(Gaussian(gaussian.mean.double(), gaussian.variance.double()), link_approx)
        return Gaussian(result.mean.to(gaussian.mean.dtype), result.variance.to(gaussian.variance.dtype))

    def _check(self, gaussian: Gaussian, link_approx: str) -> None:
        check_choice("link_approx", link_approx, LINK_APPROXIMATIONS)
        refused = {**self.refused, "mc": "it is the link called on draws, not a formula"}
        if link_approx in refused:
            possible = " or ".join(f'"{a}"' for a in LINK_APPROXIMATIONS if a not in refused)
            raise ArgumentError(
                f"expected link_approx {possible or '(none)'} for the moments of {type(self).__name__}, got "
                f'"{link_approx}": {refused[link_approx]}'
            )
        check_finite("mean", gaussian.mean)
        check_finite("variance", gaussian.variance)


@dataclass(frozen=True)
class Identity(Link):
    """h(y) = y: the Gaussian stays what it is, and its linearization is exact."""

    refused: ClassVar[dict[str, str]] = {
        "probit": "the probit integral is for sigmoids and steps, and the identity's moments are known exactly"
    }

    def __call__(self, y: Tensor) -> Tensor:
        """The output itself."""
        return y

    def _moments(self, gaussian: Gaussian, link_approx: str) -> Gaussian:
        return gaussian


@dataclass(frozen=True)
class ClampedPixel(Link):
    r"""A network's output as a pixel, :math:`h(y) = \mathrm{clip}((y - l)/(u - l), 0, 1)`.

    y is a Gaussian censored at both bounds. Let c = clip(μ, l, u), g = |μ − c|/σ, and J as in :mod:`bayesdiff.laplace.censored`.
    About c, which is the mean or the bound that it lies beyond,

        E[y] − c = σ (J₁(g, (u − c)/σ) − J₁(g, (c − l)/σ))
        E[(y − c)²] = σ² (J₂(g, (u − c)/σ) + J₂(g, (c − l)/σ))          Var = E[(y − c)²] − (E[y] − c)²

    y is clipped here. Each J₁² is at most Q(g) J₂ ≤ J₂/2 (Cauchy–Schwarz), so the difference is no less than half of what
    it is taken from: it is positive, and loses at most one bit. When μ is beyond a bound, only one of the two J's is not
    zero.

    ``"linearized"``: the derivative is 1/(u − l) if μ is within the bounds and 0 if not, so pixels whose mean is clipped
    come out certain.

    Args:
        low: l, the output that is black, in the network's units.
        high: u, the output that is white.

    Raises:
        ArgumentError: The bounds are not finite numbers with low < high.
    """

    low: float = -1.0
    high: float = 1.0
    refused: ClassVar[dict[str, str]] = {
        "probit": "the probit integral is for sigmoids and steps, and a clipped Gaussian has its moments in closed form"
    }

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high)

    def __call__(self, y: Tensor) -> Tensor:
        """The pixels, 0–1."""
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        return ((wide - self.low) / (self.high - self.low)).clamp(0, 1).to(y.dtype)

    def _moments(self, gaussian: Gaussian, link_approx: str) -> Gaussian:
        mean, variance = gaussian
        span = self.high - self.low
        center = mean.clamp(self.low, self.high)
        if link_approx == "linearized":
            return Gaussian((center - self.low) / span, torch.where(center == mean, variance / span**2, 0.0))
        sigma, gap = variance.sqrt(), (mean - center).abs()
        up_first, up_second = censored_moments(sigma, gap, self.high - center)
        down_first, down_second = censored_moments(sigma, gap, center - self.low)
        shift = up_first - down_first
        return Gaussian(((center - self.low) + shift) / span, (up_second + down_second - shift.square()) / span**2)


@dataclass(frozen=True)
class Exceedance(Link):
    r"""The event that a pixel is brighter than a threshold, :math:`h(y) = 1[(y - l)/(u - l) > \tau]`.

    With :math:`z = (\mu - l - \tau(u - l))/\sigma` the mean is p = Φ(z) and the variance Φ(z) Φ(−z); at σ = 0 the event is
    certain. This integral of a step over a Gaussian is the probit function itself, so ``"exact"`` and ``"probit"`` are one.

    Args:
        threshold: τ, in pixel units, 0 ≤ τ < 1: no pixel is brighter than 1.
        low: l, the output that is black, in the network's units.
        high: u, the output that is white.

    Raises:
        ArgumentError: The threshold or the bounds are not such numbers.
    """

    threshold: float
    low: float = -1.0
    high: float = 1.0
    refused: ClassVar[dict[str, str]] = {
        "linearized": "the derivative of a step is 0 almost everywhere, so every pixel would come out certain"
    }

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high)
        if not _is_number(self.threshold) or not 0 <= self.threshold < 1:
            raise ArgumentError(
                f"expected threshold in pixel units, 0 <= threshold < 1, got {self.threshold!r}: pixels are clipped to "
                "[0, 1], so none is above 1; to convert an output of the network, take (output - low)/(high - low)"
            )

    @property
    def level(self) -> float:
        """The threshold in the network's units."""
        return self.low + self.threshold * (self.high - self.low)

    def __call__(self, y: Tensor) -> Tensor:
        """1 where the pixel is above the threshold, 0 where it is not."""
        return (y.to(torch.promote_types(y.dtype, torch.float32)) > self.level).to(y.dtype)

    def _moments(self, gaussian: Gaussian, link_approx: str) -> Gaussian:
        mean, variance = gaussian
        above = mean - self.level
        certain = variance == 0
        scaled = above / torch.where(certain, 1.0, 2 * variance).sqrt()
        # ½ erfc keeps its relative accuracy in the tail, which torch.special.ndtr = ½(1 + erf) does not.
        p, q = torch.special.erfc(-scaled) / 2, torch.special.erfc(scaled) / 2
        return Gaussian(torch.where(certain, (above > 0).to(p), p), torch.where(certain, 0.0, p * q))


@dataclass(frozen=True)
class Sigmoid(Link):
    r"""A probability from a logit, :math:`h(y) = s(y) = 1/(1 + e^{-y})`.

    ``"probit"``: the mean is MacKay's (1992), who replaces s by Φ with the same slope at 0, integrates, and turns back,

        m = E s(y) ≈ s(κμ)          κ = (1 + πσ²/8)^{−1/2}

    Since s' = s − s², Var s(y) = m − m² − E s'(y) without approximation, and E s'(y) = ∂m/∂μ ≈ κ m (1 − m), so

        Var s(y) ≈ m (1 − m) (1 − κ)

    This is the form of Daunizeau (2017, arXiv:1703.00091), who fits 0.368 in the place of π/8 = 0.393. It is positive and
    within 0.015 of the truth at any μ in [−10, 10] and σ² ≤ 100 (the mean, within 0.016). It is not exact to first order:
    as σ → 0, the variance is 21 % too small at μ = 0 and too large far from 0 (11-fold at |μ| = 4). Below
    σ² ≈ 0.4 the variance of ``"linearized"`` is the nearer one; the mean of ``"probit"`` always is.

    ``"linearized"``: m = s(μ), variance (s(μ) s(−μ))² σ².
    """

    refused: ClassVar[dict[str, str]] = {
        "exact": "the integral of a sigmoid over a Gaussian has no closed form; "
        '"probit" holds for any variance, "linearized" for a small one'
    }

    def __call__(self, y: Tensor) -> Tensor:
        """s(y)."""
        return torch.sigmoid(y)

    def _moments(self, gaussian: Gaussian, link_approx: str) -> Gaussian:
        mean, variance = gaussian
        if link_approx == "linearized":
            slope = torch.sigmoid(mean) * torch.sigmoid(-mean)
            return Gaussian(torch.sigmoid(mean), slope.square() * variance)
        excess = math.pi / 8 * variance
        root = (1 + excess).sqrt()
        m, rest = torch.sigmoid(mean / root), torch.sigmoid(-mean / root)
        return Gaussian(m, m * rest * (excess / (root * (1 + root))))  # the last factor is 1 − 1/root


@dataclass(frozen=True)
class Smooth(Link):
    r"""Any differentiable map of single elements: mean h(μ), variance :math:`h'(\mu)^2\sigma^2`.

    The derivative is a Jacobian-vector product with σ; see :func:`push_deviations`, which also says what is done when
    the function has none.

    Args:
        function: h, of a tensor to a tensor of the same shape. It is called in the mean's dtype, half precision in float32.
        elementwise: Whether each element of the result depends on the same element of the input alone. If not, the
            variances of the input do not determine those of the result, and :meth:`moments` refuses; draws still work.

    Raises:
        ArgumentError: The function cannot be called.
    """

    function: Callable[[Tensor], Tensor]
    elementwise: bool = True
    refused: ClassVar[dict[str, str]] = {
        "exact": "the moments of an arbitrary function have no closed form",
        "probit": "the probit integral is for sigmoids and steps",
    }

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ArgumentError(f"expected function to be callable, got {self.function!r}")

    def __call__(self, y: Tensor) -> Tensor:
        """h(y).

        Raises:
            ShapeError: The map is said to be elementwise and returns another shape.
        """
        result = self.function(y.to(torch.promote_types(y.dtype, torch.float32)))
        if self.elementwise and result.shape != y.shape:
            raise ShapeError(
                f"expected an elementwise function to keep the shape {tuple(y.shape)}, got {tuple(result.shape)}; for other "
                "maps give elementwise=False and use push_deviations"
            )
        return result.to(y.dtype)

    def moments(self, gaussian: Gaussian, link_approx: str) -> Gaussian:
        """Mean and variance of h(y), as :meth:`Link.moments`, in the dtype of the mean or float32.

        Raises:
            ArgumentError: The approximation is not ``"linearized"``, or the map is not elementwise.
            NonFiniteError: The input, h(μ) or h'(μ) is NaN or infinite.
            ShapeError: The function does not keep the shape.
        """
        self._check(gaussian, link_approx)
        if not self.elementwise:
            raise ArgumentError(
                "expected an elementwise map, got elementwise=False: the covariances between its inputs are needed; give "
                'draws of the deviations to push_deviations, or use link_approx "mc"'
            )
        dtype = torch.promote_types(gaussian.mean.dtype, torch.float32)
        result = self._moments(Gaussian(gaussian.mean.to(dtype), gaussian.variance.to(dtype)), link_approx)
        return Gaussian(result.mean.to(gaussian.mean.dtype), result.variance.to(gaussian.variance.dtype))

    def _moments(self, gaussian: Gaussian, link_approx: str) -> Gaussian:
        return push_deviations(self, gaussian.mean, gaussian.std.unsqueeze(0))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_bounds(low: object, high: object) -> None:
    if not _is_number(low) or not _is_number(high) or not low < high:  # type: ignore[operator]
        raise ArgumentError(f"expected finite bounds low < high, got low={low!r} and high={high!r}")


#: The links that :func:`link` knows by name.
LINKS: dict[str, type[Link]] = {
    "identity": Identity,
    "clamped_pixel": ClampedPixel,
    "exceedance": Exceedance,
    "sigmoid": Sigmoid,
}


def link(name_or_link: str | Link) -> Link:
    """The link of a name, with its default settings; a link itself is returned as it is.

    Args:
        name_or_link: ``"identity"``, ``"clamped_pixel"``, ``"sigmoid"``, or a :class:`Link`.

    Raises:
        ArgumentError: It is neither, or the name of a link that needs a setting.
    """
    if isinstance(name_or_link, Link):
        return name_or_link
    kind = LINKS.get(name_or_link) if isinstance(name_or_link, str) else None
    if kind is None:
        raise ArgumentError(
            f"expected link to be one of {', '.join(map(repr, LINKS))}, or a Link such as Exceedance(0.5) or "
            f"Smooth(torch.exp), got {name_or_link!r}"
        )
    if kind is Exceedance:
        raise ArgumentError(
            "expected a threshold with the exceedance link, got the bare name 'exceedance'; give Exceedance(threshold), "
            "with the threshold in pixel units 0-1"
        )
    return kind()
