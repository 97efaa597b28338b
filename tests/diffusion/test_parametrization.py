"""What networks predict, against diffusers' own arithmetic."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from bayesdiff.checks import UnsupportedSchedulerError
from bayesdiff.diffusion.parametrization import (
    PREDICTIONS,
    alpha_sigma,
    clean_coefficients,
    is_flow,
    prediction_type,
    target,
)

#: diffusers computes its schedules in float32.
FLOAT32 = {"rtol": 0, "atol": 2e-6}
FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_table_recovers_clean_data(prediction):
    """x_0 = a x_t + b g, also where α² + σ² ≠ 1."""
    alpha, sigma = 0.05 + torch.rand(2, 50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean, noise = normal(50, 8), normal(50, 8, seed=1)
    g = target(prediction, clean, noise, alpha, sigma)
    x_t = alpha * clean + sigma * noise
    for i in range(50):
        a, b = clean_coefficients(prediction, float(alpha[i]), float(sigma[i]))
        # The terms of a sum that cancels round in proportion to their own size.
        size = 1 + float((abs(a) * x_t[i].abs() + abs(b) * g[i].abs()).max())
        torch.testing.assert_close(a * x_t[i] + b * g[i], clean[i], rtol=0, atol=1e-12 * size)


@pytest.mark.parametrize("config", [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"prediction_type": "v_prediction"}])
@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
def test_alpha_sigma_is_the_schedulers_add_noise(cls, config):
    scheduler = cls(num_train_timesteps=1000, **config)
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    alpha, sigma = alpha_sigma(scheduler, t)
    assert alpha.dtype == sigma.dtype == torch.float64
    one, zero = torch.ones(6, 1), torch.zeros(6, 1)
    torch.testing.assert_close(alpha[:, None].float(), scheduler.add_noise(one, zero, t), **FLOAT32)
    torch.testing.assert_close(sigma[:, None].float(), scheduler.add_noise(zero, one, t), **FLOAT32)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_alpha_sigma_is_the_flow_schedulers_scale_noise(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(12)
    t = scheduler.timesteps
    alpha, sigma = alpha_sigma(scheduler, t)
    one, zero = torch.ones(12, 1), torch.zeros(12, 1)
    torch.testing.assert_close(alpha[:, None].float(), scheduler.scale_noise(one, t, zero), **FLOAT32)
    torch.testing.assert_close(sigma[:, None].float(), scheduler.scale_noise(zero, t, one), **FLOAT32)


@pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_alpha_sigma_of_vp_solvers_set_to_flow_sigmas(cls):
    scheduler = cls(**FLOW_SIGMAS)
    scheduler.set_timesteps(12)
    t = scheduler.timesteps
    alpha, sigma = alpha_sigma(scheduler, t)
    assert prediction_type(scheduler) == "flow"
    one, zero = torch.ones(12, 1), torch.zeros(12, 1)
    # Their timesteps are rounded to integers.
    torch.testing.assert_close(alpha[:, None].float(), scheduler.add_noise(one, zero, t), rtol=0, atol=1.01e-3)
    torch.testing.assert_close(sigma[:, None].float(), scheduler.add_noise(zero, one, t), rtol=0, atol=1.01e-3)


def test_between_timesteps_the_schedule_is_interpolated_and_past_its_ends_held():
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    cumprod = scheduler.alphas_cumprod.double()
    alpha, _ = alpha_sigma(scheduler, torch.tensor([[10.25], [998.5]], dtype=torch.float64))
    assert alpha.shape == (2, 1)
    expected = torch.stack([0.75 * cumprod[10] + 0.25 * cumprod[11], 0.5 * cumprod[998] + 0.5 * cumprod[999]])
    torch.testing.assert_close(alpha[:, 0] ** 2, expected)
    ends, _ = alpha_sigma(scheduler, torch.tensor([-1, 0, 999, 1000]))
    assert ends[0] == ends[1]
    assert ends[2] == ends[3]


@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
def test_the_v_target_is_the_schedulers_velocity(cls):
    scheduler = cls(num_train_timesteps=1000, prediction_type="v_prediction")
    clean, noise, t = normal(5, 3).float(), normal(5, 3, seed=1).float(), torch.tensor([0, 10, 400, 800, 999])
    alpha, sigma = (v[:, None] for v in alpha_sigma(scheduler, t))
    expected = scheduler.get_velocity(clean, noise, t)
    got = target(prediction_type(scheduler), clean.double(), noise.double(), alpha, sigma)
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=1e-5)


def test_the_flow_target_takes_the_sampler_to_the_clean_image():
    """With the true velocity Euler's steps lie on the straight line to x_0, from wherever they start."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(4)
    clean, noise = normal(1, 6).float(), normal(1, 6, seed=1).float()
    x = noise
    for t in scheduler.timesteps:
        alpha, sigma = alpha_sigma(scheduler, t)
        torch.testing.assert_close(x, (alpha * clean + sigma * noise).float(), rtol=0, atol=1e-5)
        x = scheduler.step(target("flow", clean, noise, alpha, sigma), t, x).prev_sample
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-5)


def test_predictions_are_read_off_the_scheduler():
    for name in ("epsilon", "v_prediction", "sample"):
        assert prediction_type(DDPMScheduler(prediction_type=name)) == name
    assert prediction_type(FlowMatchEulerDiscreteScheduler()) == "flow"
    assert is_flow(FlowMatchEulerDiscreteScheduler())
    assert not is_flow(DDPMScheduler())
    with pytest.raises(UnsupportedSchedulerError, match="epsilon, v_prediction, sample, flow, got 'score' from DDPM"):
        prediction_type(DDPMScheduler(prediction_type="score"))
    with pytest.raises(UnsupportedSchedulerError, match=r"alphas_cumprod .* got EDMEulerScheduler"):
        alpha_sigma(EDMEulerScheduler(), torch.tensor([3]))
