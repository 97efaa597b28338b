"""``bd.compare``: closed forms are exact where they say so, Monte Carlo errs as theory has it, and both are timed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import bayesdiff as bd
from bayesdiff.calibration.comparison import quadrature
from bayesdiff.checks import ArgumentError, NonFiniteError, ShapeError
from bayesdiff.gaussian import Gaussian
from bayesdiff.laplace.links import ClampedPixel, Smooth
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics


def made(bias):
    """A posterior of a small convolution, and features."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 2, 3, padding=1, bias=bias))
    found = bd.find_head(network, "0")
    x = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    statistics = Statistics(found.geometry, 1)
    r = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(2))
    statistics.update(x, r, torch.zeros(8, dtype=torch.long), torch.arange(8))
    posterior = LaplacePosterior.from_statistics(statistics, found, covariance="ggn", prior_precision=1.0)
    return posterior.recut(temperature=20.0), x


@pytest.fixture(scope="module")
def head():
    return made(bias=True)


def test_closed_forms_are_exact_and_draws_err_as_theory_says(head, tmp_path):
    posterior, x = head
    links = ("identity", "clamped_pixel", "sigmoid", bd.links.Exceedance(0.5), Smooth(torch.tanh))
    found = bd.compare(posterior, x, links, draws=(50, 800), repeats=1, generator=torch.Generator().manual_seed(0))
    rows = {(r["link"], r["method"]): r for r in found.rows}
    for link in ("identity", "clamped_pixel", "exceedance"):
        assert rows[link, "exact"]["std_error"] < 1e-5
        assert rows[link, "exact"]["mean_error"] < 1e-5
    assert rows["sigmoid", "probit"]["mean_error"] < rows["sigmoid", "linearized"]["mean_error"]
    assert ("sigmoid", "exact") not in rows
    assert rows["Smooth", "linearized"]["reference"].startswith("quadrature")
    assert rows["clamped_pixel", "linearized"]["std_error"] > 0.01
    for n in (50, 800):
        row = rows["identity", f"mc, n = {n}"]
        assert row["theory"] == pytest.approx(1 / math.sqrt(2 * (n - 1)))
        assert row["std_error"] == pytest.approx(row["theory"], rel=0.5)
    assert all(r["seconds"] > 0 for r in found.rows)
    assert found.elements == 8 * 2 * 36
    assert "variance (1)" in str(found)
    found.save(tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"] == found.rows
    assert (tmp_path / "comparison.png").stat().st_size > 5_000
    again = bd.compare(posterior, x, ["identity"], draws=(50,), repeats=1, generator=torch.Generator().manual_seed(0))
    assert again.rows[-1]["std_error"] == rows["identity", "mc, n = 50"]["std_error"]


def test_a_map_that_is_not_elementwise_is_compared_with_draws(head):
    posterior, x = head
    blur = Smooth(lambda y: nn.functional.avg_pool2d(y, 2), elementwise=False)
    found = bd.compare(posterior, x, [blur], draws=(100,), repeats=1, generator=torch.Generator().manual_seed(0))
    assert [r["method"] for r in found.rows] == ["linearized", "mc, n = 100"]
    assert "draws of its own" in found.rows[0]["reference"]
    assert all(r["std_error"] < 0.15 for r in found.rows)


def test_quadrature_is_the_closed_form_of_what_has_one():
    gaussian = Gaussian(torch.linspace(-2, 2, 9).double(), torch.full((9,), 0.3).double())
    cubes = quadrature(Smooth(lambda y: y**3), gaussian)
    m, v = gaussian.mean, gaussian.variance
    torch.testing.assert_close(cubes.mean, m**3 + 3 * m * v)
    torch.testing.assert_close(cubes.variance, 9 * m**4 * v + 36 * m**2 * v**2 + 15 * v**3)
    clipped = ClampedPixel()
    rough = quadrature(clipped, gaussian)  # not smooth: near only
    torch.testing.assert_close(rough.mean, clipped.moments(gaussian, "exact").mean, rtol=0, atol=5e-3)


def test_bad_input_is_a_typed_error(head):
    posterior, x = head
    with pytest.raises(ArgumentError, match="a LaplacePosterior"):
        bd.compare(None, x)
    with pytest.raises(ArgumentError, match="or a tensor"):
        bd.compare(posterior, [1.0])
    with pytest.raises(ShapeError):
        bd.compare(posterior, x[:, :2])
    with pytest.raises(NonFiniteError):
        bd.compare(posterior, x / 0)
    for wrong in ({"links": []}, {"links": ["softmax"]}, {"draws": (1,)}, {"repeats": 0}):
        with pytest.raises(ArgumentError):
            bd.compare(posterior, x, **wrong)
    without, _ = made(bias=False)
    with pytest.raises(ArgumentError, match="some predictive variance"):
        bd.compare(without, x * 0)
