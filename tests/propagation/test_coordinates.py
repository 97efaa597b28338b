"""The network's own coordinates: noise levels, branches, and which denoiser an output stands for, against schedulers' own x_0."""

from __future__ import annotations

import itertools

import diffusers
import pytest
import torch

from bayesdiff.diffusion.parametrization import alpha_sigma, target
from bayesdiff.propagation.coordinates import Coordinates, branch_order, levels
from bayesdiff.tracing.record import Call


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call(agreement=1.0, sums=(0.0, 0.0), **scalars):
    """What is kept of one network call."""
    tensors = {k: torch.as_tensor(v, dtype=torch.float64).flatten() for k, v in scalars.items()}
    return Call(None, list(sums), tensors, agreement=agreement)


def calls(scheduler, told=lambda t: t):
    return [call(t=told(float(t))) for t in scheduler.timesteps]


# --- levels ---


def test_the_level_is_the_number_that_falls_or_rises():
    assert levels([call(scale=7.5, t=t) for t in (900.0, 500.0, 100.0)]) == [900, 500, 100]
    assert levels([call(t=t) for t in (0.1, 0.5, 0.9)]) == [0.1, 0.5, 0.9]
    assert levels([call(t=[t, t, t]) for t in (9.0, 5.0)]) == [9, 5]
    assert levels([call(scale=1.0), call(scale=1.0)]) is None
    assert levels([call(), call()]) is None
    # Two stages come to one level twice.
    assert levels([call(t=t) for t in (9.0, 5.0, 5.0, 1.0)]) == [9, 5, 5, 1]
    assert levels([call(t=1.0, scale=2.0), call(scale=1.0)]) == [2, 1]  # t is not always there


def test_a_small_sample_is_not_taken_for_a_level():
    """Vectors of a few numbers are as small as timesteps are: their mean moves, but up and down, and they are several."""
    ts = (9.0, 7.0, 5.0, 3.0)
    rising = [call(a=[i, i + 1.0], t=t) for i, t in enumerate(ts)]
    assert levels(rising) == list(ts)
    wandering = [call(a=v, t=t) for v, t in zip((0.3, -1.0, 0.5, 0.2), ts, strict=True)]
    assert levels(wandering) == list(ts)


def test_branches_that_are_called_apart():
    """One after the other, with the same sample at the same level; each has an order of its own."""
    guided = [call(sums=(float(n),) * 2, t=t) for n, t in enumerate((9.0, 5.0, 1.0)) for _ in range(2)]
    assert branch_order(guided) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    # Class labels are small numbers, too.
    labels = [call(sums=(float(n),) * 2, t=t, y=y) for n, t in enumerate((9.0, 5.0, 1.0)) for y in ([3, 3], [0, 1])]
    assert branch_order(labels) == branch_order(guided)
    plain = [call(sums=(float(n),) * 2, t=9.0 - n) for n in range(3)]
    assert branch_order(plain) == [(0, 0), (0, 1), (0, 2)]
    # The same sample at another level is no branch, nor another sample at the same level (the corrected stage of a solver).
    stages = [call(sums=(1.0, 1.0), t=9.0), call(sums=(1.0, 1.0), t=5.0), call(sums=(2.0, 2.0), t=5.0)]
    assert branch_order(stages) == [(0, 0), (0, 1), (0, 2)]
    # Guidance in some steps only.
    interval = [call(sums=(n,) * 2, t=t) for n, t in ((0.0, 9.0), (1.0, 5.0), (1.0, 5.0), (2.0, 1.0))]
    assert branch_order(interval) == [(0, 0), (0, 1), (1, 0), (0, 2)]


# --- the denoiser ---


WITH_X0 = {
    f"{name}-{prediction}": (name, {"prediction_type": prediction})
    for name in (
        "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler",
    )
    for prediction in ("epsilon", "v_prediction")
} | {"DDIMScheduler-sample": ("DDIMScheduler", {"prediction_type": "sample"})}  # fmt: skip


@pytest.mark.parametrize("name", WITH_X0)
def test_any_output_is_that_of_the_schedulers_own_x0(name):
    """Whatever the sampler carries, x_0 = a x_in + b f with a and b by the timestep that the network is told."""
    cls, config = WITH_X0[name]
    if "DDIM" in cls or "DDPM" in cls:
        config = {**config, "clip_sample": False}
    scheduler = getattr(diffusers, cls)(**config)
    scheduler.set_timesteps(10)
    at = Coordinates(scheduler, calls(scheduler))
    generator = torch.Generator().manual_seed(0)
    for n, t in enumerate(scheduler.timesteps):
        x, f = normal(1, 8) * float(scheduler.init_noise_sigma), normal(1, 8, seed=1)
        x_in = scheduler.scale_model_input(x, t)
        extra = {"generator": generator} if "Ancestral" in cls or "DDPM" in cls else {}
        expected = scheduler.step(f, t, x, **extra).pred_original_sample
        a, b = at(n)
        torch.testing.assert_close(a * x_in + b * f, expected.double(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "cls", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"]
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_multistep_solvers_convert_outputs_so_too(cls, prediction):
    scheduler = getattr(diffusers, cls)(prediction_type=prediction)
    scheduler.set_timesteps(10)
    at = Coordinates(scheduler, calls(scheduler))
    x, f = normal(1, 8), normal(1, 8, seed=1)
    scheduler._init_step_index(scheduler.timesteps[0])
    for n, t in enumerate(scheduler.timesteps):
        expected = scheduler.convert_model_output(f, sample=x)
        a, b = at(n)
        # Their timesteps are rounded to integers.
        torch.testing.assert_close(a * x + b * f, expected, rtol=2e-2, atol=2e-2)
        scheduler.step(f, t, x)


TOLD = {
    "t": (lambda t: t, 1.0),
    "t/1000": (lambda t: t / 1000, 1.0),
    "1-t/1000": (lambda t: 1 - t / 1000, -1.0),
    "1000-t": (lambda t: 1000 - t, -1.0),
}


@pytest.mark.parametrize("name", TOLD)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_networks_are_told_the_level_in_many_ways(name, shift):
    """And return the velocity in either direction: to the noise, with which the sample agrees, or to the image."""
    told, sign = TOLD[name]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(5)
    clean, noise = 0.5 * normal(1, 200), normal(1, 200, seed=1)
    recorded, pairs = [], []
    for t in scheduler.timesteps:
        alpha, sigma = (float(v) for v in alpha_sigma(scheduler, t))
        x, f = alpha * clean + sigma * noise, sign * (noise - clean)
        recorded.append(call(agreement=float((x * f).sum()), t=told(float(t))))
        pairs.append((x, f))
    at = Coordinates(scheduler, recorded)
    for n, (x, f) in enumerate(pairs):
        a, b = at(n)
        torch.testing.assert_close(a * x + b * f, clean, rtol=0, atol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("cls", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_preconditioned_networks(cls, prediction):
    scheduler = getattr(diffusers, cls)(prediction_type=prediction, sigma_data=0.7)
    scheduler.set_timesteps(10)
    at = Coordinates(scheduler, calls(scheduler))
    f = normal(1, 8, seed=1)
    for n, sigma in enumerate(scheduler.sigmas[:-1].double()):
        x = sigma * normal(1, 8)
        a, b = at(n)
        expected = scheduler.precondition_outputs(x, f, sigma)
        torch.testing.assert_close(a * scheduler.precondition_inputs(x, sigma) + b * f, expected, rtol=1e-4, atol=1e-4)


def test_where_nothing_is_known_it_is_the_output_itself():
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(4)
    assert Coordinates(None, calls(scheduler))(2) == (0, 1)
    assert Coordinates(scheduler, [call(), call()])(1) == (0, 1)
    assert Coordinates(diffusers.DDPMScheduler(prediction_type="sample"), calls(scheduler))(2) == (0, 1)
    other = diffusers.DDPMScheduler(prediction_type="score")
    assert Coordinates(other, calls(scheduler))(1) == (0, 1)
    blind = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)  # ε tells nothing of x_0 at pure noise
    assert Coordinates(blind, [call(t=999.0), call(t=500.0)])(0) == (0, 1)
    blind = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert Coordinates(blind, [call(t=999.0), call(t=500.0)])(0) == pytest.approx((0, -1), abs=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_at_every_level_the_true_output_gives_the_clean_image(prediction):
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction)
    ts = (900.0, 400.5, 20.0)
    at = Coordinates(scheduler, [call(t=t) for t in ts])
    clean, noise = normal(1, 8), normal(1, 8, seed=1)
    for n, t in enumerate(ts):
        alpha, sigma = alpha_sigma(scheduler, torch.tensor(t))
        a, b = at(n)
        x = alpha * clean + sigma * noise
        torch.testing.assert_close(a * x + b * target(prediction, clean, noise, alpha, sigma), clean, rtol=0, atol=1e-6)
    assert len({at(n) for n in range(3)}) == (1 if prediction == "sample" else 3)
    assert all(one[1] != other[1] or prediction == "sample" for one, other in itertools.pairwise(map(at, range(3))))
