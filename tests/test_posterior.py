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
from bayesdiff.curvature import Statistics
from bayesdiff.head import Head, HeadGeometry, find_head
from bayesdiff.posterior import LaplacePosterior, evidence_prior_precision
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


@pytest.mark.parametrize("covariance", ["ggn", "sandwich"])
@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_variance_equals_explicit_jacobian(case, structure, covariance):
    bins, images = layout(case)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
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


@pytest.mark.parametrize("covariance", ["ggn", "sandwich"])
@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("case", [c for c in LAYERS if c.name in ("conv3x3", "linear-tokens")], ids=str)
def test_samples_have_the_posterior_covariance(case, structure, covariance):
    fitted = posterior(case, structure=structure, covariance=covariance, prior_precision=0.7)
    bins, images = layout(case)
    dense = references.dense_posterior(
        case.layer, case.inputs, case.residuals, bins, images, 1 / fitted.weights,
        prior_precision=0.7, structure=structure, covariance=covariance,
    )  # fmt: skip
    n = 20_000
    draws = fitted.sample(n, torch.Generator().manual_seed(0)) - fitted.mean
    empirical = draws.flatten(1).T @ draws.flatten(1) / n
    # The standard error of entry (i, j) is √((Σ_ii Σ_jj + Σ_ij²)/n): channels' cross terms are tested too.
    diagonal = dense.diagonal()
    error = ((torch.outer(diagonal, diagonal) + dense.square()) / n).sqrt() + 1e-15
    assert float(((empirical - dense).abs() / error).max()) < MC_TOLERANCE + 1
    again = fitted.sample(n, torch.Generator().manual_seed(0)) - fitted.mean
    assert torch.equal(draws, again)


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
    torch.testing.assert_close(merged.image_scores(1 / noise), whole.image_scores(1 / noise), rtol=1e-9, atol=1e-12)
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


@pytest.mark.parametrize("covariance", ["ggn", "sandwich"])
@pytest.mark.parametrize("structure", ["full", "diag"])
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
    assert torch.equal(loaded.sample(3, seeds[0]), fitted.sample(3, seeds[1]))
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
