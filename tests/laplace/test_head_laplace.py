"""The laplace-torch face: equal to laplace-torch where that is right, and what it is where that is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from laplace import DiagLaplace, FullLaplace, KronLaplace
from laplace.baselaplace import ParametricLaplace
from laplace.curvature import BackPackGGN, CurvlinopsEF, CurvlinopsGGN
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bayesdiff.checks import ArgumentError, EmptyDataError, NonFiniteError, ShapeError, UnsupportedHeadError
from bayesdiff.laplace import HeadLaplace
from tests import references

THEIRS = {"full": FullLaplace, "diag": DiagLaplace}
#: Relative standard error of a variance over n draws is √(2/n); five of them are rare.
MC_TOLERANCE = 5.0


def problem(kind, seed=0):
    torch.manual_seed(seed)
    layer, shape = {
        "conv": (nn.Conv2d(2, 2, 3, padding=1), (2, 4, 3)),
        "conv1d": (nn.Conv1d(2, 2, 3, padding=1), (2, 6)),
        "conv3d": (nn.Conv3d(2, 2, (2, 3, 1)), (2, 3, 4, 2)),
        "linear": (nn.Linear(5, 3), (4, 5)),
        "vectors": (nn.Linear(5, 3), (5,)),
    }[kind]
    x = torch.randn(12, *shape)
    with torch.no_grad():
        y = layer(x) + 0.5 * torch.randn_like(layer(x))
    return layer, x, y


def pair(kind, structure, **settings):
    """Ours on the layer and theirs on the layer with flat outputs, fitted to the same data."""
    layer, x, y = problem(kind)
    settings = {"sigma_noise": 0.5, "prior_precision": 0.7, **settings}
    ours = HeadLaplace(layer, "regression", structure=structure, **settings)
    ours.fit(DataLoader(TensorDataset(x, y), batch_size=5))
    theirs = THEIRS[structure](nn.Sequential(layer, nn.Flatten()), "regression", **settings)
    theirs.fit(DataLoader(TensorDataset(x, y.flatten(1)), batch_size=5))
    return ours, theirs, x


@pytest.mark.parametrize("structure", THEIRS)
@pytest.mark.parametrize("kind", ["conv", "conv1d", "conv3d", "linear", "vectors"])
def test_equals_laplace_torch_where_it_is_right(kind, structure):
    ours, theirs, x = pair(kind, structure, temperature=2.0)
    assert isinstance(ours, ParametricLaplace)
    torch.testing.assert_close(ours.posterior_precision.float(), theirs.posterior_precision, rtol=1e-5, atol=1e-4)
    mean, variance = ours(x, pred_type="glm")
    their_mean, their_covariance = theirs(x, pred_type="glm")
    torch.testing.assert_close(mean.flatten(1), their_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance.flatten(1), their_covariance.diagonal(dim1=1, dim2=2), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        ours(x, pred_type="glm", diagonal_output=False)[1], their_covariance, rtol=1e-4, atol=1e-6
    )
    assert float(ours.log_marginal_likelihood()) == pytest.approx(float(theirs.log_marginal_likelihood()), rel=1e-4)
    for prior, noise in ((2.0, 0.3), (0.1, 1.5)):
        args = torch.tensor(prior), torch.tensor(noise)
        assert float(ours.log_marginal_likelihood(*args)) == pytest.approx(
            float(theirs.log_marginal_likelihood(*args)), rel=1e-4
        )
        torch.testing.assert_close(ours(x)[1].flatten(1), theirs(x)[1].diagonal(dim1=1, dim2=2), rtol=1e-5, atol=1e-7)
    value = torch.randn(ours.n_params, generator=torch.Generator().manual_seed(1))
    assert float(ours.log_prob(value)) == pytest.approx(float(theirs.log_prob(value)), rel=1e-4)


@pytest.mark.parametrize("structure", THEIRS)
def test_the_optimal_prior(structure):
    ours, theirs, _ = pair("conv", structure)
    ours.optimize_prior_precision(method="marglik")
    theirs.optimize_prior_precision(method="marglik", n_steps=500, lr=0.05)
    assert float(ours.prior_precision) == pytest.approx(
        float(theirs.prior_precision), rel=1e-2
    )  # theirs takes gradient steps
    best = float(ours.log_marginal_likelihood())
    for factor in (0.95, 1.05):
        assert float(ours.log_marginal_likelihood(ours.prior_precision.clone() * factor)) < best
        ours.optimize_prior_precision()
    prior = torch.tensor(1.0, requires_grad=True)
    ours.log_marginal_likelihood(prior).backward()  # differentiable, as theirs
    assert float(prior.grad) != 0
    for settings in ({"method": "gridsearch"}, {"prior_structure": "diag"}):
        with pytest.raises(ArgumentError):
            ours.optimize_prior_precision(**settings)


@pytest.mark.parametrize("structure", THEIRS)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_the_line_that_people_write(kind, structure):
    conv_out_la, _, feats = pair(kind, structure)
    before = {k: v.clone() for k, v in conv_out_la.model.state_dict().items()}
    mean, var = conv_out_la(feats, pred_type="nn", link_approx="mc", n_samples=100)
    assert mean.shape == var.shape == conv_out_la.model(feats).shape
    n = 4000
    generator = torch.Generator().manual_seed(0)
    mean, var = conv_out_la(feats, pred_type="nn", link_approx="mc", n_samples=n, generator=generator)
    exact_mean, exact = conv_out_la(feats, pred_type="glm")
    assert float((var / exact - 1).abs().max()) < MC_TOLERANCE * math.sqrt(2 / n)
    assert float(((mean - exact_mean).abs() / exact.sqrt()).max()) < MC_TOLERANCE / math.sqrt(n)
    draws = conv_out_la.functional_samples(feats, n_samples=n, generator=generator)
    assert float((draws.var(0) / exact - 1).abs().max()) < (MC_TOLERANCE + 1) * math.sqrt(2 / n)
    assert all(torch.equal(before[k], v) for k, v in conv_out_la.model.state_dict().items())


def test_samples_are_in_the_order_of_the_parameters():
    la, _, _ = pair("conv", "full")
    n = 20_000
    draws = la.sample(n, generator=torch.Generator().manual_seed(0))
    covariance = torch.linalg.inv(la.posterior_precision).float()
    empirical = torch.cov(draws.T)
    scale = torch.outer(covariance.diagonal(), covariance.diagonal()).sqrt()
    assert float(((empirical - covariance) / scale).abs().max()) < (MC_TOLERANCE + 1) / math.sqrt(n) * math.sqrt(2)
    torch.testing.assert_close(
        draws.mean(0), la.mean, atol=float(6 * covariance.diagonal().max().sqrt() / n**0.5), rtol=0
    )


def test_fitting_goes_on_and_files():
    layer, x, y = problem("conv")
    whole, parts, loaded = (HeadLaplace(layer, structure="full", sigma_noise=0.5) for _ in range(3))
    whole.fit(DataLoader(TensorDataset(x, y), batch_size=12))
    parts.fit(DataLoader(TensorDataset(x[:7], y[:7]), batch_size=3))
    parts.fit(DataLoader(TensorDataset(x[7:], y[7:]), batch_size=3), override=False)
    torch.testing.assert_close(whole(x)[1], parts(x)[1])
    assert float(whole.log_marginal_likelihood()) == pytest.approx(float(parts.log_marginal_likelihood()))
    loaded.load_state_dict(whole.state_dict())
    assert torch.equal(loaded(x)[1], whole(x)[1])
    assert not hasattr(layer, "output_size")
    whole.prior_precision = 50.0
    assert float((whole(x)[1] / loaded(x)[1]).max()) < 1


def test_where_laplace_torch_is_wrong():
    """Both numbers are here; when a newer laplace-torch mends one, its line fails and may go."""
    layer, x, y = problem("conv")
    flat = nn.Sequential(layer, nn.Flatten())
    loader = DataLoader(TensorDataset(x, y.flatten(1)), batch_size=len(x))
    ours = HeadLaplace(layer, structure="full", prior_precision=1e-4)
    ours.fit(DataLoader(TensorDataset(x, y), batch_size=12))
    right = ours.posterior_precision.diagonal() - 1e-4
    jacobian = references.jacobian(layer, x)  # (B, P, C, C, D)
    naive = jacobian.square().sum((0, 1, 2))
    torch.testing.assert_close(right, ours._to_flat(naive[None])[0], rtol=1e-5, atol=1e-4)
    # Kron with BackPACK over-counts a convolution's weights by the number of positions, here 4 x 3.
    kron = KronLaplace(flat, "regression", prior_precision=1e-4, backend=BackPackGGN)
    kron.fit(loader)
    theirs = kron.posterior_precision.to_matrix().diagonal()[: layer.weight.numel()] - 1e-4
    ratio = theirs / right[: layer.weight.numel()].float()
    assert float(ratio.median()) == pytest.approx(12, rel=0.35)
    # The empirical Fisher of a regression is four times the square of a gradient that is half as large: 2x in all.
    again = nn.Sequential(problem("conv")[0], nn.Flatten())  # BackPACK has changed the other for good
    fisher = DiagLaplace(again, "regression", prior_precision=1e-4, backend=CurvlinopsEF)
    fisher.fit(loader)
    residual = (y - layer(x)).detach()
    per_image = torch.einsum("bpc,bpcwd->bwd", residual.double().flatten(2).mT, jacobian)
    expected = ours._to_flat(per_image.square().sum(0)[None])[0].float()
    assert float((fisher.H / expected).median()) == pytest.approx(2, rel=0.05)


def test_what_laplace_torch_leaves_out():
    """Its Kron with Curvlinops has no block between weight and bias; in regression its GLM ignores ``link_approx``."""
    layer, x, y = problem("conv")
    flat = nn.Sequential(layer, nn.Flatten())
    kron = KronLaplace(flat, "regression", backend=CurvlinopsGGN)
    kron.fit(DataLoader(TensorDataset(x, y.flatten(1)), batch_size=len(x)))
    ours = HeadLaplace(layer)
    ours.fit([(x, y)])
    n = layer.weight.numel()
    assert float(kron.posterior_precision.to_matrix()[:n, n:].abs().max()) == 0
    assert float(ours.posterior_precision[:n, n:].abs().max()) > 1
    probit, mc = (kron(x[:2], pred_type="glm", link_approx=a) for a in ("probit", "mc"))
    assert torch.equal(probit[1], mc[1])


def test_errors():
    layer, x, y = problem("conv")
    with pytest.raises(ArgumentError, match="regression"):
        HeadLaplace(layer, "classification")
    with pytest.raises(ArgumentError, match="structure"):
        HeadLaplace(layer, structure="kron")
    with pytest.raises(UnsupportedHeadError):
        HeadLaplace(nn.ReLU())
    la = HeadLaplace(layer)
    with pytest.raises(AttributeError, match="fit"):
        la(x)
    with pytest.raises(EmptyDataError):
        la.fit([])
    with pytest.raises(ShapeError, match="targets"):
        la.fit([(x, y[:, :1])])
    with pytest.raises(NonFiniteError):
        la.fit([(x * float("nan"), y)])
    la.fit([(x, y)])
    with pytest.raises(ArgumentError, match='link_approx="mc"'):
        la(x, pred_type="nn")
    with pytest.raises(ArgumentError, match="pred_type"):
        la(x, pred_type="gp")
    with pytest.raises(ShapeError):
        la(x[:, :1])
    with pytest.raises(ArgumentError, match="at most 4096 outputs"):
        la(torch.randn(1, 2, 64, 64), diagonal_output=False)


@pytest.mark.parametrize("channels", [1, 2])
def test_one_prior_precision(channels):
    """One channel has as many weights as its Gram matrix eigenvalues, which are in another order: no evidence comes of it."""
    layer = nn.Linear(4, channels)
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    la = HeadLaplace(layer, prior_precision=0.7)
    la.fit([(x, layer(x).detach() + 0.1)])
    evidence, variance = float(la.log_marginal_likelihood()), la(x)[1]
    for several in (torch.arange(1.0, la.n_params + 1), torch.ones(2)):  # by weight; by layer, as laplace-torch counts
        with pytest.raises(ArgumentError, match=f"one prior_precision for the whole head, got {len(several)}"):
            la.log_marginal_likelihood(several)
        with pytest.raises(ArgumentError, match="one prior_precision"):
            la.prior_precision = several
        with pytest.raises(ArgumentError, match="one prior_precision"):
            HeadLaplace(layer, prior_precision=several)
    assert float(la.log_marginal_likelihood()) == evidence  # what was refused has left no trace
    for one in (0.7, torch.tensor(0.7), torch.tensor([0.7])):
        la.prior_precision = one
        assert torch.equal(la(x)[1], variance)


def test_images_of_mixed_sizes():
    """Every pixel has a Gaussian normaliser, in whatever order the sizes come."""
    torch.manual_seed(0)
    layer, sigma = nn.Conv2d(2, 3, 3, padding=1), 0.3
    batches = []
    for count, size in ((4, (5, 4)), (3, (2, 7)), (2, (6, 6))):
        x = torch.randn(count, 2, *size)
        out = layer(x).detach()
        batches.append((x, out + sigma * torch.randn_like(out)))
    noise = torch.distributions.Normal(0.0, sigma)
    expected = sum(float(noise.log_prob((y - layer(x)).detach().double()).sum()) for x, y in batches)
    evidence = []
    for order in (batches, batches[::-1]):
        whole, parts, loaded = (HeadLaplace(layer, sigma_noise=sigma) for _ in range(3))
        whole.fit(order)
        parts.fit(order[:2])
        parts.fit(order[2:], override=False)
        loaded.load_state_dict(whole.state_dict())
        for la in (whole, parts, loaded):
            assert float(la.log_likelihood) == pytest.approx(expected, rel=1e-5)
            evidence.append(float(la.log_marginal_likelihood()))
    assert evidence == pytest.approx([evidence[0]] * 6, rel=1e-6)
    whole.fit(batches[:1])
    assert whole.n_outputs == 3 * 5 * 4
    assert isinstance(whole.n_outputs, int)


@pytest.mark.parametrize(
    "argument",
    [
        {"backend": BackPackGGN},
        {"backend_kwargs": {"stochastic": True}},
        {"asdl_fisher_kwargs": {}},
        {"enable_backprop": True},
        {"dict_key_x": "features"},
    ],
    ids=lambda a: next(iter(a)),
)
def test_what_would_be_ignored_is_refused(argument):
    layer, _, _ = problem("conv")
    with pytest.raises(ArgumentError, match=f"got {next(iter(argument))}: .* leave them out"):
        HeadLaplace(layer, sigma_noise=0.5, **argument)
    HeadLaplace(layer, backend=None, enable_backprop=False, temperature=2.0)
