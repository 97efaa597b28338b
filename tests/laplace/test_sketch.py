"""Sketched gradients: unbiased within their stated error, whatever the batches, processes and files."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bayesdiff.checks import ArgumentError, EmptyDataError, ProjectionWarning
from bayesdiff.head.find import Head
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics

IMAGES, DRAWS, BINS, R = 500, 3, 3, 256
#: A relative error of √(2/R) in a variance; the mean over 200 positions of correlated errors may be half as much again.
STATED = math.sqrt(2 / R)


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(20, 4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    shared = torch.randn(IMAGES, 1, 20, generator=generator).repeat_interleave(DRAWS, 0)
    inputs = (shared + torch.randn(IMAGES * DRAWS, 5, 20, generator=generator)).relu()
    residuals = torch.randn(IMAGES * DRAWS, 5, 4, generator=generator) * (1 + inputs[..., :4])
    residuals += torch.randn(IMAGES, 1, 4, generator=generator).repeat_interleave(DRAWS, 0)
    return layer, inputs, residuals


def fitted(problem, sketch, first=0, last=IMAGES, batch=50):
    layer, inputs, residuals = problem
    out = Statistics(HeadGeometry.of(layer), BINS, sketch=sketch)
    for a in range(first, last, batch):
        rows = slice(a * DRAWS, min(last, a + batch) * DRAWS)
        count = torch.arange(IMAGES * DRAWS)[rows]
        out.update(inputs[rows], residuals[rows], count % BINS, count // DRAWS)
        out.settle()
    return out


def cut(problem, statistics, **kwargs):
    layer = problem[0]
    return LaplacePosterior.from_statistics(statistics, Head("head", layer, statistics.geometry), **kwargs)


@pytest.mark.filterwarnings("ignore::bayesdiff.checks.ProjectionWarning")
@pytest.mark.parametrize("structure", ["full", "kron", "lowrank", "diag"])
@pytest.mark.parametrize("training_draws", [None, 1, DRAWS, 8.5])
def test_variances_are_within_the_stated_error(problem, training_draws, structure):
    exact, sketched = (
        cut(problem, fitted(problem, s), training_draws=training_draws, structure=structure) for s in (None, R)
    )
    x = torch.randn(200, 20, generator=torch.Generator().manual_seed(1))
    ratio = sketched.variance(x) / exact.variance(x)
    assert float((ratio - 1).square().mean().sqrt()) < 1.5 * STATED
    assert abs(float(ratio.mean()) - 1) < STATED
    for one, other in zip(exact.shares(), sketched.shares(), strict=True):
        assert abs(one["share_between"] - other["share_between"]) < STATED


def test_what_all_images_share_is_left_out_of_a_sketch_too(problem):
    """A network far from its minimum: a mean gradient thirty times the spread would drown it."""
    layer, inputs, residuals = problem
    far = layer, inputs, residuals + 30
    x = torch.randn(200, 20, generator=torch.Generator().manual_seed(1))
    exact, sketched = (
        cut(far, fitted(far, s), training_draws=1, loss_weights=torch.ones(BINS)).variance(x) for s in (None, R)
    )
    assert float((sketched / exact - 1).square().mean().sqrt()) < 1.5 * STATED
    merged = fitted(far, R, last=200)
    merged.merge(fitted(far, R, first=200))
    together = cut(far, merged, training_draws=1, loss_weights=torch.ones(BINS)).variance(x)
    torch.testing.assert_close(together, sketched, rtol=1e-6, atol=0)


def test_the_error_falls_with_the_rows(problem):
    x = torch.randn(200, 20, generator=torch.Generator().manual_seed(1))
    exact = cut(problem, fitted(problem, None)).variance(x)
    errors = [
        float((cut(problem, fitted(problem, r)).variance(x) / exact - 1).square().mean().sqrt()) for r in (16, 64, 1024)
    ]
    for found, rows in zip(errors, (16, 64, 1024), strict=True):
        assert 0.5 < found / math.sqrt(2 / rows) < 1.5


def test_signs_do_not_depend_on_batches_or_processes(problem):
    whole = fitted(problem, R)
    halves = fitted(problem, R, 0, 200).merge(fitted(problem, R, 200))
    mixed = fitted(problem, None, 0, 200).merge(fitted(problem, R, 200))
    other_way = fitted(problem, R, 200).merge(fitted(problem, None, 0, 200))
    for out in (halves, mixed, other_way, fitted(problem, R, batch=7)):
        assert (out.num_images, out.num_draws) == (IMAGES, IMAGES * DRAWS)
        for name in ("means", "deviations"):
            torch.testing.assert_close(
                getattr(out._draws.sketch, name), getattr(whole._draws.sketch, name), rtol=1e-9, atol=1e-9
            )
    begun = fitted(problem, None)
    begun.settle(R)  # late
    torch.testing.assert_close(begun._draws.sketch.means, whole._draws.sketch.means, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sketches", [(None, None), (R, R), (None, R), (R, None)], ids=str)
def test_the_same_fit_does_not_count_twice(problem, sketches, tmp_path):
    """The same images and draws again, also after saving, in other batches, rounded otherwise, or as a part of more images."""
    one, other = (fitted(problem, s, 0, 100, batch) for s, batch in zip(sketches, (50, 20), strict=True))
    one.save(tmp_path)
    with pytest.raises(ArgumentError, match="100 of the very same images"):
        Statistics.load(tmp_path).merge(other)
    with pytest.raises(ArgumentError, match="very same images"):
        fitted(problem, sketches[0], 50, 300).merge(other)
    layer, inputs, residuals = problem
    rounded = fitted((layer, inputs * (1 + 1e-5 * torch.randn(inputs.shape)), residuals), sketches[0], 0, 100)
    with pytest.raises(ArgumentError, match="very same images"):
        rounded.merge(other)
    fresh = fitted((layer, inputs, residuals + 0.1 * torch.randn(residuals.shape)), sketches[0], 0, 100)
    assert fresh.merge(fitted(problem, sketches[1], 100, 200)).num_images == 200


def test_what_a_sketch_does_not_tell(problem, tmp_path):
    out = fitted(problem, R)
    for settings in ({"covariance": "ef"}, {"loss_weights": "noise"}, {"loss_weights": torch.tensor([1.0, 2.0, 3.0])}):
        with pytest.raises(ArgumentError, match="sketch=None"):
            cut(problem, out, **settings)
    with pytest.raises(ArgumentError, match="sketch=None"):
        cut(problem, out).recut(covariance="ef")
    with pytest.raises(ArgumentError, match="same_images"):
        out.merge(fitted(problem, R), same_images=True)
    with pytest.raises(ArgumentError, match="sketch of 256 rows"):
        out.merge(fitted(problem, 64))
    with pytest.raises(EmptyDataError):
        cut(problem, Statistics(out.geometry, BINS, sketch=4))
    with pytest.raises(ArgumentError, match="sketch"):
        Statistics(out.geometry, BINS, sketch=1)
    assert torch.equal(cut(problem, out, covariance="ggn").mean, cut(problem, out).mean)  # needs no gradients
    out.save(tmp_path)
    loaded = Statistics.load(tmp_path)
    x = torch.randn(3, 20)
    assert torch.equal(cut(problem, loaded).variance(x), cut(problem, out).variance(x))


def test_the_sum_of_two_factors_in_the_rows_of_one(problem):
    with pytest.warns(ProjectionWarning):
        out = cut(problem, fitted(problem, R), training_draws=100)
    assert len(out.sigma.parts["root"]) <= R
