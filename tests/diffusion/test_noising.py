"""The forward process: draws that know their image only, and (x_t, target) as diffusers trains on them."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from bayesdiff.diffusion.noising import draw, noised
from bayesdiff.diffusion.parametrization import alpha_sigma, clean_coefficients, prediction_type

SHAPE = (2, 3, 3)
SCHEDULERS = {
    "epsilon": DDPMScheduler(),
    "v_prediction": DDPMScheduler(prediction_type="v_prediction"),
    "sample": DDPMScheduler(prediction_type="sample"),
    "flow": FlowMatchEulerDiscreteScheduler(),
}
#: Monte Carlo: a mean may be this many of its standard errors away.
ERRORS = 5.0


@pytest.mark.parametrize("name", ["epsilon", "flow"])
def test_draws_do_not_depend_on_how_images_are_chunked(name):
    scheduler = SCHEDULERS[name]
    t, noise = draw(scheduler, SHAPE, 7, 0, 6, 3)
    assert t.shape == (18,)
    assert t.dtype == (torch.float64 if name == "flow" else torch.int64)
    assert noise.shape == (18, *SHAPE)
    assert noise.dtype == torch.float32
    chunks = [draw(scheduler, SHAPE, 7, first, count, 3) for first, count in ((0, 2), (2, 3), (5, 1))]
    assert torch.equal(torch.cat([c[0] for c in chunks]), t)
    assert torch.equal(torch.cat([c[1] for c in chunks]), noise)
    # More draws of an image leave those it had.
    fewer_t, fewer = draw(scheduler, SHAPE, 7, 0, 6, 1)
    assert torch.equal(fewer_t, t[::3])
    assert torch.equal(fewer, noise[::3])
    assert len(noise.flatten(1).unique(dim=0)) == 18
    assert not torch.equal(draw(scheduler, SHAPE, 8, 0, 6, 3)[1], noise)


def test_integer_timesteps_cover_the_schedule_evenly():
    n, values = 1400, 7
    t, _ = draw(DDPMScheduler(num_train_timesteps=values), (1,), 0, 0, n // 2, 2)
    counts = torch.bincount(t, minlength=values)
    assert len(counts) == values
    error = math.sqrt(n * (1 / values) * (1 - 1 / values))
    assert float((counts - n / values).abs().max()) < ERRORS * error


def test_flow_timesteps_cover_the_interval_evenly():
    n, bins = 1500, 10
    t, _ = draw(FlowMatchEulerDiscreteScheduler(), (1,), 0, 0, n, 1)
    assert 0 < float(t.min()) < 10
    assert 990 < float(t.max()) < 1000
    counts = (t / 100).long().bincount(minlength=bins)
    assert len(counts) == bins
    assert float((counts - n / bins).abs().max()) < ERRORS * math.sqrt(n * 0.1 * 0.9)


def test_noise_is_standard_normal_and_apart_from_image_to_image():
    n = 1000
    _, noise = draw(SCHEDULERS["epsilon"], (20,), 0, 0, n // 2, 2)
    total = noise.numel()
    assert abs(float(noise.mean())) < ERRORS / math.sqrt(total)
    assert abs(float(noise.var()) - 1) < ERRORS * math.sqrt(2 / total)
    for lag in (1, 2):  # the other draw of the image; the next image
        neighbours = (noise[:-lag] * noise[lag:]).mean()
        assert abs(float(neighbours)) < ERRORS / math.sqrt(total)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 3, 4, 4)], ids=["image", "video"])
def test_noised_is_the_schedulers_own(name, shape):
    scheduler = SCHEDULERS[name]
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(5, *shape, generator=generator), torch.randn(5, *shape, generator=generator)
    t = torch.tensor([1, 10, 400, 800, 999])
    if name == "flow":
        # Its schedule holds num_train_timesteps … 1.
        x_t, wanted = scheduler.scale_noise(clean, t.float(), noise), noise - clean
    else:
        x_t = scheduler.add_noise(clean, noise, t)
        wanted = {
            "epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, t)
        }[name]  # fmt: skip
    got, goal = noised(scheduler, clean, noise, t)
    assert got.dtype == goal.dtype == torch.float64
    torch.testing.assert_close(got.float(), x_t, rtol=0, atol=1e-5)
    torch.testing.assert_close(goal.float(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_clean_images_come_back(name):
    scheduler = SCHEDULERS[name]
    t, noise = draw(scheduler, SHAPE, 3, 0, 4, 2)
    clean = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x_t, g = noised(scheduler, clean, noise, t)
    for i in range(8):
        alpha, sigma = (float(v) for v in alpha_sigma(scheduler, t[i]))
        a, b = clean_coefficients(prediction_type(scheduler), alpha, sigma)
        torch.testing.assert_close(a * x_t[i] + b * g[i], clean[i].double(), rtol=0, atol=1e-12 * (1 + abs(a) + abs(b)))
