"""Losses other than squares, and weights of each draw: M-estimators, against loops and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bayesdiff.checks import ArgumentError, ShapeError
from bayesdiff.head.find import Head
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.laplace.loss import L1, LOSSES, Huber, PseudoHuber, Squares, as_loss, from_dict, to_dict
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics
from tests import cases, references

BINS = 3
CASES = [
    c for c in cases.layer_cases() if c.name in ("conv3x3", "conv3x3-one-channel", "linear-tokens", "linear-vector")
]
RHO = {
    Squares(): lambda r: r.square() / 2,
    Huber(0.7): lambda r: torch.nn.functional.huber_loss(r, torch.zeros_like(r), delta=0.7, reduction="none"),
    PseudoHuber(0.7): lambda r: 0.49 * ((1 + (r / 0.7).square()).sqrt() - 1),
    L1(0.4): lambda r: r.abs(),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layout(case):
    n = len(case.inputs)
    return torch.arange(n) % BINS, torch.arange(n) // 2


def statistics(case, loss, weights=None):
    bins, images = layout(case)
    out = Statistics(HeadGeometry.of(case.layer), BINS, loss=loss, weighted=weights is not None)
    for part in torch.arange(len(case.inputs)).split(5):
        w = None if weights is None else weights[part]
        out.update(case.inputs[part].double(), case.residuals[part].double(), bins[part], images[part], weights=w)
    return out


def posterior(case, loss, weights=None, **settings):
    head = Head("head", case.layer, HeadGeometry.of(case.layer))
    return LaplacePosterior.from_statistics(
        statistics(case, loss, weights), head, **{"prior_precision": 0.7, **settings}
    )


@pytest.mark.parametrize("loss", RHO, ids=str)
def test_scores_and_curvatures_are_derivatives(loss):
    r = torch.randn(5, 40, generator=generator(), dtype=torch.float64, requires_grad=True)
    (psi,) = torch.autograd.grad(RHO[loss](r).sum(), r, create_graph=True)
    torch.testing.assert_close(loss.score(r.detach()), psi.detach())
    curvature = loss.curvature(r.detach())
    if isinstance(loss, L1):
        torch.testing.assert_close(curvature, (r.detach().abs() < 0.4).double() / 0.4)
    elif isinstance(loss, Squares):
        assert curvature is None
    else:
        torch.testing.assert_close(curvature, torch.autograd.grad(psi.sum(), r)[0])


def dense(case, loss, weights, fitted, size):
    """The sandwich of all C·D weights: curvature and scores one position at a time."""
    bins, images = layout(case)
    jac = references.jacobian(case.layer, case.inputs)
    _, c, d = len(case.inputs), *fitted.mean.shape
    channel = -1 if isinstance(case.layer, nn.Linear) else 1
    r = case.residuals.double().movedim(channel, -1)
    r = r.flatten(1, -2) if r.ndim > 2 else r[:, None]  # (B, P, C)
    slope = loss.curvature(r)
    slope = torch.ones_like(r) if slope is None else slope
    w = weights * fitted.weights[bins]
    # Over the channels: the mean pattern, and each channel's size, by bin.
    size_of = torch.stack([(slope * weights[:, None, None])[bins == b].sum((0, 1)) for b in range(BINS)])  # (T, C)
    factor = size_of / size_of.mean(1, keepdim=True)
    h = torch.zeros(c * d, c * d, dtype=torch.float64)
    scores = {}
    for b in range(len(case.inputs)):
        for p in range(jac.shape[1]):
            j = jac[b, p].flatten(1)
            h += w[b] * slope[b, p].mean() * j.T @ (factor[bins[b]][:, None] * j)
            g = w[b] * j.T @ loss.score(r)[b, p]
            scores[int(images[b])] = scores.get(int(images[b]), 0) + g
    scale = size / len(scores)
    inverse = torch.linalg.inv(scale * h + 0.7 * torch.eye(c * d).double())
    centred = references.about_their_mean(list(scores.values()), [int((images == i).sum()) for i in scores])
    return inverse @ (scale * sum(torch.outer(g, g) for g in centred)) @ inverse


@pytest.mark.parametrize("loss", RHO, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_sandwich_equals_loops(case, loss, weighted):
    weights = torch.rand(len(case.inputs), generator=generator(4), dtype=torch.float64) + 0.1
    fitted = posterior(case, loss, weights if weighted else None, dataset_size=30)
    expected = dense(case, loss, weights if weighted else torch.ones(len(case.inputs)).double(), fitted, 30)
    variance = references.dense_variance(case.layer, case.inputs, expected)
    torch.testing.assert_close(fitted.variance(case.inputs.double()), variance, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(fitted.weight_variance().flatten(), expected.diagonal())
    x = case.inputs.double()
    torch.testing.assert_close(fitted.recut(structure="lowrank", rank=1000).variance(x), variance, rtol=1e-6, atol=1e-8)
    kron = fitted.recut(structure="kron")
    if fitted.precision.ndim == 3:
        c, d = fitted.mean.shape
        nearest = references.dense_variance(case.layer, case.inputs, references.nearest_kronecker(expected, c, d))
        torch.testing.assert_close(kron.variance(x), nearest, rtol=1e-4, atol=1e-6 * float(nearest.mean()))
    else:
        assert bool((kron.variance(x) > 0).all())
    assert bool((fitted.recut(structure="diag").variance(x) > 0).all())


def test_squares_with_equal_weights_are_squares():
    case = CASES[0]
    plain = posterior(case, "squares")
    x = case.inputs.double()
    weighted = posterior(case, "squares", torch.full((len(x),), 0.01).double())
    torch.testing.assert_close(weighted.variance(x), plain.variance(x))  # a factor of the loss is no matter
    wide = posterior(case, Huber(1e6))
    torch.testing.assert_close(wide.variance(x), plain.variance(x))
    torch.testing.assert_close(posterior(case, PseudoHuber(1e6)).variance(x), plain.variance(x))


def test_weights_of_each_draw_and_by_bin_agree():
    case = CASES[0]
    own = torch.tensor([0.5, 2.0, 1.0]).double()
    by_bin = posterior(case, "squares", loss_weights=own, prior_precision=1e-9)
    by_draw = posterior(case, "squares", own[layout(case)[0]], prior_precision=1e-9)
    torch.testing.assert_close(by_draw.variance(case.inputs.double()), by_bin.variance(case.inputs.double()))


def test_the_curvature_of_l1_follows_the_features():
    """Laplace residuals of scale b(φ): 2p(0) = 1/b. One curvature for the bin would be wrong by the spread of b."""
    layer = nn.Linear(2, 1, bias=False)
    g = generator(1)
    x = torch.rand(400, 300, 2, generator=g, dtype=torch.float64) * torch.tensor([3.0, 1.0]) + 0.3
    scale = x[..., :1].square() / (x[..., :1] + 0.5)
    sign = torch.where(torch.rand(scale.shape, generator=g) < 0.5, -1.0, 1.0)
    r = sign * scale * -torch.rand(scale.shape, generator=g, dtype=torch.float64).log()
    stats = Statistics(HeadGeometry.of(layer), 1, loss="l1")
    stats.update(x, r, torch.zeros(400, dtype=torch.long), torch.arange(400))
    got = stats.loss_curvature(torch.ones(1))
    phi, b = x.flatten(0, 1), scale.flatten()
    expected = phi.T @ (phi / b[:, None])
    constant = phi.T @ phi * float((1 / b).mean())
    assert float(((got - expected).abs() / expected).max()) < 0.2  # where b is small, the kernel is wide beside it
    assert float(((constant - expected).abs() / expected).max()) > 0.5
    fixed = Statistics(HeadGeometry.of(layer), 1, loss=L1(0.01))
    fixed.update(x, r, torch.zeros(400, dtype=torch.long), torch.arange(400))
    assert float(((fixed.loss_curvature(torch.ones(1)) - expected).abs() / expected).max()) < 0.1


def test_the_likelihood_knows_no_loss():
    case = CASES[0]
    plain, robust = (posterior(case, loss, prior_precision=None) for loss in ("squares", "huber"))
    assert torch.equal(plain.noise_variance, robust.noise_variance)
    assert plain.log_marginal_likelihood() == robust.log_marginal_likelihood()
    x = case.inputs.double()
    assert not torch.allclose(plain.variance(x), robust.variance(x))
    torch.testing.assert_close(plain.recut(covariance="ggn").variance(x), robust.recut(covariance="ggn").variance(x))
    with pytest.raises(ArgumentError, match='covariance "ef"'):
        robust.recut(covariance="ef")


def test_files_and_merging(tmp_path):
    case = CASES[0]
    weights = torch.rand(len(case.inputs), generator=generator(4), dtype=torch.float64)
    for loss in ("l1", Huber(0.3)):
        stats = statistics(case, loss, weights)
        stats.save(tmp_path)
        loaded = Statistics.load(tmp_path)
        assert (loaded.loss, loaded.weighted) == (stats.loss, True)
        other = statistics(case, loss, weights.flip(0))  # the same images, weighted otherwise: other draws
        loaded, stats = loaded.merge(other), stats.merge(other)
        head = Head("head", case.layer, stats.geometry)
        one, two = (LaplacePosterior.from_statistics(s, head, dataset_size=100) for s in (stats, loaded))
        torch.testing.assert_close(one.variance(case.inputs), two.variance(case.inputs))
    for loss in LOSSES.values():
        assert from_dict(to_dict(loss)) == loss


def test_bad_losses():
    case = CASES[0]
    for bad in ("l2", 1.0, None, nn.L1Loss()):
        with pytest.raises(ArgumentError, match="loss"):
            as_loss(bad)
    for make in (lambda: Huber(0), lambda: PseudoHuber(-1), lambda: L1(0), lambda: Huber(float("nan"))):
        with pytest.raises(ArgumentError, match=r"delta|bandwidth"):
            make()
    small = next(c for c in CASES if c.name == "linear-vector")
    with pytest.raises(ArgumentError, match=r"bayesdiff\.L1\(bandwidth"):
        statistics(small, "l1")
    stats = Statistics(HeadGeometry.of(case.layer), BINS, weighted=True)
    bins, images = layout(case)
    with pytest.raises(ArgumentError, match="a weight for each draw"):
        stats.update(case.inputs, case.residuals, bins, images)
    with pytest.raises(ShapeError, match="one weight"):
        stats.update(case.inputs, case.residuals, bins, images, weights=torch.ones(3))
    with pytest.raises(ArgumentError, match="no weights"):
        Statistics(stats.geometry).update(case.inputs, case.residuals, bins, images, weights=torch.ones(len(bins)))
    weighted = posterior(case, "squares", torch.ones(len(bins)).double())
    with pytest.raises(ArgumentError, match="weights of each draw"):
        weighted.recut(loss_weights="noise")
    for late in ("min-snr", torch.sqrt):
        with pytest.raises(ArgumentError, match=r"bayesdiff\.fit"):
            weighted.recut(loss_weights=late)
