"""Links, against float64 quadrature, Monte Carlo and explicit Jacobians."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from scipy import integrate, special
from torch import nn

from bayesdiff.checks import ArgumentError, BayesdiffWarning, NegativeVarianceError, NonFiniteError, ShapeError
from bayesdiff.gaussian import Gaussian
from bayesdiff.laplace.links import (
    LINK_APPROXIMATIONS,
    LINKS,
    ClampedPixel,
    Exceedance,
    Identity,
    Link,
    Sigmoid,
    Smooth,
    link,
)
from bayesdiff.laplace.push import push_deviations
from tests.ids import named

#: Standard errors that a Monte Carlo estimate may be off.
MC_TOLERANCE = 4.0
#: Relative error that a closed form may have against quadrature, in float64.
QUADRATURE_TOLERANCE = 1e-8
#: Largest absolute errors of Sigmoid's probit moments over μ in [-10, 10], σ² in [1e-4, 100]: as measured, rounded up.
SIGMOID_MEAN_ERROR = 0.0160
SIGMOID_VARIANCE_ERROR = 0.0147

ALL = [Identity(), ClampedPixel(), ClampedPixel(0.0, 255.0), Exceedance(0.3), Sigmoid(), Smooth(torch.tanh)]
REFUSED = {
    Identity: {"probit", "mc"},
    ClampedPixel: {"probit", "mc"},
    Exceedance: {"linearized", "mc"},
    Sigmoid: {"exact", "mc"},
    Smooth: {"exact", "probit", "mc"},
}
PAIRS = [(kind, approx) for kind in ALL for approx in LINK_APPROXIMATIONS if approx not in REFUSED[type(kind)]]


def gaussian(mean, variance, dtype=torch.float64):
    return Gaussian(torch.as_tensor(mean, dtype=dtype), torch.as_tensor(variance, dtype=dtype))


def quad(function, low, high):
    return integrate.quad(function, low, high, epsabs=0, epsrel=1e-12, limit=200)[0] if high > low else 0.0


def pixel_by_quadrature(mu, sigma, low, high):
    """Mean and variance of the clipped pixel, each a sum of positive terms, so no small one is lost.

    E = ∫ P(pixel > t) dt, and Var = E² P(0) + (1 − E)² P(1) + ∫ (pixel − E)² φ between the bounds. Integrals beyond a
    bound are of exp(−(z² − α²)/2), over the part where that is above 1e-26.
    """
    if mu > (low + high) / 2:
        mean, variance = pixel_by_quadrature(-mu, sigma, -high, -low)
        return 1 - mean, variance
    alpha, beta, unit = (low - mu) / sigma, (high - mu) / sigma, sigma / (high - low)
    if alpha >= 0:
        factor = math.exp(-(alpha**2) / 2)
        end = min(beta, math.sqrt(alpha**2 + 120))
        area = quad(lambda z: special.erfcx(z / 2**0.5) / 2 * math.exp((alpha**2 - z**2) / 2), alpha, end)
        pieces = [(alpha, end)]
    else:
        factor = 1.0
        start, end = max(alpha, -12.0), min(beta, 12.0)
        pieces = [(start, 0.0), (0.0, end)]
        area = (start - alpha) + sum(quad(lambda z: special.ndtr(-z), *p) for p in pieces)
    mean = unit * factor * area
    at = alpha + mean / unit  # the mean, in standard deviations from μ
    spread = sum(quad(lambda z: (z - at) ** 2 * math.exp((max(alpha, 0) ** 2 - z**2) / 2), *p) for p in pieces)
    variance = unit**2 * factor * spread / math.sqrt(2 * math.pi)
    return mean, mean**2 * special.ndtr(alpha) + (1 - mean) ** 2 * special.ndtr(-beta) + variance


def assert_relative(got, expected, tolerance):
    # Below 1e-300 float64 has no relative precision.
    error = np.abs(got - expected) / np.maximum(np.abs(expected), 1e-300)
    assert error.max() < tolerance, f"{error.max():.3g} at {error.argmax()}"


def pixel_grid(low, high):
    for sigma in (0.0, -6.0, -4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0):
        sigma = 10.0**sigma
        inside = [low + (high - low) * x for x in (0.0, 1e-3, 0.1, 0.35, 0.5, 0.8, 0.999, 1.0)]
        beyond = [k * sigma for k in (0.01, 0.3, 1, 2, 5, 10, 20, 30, 37, 50)]
        for mu in [*inside, *(low - d for d in beyond), *(high + d for d in beyond)]:
            yield mu, sigma


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 255.0)])
def test_clamped_pixel_equals_quadrature(low, high):
    grid = list(pixel_grid(low, high))
    expected = np.array([pixel_by_quadrature(mu, sigma, low, high) for mu, sigma in grid])
    mu, sigma = np.array(grid).T
    # The variance is what the link is given, so the reference has to have the same rounded σ.
    got = ClampedPixel(low, high).moments(gaussian(mu, sigma**2), "exact")
    assert_relative(got.mean.numpy(), expected[:, 0], QUADRATURE_TOLERANCE)
    assert_relative(got.variance.numpy(), expected[:, 1], QUADRATURE_TOLERANCE)
    assert expected[:, 1].min() == 0.0  # 50 σ out there is nothing in float64, and elsewhere 1e-300 is resolved
    assert 0 < expected[expected[:, 1] > 0, 1].min() < 1e-290


def test_clamped_pixel_has_the_right_limits():
    mu = torch.tensor([-1.5, -1.0, -0.2, 0.7, 1.0, 3.0], dtype=torch.float64)
    certain = ClampedPixel().moments(gaussian(mu, torch.zeros(6)), "exact")
    assert torch.equal(certain.mean, ClampedPixel()(mu))
    assert torch.equal(certain.variance, torch.zeros(6, dtype=torch.float64))
    # A Gaussian much wider than the pixel's range is a coin toss between black and white.
    for scale in (1e6, 1e12, 1e150):
        wide = ClampedPixel().moments(gaussian(mu, torch.full_like(mu, scale**2)), "exact")
        torch.testing.assert_close(wide.mean, torch.full_like(mu, 0.5), rtol=0, atol=2 / scale + 1e-15)
        torch.testing.assert_close(wide.variance, torch.full_like(mu, 0.25), rtol=0, atol=2 / scale + 1e-15)
    # A narrow one inside is not clipped at all.
    narrow = ClampedPixel().moments(gaussian([0.3], [1e-12]), "exact")
    torch.testing.assert_close(narrow.mean, torch.tensor([0.65], dtype=torch.float64), rtol=1e-15, atol=0)
    torch.testing.assert_close(narrow.variance, torch.tensor([0.25e-12], dtype=torch.float64), rtol=1e-14, atol=0)
    # Half of one at a bound is: E = σφ(0)/2 above black, Var = σ²(1/2 − 1/2π)/4.
    edge = ClampedPixel().moments(gaussian([-1.0], [1e-8]), "exact")
    assert edge.mean.item() == pytest.approx(0.5e-4 / math.sqrt(2 * math.pi), rel=1e-12)
    assert edge.variance.item() == pytest.approx(0.25e-8 * (0.5 - 0.5 / math.pi), rel=1e-12)


def test_clamped_pixel_linearized():
    mu = torch.tensor([-1.5, -1.0, 0.2, 1.0, 1.01], dtype=torch.float64)
    got = ClampedPixel().moments(gaussian(mu, torch.full((5,), 0.04)), "linearized")
    torch.testing.assert_close(got.mean, torch.tensor([0.0, 0.0, 0.6, 1.0, 1.0]).double())
    torch.testing.assert_close(got.variance, torch.tensor([0.0, 0.01, 0.01, 0.01, 0.0]).double())


def test_exceedance_equals_quadrature():
    low, high = -1.0, 1.0
    event = Exceedance(0.7, low, high)
    assert event.level == pytest.approx(0.4)
    grid = [(event.level + k * s, s) for s in (1e-6, 0.1, 1.0, 1e3) for k in (-37, -10, -3, -0.5, 0, 0.5, 3, 10, 37)]
    mu, sigma = np.array(grid).T
    z = (mu - event.level) / sigma

    def tail(x):  # ∫ φ from x on, x >= 0 the tail of the integral, its scale taken out
        scaled = quad(lambda t: math.exp((x**2 - t**2) / 2), x, math.sqrt(x**2 + 120))
        return scaled * math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)

    far = np.array([tail(abs(x)) for x in z])
    got = event.moments(gaussian(mu, sigma**2), "exact")
    assert_relative(got.mean.numpy(), np.where(z > 0, 1 - far, far), QUADRATURE_TOLERANCE)
    # Var of an event that is all but certain: p(1 − p) to 1e-8 although p rounds to 1.
    assert_relative(got.variance.numpy(), far * (1 - far), QUADRATURE_TOLERANCE)
    assert got.variance.min() > 0
    probit = event.moments(gaussian(mu, sigma**2), "probit")
    assert torch.equal(probit.mean, got.mean)
    assert torch.equal(probit.variance, got.variance)


def test_exceedance_of_a_certain_pixel_is_a_step():
    event = Exceedance(0.25)
    mu = torch.tensor([-0.6, -0.5, -0.4])
    got = event.moments(gaussian(mu, torch.zeros(3), torch.float32), "exact")
    assert got.mean.tolist() == [0.0, 0.0, 1.0]
    assert got.variance.tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(got.mean, event(mu))
    assert event(torch.tensor([-0.5, -0.499, 7.0])).tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "kind", [Identity(), ClampedPixel(), ClampedPixel(0.0, 2.0), Exceedance(0.3), Exceedance(0.5, 0.0, 2.0)], ids=named
)
def test_exact_moments_equal_monte_carlo(kind):
    n = 10**6
    noise = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mu, sigma in ((0.1, 0.5), (-1.2, 0.9), (0.9, 0.4), (0.3, 5.0), (2.5, 1.0)):
        draws = kind(mu + sigma * noise)
        got = kind.moments(gaussian([mu], [sigma**2]), "exact")
        centered = draws - draws.mean()
        variance = centered.square().mean()
        mean_error = (variance / n).sqrt()
        variance_error = ((centered.pow(4).mean() - variance.square()) / n).sqrt()
        assert abs(got.mean.item() - draws.mean()) <= MC_TOLERANCE * mean_error
        assert abs(got.variance.item() - variance) <= MC_TOLERANCE * variance_error


def sigmoid_by_quadrature(mu, variance, nodes=350):
    """Gauss–Hermite moments of s(y); many nodes, because at σ = 10 the integrand has poles at a distance of π/σ."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    w = w / w.sum()
    values = special.expit(mu[..., None] + np.sqrt(variance)[..., None] * x)
    mean = values @ w
    return mean, np.square(values - mean[..., None]) @ w


def sigmoid_grid():
    return np.meshgrid(np.linspace(-10, 10, 81), np.geomspace(1e-4, 100, 49))


def test_sigmoid_probit_errors_are_as_documented():
    mu, variance = sigmoid_grid()
    mean, spread = sigmoid_by_quadrature(mu, variance)
    finer = sigmoid_by_quadrature(mu, variance, nodes=300)  # the reference is itself good to 1e-4
    assert np.abs(finer[0] - mean).max() < 1e-4
    assert np.abs(finer[1] - spread).max() < 1e-4
    got = Sigmoid().moments(gaussian(mu, variance), "probit")
    mean_error, variance_error = np.abs(got.mean.numpy() - mean).max(), np.abs(got.variance.numpy() - spread).max()
    assert 0.98 * SIGMOID_MEAN_ERROR < mean_error < SIGMOID_MEAN_ERROR
    assert 0.98 * SIGMOID_VARIANCE_ERROR < variance_error < SIGMOID_VARIANCE_ERROR
    # Where linearizing fails, this does not.
    linear = Sigmoid().moments(gaussian(mu, variance), "linearized")
    assert np.abs(linear.mean.numpy() - mean).max() > 0.3
    assert np.abs(linear.variance.numpy() - spread).max() > 1
    # The documented limits for σ → 0, and which of the two is the nearer.
    small = gaussian([0.0, 4.0], [1e-6, 1e-6])
    ratio = Sigmoid().moments(small, "probit").variance / Sigmoid().moments(small, "linearized").variance
    torch.testing.assert_close(ratio, torch.tensor([math.pi / 4, 11.12]).double(), rtol=1e-3, atol=0)
    for v, better in ((0.2, "linearized"), (0.8, "probit")):
        mu = np.linspace(-10, 10, 81)
        spread = sigmoid_by_quadrature(mu, np.full_like(mu, v))[1]
        off = {
            a: np.abs(Sigmoid().moments(gaussian(mu, np.full_like(mu, v)), a).variance.numpy() - spread).max()
            for a in ("linearized", "probit")
        }
        assert min(off, key=off.get) == better


def test_sigmoid_probit_is_symmetric_and_exact_in_its_limits():
    mu, variance = (torch.as_tensor(x) for x in sigmoid_grid())
    got, mirrored = (Sigmoid().moments(Gaussian(m, variance), "probit") for m in (mu, -mu))
    torch.testing.assert_close(got.mean, 1 - mirrored.mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got.variance, mirrored.variance, rtol=1e-12, atol=0)
    certain = Sigmoid().moments(gaussian([1.3], [0.0]), "probit")
    assert certain.mean.item() == pytest.approx(special.expit(1.3), rel=1e-15)
    assert certain.variance.item() == 0
    toss = Sigmoid().moments(gaussian([1.3], [1e12]), "probit")
    assert toss.mean.item() == pytest.approx(0.5, abs=1e-5)
    assert toss.variance.item() == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "h"), [(Sigmoid(), special.expit), (Smooth(torch.tanh), np.tanh), (Smooth(torch.exp), np.exp)], ids=named
)
def test_linearized_is_exact_to_first_order(kind, h):
    x, w = np.polynomial.hermite_e.hermegauss(60)
    w = w / w.sum()
    errors = []
    for sigma in (0.08, 0.04, 0.02):
        values = h(0.7 + sigma * x)
        mean = values @ w
        got = kind.moments(gaussian([0.7], [sigma**2]), "linearized")
        errors.append((abs(got.mean.item() - mean), abs(got.variance.item() / (np.square(values - mean) @ w) - 1)))
    order = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    # The mean, and the variance relative to itself, are off by O(σ²).
    np.testing.assert_allclose(order, 2, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "approx"), PAIRS, ids=named)
def test_dtypes_and_shapes_are_kept(kind, approx, dtype):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 3, 4, 5, generator=generator).to(dtype)
    variance = torch.rand(2, 3, 4, 5, generator=generator).to(dtype)
    got = kind.moments(Gaussian(mean, variance), approx)
    assert got.mean.dtype == got.variance.dtype == dtype
    assert got.shape == mean.shape
    # Half precision has one rounding, that of the result, because it is computed with in more.
    expected = kind.moments(Gaussian(mean.double(), variance.double()), approx)
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.mean.double(), expected.mean, rtol=rounding, atol=rounding * 1e-3)
    torch.testing.assert_close(got.variance.double(), expected.variance, rtol=rounding, atol=rounding * 1e-3)
    values = kind(mean)
    assert values.dtype == dtype
    assert values.shape == mean.shape
    torch.testing.assert_close(values.double(), kind(mean.double()), rtol=rounding, atol=rounding * 1e-3)
    for shape in ((), (0,), (7,)):
        part = kind.moments(Gaussian(torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)), approx)
        assert part.shape == shape


@pytest.mark.parametrize(("kind", "approx"), [p for p in PAIRS if not isinstance(p[0], Identity)], ids=named)
def test_variances_are_never_negative(kind, approx):
    """Over 200 orders of magnitude; Gaussian itself refuses a negative or NaN variance."""
    n = 200_000
    generator = torch.Generator().manual_seed(1)

    def wide(least, most):
        return 10 ** (least + (most - least) * torch.rand(n, generator=generator, dtype=torch.float64))

    sign = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0).double()
    sigma = wide(-100, 50)
    for mean in (sign * wide(-100, 50), sign + sign.flip(0) * sigma * wide(-3, 2), sign * wide(-8, 1)):
        try:
            got = kind.moments(Gaussian(mean, sigma.square()), approx)
        except NegativeVarianceError as error:  # pragma: no cover
            pytest.fail(str(error))
        if not isinstance(kind, Smooth) and approx != "linearized":
            assert got.mean.min() >= 0
            assert got.mean.max() <= 1
            # Of all variables in [0, 1] with this mean, a coin toss has the largest variance (Popoviciu).
            assert bool((got.variance <= got.mean * (1 - got.mean) + 1e-12).all())


@pytest.mark.parametrize("kind", [*ALL, Smooth(torch.tanh, elementwise=False)], ids=named)
def test_what_has_no_meaning_is_refused(kind):
    given = gaussian([0.1], [0.2])
    for approx in REFUSED[type(kind)]:
        possible = [a for a in LINK_APPROXIMATIONS if a not in REFUSED[type(kind)]]
        with pytest.raises(ArgumentError, match=f'for the moments of {type(kind).__name__}, got "{approx}"') as caught:
            kind.moments(given, approx)
        assert all(f'"{a}"' in str(caught.value).split(" for the moments")[0] for a in possible)
    with pytest.raises(ArgumentError, match="expected link_approx to be one of 'exact', 'linearized', 'probit', 'mc'"):
        kind.moments(given, "laplace")
    for bad in (gaussian([math.nan], [0.2]), gaussian([0.1], [math.inf])):
        approx = next(a for a in LINK_APPROXIMATIONS if a not in REFUSED[type(kind)])
        with pytest.raises(NonFiniteError, match="expected finite"):
            kind.moments(bad, approx)


def test_refusals_say_why():
    given = gaussian([0.1], [0.2])
    for kind, approx, reason in (
        (Identity(), "probit", "identity's moments are known exactly"),
        (ClampedPixel(), "probit", "closed form"),
        (Exceedance(0.5), "linearized", "derivative of a step is 0 almost everywhere"),
        (Sigmoid(), "exact", '"probit" holds for any variance, "linearized" for a small one'),
        (Smooth(torch.exp), "exact", "no closed form"),
        (Smooth(torch.exp), "probit", "sigmoids and steps"),
        (Smooth(torch.exp, elementwise=False), "linearized", "push_deviations"),
        (Identity(), "mc", "called on draws"),
    ):
        with pytest.raises(ArgumentError, match=reason):
            kind.moments(given, approx)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClampedPixel(1.0, 1.0), "finite bounds low < high"),
        (lambda: ClampedPixel(-math.inf, 1.0), "finite bounds low < high"),
        (lambda: ClampedPixel("0", 1.0), "finite bounds low < high"),
        (lambda: Exceedance(0.5, 1.0, -1.0), "finite bounds low < high"),
        (lambda: Exceedance(1.0), "0 <= threshold < 1, got 1.0"),
        (lambda: Exceedance(-0.1), "0 <= threshold < 1, got -0.1"),
        (lambda: Exceedance(math.nan), "0 <= threshold < 1, got nan"),
        (lambda: Exceedance("half"), "0 <= threshold < 1, got 'half'"),
        (lambda: Smooth(3), "expected function to be callable, got 3"),
        (lambda: link("exceedance"), r"bare name 'exceedance'; give Exceedance\(threshold\)"),
        (lambda: link("relu"), "'identity', 'clamped_pixel', 'exceedance', 'sigmoid'.*got 'relu'"),
        (lambda: link(None), "got None"),
        (lambda: link(Sigmoid), "got <class"),
    ],
)
def test_bad_links_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_links_are_found_by_name():
    assert link("identity") == Identity()
    assert link("clamped_pixel") == ClampedPixel(-1, 1)
    assert link("sigmoid") == Sigmoid()
    own = Exceedance(0.4)
    assert link(own) is own
    assert set(LINKS) == {"identity", "clamped_pixel", "exceedance", "sigmoid"}
    assert all(issubclass(kind, Link) for kind in LINKS.values())
    assert LINK_APPROXIMATIONS == ("exact", "linearized", "probit", "mc")


def test_identity_hands_the_gaussian_on():
    given = Gaussian(torch.randn(3, 2), torch.rand(3, 2))
    for approx in ("exact", "linearized"):
        got = Identity().moments(given, approx)
        assert torch.equal(got.mean, given.mean)
        assert torch.equal(got.variance, given.variance)


def test_smooth_maps_that_are_not_smooth_enough():
    with pytest.raises(NonFiniteError, match=r"expected finite function\(mean\), got 1 NaN"):
        Smooth(torch.log).moments(gaussian([1.0, -1.0], [0.1, 0.1]), "linearized")
    with pytest.raises(NonFiniteError, match="expected finite derivatives of the function"):
        Smooth(torch.sqrt).moments(gaussian([1.0, 0.0], [0.1, 0.1]), "linearized")
    with pytest.raises(ShapeError, match="elementwise=False and use push_deviations"):
        Smooth(lambda y: y.sum()).moments(gaussian([1.0, 0.0], [0.1, 0.1]), "linearized")
    # A derivative that is 0 because the function is flat there is no reason to warn.
    flat = Smooth(torch.relu).moments(gaussian([-1.0, -2.0], [0.1, 0.1]), "linearized")
    assert flat.variance.tolist() == [0.0, 0.0]


def decoder(dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 3)
    )
    return layers.to(dtype)


def latents(k=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(2, 2, 3, 3, generator=generator, dtype=torch.float64)
    # Correlated between elements, so that a diagonal shortcut would be found out.
    common = torch.randn(k, 2, 1, 1, 1, generator=generator, dtype=torch.float64)
    deviations = 0.1 * (common + torch.randn(k, 2, 2, 3, 3, generator=generator, dtype=torch.float64))
    return mean.to(dtype), deviations.to(dtype)


def explicit(function, mean, deviations):
    """(1/K) Σ (J δ_k)² with J written out, sample by sample, by reverse-mode differentiation."""
    rows = []
    for i, x in enumerate(mean):
        jacobian = torch.func.jacrev(lambda v: function(v.unsqueeze(0))[0])(x)  # (out..., in...)
        rows.append(torch.tensordot(jacobian, deviations[:, i].movedim(0, -1), dims=x.ndim).square().mean(-1))
    return torch.stack(rows).detach()


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 9])
def test_pushed_deviations_equal_the_explicit_jacobian(chunk_size):
    net = decoder()
    mean, deviations = latents()
    expected = explicit(net, mean, deviations)
    got = push_deviations(net, mean, deviations, chunk_size=chunk_size)
    assert got.shape == (2, 3, 4, 4)
    torch.testing.assert_close(got.variance, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(got.mean, net(mean).detach(), rtol=1e-12, atol=0)
    assert not got.variance.requires_grad


class NoForward(torch.autograd.Function):
    """sin, with a backward derivative only, as fused operations have."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


def fused_attention(x):
    tokens = x.flatten(1)[:, :16].reshape(len(x), 1, 2, 8)  # few dimensions a head have no fused kernel
    return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).squeeze(1)


def plain_attention(x):
    tokens = x.flatten(1)[:, :16].reshape(len(x), 2, 8)
    return torch.softmax(tokens @ tokens.mT / math.sqrt(tokens.shape[-1]), -1) @ tokens


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize(
    ("broken", "whole", "reason"),
    [
        (lambda x: NoForward.apply(2 * x), lambda x: torch.sin(2 * x), "NotImplementedError"),
        (fused_attention, plain_attention, "NotImplementedError"),
        (lambda x: torch.sin(x.detach()), torch.sin, "may contain a detach"),
        (lambda x: torch.sin(x.detach()).mean((1, 2, 3)), lambda x: torch.sin(x).mean((1, 2, 3)), "may contain a detach"),
    ],
    ids=["function-without-jvp", "fused-attention", "detached", "detached-to-scalars"],
)  # fmt: skip
def test_without_a_forward_derivative_finite_differences_take_over(broken, whole, reason, chunk_size):
    if broken is fused_attention:
        with contextlib.suppress(NotImplementedError), torch.no_grad():
            torch.func.jvp(broken, (latents()[0],), (latents()[1][0],))
            pytest.skip("this PyTorch differentiates fused attention on the CPU")
    # The documented error is of order eps^(2/3) of the derivative; small derivatives have that of their neighbours.
    for dtype in (torch.float64, torch.float32):
        mean, deviations = latents(dtype=dtype)
        expected = push_deviations(whole, mean.double(), deviations.double()).variance
        with pytest.warns(BayesdiffWarning, match=f"{reason}.*central finite differences"):
            got = push_deviations(broken, mean, deviations, chunk_size=chunk_size)
        assert got.variance.dtype == dtype
        error = (got.variance.double() - expected).abs().max() / expected.max()
        assert error < 10 * torch.finfo(dtype).eps ** (2 / 3)
    smooth = Smooth(lambda y: NoForward.apply(2 * y))
    with pytest.warns(BayesdiffWarning, match="central finite differences"):
        got = smooth.moments(gaussian([0.3, 1.0], [0.01, 0.04]), "linearized")
    expected = Smooth(lambda y: torch.sin(2 * y)).moments(gaussian([0.3, 1.0], [0.01, 0.04]), "linearized")
    torch.testing.assert_close(got.variance, expected.variance, rtol=1e-8, atol=0)


def test_the_step_of_finite_differences_follows_each_sample():
    """Samples and deviations of very different sizes, and a deviation and a mean of zero."""
    scale = torch.tensor([1e-4, 1.0, 1e5, 1.0], dtype=torch.float64).reshape(4, 1)
    mean = scale * torch.tensor([[0.3, 0.8]] * 3 + [[0.0, 0.0]], dtype=torch.float64)
    deviations = torch.stack([1e-3 * scale * torch.tensor([1.0, -2.0]), torch.zeros(4, 2)]).double()

    def scaled(function):
        return lambda x: scale * function(x / scale)

    with pytest.warns(BayesdiffWarning, match="central finite differences"):
        got = push_deviations(scaled(NoForward.apply), mean, deviations)
    expected = push_deviations(scaled(torch.sin), mean, deviations)
    torch.testing.assert_close(got.variance, expected.variance, rtol=1e-8, atol=0)


def test_pushed_half_precision_comes_back_in_float32():
    net, (mean, deviations) = decoder(torch.bfloat16), latents(dtype=torch.bfloat16)
    got = push_deviations(net, mean, deviations)
    assert got.mean.dtype == got.variance.dtype == torch.float32
    # Two layers of bfloat16 rounding (0.4 % each) in the derivative, twice that in its square.
    expected = explicit(decoder(), mean.double(), deviations.double())
    assert (got.variance - expected).abs().mean() < 0.05 * expected.mean()


def test_pushing_is_refused_where_it_means_nothing():
    mean, deviations = latents()
    for bad in (deviations[0], deviations[:, :1], deviations[:0]):
        with pytest.raises(ShapeError, match=r"expected deviations of shape \(K, 2, 2, 3, 3\)"):
            push_deviations(torch.sin, mean, bad)
    with pytest.raises(ArgumentError, match="chunk_size >= 1"):
        push_deviations(torch.sin, mean, deviations, chunk_size=0)
    with pytest.raises(NonFiniteError, match="expected finite deviations"):
        push_deviations(torch.sin, mean, deviations * math.nan)
    with pytest.raises(NonFiniteError, match=r"expected finite function\(mean\)"):
        push_deviations(lambda x: x / 0, mean, deviations)

    def mistaken(x):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):  # the function's own fault stays its own
        push_deviations(mistaken, mean, deviations)
