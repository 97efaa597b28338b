"""The posterior, against explicit-Jacobian float64 references, and its files."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bayesdiff.checks import (
    ArgumentError,
    BayesdiffWarning,
    EmptyDataError,
    HeadMismatchError,
    NonFiniteError,
    NotPositiveDefiniteError,
    PosteriorFileError,
    ShapeError,
)
from bayesdiff.head.find import Head, find_head
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.laplace.evidence import evidence_prior_precision
from bayesdiff.laplace.links import Exceedance, Smooth
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics
from bayesdiff.laplace.structure import nearest_kronecker
from tests import cases, references

LAYERS = cases.layer_cases()
BINS = 3
#: Relative error of a Monte Carlo variance of n draws is √(2/n); five of them is a rare event.
MC_TOLERANCE = 5.0


def layout(case):
    """Two draws for each image, in bins 0, 1, 2, 0, …"""
    n = len(case.inputs)
    return torch.arange(n) % BINS, torch.arange(n) // 2


def statistics(case, *, dtype=torch.float32):
    bins, images = layout(case)
    out = Statistics(HeadGeometry.of(case.layer), BINS)
    for part in torch.arange(len(case.inputs)).split(4):
        out.update(case.inputs[part].to(dtype), case.residuals[part].to(dtype), bins[part], images[part])
    return out


def posterior(case, dtype=torch.float64, **kwargs):
    head = Head("head", case.layer, HeadGeometry.of(case.layer))
    return LaplacePosterior.from_statistics(statistics(case, dtype=dtype), head, **kwargs)


@pytest.mark.parametrize("covariance", ["ggn", "sandwich", "ef"])
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_variance_equals_explicit_jacobian(case, structure, covariance):
    bins, images = layout(case)
    # The nearest Kronecker product is found by an iteration, which ends before rounding does.
    for dtype, tolerance in ((torch.float64, 1e-8 if structure == "kron" else 1e-9), (torch.float32, 1e-5)):
        for size in (None, 10 * len(case.inputs)):
            fitted = posterior(
                case, dtype, structure=structure, covariance=covariance, dataset_size=size, prior_precision=0.7
            )
            scale = 1 if size is None else size / fitted.num_images
            dense = references.dense_posterior(
                case.layer, case.inputs, case.residuals, bins, images, 1 / fitted.weights,
                prior_precision=0.7, structure=structure, covariance=covariance, scale=scale,
            )  # fmt: skip
            expected = references.dense_variance(case.layer, case.inputs, dense)
            got = fitted.variance(case.inputs.to(dtype))
            assert got.dtype == dtype
            assert got.shape == expected.shape
            assert float(got.min()) >= 0
            # Pixels whose variance all but cancels have the rounding of their neighbours.
            floor = 0.01 * expected.mean()
            assert float(((got.double() - expected).abs() / expected.clamp(min=floor)).max()) < tolerance


@pytest.mark.parametrize("covariance", ["ggn", "sandwich", "ef"])
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("case", [c for c in LAYERS if c.name in ("conv3x3", "linear-tokens")], ids=str)
def test_samples_have_the_posterior_covariance(case, structure, covariance):
    fitted = posterior(case, structure=structure, covariance=covariance, prior_precision=0.7)
    bins, images = layout(case)
    dense = references.dense_posterior(
        case.layer, case.inputs, case.residuals, bins, images, 1 / fitted.weights,
        prior_precision=0.7, structure=structure, covariance=covariance,
    )  # fmt: skip
    torch.testing.assert_close(fitted.weight_variance().flatten(), dense.diagonal())
    n = 20_000
    draws = fitted.sample(n, torch.Generator().manual_seed(0)) - fitted.mean
    empirical = draws.flatten(1).T @ draws.flatten(1) / n
    # The standard error of entry (i, j) is √((Σ_ii Σ_jj + Σ_ij²)/n): channels' cross terms are tested too.
    diagonal = dense.diagonal()
    error = ((torch.outer(diagonal, diagonal) + dense.square()) / n).sqrt() + 1e-15
    assert float(((empirical - dense).abs() / error).max()) < MC_TOLERANCE + 1
    again = fitted.sample(n, torch.Generator().manual_seed(0)) - fitted.mean
    assert torch.equal(draws, again)


@pytest.mark.parametrize("covariance", ["ggn", "sandwich", "ef"])
@pytest.mark.parametrize("case", [c for c in LAYERS if c.name in ("conv3x3", "conv1x1", "linear-tokens")], ids=str)
def test_low_rank(case, covariance):
    full = posterior(case, covariance=covariance, prior_precision=0.7)
    x = case.inputs.double()
    exact = full.variance(x)
    everything = full.recut(structure="lowrank", rank=10_000)
    assert everything.approximation_error == 0
    torch.testing.assert_close(everything.variance(x), exact)
    errors = []
    for rank in (2, 6, 12, 20):
        cut = full.recut(structure="lowrank", rank=rank)
        assert cut.sigma.rows.shape[1] <= rank
        errors.append(float((cut.variance(x) - exact).abs().mean() / exact.mean()))
    assert errors[-1] < errors[0]
    for tolerance in (0.2, 0.05, 0.01):
        cut = full.recut(structure="lowrank", tolerance=tolerance)
        assert cut.approximation_error <= tolerance
        error = (cut.variance(x) - exact) / exact.mean()
        if covariance == "sandwich":  # whose weights are the same for all features here
            assert float(error.mean().abs()) < 1e-9
            assert float(error.abs().mean()) < 2 * tolerance
        assert float(error.abs().mean()) < 4 * tolerance
    draws = cut.sample(2000, torch.Generator().manual_seed(0)) - cut.mean
    spread = full.geometry.apply(x[:2], draws).var(0)
    assert float((spread / cut.variance(x[:2]) - 1).abs().max()) < (MC_TOLERANCE + 1) * math.sqrt(2 / 1999)


def test_the_nearest_kronecker_product():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(30, 3, 5, generator=generator, dtype=torch.float64) @ torch.randn(
        5, 5, generator=generator, dtype=torch.float64
    )
    b, a, error = nearest_kronecker(scores)
    whole = torch.einsum("ncd,nef->cdef", scores, scores).reshape(15, 15)
    expected = references.nearest_kronecker(whole, 3, 5)
    torch.testing.assert_close(torch.kron(b, a), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert error == pytest.approx(float((whole - expected).norm() / whole.norm()), rel=1e-6)
    product = torch.einsum("k,cd->kcd", torch.tensor([1.0, 2.0]).double(), scores[0])
    assert nearest_kronecker(product[:, :1])[2] < 1e-7  # one channel: exact


def test_recut_is_a_fresh_cut():
    case = LAYERS[0]
    fitted = posterior(case, dataset_size=100)
    x = case.inputs
    changes = [
        {"structure": "diag"}, {"covariance": "ggn"}, {"covariance": "ef", "structure": "kron"}, {"prior_precision": 3.0},
        {"prior_precision": torch.tensor([0.5, 2.0])}, {"noise_variance": 0.3, "covariance": "ggn"}, {"dataset_size": 400},
        {"noise_variance": torch.tensor([0.3, 0.1, 0.2]), "covariance": "ef"}, {"loss_weights": "noise"},
        {"structure": "lowrank", "rank": 3},
    ]  # fmt: skip
    for change in changes:
        settings = {"dataset_size": 100, "prior_precision": fitted.prior_precision} | change
        expected = posterior(case, **settings)
        got = fitted.recut(**change)
        torch.testing.assert_close(got.variance(x), expected.variance(x))
        assert not torch.allclose(got.variance(x), fitted.variance(x))
        back = got.recut(
            structure="full", covariance="sandwich", prior_precision=fitted.prior_precision, dataset_size=100, rank=None,
            noise_variance="residual", loss_weights="uniform",
        )  # fmt: skip
        torch.testing.assert_close(back.variance(x), fitted.variance(x))
    hot = fitted.recut(temperature=4.0)
    torch.testing.assert_close(hot.variance(x), 4 * fitted.variance(x))
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    torch.testing.assert_close(hot.deviations(3, seeds[0]), 2 * fitted.deviations(3, seeds[1]))
    with pytest.raises(ArgumentError, match="settings among"):
        fitted.recut(structur="diag")


@pytest.mark.parametrize(
    ("structure", "covariance"),
    [
        *((s, c) for s in ("full", "kron", "diag") for c in ("ggn", "sandwich")), ("diag", "ef"), ("kron", "ef"),
        ("full", "ef"), ("lowrank", "sandwich"), ("lowrank", "ggn"),
    ],
)  # fmt: skip
def test_orthogonal_draws(structure, covariance):
    """As many as there are numbers in one have no noise, where a draw is one linear function of one set of numbers."""
    case = LAYERS[0]
    fitted = posterior(case, structure=structure, covariance=covariance, temperature=1.7)
    sizes = []

    def noise(shape):
        sizes.append(math.prod(shape[1:]))
        return torch.zeros(shape, dtype=torch.float64)

    fitted.sigma.transform(1, noise)
    geometry = HeadGeometry.of(case.layer)
    expected = fitted.variance(case.inputs.double())

    def estimate(n, seed):
        drawn = fitted.deviations(n, torch.Generator().manual_seed(seed), orthogonal=True)
        assert drawn.shape == (n, *fitted.mean.shape)
        return geometry.apply(case.inputs.double(), drawn).square().mean(0)

    if len(sizes) == 1:
        torch.testing.assert_close(estimate(sizes[0], 0), expected, rtol=1e-6, atol=0)
    else:
        assert (structure, covariance) in {("full", "ef"), ("lowrank", "sandwich"), ("lowrank", "ggn")}
    runs, n = 400, 5
    mean = torch.stack([estimate(n, seed) for seed in range(runs)]).mean(0)
    assert float((mean / expected - 1).abs().max()) < MC_TOLERANCE * (2 / (runs * n)) ** 0.5


@pytest.mark.parametrize("covariance", ["ggn", "sandwich"])
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_a_prior_for_each_channel(structure, covariance):
    case = LAYERS[0]
    tau = torch.tensor([0.5, 3.0])
    both = posterior(case, structure=structure, covariance=covariance, prior_precision=tau)
    for c in range(2):
        one = posterior(case, structure=structure, covariance=covariance, prior_precision=float(tau[c]))
        torch.testing.assert_close(both.variance(case.inputs)[:, c], one.variance(case.inputs)[:, c])
    best = posterior(case, structure=structure, covariance=covariance, prior_precision="channel")
    shared = posterior(case, structure=structure, covariance=covariance)
    assert best.log_marginal_likelihood() > shared.log_marginal_likelihood()
    for factor in (0.95, 1.05):
        other = best.recut(prior_precision=best.prior_precision * torch.tensor([1.0, factor]))
        assert best.log_marginal_likelihood() > other.log_marginal_likelihood()


def test_only_one_prior_where_there_can_be_only_one():
    tau = torch.tensor([0.5, 3.0])
    for settings in ({"structure": "kron"}, {"structure": "lowrank"}, {"covariance": "ef"}):
        with pytest.raises(ArgumentError, match="one prior precision"):
            posterior(LAYERS[0], prior_precision=tau, **settings)
    for bad in (torch.ones(3), torch.tensor([1.0, -1.0]), float("nan"), 0.0, "best"):
        with pytest.raises(ArgumentError, match="prior_precision"):
            posterior(LAYERS[0], prior_precision=bad)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_noise_by_evidence(structure):
    case = LAYERS[1]
    best = posterior(case, structure=structure, covariance="ggn", noise_variance="evidence")
    plain = posterior(case, structure=structure, covariance="ggn")
    assert bool((best.noise_variance > plain.noise_variance).all())  # degrees of freedom that the weights take
    top = best.log_marginal_likelihood()
    assert top > plain.log_marginal_likelihood()
    for b in range(BINS):
        for factor in (0.97, 1.03):
            noise = best.noise_variance.clone()
            noise[b] *= factor
            assert best.recut(noise_variance=noise).log_marginal_likelihood() < top
    with pytest.raises(ArgumentError, match="ef"):
        posterior(case, covariance="ef", noise_variance="evidence")


def test_a_prior_by_heldout_likelihood():
    case = LAYERS[0]
    fitted = posterior(case, covariance="ggn")
    x, r, t = case.inputs.double(), case.residuals.double(), torch.arange(16) * 60
    bins = (t * BINS / 1000).long()
    total = fitted.noise_variance[bins].view(-1, 1, 1, 1) + fitted.variance(x)
    expected = torch.distributions.Normal(0, total.sqrt()).log_prob(r).mean()
    assert fitted.heldout_log_likelihood(x, r, t) == pytest.approx(float(expected))
    # Residuals twice as large as the noise says ask for a wider posterior than those half as large.
    wide, narrow = (fitted.with_heldout_prior(x, s * r, t) for s in (2, 0.5))
    assert wide.prior_precision < narrow.prior_precision
    for scale, best in ((2, wide), (0.5, narrow)):
        top = best.heldout_log_likelihood(x, scale * r, t)
        for tau in (fitted.prior_precision, best.prior_precision * 1.5, best.prior_precision / 1.5):
            assert fitted.recut(prior_precision=tau).heldout_log_likelihood(x, scale * r, t) <= top + 1e-6
    with pytest.raises(ShapeError, match="residuals"):
        fitted.heldout_log_likelihood(x, r[:, :1], t)


def test_half_precision_features_of_large_size():
    """Features of 1e4 square to more than float16 holds: sums and variances are of float32 at least."""
    layer = torch.nn.Conv2d(3, 2, 3, padding=1)
    generator = torch.Generator().manual_seed(0)
    inputs = (1e4 * torch.randn(8, 3, 5, 5, generator=generator)).half()
    residuals = torch.randn(8, 2, 5, 5, generator=generator)
    stats = Statistics(HeadGeometry.of(layer), 1)
    stats.update(inputs, residuals, torch.zeros(8, dtype=torch.long), torch.arange(8))
    fitted = LaplacePosterior.from_statistics(stats, Head("head", layer, stats.geometry))
    exact = fitted.variance(inputs.double())
    assert bool(torch.isfinite(exact).all())
    torch.testing.assert_close(fitted.variance(inputs).double(), exact, rtol=1e-4, atol=1e-8)


def test_mc_predictive_agrees_with_the_closed_form():
    case = LAYERS[0]
    fitted = posterior(case)
    n = 4000
    exact = fitted.predict(case.inputs)
    mc = fitted.predict(case.inputs, link_approx="mc", n_samples=n, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(exact.mean, case.layer(case.inputs).detach(), rtol=1e-4, atol=1e-5)
    assert float((mc.variance / exact.variance - 1).abs().max()) < MC_TOLERANCE * math.sqrt(2 / (n - 1))
    assert float(((mc.mean - exact.mean).abs() / (exact.std / math.sqrt(n))).max()) < MC_TOLERANCE
    with pytest.raises(ArgumentError, match="probit"):
        fitted.predict(case.inputs, link_approx="probit")
    with pytest.raises(ArgumentError, match="'mc'"):
        fitted.predict(case.inputs, link_approx="laplace")
    with pytest.raises(ArgumentError, match="n_samples >= 2"):
        fitted.predict(case.inputs, link_approx="mc", n_samples=1)


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("case", LAYERS[:2], ids=str)
def test_evidence_and_its_maximum(case, structure):
    fitted = posterior(case, structure=structure, covariance="ggn")
    bins, images = layout(case)
    tau = fitted.prior_precision
    inverse = references.dense_posterior(
        case.layer, case.inputs, case.residuals, bins, images, 1 / fitted.weights,
        prior_precision=1e-12, structure=structure, covariance="ggn",
    )  # fmt: skip
    precision = torch.linalg.inv(inverse)
    stats = fitted.statistics
    counts = stats.positions * stats.geometry.out_channels
    args = (fitted.mean, tau, stats.squared_residuals.sum(1), counts, fitted.noise_variance)
    assert fitted.log_marginal_likelihood() == pytest.approx(references.log_evidence(precision, *args), rel=1e-7)

    def at(value):
        head = Head("head", case.layer, stats.geometry)
        cut = LaplacePosterior.from_statistics(
            stats, head, structure=structure, covariance="ggn", prior_precision=value
        )
        return cut.log_marginal_likelihood()

    assert at(tau) > at(tau * 1.05)
    assert at(tau) > at(tau / 1.05)


def test_the_sandwich_has_the_weights_of_the_training_loss():
    case = LAYERS[0]
    fitted = posterior(case)
    pooled = float(case.residuals.double().square().mean())
    torch.testing.assert_close(fitted.weights, torch.full((BINS,), 1 / pooled, dtype=torch.float64))
    assert torch.equal(posterior(case, covariance="ggn").weights, 1 / fitted.noise_variance)
    assert torch.equal(posterior(case, loss_weights="noise").weights, 1 / fitted.noise_variance)
    own = torch.tensor([1.0, 2.0, 0.5])
    torch.testing.assert_close(posterior(case, loss_weights=own).weights, own.double() / pooled)
    # Weights that are all multiplied by one number are the same loss: only the prior's share changes.
    torch.testing.assert_close(
        posterior(case, loss_weights=own, prior_precision=1e-9).variance(case.inputs),
        posterior(case, loss_weights=3 * own, prior_precision=1e-9).variance(case.inputs),
    )
    for bad in ("equal", torch.ones(2), -own):
        with pytest.raises(ArgumentError, match="loss_weights"):
            posterior(case, loss_weights=bad)


def test_noise_variance_is_estimated_by_timestep_bin():
    case = LAYERS[0]
    bins, images = layout(case)
    residuals = case.residuals * torch.tensor([0.1, 1.0, 5.0])[bins].view(-1, 1, 1, 1)
    stats = Statistics(HeadGeometry.of(case.layer), 5)
    stats.update(case.inputs, residuals, bins, images)
    expected = torch.stack([residuals[bins == b].double().square().mean() for b in (0, 1, 2, 2, 2)])
    torch.testing.assert_close(stats.noise_variance(), expected)


def test_merging_is_fitting_to_all():
    case = LAYERS[0]
    bins, images = layout(case)
    geometry = HeadGeometry.of(case.layer)
    whole = Statistics(geometry, BINS)
    whole.update(case.inputs.double(), case.residuals.double(), bins, images)
    parts = []
    for part in (torch.arange(8, 16), torch.tensor([0, 1]), torch.arange(2, 8)):
        s = Statistics(geometry, BINS)
        s.update(case.inputs[part].double(), case.residuals[part].double(), bins[part], images[part])
        parts.append(s)
    merged = parts[0].merge(parts[1]).merge(parts[2])
    noise = whole.noise_variance()
    torch.testing.assert_close(merged.noise_variance(), noise, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.precision(1 / noise), whole.precision(1 / noise), rtol=1e-9, atol=1e-12)
    order = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])  # images are numbered on
    torch.testing.assert_close(
        merged.image_scores(1 / noise), whole.image_scores(1 / noise)[order], rtol=1e-9, atol=1e-12
    )
    with pytest.raises(ShapeError):
        whole.merge(Statistics(geometry, BINS + 1))


def test_draws_of_one_image_are_not_independent():
    """Two identical draws of each image leave the sandwich as it is; as independent images they would halve it."""
    case = LAYERS[1]
    geometry = HeadGeometry.of(case.layer)
    n = len(case.inputs)
    head = Head("head", case.layer, geometry)
    variances = []
    for repeats in (1, 2):
        s = Statistics(geometry, 1)
        for _ in range(repeats):
            s.update(case.inputs, case.residuals, torch.zeros(n, dtype=torch.long), torch.arange(n))
        fitted = LaplacePosterior.from_statistics(s, head, prior_precision=1e-9)
        variances.append(fitted.variance(case.inputs))
    torch.testing.assert_close(*variances, rtol=1e-3, atol=0)


@pytest.mark.parametrize("covariance", ["ggn", "sandwich", "ef"])
@pytest.mark.parametrize("structure", ["full", "kron", "diag", "lowrank"])
def test_save_and_load(tmp_path, structure, covariance):
    case = LAYERS[0]
    fitted = posterior(case, structure=structure, covariance=covariance, dataset_size=100)
    fitted.save(tmp_path / "p")
    fitted.save(tmp_path / "p")  # again, over itself
    assert len(list((tmp_path / "p").iterdir())) == 2
    loaded = LaplacePosterior.load(tmp_path / "p")
    assert torch.equal(loaded.variance(case.inputs), fitted.variance(case.inputs))
    assert loaded.log_marginal_likelihood() == fitted.log_marginal_likelihood()
    seeds = [torch.Generator().manual_seed(2) for _ in range(2)]
    torch.testing.assert_close(loaded.sample(3, seeds[0]), fitted.sample(3, seeds[1]), rtol=1e-9, atol=1e-12)
    for name in (
        "structure",
        "covariance",
        "prior_precision",
        "dataset_size",
        "num_images",
        "head_path",
        "fingerprint",
    ):
        assert getattr(loaded, name) == getattr(fitted, name)


def test_damaged_files(tmp_path):
    fitted = posterior(LAYERS[0])
    with pytest.raises(PosteriorFileError, match=r"LaplacePosterior\.save"):
        LaplacePosterior.load(tmp_path / "nowhere")
    folder = tmp_path / "p"
    fitted.save(folder)
    tensors = next(folder.glob("*.safetensors"))
    whole, meta = tensors.read_bytes(), (folder / "posterior.json").read_text()
    for broken in (whole[:-20], whole[:10], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        tensors.write_bytes(broken)
        with pytest.raises(PosteriorFileError, match=r"damaged|expected"):
            LaplacePosterior.load(folder)
    tensors.write_bytes(whole)
    for broken in (meta[: len(meta) // 2], "[]", "{}", json.dumps({**json.loads(meta), "format": 99})):
        (folder / "posterior.json").write_text(broken)
        with pytest.raises(PosteriorFileError):
            LaplacePosterior.load(folder)


def test_a_posterior_knows_its_network(tmp_path):
    unet, other = cases.tiny_unet(seed=0), cases.tiny_unet(seed=1)
    head = find_head(unet)
    s = Statistics(head.geometry, 1)
    generator = torch.Generator().manual_seed(0)
    s.update(
        torch.randn(4, 8, 8, 8, generator=generator), torch.randn(4, 3, 8, 8, generator=generator),
        torch.zeros(4, dtype=torch.long), torch.arange(4),
    )  # fmt: skip
    fitted = LaplacePosterior.from_statistics(s, head)
    fitted.save(tmp_path)
    assert LaplacePosterior.load(tmp_path, unet).check(unet).path == "conv_out"
    with pytest.raises(HeadMismatchError, match="another network"):
        LaplacePosterior.load(tmp_path, other)
    with pytest.raises(HeadMismatchError, match="HeadGeometry"):
        fitted.check(cases.tiny_unet(channels=1))
    fitted.check(cases.tiny_unet(seed=0).to(torch.bfloat16))  # the same weights, rounded
    with pytest.raises(HeadMismatchError):
        fitted.check(other.to(torch.bfloat16))


def test_bad_input_is_refused():
    case = LAYERS[0]
    fitted = posterior(case)
    with pytest.raises(ShapeError, match="3, height"):
        fitted.variance(torch.zeros(1, 5, 4, 4))
    for bad in (float("nan"), float("inf")):
        x = case.inputs.clone()
        x[1, 2, 0, 0] = bad
        with pytest.raises(NonFiniteError, match=r"1 NaN|1 infinite"):
            fitted.variance(x)
        with pytest.raises(NonFiniteError):
            Statistics(fitted.geometry, 1).update(x, case.residuals, *layout(case))
    empty = Statistics(fitted.geometry, BINS)
    head = Head("head", case.layer, fitted.geometry)
    with pytest.raises(EmptyDataError):
        LaplacePosterior.from_statistics(empty, head)
    for kwargs in ({"structure": "kron2"}, {"covariance": "x"}, {"prior_precision": 0}, {"dataset_size": 1}):
        with pytest.raises(ArgumentError):
            posterior(case, **kwargs)


def test_rank_deficiency():
    """One position cannot determine 28 weights: a tiny prior fails by name, the evidence's own mends it."""
    case = LAYERS[0]
    geometry = HeadGeometry.of(case.layer)
    s = Statistics(geometry, 1)
    zero = torch.zeros(1, dtype=torch.long)
    s.update(1e4 * case.inputs[:1, :, :3, :3].double(), case.residuals[:1, :, :3, :3].double(), zero, zero)
    head = Head("head", case.layer, geometry)
    with pytest.raises(NotPositiveDefiniteError, match="larger prior_precision"):
        LaplacePosterior.from_statistics(s, head, prior_precision=1e-30)
    assert float(LaplacePosterior.from_statistics(s, head).variance(case.inputs).min()) >= 0


def test_prior_without_a_maximum_warns():
    with pytest.warns(BayesdiffWarning, match="no maximum"):
        assert evidence_prior_precision(torch.ones(3), torch.zeros(2, 3)) == 1.0


PREDICTIVE_LINKS = {
    "identity": ("identity", "linearized"),
    "clamped": ("clamped_pixel", "exact"),
    "exceedance": (Exceedance(0.55), "exact"),
    "sigmoid": ("sigmoid", "probit"),
    "smooth": (Smooth(torch.tanh), "linearized"),
}


@pytest.mark.parametrize("name", PREDICTIVE_LINKS)
@pytest.mark.parametrize("case", [c for c in LAYERS if c.name in ("conv3x3", "linear-tokens")], ids=str)
def test_links_against_their_monte_carlo_twin(case, name):
    link, approximation = PREDICTIVE_LINKS[name]
    # Enough data that a smooth map is all but linear over its Gaussians.
    fitted = posterior(case, prior_precision=0.7, dataset_size=8 if name != "smooth" else 8000)
    n = 20_000
    mc = fitted.predict(case.inputs, "mc", n, link=link, generator=torch.Generator().manual_seed(3))
    closed = fitted.predict(case.inputs, approximation, link=link)
    assert closed.shape == mc.shape == case.residuals.shape
    # 0.02: the error of MacKay's mean; tanh is curved over these Gaussians.
    slack = {"sigmoid": 0.016, "smooth": 1e-3}.get(name, 0.0)
    error = (closed.mean - mc.mean).abs()
    spread = torch.maximum(mc.std, closed.std)  # of a rare event, no draw may have seen any
    assert float((error - slack - MC_TOLERANCE * spread / math.sqrt(n)).max()) < 10 / n
    if slack == 0:
        # The variance's own error has the fourth moment in it: bounded by that of a variable within [0, 1] or a Gaussian.
        allowed = MC_TOLERANCE * torch.maximum(math.sqrt(2 / n) * closed.variance, spread / math.sqrt(n))
        assert float(((closed.variance - mc.variance).abs() - allowed).max()) < 10 / n


def test_monte_carlo_does_not_depend_on_its_chunks(monkeypatch):
    case = LAYERS[0]
    fitted = posterior(case)

    def run():
        return fitted.predict(
            case.inputs.double(), "mc", 50, link="clamped_pixel", generator=torch.Generator().manual_seed(3)
        )

    whole = run()
    weights = fitted.sample(50, torch.Generator().manual_seed(3))
    draws = fitted.geometry.apply(case.inputs.double(), weights).add(1).div(2).clamp(0, 1)
    torch.testing.assert_close(whole.mean, draws.mean(0))
    torch.testing.assert_close(whole.variance, draws.var(0))
    monkeypatch.setattr(
        "bayesdiff.laplace.predictive.CHUNK", 1
    )  # one draw at a time: other draws, the same moments in the mean
    parts = run()
    assert parts.mean.shape == whole.mean.shape
    torch.testing.assert_close(parts.mean, whole.mean, atol=float(6 * whole.std.max() / math.sqrt(25)), rtol=0)


def test_a_link_that_mixes_outputs():
    """A blur stands for a decoder: its variance needs the covariances between pixels, which shared weights give."""
    case = LAYERS[1]
    fitted = posterior(case)
    blur = Smooth(lambda y: torch.nn.functional.avg_pool2d(y, 2), elementwise=False)
    generator = torch.Generator().manual_seed(0)
    fast = fitted.predict(case.inputs, n_samples=4000, link=blur, generator=generator)
    slow = fitted.predict(case.inputs, "mc", 4000, link=blur, generator=generator)
    assert fast.shape == slow.shape == (20, 1, 2, 2)
    assert float((fast.variance / slow.variance - 1).abs().max()) < 2 * MC_TOLERANCE * math.sqrt(2 / 4000)
    independent = torch.nn.functional.avg_pool2d(fitted.variance(case.inputs), 2) / 4
    assert float(fast.variance.mean() / independent.mean()) > 1.2


def test_statistics_files(tmp_path):
    case = LAYERS[0]
    stats = statistics(case)
    stats.save(tmp_path)
    loaded = Statistics.load(tmp_path)
    head = Head("head", case.layer, stats.geometry)
    cut = [LaplacePosterior.from_statistics(s, head, structure="kron") for s in (stats, loaded)]
    assert torch.equal(cut[0].variance(case.inputs), cut[1].variance(case.inputs))
    assert loaded.num_images == stats.num_images
    with pytest.raises(EmptyDataError):
        Statistics(stats.geometry).save(tmp_path)
    with pytest.raises(PosteriorFileError, match=r"Statistics\.save"):
        Statistics.load(tmp_path / "nowhere")
    cut[0].save(tmp_path)
    without = LaplacePosterior.load(tmp_path)
    with pytest.raises(ArgumentError, match="statistics"):
        without.recut(structure="diag")
