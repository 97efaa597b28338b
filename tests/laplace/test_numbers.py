"""Numbers that are large, collinear, of other types, in graphs or in inference mode: right, or a typed error at once."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from bayesdiff.checks import ArgumentError, NonFiniteError
from bayesdiff.head.find import Head
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.laplace import HeadLaplace
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics
from tests.ids import named

N = 400


def layer():
    generator = torch.Generator().manual_seed(3)
    out = nn.Linear(8, 1)
    with torch.no_grad():
        for parameter in out.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return out


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def collinear():
    """Eight features around 10,000 that differ by hundredths."""
    return (1e4 + normal(N, 1) + 1e-2 * normal(N, 8, seed=1)).float(), normal(N, 1, seed=2).float()


def statistics(x, y, head=None):
    out = Statistics(HeadGeometry.of(head or layer()), 1)
    out.update(x, y, torch.zeros(len(x), dtype=torch.long), torch.arange(len(x)))
    return out


def cut(sums, **kwargs):
    head = layer()
    return LaplacePosterior.from_statistics(sums, Head("head", head, sums.geometry), **kwargs)


@pytest.mark.parametrize("covariance", ["sandwich", "ggn", "ef"])
@pytest.mark.parametrize("structure", ["full", "kron", "diag", "lowrank"])
def test_collinear_features_far_from_zero(structure, covariance):
    """5 % off where they were summed or predicted with in float32."""
    x, y = collinear()
    single, double = (
        cut(statistics(*pair), structure=structure, covariance=covariance, prior_precision=1e-6)
        for pair in ((x, y), (x.double(), y.double()))
    )
    found, exact = single.variance(x), double.variance(x.double())
    assert found.dtype == torch.float32
    assert float((found / exact - 1).abs().max()) < 1e-6
    predicted = single.predict(x)
    torch.testing.assert_close(predicted.variance.double(), exact, rtol=1e-5, atol=0)
    draws = single.predict(x, "mc", 2000, generator=torch.Generator().manual_seed(0))
    assert abs(float((draws.variance / exact).mean()) - 1) < 0.2


def test_collinear_features_in_head_laplace():
    x, y = collinear()
    la = HeadLaplace(layer(), prior_precision=1e-6)
    la.fit([(x, y)])
    single, double = la(x)[1], la(x.double())[1]
    assert float((single / double - 1).abs().max()) < 1e-6
    phi = torch.cat([x.double(), torch.ones(N, 1).double()], dim=1)
    prior = float(la.prior_precision.double())
    root = torch.linalg.qr(
        torch.cat([phi, prior**0.5 * torch.eye(9).double()])
    ).R  # half the digits of the Gram matrix are lost
    exact = torch.linalg.solve_triangular(root.T, phi.T, upper=False).square().sum(0)[:, None]
    torch.testing.assert_close(double, exact, rtol=1e-2, atol=0)
    la.prior_precision = 1e-6  # and what follows from it is made anew
    assert torch.equal(la(x)[1], single)


def test_large_features():
    head = layer()
    big = (normal(50, 8) * 1e20).float()
    la = HeadLaplace(head)
    la.fit([(big, head(big).detach())])
    # Without a prior to speak of: the hat matrix, whose trace is the number of weights that the data tell.
    assert abs(float(la(big)[1].sum()) - 8) < 1.01
    sums = statistics(big, normal(50, 1))
    assert bool(torch.isfinite(cut(sums).variance(big)).all())
    with pytest.raises(NonFiniteError, match="too large"):
        la.fit([(big.double() * 1e160, head(big).detach().double())])
    with pytest.raises(NonFiniteError):
        cut(statistics(big.double() * 1e160, normal(50, 1)))


@pytest.mark.parametrize(
    "settings",
    [
        {"sigma_noise": 0.0}, {"sigma_noise": float("nan")}, {"sigma_noise": -1.0}, {"sigma_noise": torch.tensor(0.0)},
        {"prior_precision": -1}, {"prior_precision": float("nan")}, {"prior_precision": float("inf")}, {"temperature": 0},
        {"temperature": float("nan")}, {"prior_mean": float("nan")},
    ],
    ids=named,
)  # fmt: skip
def test_head_laplace_refuses_bad_numbers(settings):
    with pytest.raises(ArgumentError, match="finite"):
        HeadLaplace(layer(), **settings)
    la = HeadLaplace(layer())
    with pytest.raises(ArgumentError, match="finite"):
        setattr(la, *next(iter(settings.items())))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_features_that_carry_a_graph(kind):
    before = nn.Linear(8, 8) if kind == "linear" else nn.Conv2d(3, 8, 3, padding=1)
    head = nn.Linear(8, 1) if kind == "linear" else nn.Conv2d(8, 1, 3, padding=1)
    x = before(torch.randn(9, 8) if kind == "linear" else torch.randn(2, 3, 6, 6))
    assert x.requires_grad
    la = HeadLaplace(head)
    la.fit([(x, torch.zeros_like(head(x)))])
    mean, variance = la(x)
    assert not any(v.requires_grad for v in (la.H, mean, variance))
    sums = Statistics(HeadGeometry.of(head), 1)
    sums.update(x, head(x) + 1, torch.zeros(len(x), dtype=torch.long), torch.arange(len(x)))
    posterior = LaplacePosterior.from_statistics(sums, Head("head", head, sums.geometry))
    assert not posterior.variance(x).requires_grad
    assert not sums.gram.requires_grad
    again = pickle.loads(pickle.dumps(la))
    assert torch.equal(again(x)[1], variance)


def test_inference_mode():
    x, y = normal(40, 8), normal(40, 1)
    with torch.inference_mode():
        inside = statistics(normal(40, 8, seed=5), normal(40, 1, seed=6))
    outside = statistics(x, y)
    outside.merge(inside)
    inside.update(x, y, torch.zeros(40, dtype=torch.long), torch.arange(40))
    assert outside.num_images == 80
    assert inside.num_draws == 80
    assert not inside.gram.is_inference()
    torch.testing.assert_close(inside.gram, outside.gram)


def test_autocast_does_not_reach_the_sums():
    x, y = normal(40, 8).float(), normal(40, 1).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = statistics(x, y)
        found = cut(inside, covariance="ggn").variance(x)
    assert torch.equal(inside.gram, statistics(x, y).gram)
    assert torch.equal(found, cut(statistics(x, y), covariance="ggn").variance(x))


@pytest.mark.parametrize(
    "settings",
    [
        {"dataset_size": np.int64(60_000)}, {"temperature": np.float32(0.5)},
        {"tolerance": np.float32(0.25), "structure": "lowrank"},
        {"rank": np.int64(2), "structure": "lowrank"}, {"prior_precision": np.float64(3)}, {"prior_precision": np.array([2.0])},
        {"prior_precision": torch.tensor(2.0)}, {"training_draws": np.float32(1)}, {"num_timesteps": np.int32(1000)},
        {"noise_variance": np.float32(0.5)}, {"loss_weights": np.ones(1)}, {"prior_precision": torch.ones(1, requires_grad=True)},
    ],
    ids=named,
)  # fmt: skip
def test_numbers_of_other_types_are_kept_as_plain_ones(settings, tmp_path):
    x, y = normal(40, 8).float(), normal(40, 1).float()
    plain = {k: v.tolist() if isinstance(v, np.ndarray | np.generic | torch.Tensor) else v for k, v in settings.items()}
    fitted, expected = cut(statistics(x, y), **settings), cut(statistics(x, y), **plain)
    fitted.save(tmp_path)
    loaded, sent = LaplacePosterior.load(tmp_path), pickle.loads(pickle.dumps(fitted))
    for other in (expected, loaded, sent):
        assert torch.equal(other.variance(x), fitted.variance(x))
        found, wanted = (p.deviations(3, torch.Generator().manual_seed(0)) for p in (other, fitted))
        assert torch.equal(found, wanted)
    assert sent.recut(structure="diag").structure == "diag"


@pytest.mark.parametrize(
    "settings",
    [
        {"prior_precision": "x"}, {"prior_precision": object()}, {"prior_precision": float("nan")},
        {"noise_variance": float("nan")}, {"noise_variance": [0.0]}, {"temperature": "2"}, {"temperature": True},
        {"loss_weights": None}, {"structure": ["full"]},
        {"rank": 1.5, "structure": "lowrank"}, {"num_timesteps": "1000"}, {"tolerance": float("nan")}, {"dataset_size": 1e9},
    ],
    ids=named,
)  # fmt: skip
def test_bad_settings_are_typed_errors(settings, tmp_path):
    with pytest.raises(ArgumentError):
        cut(statistics(normal(40, 8), normal(40, 1)), **settings)
    assert not os.listdir(tmp_path)


def test_bins_that_are_not_there():
    sums = Statistics(HeadGeometry.of(layer()), 2)
    with pytest.raises(ArgumentError, match="bins from 0 to 1"):
        sums.update(normal(1, 8), normal(1, 1), torch.tensor([2]), torch.tensor([0]))


def test_repr_is_one_line():
    fitted = cut(statistics(normal(40, 8), normal(40, 1)))
    for text in (repr(fitted), repr(fitted.sigma), f"{fitted}"):
        assert "\n" not in text
        assert len(text) < 250
