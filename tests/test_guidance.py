"""Guidance weights solved for from what a pipeline did, and the variance of what is guided."""

from __future__ import annotations

import math
import re

import pytest
import torch
from bayesdiff.guidance import Guidance, solve

from bayesdiff.checks import NonFiniteError, UnsupportedPipelineError
from bayesdiff.head.find import Head
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics
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


def column(values, like):
    return torch.as_tensor(values).to(like).view(-1, 1, 1, 1)


def both(first, *rest):
    """The weights (M, B) of two samples that share them."""
    return torch.tensor([[w, w] for w in (first, *rest)], dtype=torch.float64)


def close(weights, expected, tolerance):
    assert weights.dtype == torch.float64
    assert weights.device.type == "cpu"
    torch.testing.assert_close(weights.sum(0), torch.ones(weights.shape[1]).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("s", [0, 1, 1.5, 3, 7.5, 15])
def test_classifier_free_guidance(s, dtype):
    """As a pipeline does it: in the network's own dtype."""
    branches = outputs(dtype=dtype)
    uncond, cond = branches
    guidance = solve(branches, uncond + s * (cond - uncond))
    assert guidance.amount is None
    close(guidance.weights, both(1 - s, s), rounding(branches, s, dtype))


def test_every_sample_has_a_scale_of_its_own():
    uncond, cond = branches = outputs()
    scales = [0.0, 9.5]
    guidance = solve(branches, uncond + column(scales, uncond) * (cond - uncond))
    close(guidance.weights, torch.tensor([[1.0, -8.5], scales], dtype=torch.float64), 1e-6)


def test_the_pipeline_may_combine_in_float32():
    branches = outputs(dtype=torch.bfloat16)
    uncond, cond = (f.float() for f in branches)
    close(solve(branches, uncond + 7.5 * (cond - uncond)).weights, both(-6.5, 7.5), 1e-5)


def test_one_branch():
    (only,) = outputs(1)
    assert solve([only], only).weights.tolist() == [[1, 1]]
    with pytest.raises(UnsupportedPipelineError, match=r"of the 1 network output\(s\)"):
        solve([only], 1.01 * only)


def test_three_branches():
    """InstructPix2Pix: one scale for the text, one for the image."""
    uncond, image, text = branches = outputs(3)
    guidance = solve(branches, uncond + 7.5 * (text - image) + 1.5 * (image - uncond))
    close(guidance.weights, both(1 - 1.5, 1.5 - 7.5, 7.5), 1e-5)


def test_identical_branches_need_no_weights_of_their_own():
    uncond, cond = outputs()
    assert solve([uncond, uncond.clone()], uncond).weights.tolist() == [[1, 1], [0, 0]]
    same = [uncond, cond, cond.clone()]
    close(solve(same, uncond + 3 * (cond - uncond)).weights, both(-2, 1.5, 1.5), 1e-5)
    with pytest.raises(UnsupportedPipelineError, match="residual"):
        solve([uncond, uncond.clone()], 2 * uncond)


def rescaled(g, cond, amount=0.7):
    """Guidance rescale (Lin et al. 2023): towards the standard deviation of the conditional branch."""
    dims = tuple(range(1, g.ndim))
    factor = cond.std(dims, keepdim=True) / g.std(dims, keepdim=True)
    return amount * factor * g + (1 - amount) * g


#: φ is the quotient of two small differences: it has more rounding than a scale.
AMOUNT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.15}
#: dtype, conditional branch, s, φ. In bfloat16 the branch that rescaled cannot be told from the other.
RESCALED = [
    *(
        (d, c, s, a)
        for d in (torch.float32, torch.float64)
        for c in (1, 0)
        for s in (1.5, 3, 7.5)
        for a in (0.3, 0.7, 1.0)
    ),
    *((torch.bfloat16, 1, s, a) for s, a in ((3, 0.7), (7.5, 0.7), (3, 1.0), (7.5, 1.0), (7.5, 0.3), (1.5, 1.0))),
]


@pytest.mark.parametrize(("dtype", "conditional", "s", "amount"), RESCALED, ids=str)
def test_rescaled_guidance(dtype, conditional, s, amount):
    uncond, cond = outputs(dtype=dtype, apart=1.0)
    branches = [uncond, cond] if conditional else [cond, uncond]
    g = uncond + s * (cond - uncond)
    output = rescaled(g, cond, amount)
    guidance = solve(branches, output)
    assert guidance.conditional == conditional
    assert guidance.amount.dtype == torch.float64
    apart = float((cond.double().std((1, 2, 3)) / g.double().std((1, 2, 3)) - 1).abs().min())
    expected = torch.full((2,), amount, dtype=torch.float64)
    torch.testing.assert_close(guidance.amount, expected, rtol=0, atol=AMOUNT_TOLERANCE[dtype] / apart)
    close(guidance.weights, both(1 - s, s) if conditional else both(s, 1 - s), 32 * torch.finfo(dtype).eps * s)
    again = guidance(branches)
    assert again.dtype == torch.promote_types(dtype, torch.float32)
    size = s * float(cond.double().abs().max())
    torch.testing.assert_close(again.double(), output.double(), rtol=0, atol=16 * torch.finfo(dtype).eps * size)


def test_a_call_is_what_the_scheduler_was_given():
    uncond, cond = branches = outputs(dtype=torch.float64)
    g = uncond + 7.5 * (cond - uncond)
    guidance = solve(branches, g)
    torch.testing.assert_close(guidance(branches), g, rtol=0, atol=1e-12)
    # Of other outputs, too: it is the function, not the number.
    moved = [torch.sin(f) for f in branches]
    torch.testing.assert_close(guidance(moved), moved[0] + 7.5 * (moved[1] - moved[0]), rtol=0, atol=1e-12)
    guidance = solve(branches, rescaled(g, cond))
    torch.testing.assert_close(
        guidance(moved), rescaled(moved[0] + 7.5 * (moved[1] - moved[0]), moved[1]), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("amount", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("conditional", [1, 0])
def test_deviations_obey_the_derivative(conditional, amount):
    uncond, cond = outputs(dtype=torch.float64)
    branches = [uncond, cond] if conditional else [cond, uncond]
    g = uncond + 3 * (cond - uncond)
    guidance = solve(branches, rescaled(g, cond, amount) if amount else g)
    assert (guidance.amount is None) == (amount == 0)
    generator = torch.Generator().manual_seed(1)
    deviations = [torch.randn(5, *f.shape, generator=generator, dtype=torch.float64) for f in branches]
    d_guided = torch.stack([guidance.combine(d) for d in zip(*deviations, strict=True)])
    pushed = guidance.push(branches, d_guided, deviations[conditional])
    h = 1e-5
    for k, got in enumerate(pushed):
        up, down = (
            guidance([f + sign * h * d[k] for f, d in zip(branches, deviations, strict=True)]) for sign in (1, -1)
        )
        torch.testing.assert_close(got, (up - down) / (2 * h), rtol=0, atol=1e-8)
    # The linear map alone is not the derivative of what is rescaled: the test can fail.
    assert torch.equal(pushed, d_guided) == (amount == 0)


BENDS = {
    "clipped": lambda g, _: g.clamp(-1, 1),
    "squared": lambda g, _: g.square(),
    "slightly-squared": lambda g, _: g + 0.1 * g.square(),
    "weights-not-of-sum-1": lambda g, _: 1.02 * g,
    "less-by-a-tenth": lambda g, _: 0.9 * g,
    "more-by-a-third": lambda g, _: 1.3 * g,
    "negative": lambda g, _: -g,
    "scale-by-sample": lambda g, cond: g + torch.tensor([0.0, 0.05]).view(2, 1, 1, 1) * cond,
    "one-pixel": lambda g, _: torch.where(torch.arange(g.numel()).view_as(g) == 7, g + 0.01, g),
    "rescaled-by-other-amounts": lambda g, cond: torch.cat(
        [rescaled(g, cond, a)[i : i + 1] for i, a in ((0, 0.3), (1, 0.7))]
    ),
    "rescaled-too-far": lambda g, cond: rescaled(g, cond, 1.5),
    "rescaled-by-maximum": lambda g, cond: g * cond.abs().amax((1, 2, 3), True) / g.abs().amax((1, 2, 3), True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", BENDS)
def test_what_is_not_linear_is_refused_with_its_residual(name, dtype):
    uncond, cond = branches = outputs(dtype=dtype)
    g = uncond + 7.5 * (cond - uncond)
    with pytest.raises(UnsupportedPipelineError, match="nonlinear guidance cannot be followed") as raised:
        solve(branches, BENDS[name](g, cond).to(dtype))
    found = re.search(r"residual of (\S+) \(allowed: (\S+)\)", str(raised.value))
    assert float(found[1]) > float(found[2]) > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_outputs_must_be_finite(bad, where):
    uncond, cond = outputs()
    tensors = [uncond, cond, uncond + 3 * (cond - uncond)]
    tensors[where][1, 0, 3, 3] = bad
    with pytest.raises(NonFiniteError, match=r"network outputs.*bfloat16 or float32"):
        solve(tensors[:2], tensors[2])


@pytest.mark.parametrize("amount", [0.0, 0.7])
def test_a_sample_does_not_depend_on_its_batch(amount):
    """To the last bit: weights, amount, outputs, combinations and deviations."""
    generator = torch.Generator().manual_seed(0)
    uncond = torch.randn(8, 3, 8, 8, generator=generator)
    cond = uncond + 0.3 * torch.randn(uncond.shape, generator=generator)
    g = uncond + column([0, 1, 1.5, 3, 4, 5, 7.5, 15] if not amount else [3.0] * 8, uncond) * (cond - uncond)
    output = rescaled(g, cond, amount) if amount else g
    d_guided, d_cond = torch.randn(2, 4, *uncond.shape, generator=generator, dtype=torch.float64)
    together = solve([uncond, cond], output)
    for b in range(8):
        one = slice(b, b + 1)
        branches = [uncond[one], cond[one]]
        alone = solve(branches, output[one])
        assert torch.equal(alone.weights, together.weights[:, one])
        assert torch.equal(alone([*branches]), together([uncond, cond])[one])
        assert torch.equal(alone.combine(branches), together.combine([uncond, cond])[one])
        got = alone.push(branches, d_guided[:, one], d_cond[:, one])
        assert torch.equal(got, together.push([uncond, cond], d_guided, d_cond)[:, one])
        assert (alone.amount is None) == (not amount)
        if amount:
            assert torch.equal(alone.amount, together.amount[one])


def test_combine():
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        uncond, cond = outputs(dtype=dtype)
        got = Guidance(both(-6.5, 7.5)).combine([uncond, cond])
        assert got.dtype == kept
        expected = -6.5 * uncond.double() + 7.5 * cond.double()
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e3 * torch.finfo(kept).eps)
    with pytest.raises(ValueError, match="zip"):
        Guidance(both(1)).combine([uncond, cond])


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
@pytest.mark.parametrize("s", [1, 3, 7.5, 15])
def test_the_variance_of_what_is_guided(s, covariance):
    """ψᵀΣψ is what weight draws give; branches taken as independent give many times as much."""
    posterior, uncond, cond = guided(covariance)
    n = 4000
    draws = posterior.sample(n, torch.Generator().manual_seed(0))
    f_u, f_c = (posterior.geometry.apply(phi, draws) for phi in (uncond, cond))
    g = f_u + s * (f_c - f_u)
    guidance = solve([f_u[0], f_c[0]], g[0])
    variance = posterior.variance(guidance.combine([uncond, cond]))
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
    guidance = solve([f_u, f_c], f_u + 7.5 * (f_c - f_u))
    together = posterior.predict(guidance.combine([uncond, cond])).mean
    torch.testing.assert_close(together, f_u + 7.5 * (f_c - f_u), rtol=0, atol=1e-10)
