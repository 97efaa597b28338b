"""Noise models: Tweedie's variance against Gaussian data in closed form, the log-linear model against its truth and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor

from bayesdiff.calibration.heldout import Observed
from bayesdiff.calibration.noise_models import (
    LogLinear,
    Sample,
    Tweedie,
    fit_noise,
    out_of_fold,
)
from bayesdiff.calibration.shape_fits import fit_shape
from bayesdiff.calibration.shapes import Quantiles, Scaled, StudentT
from bayesdiff.checks import ArgumentError, EmptyDataError, NonFiniteError
from bayesdiff.diffusion.parametrization import PREDICTIONS, clean_coefficients
from bayesdiff.diffusion.tweedie import clean_variance, target_variance
from bayesdiff.head.geometry import HeadGeometry


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("alpha", "sigma"), [(0.9, 0.4358898943540674), (0.3, 0.7), (0.05, 0.99)])
def test_tweedie_is_exact_for_gaussian_data(prediction: str, alpha: float, sigma: float) -> None:
    # x0 ~ N(m, C): everything is linear, and Cov[x0|x_t] = C − αC(α²C + σ²)⁻¹αC, whatever x_t.
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    c, eye = root @ root.mT, torch.eye(5, dtype=torch.float64)
    gain = alpha * c @ torch.linalg.inv(alpha**2 * c + sigma**2 * eye)  # ∂D/∂x
    truth = (c - gain @ (alpha * c)).diagonal()
    a, b = clean_coefficients(prediction, alpha, sigma)
    f = (gain - a * eye) / b  # the network's response: D = a x + b f
    found = target_variance(prediction, number(alpha), number(sigma), f.diagonal())
    torch.testing.assert_close(found * b**2, truth, rtol=1e-10, atol=1e-12)  # x0 = a x_t + b g
    torch.testing.assert_close(clean_variance(number(alpha), number(sigma), gain.diagonal()), truth, rtol=1e-10, atol=0)


GEOMETRY = HeadGeometry("conv", 3, 2, True, (3, 3), (1, 1, 1, 1))


def observed(n: int = 60, seed: int = 0, probes: bool = False) -> tuple[Observed, Tensor]:
    """Rows whose residuals have a log-linear variance, and that variance."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 3, 6, 6, generator=generator)
    beta = 0.2 * torch.randn(2, GEOMETRY.in_features, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    level = torch.rand(n, generator=generator, dtype=torch.float64)
    eta = GEOMETRY.apply(inputs.double(), beta[None])[0] + (2 * level - 1).view(-1, 1, 1, 1)
    variance = eta.exp()
    residual = variance.sqrt() * torch.randn(variance.shape, generator=generator, dtype=torch.float64)
    tweedie = torch.where(torch.rand(variance.shape, generator=generator) < 0.2, variance, float("nan"))
    return Observed(inputs, residual, level * 10, level, torch.arange(n), tweedie), variance


def sample(rows: Observed, number: int = 36) -> Sample:
    return Sample.of(GEOMETRY, [rows], number, torch.Generator().manual_seed(3))


def test_a_log_linear_variance_is_found_again() -> None:
    rows, truth = observed(200)
    model = LogLinear.fit(sample(rows))
    other, truth = observed(40, seed=1)
    found = model.of_rows(GEOMETRY, other)
    assert found.shape == truth.shape
    error = (found / truth).log()
    assert float(error.square().mean().sqrt()) < 0.15
    # Shapes are fitted to what a model says of images that it did not see: worse than of its own.
    part = sample(rows)
    own, left_out = model.of_sample(part), model.left_out
    assert left_out.shape == own.shape
    scores = [float((v.log() + part.residual.square() / v).mean()) for v in (own, left_out)]
    assert scores[0] < scores[1] < scores[0] + 0.05
    # The same numbers position by position as row by row.
    again = model.of_sample(sample(other))
    flat = found.flatten(2).mT.reshape(-1, 2)
    torch.testing.assert_close(again.sort(0).values, flat.sort(0).values, rtol=1e-4, atol=0)


def test_fisher_scoring_reaches_the_minimum() -> None:
    rows, _ = observed(30)
    part = sample(rows, 10)
    model = LogLinear._with(part, 1e-2)
    phi, square = part.phi.double(), part.residual[:, 0].square()
    mean, std = phi.mean(0), phi.std(0, correction=0)
    z = (part.level - part.level.mean()) / part.level.std(correction=0)
    x = torch.cat([((phi - mean) / std)[:, :-1], torch.stack([torch.ones_like(z), z, z.square()], 1)], 1).numpy()
    penalty = np.full(x.shape[1], 1e-2 * len(x))
    penalty[-3] = 0

    def loss(theta: np.ndarray) -> float:
        eta = x @ theta
        return float(0.5 * (eta + square.numpy() * np.exp(-eta)).sum() + 0.5 * (penalty * theta**2).sum())

    best = optimize.minimize(loss, np.zeros(x.shape[1]), method="BFGS", options={"gtol": 1e-6})
    np.testing.assert_allclose(model.of_sample(part)[:, 0].log().numpy(), x @ best.x, atol=4e-3)


def test_what_is_measured_is_what_is_predicted_and_what_is_below_the_floor_is_counted() -> None:
    rows, truth = observed()
    rows.tweedie[:5] = -1.0
    part = sample(rows, 8)
    model = Tweedie.fit(part)
    found = model.of_rows(GEOMETRY, rows)
    known = torch.isfinite(rows.tweedie)
    assert torch.equal(torch.isfinite(found), known)
    assert bool((found[:5] == model.least).all())
    assert model.least > 0
    known[:5] = False
    torch.testing.assert_close(found[known], truth[known].clamp(min=model.least))
    assert 0.05 < model.floored < 0.3
    # Positions with a measurement are preferred: of 36, about 13 have one.
    assert float(torch.isfinite(part.tweedie).any(1).double().mean()) > 0.95


def test_predictions_add_the_weights() -> None:
    rows, truth = observed()
    noise = fit_noise(sample(rows), "constant", ["normal"])["normal"]
    weights = torch.rand(truth.shape, dtype=torch.float64)
    prediction, known = noise.predict(GEOMETRY, rows, weights)
    assert bool(known.all())
    constant = float(sample(rows).residual.square().mean())
    torch.testing.assert_close(prediction.variance, (weights + constant).flatten())


def test_shapes_are_those_of_the_residuals() -> None:
    generator = np.random.default_rng(0)
    heavy = torch.from_numpy(0.7 * stats.t.rvs(4.0, size=20_000, random_state=generator))
    student = fit_shape(heavy, "student-t")
    assert isinstance(student, Scaled)
    assert isinstance(student.inner, StudentT)
    assert student.inner.dof == pytest.approx(4.0, rel=0.15)
    assert student.factor == pytest.approx(0.7, rel=0.03)
    skewed = torch.from_numpy(generator.exponential(size=50_000))
    quantiles = fit_shape(skewed, "quantiles")
    assert isinstance(quantiles, Quantiles)
    p = torch.tensor([0.05, 0.37, 0.8, 0.95], dtype=torch.float64)
    torch.testing.assert_close(quantiles.quantile(p), -(-p).log1p(), rtol=0.05, atol=0.01)


def test_a_stretched_shape_is_that_of_a_stretched_number() -> None:
    shape, z = Scaled(StudentT(5.0), 0.6), torch.linspace(-3, 3, 7, dtype=torch.float64)
    np.testing.assert_allclose(shape.log_density(z).exp().numpy(), stats.t.pdf(z.numpy(), 5, scale=0.6), rtol=1e-10)
    torch.testing.assert_close(shape.quantile(shape.cdf(z)), z)
    assert shape.variance == pytest.approx(stats.t.var(5, scale=0.6))
    torch.testing.assert_close(shape.crps(z), 0.6 * StudentT(5.0).crps(z / 0.6))


@pytest.mark.parametrize(("folds", "expected"), [(2, 2), (8, 8), (50, 20)])
def test_out_of_fold_variances_do_not_know_their_own_images(folds: int, expected: int) -> None:
    rows, _ = observed(20)
    part = sample(rows, 5)
    seen: list[set[int]] = []

    class Kept:
        def __init__(self, images: Tensor) -> None:
            self.images = set(images.tolist())

        def of_sample(self, other: Sample) -> Tensor:
            seen.append(self.images & set(other.image.tolist()))
            return torch.full_like(other.residual, math.pi)

        def of_rows(self, geometry: HeadGeometry, rows: Observed) -> Tensor:
            raise AssertionError

    out = out_of_fold(part, lambda others: Kept(others.image), folds)
    assert seen == [set()] * expected
    assert bool((out == math.pi).all())


def test_bad_input_is_a_typed_error() -> None:
    rows, _ = observed(8)
    part = sample(rows, 4)
    with pytest.raises(ArgumentError, match="scale to be one of"):
        fit_noise(part, "quadratic")
    with pytest.raises(ArgumentError, match="shape to be one of"):
        fit_noise(part, "constant", ["cauchy"])
    with pytest.raises(EmptyDataError, match="held-out rows"):
        Sample.of(GEOMETRY, [], 4, torch.Generator())
    with pytest.raises(EmptyDataError, match="two images"):
        fit_noise(part[part.image < 1], "log-linear")
    zero = Sample(part.phi, part.residual * 0, part.level, part.image, part.tweedie)
    with pytest.raises(ArgumentError, match="not all 0"):
        fit_noise(zero, "constant")
    broken = Sample(part.phi, part.residual / 0, part.level, part.image, part.tweedie)
    with pytest.raises(NonFiniteError):
        fit_noise(broken, "constant")
    unmeasured = Sample(part.phi, part.residual, part.level, part.image, part.tweedie * float("nan"))
    with pytest.raises(ArgumentError, match="measured responses"):
        fit_noise(unmeasured, "tweedie")
