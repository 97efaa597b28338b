"""Few-step samplers: the map is the derivative of the whole trajectory, at one step in closed form."""

from __future__ import annotations

import copy
import inspect

import diffusers
import pytest
import torch

import bayesdiff as bd
from tests import cases

#: Networks without training need more calls than others: maps are what is looked at here, not how good they are.
pytestmark = pytest.mark.filterwarnings("ignore:the network's response is not well known")

STEPS = (1, 2, 4, 8)
SAMPLERS = {
    "lcm": (diffusers.LCMScheduler, {"clip_sample": False}, {}),
    "tcd": (diffusers.TCDScheduler, {"clip_sample": False}, {"eta": 0.3}),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}, {}),
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {}, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}, {}),
    "flow-euler": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, {}),
}
#: Schedulers that compute their step in float32, whatever they are given.
FLOAT32 = {"dpm++", "euler", "flow-euler"}
K = 3


class FlowPipeline(diffusers.DDIMPipeline):
    """Flow matching: the network sees the sample as it is, and the timestep as the scheduler has it."""

    def __init__(self, unet, scheduler):
        diffusers.DiffusionPipeline.__init__(self)
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, classes, *, guidance_scale=1.0, num_inference_steps, generator, output_type):
        self.scheduler.set_timesteps(num_inference_steps)
        shape = (len(classes), 1, 8, 8)
        x = diffusers.utils.torch_utils.randn_tensor(shape, generator=generator, dtype=self.unet.dtype)
        labels = [torch.full((len(classes),), 3), torch.tensor(classes)]
        for t in self.scheduler.timesteps:
            f_u, f_c = (self.unet(x, t, class_labels=y).sample for y in labels)
            x = self.scheduler.step(f_u + guidance_scale * (f_c - f_u), t, x).prev_sample
        return diffusers.ImagePipelineOutput(images=x)


def make(name, dtype=torch.float32, scale=1.0):
    cls, config, kwargs = SAMPLERS[name]
    pipe = cases.class_pipeline(cls(**config), dtype)
    posterior = cases.class_posterior(pipe, scale)
    if name == "flow-euler":
        pipe = FlowPipeline(pipe.unet, pipe.scheduler)
    return pipe, posterior, kwargs


def sample(run, steps, guidance_scale=1.0, **kwargs):
    return run(
        [0, 2], generator=cases.seeds(4, 5), num_inference_steps=steps, guidance_scale=guidance_scale,
        output_type="latent", **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_tangents_are_the_derivative_of_the_trajectory(name, steps, guidance_scale):
    """LCM and TCD add noise in between: the same for the same generator, so that it has no derivative."""
    pipe, posterior, kwargs = make(name, torch.float64, scale=1e5 if name in FLOAT32 else 1e8)
    settings = bd.Tangents(draws=K, refresh=1, num_directions=K, factors=True, trajectory=True)
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=settings)
    out = sample(up, steps, guidance_scale, **kwargs)
    branches = 2 if name == "flow-euler" else 1
    assert out.plain_calls == branches * steps
    assert out.calls == branches * (steps + 2 * K * (steps - 1)) + 1  # to both sides; and one asks for the same again
    assert len(out.trajectory) == steps

    def last(delta):
        with up.head.shifted(delta.double()):
            return sample(pipe, steps, guidance_scale, **kwargs).images.double()

    differences = torch.stack([(last(d) - last(-d)) / 2 for d in up.deviations]) / K**0.5
    got = out.factors.double()
    error = float((got - differences).norm() / differences.norm())
    assert error < (2e-3 if name in FLOAT32 else 5e-5), f"relative error {error:.2g}"


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_default_settings(name, steps):
    pipe, posterior, kwargs = make(name)
    out = sample(bd.UncertaintyPipeline(pipe, posterior), steps, 3.0, **kwargs)
    assert torch.equal(out.images, sample(pipe, steps, 3.0, **kwargs).images)
    assert bool(torch.isfinite(out.variance).all())
    assert float(out.variance.min()) > 0
    assert len(out.steps) == steps


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_the_closed_form(name):
    """Var[x'] = B² Var[g], B the derivative of the only step in g."""
    pipe, posterior, kwargs = make(name)
    draws = 4000
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Tangents(draws=draws))
    out = sample(up, 1, 3.0, **kwargs)
    g = out.steps[0].mean
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(1)
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=s) for s in cases.seeds(4, 5)])
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    extra = {k: v for k, v in kwargs.items() if k in inspect.signature(scheduler.step).parameters}

    def after(output):
        return copy.deepcopy(scheduler).step(output, scheduler.timesteps[0], x, **extra).prev_sample

    torch.testing.assert_close(after(g), out.images, rtol=0, atol=1e-4 * float(out.images.abs().max()))
    slope = (after(g + 1) - after(g - 1)) / 2  # affine
    assert float(slope.abs().min()) > 1e-3  # DDIM's and Euler's one step is at t = 0, where B is 0.01
    ratio = out.latents.variance / (slope.square() * out.steps[0].variance)
    assert float((ratio - 1).abs().max()) < 5 * (2 / draws) ** 0.5
    assert float((ratio.mean() - 1).abs()) < 0.1
