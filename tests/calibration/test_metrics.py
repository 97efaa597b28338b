"""Metrics against closed forms, scipy and naive twins; batches against once; states merged as in a distributed run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor
from torchmetrics import Metric

from bayesdiff import calibration
from bayesdiff.calibration import (
    CRPS,
    ENCE,
    GaussianNLL,
    IntervalCoverage,
    PITHistogram,
    Prediction,
    RiskCoverage,
    Sharpness,
    Sparsification,
    Spearman,
)
from bayesdiff.calibration.shapes import Normal, Quantiles, Shape, StudentT
from bayesdiff.checks import ArgumentError, EmptyDataError, NegativeVarianceError, NonFiniteError, ShapeError
from bayesdiff.gaussian import Gaussian

WARPED = Quantiles((0.02, 0.2, 0.5, 0.7, 0.99), (-4.0, -1.0, 0.2, 0.5, 3.0))
SHAPES: dict[str, Shape] = {"normal": Normal(), "t": StudentT(4.5), "quantiles": WARPED}


def drawn(n: int = 4000, seed: int = 0) -> tuple[Gaussian, Tensor]:
    """Predictions that are right, of spreads over two decades."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, generator=generator, dtype=torch.float64)
    std = torch.logspace(-1, 1, n, dtype=torch.float64)[torch.randperm(n, generator=generator)]
    return Gaussian(mean, std.square()), mean + std * torch.randn(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_one_distribution(name: str) -> None:
    shape = SHAPES[name]
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    z = shape.quantile(p)
    torch.testing.assert_close(shape.cdf(z), p, rtol=0, atol=1e-10)
    knots = list(WARPED.values) if name == "quantiles" else None

    def density(x: float) -> float:
        return float(shape.log_density(torch.tensor(x, dtype=torch.float64)).exp())

    for low, high in ((-2.3, 1.7), (-6.0, 0.1)):
        ends = torch.tensor([low, high], dtype=torch.float64)
        area = integrate.quad(density, low, high, points=knots and [k for k in knots if low < k < high])[0]
        assert area == pytest.approx(float(shape.cdf(ends).diff()), abs=1e-7)
    levels = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    values = shape.quantile(levels)
    assert shape.mean == pytest.approx(float(values.mean()), abs=1e-4)
    assert shape.variance == pytest.approx(float(values.var()), rel=6e-3)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("z", [-5.0, 0.3, 2.9])
def test_crps_is_its_integral(name: str, z: float) -> None:
    shape = SHAPES[name]

    def cdf(x: float) -> float:
        return float(shape.cdf(torch.tensor(x, dtype=torch.float64)))

    low = integrate.quad(lambda x: cdf(x) ** 2, -300, z, limit=400, points=[-20, -5, min(z, 0) - 1])[0]
    high = integrate.quad(lambda x: (1 - cdf(x)) ** 2, z, 300, limit=400, points=[20, 5, max(z, 0) + 1])[0]
    assert float(shape.crps(torch.tensor(z, dtype=torch.float64))) == pytest.approx(low + high, rel=1e-5)


def test_nll_and_crps_are_those_of_scipy() -> None:
    gaussian, y = drawn()
    metric, crps = GaussianNLL(), CRPS()
    metric.update(gaussian, y)
    crps.update(gaussian, y)
    expected = -stats.norm.logpdf(y.numpy(), gaussian.mean.numpy(), gaussian.std.numpy()).mean()
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-12)
    z = ((y - gaussian.mean) / gaussian.std).numpy()
    closed = z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi)
    assert float(crps.compute()) == pytest.approx((gaussian.std.numpy() * closed).mean(), rel=1e-12)
    heavy = Prediction(gaussian.mean, gaussian.std, StudentT(3.0))
    metric.reset()
    metric.update(heavy, y)
    expected = -stats.t.logpdf(y.numpy(), 3.0, gaussian.mean.numpy(), gaussian.std.numpy()).mean()
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-12)


def test_intervals_cover_what_they_say_and_have_their_width() -> None:
    gaussian, y = drawn(20_000)
    metric = IntervalCoverage()
    metric.update(gaussian, y)
    found = metric.compute()
    levels = np.array(metric.levels)
    error = np.sqrt(levels * (1 - levels) / 20_000)
    assert (np.abs(found["coverage"].numpy() - levels) < 4 * error).all()
    z = stats.norm.ppf((1 + levels) / 2)
    np.testing.assert_allclose(found["width"].numpy(), 2 * z * float(gaussian.std.mean()), rtol=1e-12)
    narrow = IntervalCoverage([0.9])
    narrow.update(Gaussian(gaussian.mean, gaussian.variance / 4), y)
    assert float(narrow.compute()["coverage"]) == pytest.approx(2 * stats.norm.cdf(1.645 / 2) - 1, abs=0.01)


def test_a_pit_histogram_is_flat_for_the_truth_and_a_u_for_what_is_too_narrow() -> None:
    gaussian, y = drawn(20_000)
    right, narrow = PITHistogram(10), PITHistogram(10)
    right.update(gaussian, y)
    narrow.update(Gaussian(gaussian.mean, gaussian.variance / 9), y)
    assert float((right.compute() - 1).abs().max()) < 4 * math.sqrt(10 / 20_000)
    assert float(right.compute().mean()) == pytest.approx(1)
    ends = stats.norm.cdf(stats.norm.ppf(0.1) / 3) * 10
    np.testing.assert_allclose(narrow.compute()[[0, -1]].numpy(), ends, rtol=0.05)


def naive_ence(gaussian: Gaussian, y: Tensor, bins: int) -> float:
    order = gaussian.variance.argsort()
    parts = [
        (gaussian.variance[i].mean().sqrt(), (y - gaussian.mean)[i].square().mean().sqrt()) for i in order.chunk(bins)
    ]
    return float(torch.stack([(v - e).abs() / v for v, e in parts]).mean())


def test_ence_is_that_of_sorted_bins_but_for_a_cell() -> None:
    gaussian, y = drawn()
    metric = ENCE(10)
    metric.update(gaussian, y)
    assert float(metric.compute()) == pytest.approx(naive_ence(gaussian, y, 10), abs=0.01)
    wrong = ENCE(10)
    wrong.update(Gaussian(gaussian.mean, 4 * gaussian.variance), y)
    assert float(wrong.compute()) == pytest.approx(0.5, abs=0.03)
    # Ten variances, equally often: the bins are exact.
    levels = torch.arange(1, 11, dtype=torch.float64).repeat(400)
    few = Gaussian(gaussian.mean, levels)
    exact = ENCE(10)
    exact.update(few, y)
    assert float(exact.compute()) == pytest.approx(naive_ence(few, y, 10), rel=1e-12)
    one = ENCE(10)
    one.update(Gaussian(gaussian.mean, torch.full_like(y, 7.0)), y)
    assert len(one.curve()[0]) == 1


def test_ence_is_about_the_mean_of_the_prediction() -> None:
    _, y = drawn()
    shape = Quantiles((0.1, 0.5, 0.9), (0.0, 1.0, 4.0))
    location, scale = torch.zeros_like(y), torch.full_like(y, 2.0)
    metric = ENCE(1)
    metric.update(Prediction(location, scale, shape), y)
    rmv, rmse = metric.curve()
    assert float(rmse) == pytest.approx(float((y - 2 * shape.mean).square().mean().sqrt()), rel=1e-12)
    assert float(rmv) == pytest.approx(2 * math.sqrt(shape.variance), rel=1e-12)


def test_sharpness() -> None:
    gaussian, _ = drawn()
    metric = Sharpness()
    metric.update(gaussian)
    assert float(metric.compute()["rms"]) == pytest.approx(float(gaussian.variance.mean().sqrt()))
    assert float(metric.compute()["mean"]) == pytest.approx(float(gaussian.std.mean()))


def pairs(n: int = 500, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    return u, u * torch.rand(n, generator=generator, dtype=torch.float64)


def naive_curve(u: Tensor, e: Tensor) -> Tensor:
    order = u.argsort()
    return torch.stack([e[order[:k]].mean() for k in range(1, len(u) + 1)])


def test_risk_and_sparsification_are_those_of_sorted_loops() -> None:
    u, e = pairs()
    curve, oracle = naive_curve(u, e), naive_curve(e, e)
    metric, area = RiskCoverage(), Sparsification()
    metric.update(u, e)
    area.update(u, e)
    assert float(metric.compute()["aurc"]) == pytest.approx(float(curve.mean()))
    assert float(metric.compute()["oracle"]) == pytest.approx(float(oracle.mean()))
    assert float(area.compute()["ause"]) == pytest.approx(float((curve - oracle).mean() / e.mean()))
    assert float(area.compute()["aurg"]) == pytest.approx(float(1 - curve.mean() / e.mean()))
    rmse = Sparsification("rmse")
    rmse.update(u, e)
    curve, oracle = naive_curve(u, e.square()).sqrt(), naive_curve(e, e.square()).sqrt()
    assert float(rmse.compute()["ause"]) == pytest.approx(float((curve - oracle).mean() / e.square().mean().sqrt()))


def test_closed_forms_of_rankings() -> None:
    # Errors 1 … n in their own order: r_k = (k + 1)/2; turned round: n − (k − 1)/2.
    n = 100
    e = torch.arange(1, n + 1, dtype=torch.float64)
    best, worst, none = Sparsification(), Sparsification(), Sparsification()
    best.update(e, e)
    worst.update(-e, e)
    none.update(torch.zeros(n), e)
    assert float(best.compute()["ause"]) == 0
    assert float(best.compute()["aurg"]) == pytest.approx(1 - (n + 3) / 4 / ((n + 1) / 2))
    assert float(worst.compute()["aurg"]) == pytest.approx(1 - (n - (n - 1) / 4) / ((n + 1) / 2))
    assert float(none.compute()["aurg"]) == pytest.approx(0, abs=1e-12)  # a constant is chance


def test_equal_uncertainties_are_worth_the_mean_over_their_orders() -> None:
    u, e = pairs(60)
    u = (u * 4).floor()
    metric = RiskCoverage()
    metric.update(u, e)
    generator = torch.Generator().manual_seed(1)
    shuffled = []
    for _ in range(4000):
        order = torch.randperm(60, generator=generator)
        order = order[u[order].argsort(stable=True)]
        shuffled.append(float((e[order].cumsum(0) / torch.arange(1, 61)).mean()))
    assert float(metric.compute()["aurc"]) == pytest.approx(np.mean(shuffled), abs=4 * np.std(shuffled) / 4000**0.5)


def test_spearman_is_that_of_scipy_with_many_equals_too() -> None:
    u, e = pairs(100_000)
    u = torch.where(u < 0.6, 0.0, u)  # 60,000 equals: 32 bits do not hold the sum of their ranks
    metric = Spearman()
    metric.update(u, e)
    assert float(metric.compute()) == pytest.approx(stats.spearmanr(u.numpy(), e.numpy()).statistic, abs=1e-9)


METRICS: dict[str, Callable[..., Metric]] = {
    "nll": GaussianNLL, "crps": CRPS, "coverage": IntervalCoverage, "pit": PITHistogram, "ence": ENCE, "sharpness": Sharpness,
    "risk": RiskCoverage, "sparsification": Sparsification, "spearman": Spearman,
}  # fmt: skip


def arguments(name: str, rows: slice) -> tuple[Any, ...]:
    if name in ("risk", "sparsification", "spearman"):
        return tuple(v[rows] for v in pairs(1000))
    gaussian, y = drawn(1000)
    return (gaussian[rows],) if name == "sharpness" else (gaussian[rows], y[rows])


def flat(value: Tensor | dict[str, Tensor]) -> Tensor:
    return torch.cat([v.flatten() for v in value.values()]) if isinstance(value, dict) else value.flatten()


@pytest.mark.parametrize("name", METRICS)
def test_batches_and_processes_make_no_difference(name: str) -> None:
    whole, batches, first, second = (METRICS[name]() for _ in range(4))
    whole.update(*arguments(name, slice(None)))
    for i in range(0, 1000, 130):
        batches.update(*arguments(name, slice(i, i + 130)))
    first.update(*arguments(name, slice(0, 420)))
    second.update(*arguments(name, slice(420, 1000)))
    torch.testing.assert_close(flat(batches.compute()), flat(whole.compute()), rtol=1e-10, atol=1e-12)
    # What torchmetrics does between processes: every state is gathered, then reduced.
    gathered = [torch.cat(v) if isinstance(v, list) else v for v in second.metric_state.values()]

    def gather(value: Tensor, group: Any = None) -> list[Tensor]:
        return [value, gathered.pop(0)]

    synced = METRICS[name](dist_sync_fn=gather, distributed_available_fn=lambda: True)
    synced.update(*arguments(name, slice(0, 420)))
    torch.testing.assert_close(flat(synced.compute()), flat(whole.compute()), rtol=1e-10, atol=1e-12)
    assert not gathered
    first.merge_state(second)
    torch.testing.assert_close(flat(first.compute()), flat(whole.compute()), rtol=1e-10, atol=1e-12)
    forward = METRICS[name]()
    step = forward(*arguments(name, slice(0, 420)))
    assert torch.isfinite(flat(step)).all()


@pytest.mark.parametrize("name", METRICS)
def test_nothing_to_compute_is_an_error(name: str) -> None:
    metric = METRICS[name]()
    with (
        pytest.warns(UserWarning, match="before the ``update``"),
        pytest.raises(EmptyDataError, match="update it first"),
    ):
        metric.compute()


def test_bad_input_is_a_typed_error() -> None:
    y = torch.zeros(3)
    with pytest.raises(ShapeError, match="target of the prediction's shape"):
        GaussianNLL().update(Gaussian(torch.zeros(2), torch.ones(2)), y)
    with pytest.raises(NegativeVarianceError, match="spread > 0"):
        CRPS().update(Gaussian(y, y), y)
    with pytest.raises(NonFiniteError):
        CRPS().update(Gaussian(y, y + 1), y / 0)
    with pytest.raises(ArgumentError, match="Gaussian or a Prediction"):
        GaussianNLL().update(y, y)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="as a tensor"):
        GaussianNLL().update(Gaussian(y, y + 1), [0.0] * 3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"levels in \(0, 1\)"):
        IntervalCoverage([95])
    with pytest.raises(ArgumentError, match="has none"):
        ENCE().update(Prediction(y, y + 1, StudentT(1.5)), y)
    with pytest.raises(ArgumentError, match="dof > 1"):
        StudentT(0.9)
    with pytest.raises(ArgumentError, match="increase"):
        Quantiles((0.1, 0.5), (1.0, 1.0))
    with pytest.raises(ArgumentError, match="errors >= 0"):
        Sparsification().update(y, y - 1)
    with pytest.raises(ShapeError, match="uncertainty for each error"):
        RiskCoverage().update(y, torch.zeros(2))
    with pytest.raises(ArgumentError, match="'mae', 'rmse'"):
        Sparsification("mse")


def test_the_package_says_what_it_has() -> None:
    assert calibration.ENCE is ENCE
