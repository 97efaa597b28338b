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

With Q = 1 − Φ and φ the standard normal density, every censored moment that is needed here is one of

    J₁(α, w) = E clip(Z − α, 0, w) = ∫_α^{α+w} Q(z) dz
    J₂(α, w) = E clip(Z − α, 0, w)² = 2 ∫_α^{α+w} (z − α) Q(z) dz          α, w ≥ 0

(the moments of the two-limit tobit model, Rosett & Nelson 1975, about the bound that is nearer).
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bayesdiff.checks import (
    ArgumentError,
    BayesdiffWarning,
    ShapeError,
    check_choice,
    check_finite,
    check_int,
)
from bayesdiff.gaussian import Gaussian

LINK_APPROXIMATIONS = ("exact", "linearized", "probit", "mc")
#: Standard deviations beyond which float64 has nothing but zeros: exp(−z²/2) is 0 from z = 38.6 on.
HORIZON = 60.0
_LEGENDRE = np.polynomial.legendre.leggauss(8)
#: Gauss–Legendre nodes and weights on [0, 1].
_NODES, _WEIGHTS = ((_LEGENDRE[0] + 1) / 2).tolist(), (_LEGENDRE[1] / 2).tolist()


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

    y is a Gaussian censored at both bounds. Let c = clip(μ, l, u), g = |μ − c|/σ, and J as at the top of the module.
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
        up_first, up_second = _censored(sigma, gap, self.high - center)
        down_first, down_second = _censored(sigma, gap, center - self.low)
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


def push_deviations(
    function: Callable[[Tensor], Tensor], mean: Tensor, deviations: Tensor, *, chunk_size: int = 1
) -> Gaussian:
    r"""The linearized moments of a map whose outputs each depend on many inputs, such as a VAE's decoder.

        mean h(μ)          variance (1/K) Σ_k (J δ_k)²          J = ∂h/∂x at μ

    K draws δ of the input's deviations stand for its covariance, correlations included; the variance has a relative error
    of √(2/K). J δ is a Jacobian-vector product by forward-mode differentiation, 2–3 calls' worth each. Where the function
    contains an operation that has no forward derivative (fused attention), or hides it (``detach``), J δ is
    the central difference (h(μ + εδ) − h(μ − εδ))/(2ε), after a warning. Its step is, sample by sample,

        rms(εδ) = u^{1/3} rms(μ)

    with u the spacing of floating-point numbers of the mean's dtype at 1, and 1 in the place of rms(μ) where this is 0.
    Truncation and rounding are then of one size, of order u^{2/3}: 2e-5 in float32, some per cent in bfloat16.

    Args:
        function: h, of ``(B, ...)`` to ``(B, ...)``. It is called without recording gradients.
        mean: μ, ``(B, ...)``.
        deviations: δ, ``(K, B, ...)``, in the units of the mean, with mean zero.
        chunk_size: Deviations that go through the function together as one batch. More than 1 is faster on a GPU, takes
            as many times the memory, and needs a function that treats the samples of a batch independently.

    Returns:
        A :class:`Gaussian` shaped as h(μ), in its dtype or float32 if that is half precision.

    Raises:
        ShapeError: The deviations do not fit the mean, or there are none.
        ArgumentError: ``chunk_size`` is not a positive integer.
        NonFiniteError: The input, h(μ) or a derivative is NaN or infinite.
    """
    check_int("chunk_size", chunk_size, least=1)
    if deviations.shape[1:] != mean.shape or deviations.ndim != mean.ndim + 1 or len(deviations) == 0:
        raise ShapeError(
            f"expected deviations of shape (K, {', '.join(map(str, mean.shape))}) with K >= 1, got "
            f"{tuple(deviations.shape)}"
        )
    check_finite("mean", mean)
    check_finite("deviations", deviations)
    with torch.no_grad():
        deviations = deviations.to(mean)
        center = check_finite("function(mean)", function(mean))
        differentiate = _forward_derivative
        if (reason := _no_forward_derivative(function, mean, deviations[0])) is not None:
            warnings.warn(
                f"the function has no forward derivative ({reason}): using central finite differences, whose relative "
                f"error is of order {torch.finfo(mean.dtype).eps ** (2 / 3):.0e}",
                BayesdiffWarning,
                stacklevel=2,
            )
            differentiate = _central_difference
        total = torch.zeros_like(center, dtype=torch.float64)
        for part in deviations.split(chunk_size):
            if len(part) == 1:
                total += differentiate(function, mean, part[0]).double().square()
            else:
                images = differentiate(function, mean.expand_as(part).flatten(0, 1), part.flatten(0, 1))
                total += images.unflatten(0, (len(part), -1)).double().square().sum(0)
        check_finite("derivatives of the function", total)
    dtype = torch.promote_types(center.dtype, torch.float32)
    return Gaussian(center.to(dtype), (total / len(deviations)).to(dtype))


def _forward_derivative(function: Callable[[Tensor], Tensor], x: Tensor, delta: Tensor) -> Tensor:
    image: Tensor = torch.func.jvp(function, (x,), (delta,))[1]
    return image


def _central_difference(function: Callable[[Tensor], Tensor], x: Tensor, delta: Tensor) -> Tensor:
    """J δ for each sample of ``(B, ...)``, with the step that :func:`push_deviations` documents."""

    def rms(tensor: Tensor) -> Tensor:
        inner = tuple(range(1, tensor.ndim))
        size = tensor.double().square().mean(inner, keepdim=True).sqrt() if inner else tensor.double().abs()
        return torch.where(size > 0, size, 1.0)

    step = torch.finfo(x.dtype).eps ** (1 / 3) * rms(x) / rms(delta)
    moved = (step * delta.double()).to(x.dtype)
    difference = function(x + moved).double() - function(x - moved).double()
    # One step for each sample: the result may have another number of dimensions than the input.
    return difference / (2 * step).reshape(-1, *[1] * (difference.ndim - 1))


def _no_forward_derivative(function: Callable[[Tensor], Tensor], x: Tensor, delta: Tensor) -> str | None:
    """Why forward-mode differentiation cannot be used along ``delta``; None if it can."""
    try:
        image = _forward_derivative(function, x, delta)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    # A derivative of 0 everywhere may be a detached one: the function itself tells.
    if not bool(image.any()) and bool(_central_difference(function, x, delta).any()):
        return "its derivative is 0 everywhere but its differences are not; it may contain a detach"
    return None


def _censored(sigma: Tensor, gap: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    r"""σ J₁(α, w) and σ² J₂(α, w), with α = gap/σ and w = room/σ, in float64.

    Wide intervals: with :math:`\psi(x) = \varphi(x) - xQ(x)` and :math:`\chi(x) = (1 + x^2)Q(x) - x\varphi(x)`, the first
    two integrals of Q, and β = α + w,

        J₁ = ψ(α) − ψ(β)          J₂ = χ(α) − χ(β) − 2wψ(β)

    with exp(−α²/2) taken out, which leaves nothing that can underflow to the wrong sign. Narrow ones, (1 + α)w ≤ 1, where
    these differences would cancel: eight Gauss–Legendre nodes on the integrals of Q themselves, whose integrand is then so
    smooth that the rule is exact to rounding. Relative error, α being the distance to the bound in σ: 1e-12 + 4e-16 α⁴.
    """
    # σ = 0 makes both distances in σ 0 or infinite, and both results 0.
    safe = sigma.clamp(min=torch.finfo(sigma.dtype).tiny)
    alpha, width = (gap / safe).clamp(max=HORIZON), (room / safe).clamp(max=HORIZON)
    beta = alpha + width
    decay = torch.exp(-width * (alpha + beta) / 2)
    first = _psi(alpha) - decay * _psi(beta)
    second = _chi(alpha) - decay * (_chi(beta) + 2 * width * _psi(beta))
    scale = sigma * torch.exp(-alpha.square() / 2)
    first, second = scale * first, sigma * scale * second
    narrow = (1 + alpha) * width <= 1
    if not bool(narrow.any()):
        return first, second
    narrow_first, narrow_second = torch.zeros_like(first), torch.zeros_like(first)
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        tail = weight * torch.special.erfc((alpha + node * width) / math.sqrt(2)) / 2
        narrow_first += tail
        narrow_second += 2 * node * tail
    return torch.where(narrow, room * narrow_first, first), torch.where(narrow, room.square() * narrow_second, second)


def _mills(x: Tensor) -> Tensor:
    """Q(x) exp(x²/2)."""
    return torch.special.erfcx(x / math.sqrt(2)) / 2


def _psi(x: Tensor) -> Tensor:
    """ψ(x) exp(x²/2)."""
    return 1 / math.sqrt(2 * math.pi) - x * _mills(x)


def _chi(x: Tensor) -> Tensor:
    """χ(x) exp(x²/2)."""
    return (1 + x.square()) * _mills(x) - x / math.sqrt(2 * math.pi)


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
