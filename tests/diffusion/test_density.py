"""Densities of t: their distribution functions, their seeds, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from bayesdiff.checks import ArgumentError, ShapeError
from bayesdiff.diffusion.density import LogitNormal, TruncatedNormal, as_density, sample
from bayesdiff.diffusion.noising import draw
from tests import cases
from tests.ids import named

VP, FLOW = cases.scheduler(), FlowMatchEulerDiscreteScheduler()
#: The Kolmogorov–Smirnov distance of n draws exceeds 1.95/√n once in a thousand.
KS = 1.95


def distance(draws, cdf):
    ordered = draws.sort().values
    return float((cdf(ordered) - torch.arange(1, len(ordered) + 1) / len(ordered)).abs().max())


def normal_cdf(x):
    return torch.special.ndtr(x)


@pytest.mark.parametrize(
    ("density", "cdf"),
    [
        (LogitNormal(), lambda u: normal_cdf(torch.logit(u))),
        (LogitNormal(1.0, 0.5), lambda u: normal_cdf((torch.logit(u) - 1) / 0.5)),
        (
            TruncatedNormal(),
            lambda u: (
                (normal_cdf((u - 0.5) / 0.2) - normal_cdf(torch.tensor(-2.5)))
                / (normal_cdf(torch.tensor(2.5)) - normal_cdf(torch.tensor(-2.5)))
            ),
        ),
        (TruncatedNormal(0.0, 1.0), lambda u: (normal_cdf(u) - 0.5) / (normal_cdf(torch.tensor(1.0)) - 0.5)),
    ],
    ids=named,
)
def test_distribution(density, cdf):
    n = 20_000
    draws = density(torch.Generator().manual_seed(0), n)
    assert draws.shape == (n,)
    assert float(draws.min()) >= 0
    assert float(draws.max()) <= 1
    assert distance(draws, cdf) < KS / n**0.5


def test_a_shift_moves_the_mean_of_the_logit():
    u = LogitNormal()(torch.Generator().manual_seed(0), 1000)
    moved = LogitNormal(torch.tensor(3.0).log().item())(torch.Generator().manual_seed(0), 1000)
    torch.testing.assert_close(moved, 3 * u / (1 + 2 * u))


def test_timesteps_of_a_density():
    density = LogitNormal()
    t, noise = draw(VP, (1, 2, 2), 5, 0, 3000, 1, density)
    assert t.dtype == torch.int64
    assert 0 <= int(t.min()) <= int(t.max()) <= 999
    assert distance((t + 0.5) / 1000, lambda u: normal_cdf(torch.logit(u))) < KS / 3000**0.5 + 1e-3
    flow, same = draw(FLOW, (1, 2, 2), 5, 0, 3000, 1, density)
    assert flow.dtype == torch.float64
    assert torch.equal((flow).long(), t)
    assert torch.equal(noise, same)
    # Draws are those of image and draw, however they are cut into batches.
    later, noise_later = draw(VP, (1, 2, 2), 5, 100, 7, 1, density)
    assert torch.equal(later, t[100:107])
    assert torch.equal(noise_later, noise[100:107])
    assert torch.equal(draw(VP, (1, 2, 2), 5, 0, 9, 2)[0], draw(VP, (1, 2, 2), 5, 0, 9, 2, as_density("uniform"))[0])


def test_a_density_of_ones_own():
    def late(generator, n):
        return 0.9 + 0.1 * torch.rand(n, generator=generator)

    t, _ = draw(FLOW, (1,), 0, 0, 50, 2, as_density(late))
    assert float(t.min()) >= 900
    assert draw(VP, (1,), 0, 0, 1, 1, lambda g, n: torch.ones(n))[0].item() == 999


def test_what_is_refused():
    g = torch.Generator()
    for bad in ("cosine", 3, None):
        with pytest.raises(ArgumentError, match="timestep_density"):
            as_density(bad)
    for value, error in (
        (torch.ones(2), ShapeError),
        (torch.tensor(0.5), ShapeError),
        (torch.tensor([1.5]), ArgumentError),
    ):
        with pytest.raises(error, match="timestep_density"):
            sample(lambda generator, n, v=value: v, g)
    for make in (
        lambda: LogitNormal(0, 0), lambda: LogitNormal(float("nan")), lambda: TruncatedNormal(0.5, -1),
        lambda: TruncatedNormal(9.0, 0.1),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=r"mean|std"):
            make()
