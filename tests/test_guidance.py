"""Guidance weights solved for from what a pipeline did, and the variance of what is guided."""

from __future__ import annotations

import math
import re

import pytest
import torch

from bayesdiff.checks import NonFiniteError, UnsupportedPipelineError
from bayesdiff.curvature import Statistics
from bayesdiff.guidance import branch_weights, combine
from bayesdiff.head import Head, HeadGeometry
from bayesdiff.posterior import LaplacePosterior
from tests import cases

#: Relative error of a Monte Carlo variance of n draws is √(2/n); five of them is a rare event.
MC_TOLERANCE = 5.0


def outputs(count=2, dtype=torch.float32, apart=0.2):
    """Branch outputs that differ by ``apart`` of their size, as those of a trained network do."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 3, 8, 8, generator=generator)
    rest = [base + apart * torch.randn(base.shape, generator=generator) for _ in range(count - 1)]
    return [f.to(dtype) for f in (base, *rest)]


def rounding(branches, s, dtype):
    """How far off a weight may be: rounding of s d and of g, averaged over all elements, in units of d = f_c − f_u."""
    difference = (branches[-1] - branches[0]).double().square().mean().sqrt()
    size = abs(s) + branches[0].double().square().mean().sqrt() / difference
    return 2 * torch.finfo(dtype).eps * float(size) / math.sqrt(branches[0].numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("s", [0, 1, 1.5, 3, 7.5, 15])
def test_classifier_free_guidance(s, dtype):
    """As a pipeline does it: in the network's own dtype."""
    branches = outputs(dtype=dtype)
    uncond, cond = branches
    weights = branch_weights(branches, uncond + s * (cond - uncond))
    assert weights.dtype == torch.float64
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert weights.tolist() == pytest.approx([1 - s, s], rel=0, abs=rounding(branches, s, dtype))


def test_the_pipeline_may_combine_in_float32():
    branches = outputs(dtype=torch.bfloat16)
    uncond, cond = (f.float() for f in branches)
    weights = branch_weights(branches, uncond + 7.5 * (cond - uncond))
    assert weights.tolist() == pytest.approx([-6.5, 7.5], rel=0, abs=1e-5)


def test_one_branch():
    (only,) = outputs(1)
    assert branch_weights([only], only).tolist() == [1]
    with pytest.raises(UnsupportedPipelineError, match=r"of the 1 network output\(s\)"):
        branch_weights([only], 1.01 * only)


def test_three_branches():
    """InstructPix2Pix: one scale for the text, one for the image."""
    uncond, image, text = branches = outputs(3)
    weights = branch_weights(branches, uncond + 7.5 * (text - image) + 1.5 * (image - uncond))
    assert weights.tolist() == pytest.approx([1 - 1.5, 1.5 - 7.5, 7.5], rel=0, abs=1e-5)


def test_identical_branches_need_no_weights_of_their_own():
    uncond, cond = outputs()
    assert branch_weights([uncond, uncond.clone()], uncond).tolist() == [1, 0]
    same = [uncond, cond, cond.clone()]
    weights = branch_weights(same, uncond + 3 * (cond - uncond))
    assert weights.tolist() == pytest.approx([-2, 1.5, 1.5], abs=1e-5)
    with pytest.raises(UnsupportedPipelineError, match="residual"):
        branch_weights([uncond, uncond.clone()], 2 * uncond)


def rescaled(g, cond, amount=0.7):
    """Guidance rescale (Lin et al. 2023): towards the standard deviation of the conditional branch."""
    dims = tuple(range(1, g.ndim))
    factor = cond.std(dims, keepdim=True) / g.std(dims, keepdim=True)
    return amount * factor * g + (1 - amount) * g


BENDS = {
    "rescaled": rescaled,
    "clipped": lambda g, _: g.clamp(-1, 1),
    "squared": lambda g, _: g.square(),
    "weights-not-of-sum-1": lambda g, _: 1.02 * g,
    "scale-by-sample": lambda g, cond: g + torch.tensor([0.0, 0.05]).view(2, 1, 1, 1) * cond,
    "one-pixel": lambda g, _: torch.where(torch.arange(g.numel()).view_as(g) == 7, g + 0.01, g),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", BENDS)
def test_what_is_not_linear_is_refused_with_its_residual(name, dtype):
    uncond, cond = branches = outputs(dtype=dtype)
    g = uncond + 7.5 * (cond - uncond)
    with pytest.raises(UnsupportedPipelineError, match="nonlinear guidance cannot be followed") as raised:
        branch_weights(branches, BENDS[name](g, cond).to(dtype))
    found = re.search(r"residual of (\S+) \(allowed: (\S+)\)", str(raised.value))
    assert float(found[1]) > float(found[2]) > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_outputs_must_be_finite(bad, where):
    uncond, cond = outputs()
    tensors = [uncond, cond, uncond + 3 * (cond - uncond)]
    tensors[where][1, 0, 3, 3] = bad
    with pytest.raises(NonFiniteError, match=r"network outputs.*bfloat16 or float32"):
        branch_weights(tensors[:2], tensors[2])


def test_combine():
    weights = torch.tensor([-6.5, 7.5], dtype=torch.float64)
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        uncond, cond = outputs(dtype=dtype)
        got = combine(weights, [uncond, cond])
        assert got.dtype == kept
        expected = -6.5 * uncond.double() + 7.5 * cond.double()
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e3 * torch.finfo(kept).eps)


def guided(covariance):
    """A posterior, and the features of two branches that are mostly alike."""
    case = cases.layer_cases()[0]
    geometry = HeadGeometry.of(case.layer)
    n = len(case.inputs)
    sums = Statistics(geometry, 1)
    sums.update(case.inputs, case.residuals, torch.zeros(n, dtype=torch.long), torch.arange(n))
    posterior = LaplacePosterior.from_statistics(sums, Head("head", case.layer, geometry), covariance=covariance)
    other = torch.randn(case.inputs[:2].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    uncond = case.inputs[:2].double()
    return posterior, uncond, uncond + 0.1 * other


@pytest.mark.parametrize("covariance", ["ggn", "sandwich"])
@pytest.mark.parametrize("s", [1, 3, 7.5])
def test_the_variance_of_what_is_guided(s, covariance):
    """ψᵀΣψ is what weight draws give; branches taken as independent give many times as much."""
    posterior, uncond, cond = guided(covariance)
    n = 4000
    draws = posterior.sample(n, torch.Generator().manual_seed(0))
    f_u, f_c = (posterior.geometry.apply(phi, draws) for phi in (uncond, cond))
    g = f_u + s * (f_c - f_u)
    weights = branch_weights([f_u[0], f_c[0]], g[0])
    variance = posterior.variance(combine(weights, [uncond, cond]))
    tolerance = MC_TOLERANCE * math.sqrt(2 / n)
    assert float((g.var(0) / variance - 1).abs().max()) < tolerance
    independent = (1 - s) ** 2 * posterior.variance(uncond) + s**2 * posterior.variance(cond)
    ratio = independent / variance
    if s == 1:
        torch.testing.assert_close(ratio, torch.ones_like(ratio))
    else:
        assert float(ratio.mean()) > 5


def test_guided_features_give_the_guided_output():
    """The constant feature keeps its 1, as the weights sum to 1."""
    posterior, uncond, cond = guided("ggn")
    f_u, f_c = (posterior.predict(phi).mean for phi in (uncond, cond))
    weights = branch_weights([f_u, f_c], f_u + 7.5 * (f_c - f_u))
    together = posterior.predict(combine(weights, [uncond, cond])).mean
    torch.testing.assert_close(together, f_u + 7.5 * (f_c - f_u), rtol=0, atol=1e-10)
