"""Fitting a network that was trained in another way than by equal squares at uniform t: against a loop of one draw at a time."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import bayesdiff as bd
from bayesdiff.checks import ArgumentError, TrainingDrawsWarning
from bayesdiff.diffusion.parametrization import alpha_sigma, prediction_type, target
from bayesdiff.head.find import find_head
from bayesdiff.rng import base_seed, item_generator
from tests import cases, references

N, DRAWS, BINS = 6, 3, 4
VP, FLOW = cases.scheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def images(channels=1):
    return torch.rand(N, channels, 8, 8, generator=generator(1)) * 2 - 1


def min_snr(scheduler, t):
    """γ = 5, for ε-prediction."""
    alpha, sigma = alpha_sigma(scheduler, t)
    snr = float(alpha / sigma) ** 2
    return min(snr, 5) / snr


CASES = {
    "min-snr": (VP, {"loss_weights": "min-snr"}, lambda t: min_snr(VP, t), "uniform", bd.Huber(1e9)),
    "huber": (VP, {"loss": bd.Huber(0.5)}, lambda t: 1.0, "uniform", bd.Huber(0.5)),
    "l1": (VP, {"loss": "l1"}, lambda t: 1.0, "uniform", bd.L1()),
    "logit-normal": (
        FLOW,
        {"timestep_density": bd.LogitNormal(0.3, 0.8)},
        lambda t: 1.0,
        "logit-normal",
        bd.Huber(1e9),
    ),
    "all": (
        FLOW,
        {
            "timestep_density": bd.LogitNormal(0.3, 0.8),
            "loss": bd.PseudoHuber(0.4),
            "loss_weights": lambda u: 1 / (1 + u),
        },
        lambda t: 1 / (1 + float(t) / 1000),
        "logit-normal",
        bd.PseudoHuber(0.4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_posterior_equals_a_naive_loop(name):
    scheduler, settings, weight, density, loss = CASES[name]
    network, x0 = cases.tiny_unet(channels=1).double(), images()
    out = bd.fit(
        network, x0, scheduler=scheduler, draws_per_image=DRAWS, training_draws=DRAWS, noise_bins=BINS, prior_precision=0.7,
        dataset_size=20, batch_size=4, generator=generator(), progress=False, **settings,
    )  # fmt: skip
    head, seed = find_head(network), base_seed(generator())
    features, residuals, weights, bins = [], [], [], []
    for i in range(N):
        for j in range(DRAWS):
            g = item_generator(seed, i, j)
            if density == "logit-normal":
                t = torch.sigmoid(0.3 + 0.8 * torch.randn(1, generator=g, dtype=torch.float64)) * 1000
            else:
                t = torch.randint(1000, (), generator=g)[None]
            noise = torch.randn(x0.shape[1:], generator=g)[None].double()
            alpha, sigma = alpha_sigma(scheduler, t)
            x = x0[i : i + 1].double()
            wanted = target(prediction_type(scheduler), x, noise, alpha, sigma)
            with torch.no_grad(), head.capture() as captured:
                residual = wanted - network(alpha * x + sigma * noise, timestep=t, return_dict=False)[0]
            features.append(captured[0])
            residuals.append(residual)
            weights.append(weight(t))
            bins.append(int(float(t) * BINS / 1000))
    phi = references.im2col(head.layer, torch.cat(features))  # (B, P, D)
    r, w = torch.cat(residuals).flatten(1), torch.tensor(weights).double()
    slope, score = loss.curvature(r), loss.score(r)
    h = torch.einsum("b,bp,bpi,bpj->ij", w, slope, phi, phi)
    g = torch.einsum("b,bp,bpi->bi", w, score, phi).view(N, DRAWS, -1).sum(1)
    g = torch.stack(references.about_their_mean(list(g), [DRAWS] * N))
    scale = 20 / N * float((w[:, None] * slope).sum() / (w[:, None] * score).square().sum())
    inverse = torch.linalg.inv(scale * h + 0.7 * torch.eye(len(h)).double())
    dense = inverse @ (scale**2 * N / 20 * g.T @ g) @ inverse
    expected = references.dense_variance(head.layer, features[0], dense)
    torch.testing.assert_close(out.variance(features[0]), expected, rtol=1e-6, atol=1e-9)


def test_draws_do_not_depend_on_the_batch():
    settings = {"loss": "huber", "loss_weights": "p2", "timestep_density": "gaussian", "training_draws": 3}
    network = cases.tiny_unet(channels=1).double()
    posteriors = [
        bd.fit(network, images(), scheduler=VP, batch_size=b, generator=generator(), progress=False, **settings)
        for b in (1, 7, 64)
    ]
    x = torch.randn(2, 8, 8, 8, generator=generator(9), dtype=torch.float64)
    for other in posteriors[1:]:
        torch.testing.assert_close(other.variance(x), posteriors[0].variance(x), rtol=1e-9, atol=0)


def test_what_is_assumed_is_told():
    network = cases.tiny_unet(channels=1)

    def fit(**settings):
        return bd.fit(network, images(), scheduler=VP, generator=generator(), progress=False, **settings)

    with pytest.warns(TrainingDrawsWarning, match="taken to be 1"):
        plain = fit()
    assert (plain.draws_per_image, plain.training_draws) == (1, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = fit(training_draws=1)
        four = fit(training_draws=3)
    assert (told.draws_per_image, four.draws_per_image, four.training_draws) == (1, 3, 3)
    x = torch.randn(2, 8, 8, 8, generator=generator(9))
    torch.testing.assert_close(told.variance(x), plain.variance(x))
    assert float(four.variance(x).mean()) < float(plain.variance(x).mean())
    for bad in (
        {"training_draws": 0.5}, {"training_draws": 3, "draws_per_image": 1}, {"loss": "l3"}, {"timestep_density": "beta"},
        {"loss_weights": "snr"}, {"loss_weights": torch.ones(3)},
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=next(iter(bad))):
            fit(**bad)


def test_two_fits_are_merged():
    """Of other images, both numbered from 0; and of the same images, drawn anew."""
    network = cases.tiny_unet(channels=1).double()
    head = find_head(network)
    data = torch.rand(8, 1, 8, 8, generator=generator(2)) * 2 - 1

    def fit(part, seed):
        return bd.fit(
            network, part, scheduler=VP, training_draws=2, draws_per_image=2, generator=generator(seed), progress=False
        ).statistics

    apart = fit(data[:4], 1).merge(fit(data[4:], 2))
    assert (apart.num_images, apart.num_draws) == (8, 16)
    more = fit(data[:4], 1).merge(fit(data[:4], 2), same_images=True)
    assert (more.num_images, more.num_draws) == (4, 16)
    first, second = (bd.LaplacePosterior.from_statistics(s, head, dataset_size=100) for s in (apart, more))
    assert (first.draws_per_image, second.draws_per_image) == (2, 4)
    own = torch.stack([s.image_scores(torch.ones(10)) for s in (fit(data[:4], 1), fit(data[:4], 2))]).sum(0)
    torch.testing.assert_close(more.image_scores(torch.ones(10)), own)
    with pytest.raises(ArgumentError, match="seed of its own"):
        fit(data[:4], 1).merge(fit(data[:4], 1), same_images=True)
