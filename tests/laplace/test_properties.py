"""Whatever the layer, the numbers, the structure, the prior, the batches: predictions are those of naive float64 algebra.

Problems are drawn by hypothesis, the same ones in every run; ``BAYESDIFF_EXAMPLES`` asks for more of them.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from bayesdiff.head.find import Head
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics
from tests import references

EXAMPLES = int(os.environ.get("BAYESDIFF_EXAMPLES", "60"))
STRUCTURES, COVARIANCES = ("full", "kron", "diag", "lowrank"), ("sandwich", "ggn", "ef")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Of a variance, beside the mean one. Features of half precision are worked with in float32.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float16: 1e-4}

tried = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
fewer = settings(tried, max_examples=EXAMPLES // 2)
pytestmark = pytest.mark.filterwarnings("ignore::bayesdiff.checks.ProjectionWarning")


class Problem:
    """A layer, and draws of some images: features, residuals, bins, numbers of images."""

    def __init__(self, layer, size, draws_of_images, bins, dtype, scale, shift, seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.layer, self.bins = layer, bins
        self.images = torch.cat([torch.full((m,), i) for i, m in enumerate(draws_of_images)])
        n = len(self.images)
        self.inputs = (shift + torch.randn(n, *size, generator=generator)).mul(scale).to(dtype)
        with torch.no_grad():
            shape = layer.double()(self.inputs.double()).shape
        layer.float()
        self.residuals = torch.randn(shape, generator=generator).to(dtype)
        self.where = torch.randint(bins, (n,), generator=generator)

    def head(self):
        return Head("head", self.layer, HeadGeometry.of(self.layer))

    def statistics(self, parts=None, **kwargs):
        out = Statistics(HeadGeometry.of(self.layer), self.bins, **kwargs)
        for part in [torch.arange(len(self.images))] if parts is None else parts:
            out.update(self.inputs[part], self.residuals[part], self.where[part], self.images[part])
        return out

    def posterior(self, statistics=None, **kwargs):
        return LaplacePosterior.from_statistics(statistics or self.statistics(), self.head(), **kwargs)

    def __repr__(self):
        return f"Problem({self.layer}, {tuple(self.inputs.shape)} {self.inputs.dtype}, images {self.images.tolist()})"


@st.composite
def problems(draw):
    count = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    c, c_in, bias = count(1, 3), count(1, 3), draw(st.booleans())
    kind = draw(st.sampled_from(("vector", "tokens", "frames", "conv1", "conv2", "conv3")))
    if kind.startswith("conv"):
        n = int(kind[-1])
        kernel = tuple(count(1, 3 if n < 3 else 2) for _ in range(n))
        size = tuple(k + count(0, 2) for k in kernel)
        mode = draw(st.sampled_from(("zeros", "reflect", "replicate", "circular")))
        padding = tuple(count(0, max(0, k - 1)) for k in kernel)
        if mode == "reflect":
            padding = tuple(min(p, s - 1) for p, s in zip(padding, size, strict=True))
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
        layer, size = conv(c_in, c, kernel, padding=padding, padding_mode=mode, bias=bias), (c_in, *size)
    else:
        layer = nn.Linear(c_in, c, bias=bias)
        size = (*[count(1, 3) for _ in range({"vector": 0, "tokens": 1, "frames": 2}[kind])], c_in)
    draws = draw(st.lists(st.integers(1, 3), min_size=2, max_size=7))
    numbers = {"scale": draw(st.sampled_from((0.03, 1.0, 30.0))), "shift": draw(st.sampled_from((0.0, 1.0, 5.0)))}
    return Problem(layer, size, draws, count(1, 3), draw(st.sampled_from(DTYPES)), seed=count(0, 2**32), **numbers)


@st.composite
def cuts(draw):
    """Settings of a posterior that go together."""
    structure, covariance = draw(st.sampled_from(STRUCTURES)), draw(st.sampled_from(COVARIANCES))
    own = structure == "diag" or (structure == "full" and covariance != "ef")  # each channel may have its own τ
    return {
        "structure": structure, "covariance": covariance, "by_channel": own and draw(st.booleans()),
        "prior": draw(st.sampled_from((0.01, 0.7, 40.0, 1e4))), "size": draw(st.sampled_from((1, 3, 1000))),
        "noise": draw(st.sampled_from((None, 0.2))), "temperature": draw(st.sampled_from((1.0, 0.3))),
    }  # fmt: skip


def chunks(draw, n):
    """A partition of 0 … n − 1, in any order."""
    order = draw(st.permutations(range(n)))
    ends = sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=4))})
    return [torch.tensor(order[a:b]) for a, b in itertools.pairwise(ends)]


def made(problem, cut, statistics=None):
    c = len(problem.layer.weight)
    tau = cut["prior"] * (1 + torch.arange(c).double()) if cut["by_channel"] else cut["prior"]
    images = int(problem.images.max()) + 1
    noise = {} if cut["noise"] is None else {"noise_variance": cut["noise"]}
    posterior = problem.posterior(
        statistics, structure=cut["structure"], covariance=cut["covariance"], prior_precision=tau,
        dataset_size=cut["size"] * images, temperature=cut["temperature"], **noise,
    )  # fmt: skip
    return posterior, torch.as_tensor(tau).double().expand(c)


def dense(problem, cut, tau, structure):
    """Σ of all C·D weights, position by position, in float64."""
    phi = references.im2col(problem.layer, problem.inputs)  # (B, P, D)
    channel = -1 if isinstance(problem.layer, nn.Linear) else 1
    r = problem.residuals.double()
    r = r.movedim(channel, -1).flatten(1, -2) if r.ndim > 2 else r[:, None]  # (B, P, C)
    c, d = r.shape[2], phi.shape[2]
    squares, counts = [0.0] * problem.bins, [0] * problem.bins
    for b, k in enumerate(problem.where.tolist()):
        squares[k] += float(r[b].square().sum())
        counts[k] += r[b].numel()
    seen = [k for k in range(problem.bins) if counts[k]]
    noise = []
    for k in range(problem.bins):
        nearest = min(seen, key=lambda s: (abs(s - k), s))
        noise.append(cut["noise"] or squares[nearest] / counts[nearest])
    pooled = sum(squares) / sum(counts)
    weight = [1 / pooled if cut["covariance"] == "sandwich" else 1 / v for v in noise]
    a, gradients = torch.zeros(d, d).double(), {}
    for b, k in enumerate(problem.where.tolist()):
        i = int(problem.images[b])
        for f, e in zip(phi[b], r[b], strict=True):
            a += cut["size"] * weight[k] * torch.outer(f, f)
            gradients[i] = gradients.get(i, 0) + weight[k] * torch.outer(e, f).flatten()
    precision = torch.kron(torch.eye(c).double(), a)
    scores = list(gradients.values())
    counts = [int((problem.images == i).sum()) for i in gradients]
    scores = references.about_their_mean(scores, counts) if cut["covariance"] == "sandwich" else scores
    meat = cut["size"] * sum(torch.outer(g, g) for g in scores)
    if structure == "diag":
        precision, meat = precision.diagonal().diag(), meat.diagonal().diag()
    if structure == "kron":
        meat = references.nearest_kronecker(meat, c, d)
    prior = tau.repeat_interleave(d).diag()
    if cut["covariance"] == "ef":
        return cut["temperature"] * torch.linalg.inv(meat + prior), phi
    inverse = torch.linalg.inv(precision + prior)
    return cut["temperature"] * (inverse if cut["covariance"] == "ggn" else inverse @ meat @ inverse), phi


def predicted(problem, sigma, phi):
    """φᵀΣ_cφ at each position, shaped as the output."""
    c, d = len(problem.layer.weight), phi.shape[2]
    blocks = sigma.view(c, d, c, d)
    by_position = torch.stack([((phi @ blocks[k, :, k]) * phi).sum(2) for k in range(c)], dim=2)  # (B, P, C)
    if isinstance(problem.layer, nn.Linear):
        return by_position.reshape(problem.residuals.shape)
    return by_position.movedim(2, 1).reshape(problem.residuals.shape)


@tried
@given(problems(), cuts(), st.data())
def test_predictions_are_those_of_naive_algebra(problem, cut, data):
    parts = chunks(data.draw, len(problem.images))
    posterior, tau = made(problem, cut, problem.statistics(parts))
    found = posterior.variance(problem.inputs)
    assert found.dtype == torch.promote_types(problem.inputs.dtype, torch.float32)
    assert bool((found >= 0).all())
    exact = cut["structure"] if cut["structure"] != "lowrank" else "full"
    sigma, phi = dense(problem, cut, tau, exact)
    expected = predicted(problem, sigma, phi)
    apart = (found.double() - expected).abs()
    if cut["structure"] == "lowrank":  # as promised: a share s is left to the diagonal
        assert float(apart.mean()) <= (2 * posterior.approximation_error + 1e-4) * float(expected.mean())
        # The mean over the features fitted to is exact: with their weights by bin, for those other than 1.
        assert posterior.approximation_error <= posterior.tolerance
        return
    tolerance = max(TOLERANCE[problem.inputs.dtype], 1e-7 if cut["structure"] == "kron" else 0)
    assert float((apart / (expected + 0.01 * expected.mean())).max()) < tolerance, posterior.amplification
    variances = posterior.weight_variance().flatten()
    torch.testing.assert_close(variances, sigma.diagonal(), rtol=1e-6, atol=1e-6 * float(sigma.diagonal().max()))


@fewer
@given(problems(), cuts())
def test_draws_have_the_covariance_itself(problem, cut):
    """Draws are linear in standard normal numbers: the numbers' unit vectors give Σ without any chance."""
    posterior, tau = made(problem, cut)
    shapes = []

    def nothing(shape):
        shapes.append(shape[1:])
        return torch.zeros(shape, dtype=torch.float64)

    posterior.sigma.transform(1, nothing)
    total = sum(math.prod(s) for s in shapes)
    unit, given = torch.eye(total, dtype=torch.float64), [0]

    def units(shape):
        first = given[0]
        given[0] += math.prod(shape[1:])
        return unit[:, first : given[0]].reshape(total, *shape[1:])

    rows = posterior.sigma.transform(total, units).flatten(1)
    own = posterior.temperature * rows.T @ rows
    torch.testing.assert_close(
        own.diagonal(), posterior.weight_variance().flatten(), rtol=1e-6, atol=1e-9 * float(own.max())
    )
    if cut["structure"] != "lowrank":
        sigma, _ = dense(problem, cut, tau, cut["structure"])
        torch.testing.assert_close(own, sigma, rtol=1e-6, atol=1e-6 * float(sigma.diagonal().max()))


@fewer
@given(problems(), cuts(), st.data())
def test_what_is_saved_is_loaded_to_the_same_bits(problem, cut, data):
    several = problem.images.bincount().max() > 1
    training_draws = data.draw(st.sampled_from((None, 1, 2, 8.5))) if several else None
    posterior = made(problem, cut)[0].recut(training_draws=training_draws)
    with tempfile.TemporaryDirectory() as folder:
        posterior.save(folder)
        loaded = LaplacePosterior.load(folder)
        problem.statistics().save(f"{folder}/sums")
        again, _ = made(problem, cut, Statistics.load(f"{folder}/sums"))
    again = again.recut(training_draws=training_draws)
    for other in (loaded, again):
        assert torch.equal(other.variance(problem.inputs), posterior.variance(problem.inputs))
        draws = [p.deviations(3, torch.Generator().manual_seed(0)) for p in (other, posterior)]
        assert torch.equal(*draws)
        for name in ("mean", "spectrum", "weights", "noise_variance", "origins"):
            assert torch.equal(getattr(other, name), getattr(posterior, name)), name
        for name in ("log_likelihood", "dataset_size", "training_draws", "rank", "temperature", "amplification"):
            assert getattr(other, name) == getattr(posterior, name), name
        assert other.log_marginal_likelihood() == posterior.log_marginal_likelihood()
        assert repr(other) == repr(posterior)


@fewer
@given(problems(), cuts(), st.data())
def test_parts_are_merged_in_any_order(problem, cut, data):
    """Parts of the images, each fitted by itself, two of them saved between; and draws of the same images."""
    whole, _ = made(problem, cut)
    by_image = chunks(data.draw, int(problem.images.max()) + 1)
    parts = [torch.cat([(problem.images == i).nonzero().flatten() for i in images.tolist()]) for images in by_image]
    found = merged(problem, parts, data.draw(st.permutations(range(len(parts)))))
    assert (found.num_images, found.num_draws) == (whole.num_images, len(problem.images))
    compare(made(problem, cut, found)[0], whole, problem)
    draws = chunks(data.draw, len(problem.images))
    found = merged(problem, draws, data.draw(st.permutations(range(len(draws)))), same_images=True)
    assert (found.num_images, found.num_draws) == (whole.num_images, len(problem.images))
    compare(made(problem, cut, found)[0], whole, problem)


def merged(problem, parts, order, **kwargs):
    statistics = [problem.statistics([part]) for part in parts]
    with tempfile.TemporaryDirectory() as folder:
        statistics[0].save(folder)
        statistics[0] = Statistics.load(folder)
    out = statistics[order[0]]
    for i in order[1:]:
        out.merge(statistics[i], **kwargs)
    return out


def compare(found, expected, problem):
    one, other = (p.variance(problem.inputs.double()) for p in (found, expected))
    scale = 1e-7 * min(1e4, expected.amplification) * float(other.mean())
    torch.testing.assert_close(one, other, rtol=1e-6, atol=scale)


@fewer
@given(problems(), st.data())
def test_sketches_add_up_in_any_order(problem, data):
    by_image = chunks(data.draw, int(problem.images.max()) + 1)
    parts = [torch.cat([(problem.images == i).nonzero().flatten() for i in images.tolist()]) for images in by_image]
    whole = problem.statistics(sketch=8)
    whole.settle()
    statistics = [problem.statistics([part], sketch=data.draw(st.sampled_from((8, None)))) for part in parts]
    order = data.draw(st.permutations(range(len(parts))))
    out = statistics[order[0]]
    for i in order[1:]:
        out.merge(statistics[i])
    out.settle(8)
    assert (out.num_images, out.num_draws) == (whole.num_images, whole.num_draws)
    for name in ("means", "deviations"):
        scale = 1e-12 * float(getattr(whole._draws.sketch, name).abs().max()) + 1e-300
        torch.testing.assert_close(
            getattr(out._draws.sketch, name), getattr(whole._draws.sketch, name), rtol=1e-9, atol=scale
        )
