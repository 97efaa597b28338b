"""The derivative of a whole sampling chain, against finite differences of the real scheduler in float64."""

from __future__ import annotations

import copy
import inspect

import diffusers
import pytest
import torch

from bayesdiff.checks import UnsupportedSchedulerError
from bayesdiff.linearized_scheduler import LinearizedScheduler, copy_scheduler
from tests import cases

STEPS = 8
CASES = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}, {}),
    "ddim-eta": (diffusers.DDIMScheduler, {"clip_sample": False}, {"eta": 0.7}),
    "ddim-clip": (diffusers.DDIMScheduler, {"clip_sample": True}, {}),
    "ddim-clip-eta": (diffusers.DDIMScheduler, {"clip_sample": True}, {"eta": 1.0}),
    "ddim-clip-reused": (diffusers.DDIMScheduler, {"clip_sample": True}, {"use_clipped_model_output": True}),
    "ddim-threshold": (
        diffusers.DDIMScheduler,
        {"clip_sample": False, "thresholding": True, "sample_max_value": 3.0},
        {},
    ),
    "ddim-v": (diffusers.DDIMScheduler, {"clip_sample": False, "prediction_type": "v_prediction"}, {}),
    "ddim-x0": (diffusers.DDIMScheduler, {"clip_sample": True, "prediction_type": "sample"}, {}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}, {}),
    "ddpm-clip": (diffusers.DDPMScheduler, {"clip_sample": True}, {}),
    "ddpm-large": (diffusers.DDPMScheduler, {"clip_sample": False, "variance_type": "fixed_large"}, {}),
    # Not written for, and they work: the mechanism is the scheduler's own step.
    "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {}, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}, {}),
    "flow-euler": (diffusers.FlowMatchEulerDiscreteScheduler, {}, {}),
}
#: Schedulers that compute their step in float32, whatever they are given.
FLOAT32 = {"euler", "flow-euler", "dpmsolver++"}


def scale_input(scheduler, x, t):
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


def chain(scheduler, x, network, injections, linearized=None, d_x=None, arguments=None):
    """Run a sampler on ``network(x) + h·injection``; with ``linearized`` carry the derivative in h beside it."""
    generator = torch.Generator().manual_seed(3)
    arguments = dict(arguments or {})
    takes = inspect.signature(scheduler.step).parameters
    if "generator" in takes:
        arguments["generator"] = generator
    d = d_x
    clipped = 0
    for n, t in enumerate(scheduler.timesteps):
        z = scale_input(scheduler, x, t)
        g = network(z) + injections[n % len(injections)]
        if linearized is not None:
            # The network is linear, so its derivative along d is network(c·d) − network(0).
            scale = scale_input(scheduler, torch.ones_like(x), t)
            d_g = torch.stack([network(scale * v) - network(torch.zeros_like(v)) for v in d])
            d_g = d_g + linearized.injections[:, n % len(injections)]
            d = linearized.step(d_g, d, g, t, x, **arguments)
        result = scheduler.step(g, t, x, **arguments)
        clipped += int((getattr(result, "pred_original_sample", x * 0).abs() == 1).sum())
        x = result.prev_sample
    return (x, d, clipped) if linearized is not None else x


@pytest.mark.parametrize("name", CASES)
def test_chain_derivative_equals_finite_difference(name):
    cls, config, arguments = CASES[name]
    base = cls(num_train_timesteps=1000, **config)
    base.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    batch, k, shape = 3, 2, (2, 4, 4)
    x = torch.randn(batch, *shape, generator=generator, dtype=torch.float64) * float(
        getattr(base, "init_noise_sigma", 1.0)
    )
    mix = torch.randn(2, 2, generator=generator, dtype=torch.float64) * 0.3 + 0.5 * torch.eye(2, dtype=torch.float64)
    shift = torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5
    steps = len(base.timesteps)
    directions = torch.randn(k, steps, batch, *shape, generator=generator, dtype=torch.float64)
    start = torch.randn(k, batch, *shape, generator=generator, dtype=torch.float64)

    def network(z):
        return torch.einsum("ij,bjhw->bihw", mix, z) + shift

    zero = torch.zeros(steps, batch, *shape, dtype=torch.float64)
    with LinearizedScheduler(base, k) as linearized:
        linearized.injections = directions
        _, tangent, clipped = chain(
            copy_scheduler(base), x, network, zero, linearized, start.clone(), arguments=arguments
        )
    step = 1e-2 if name in FLOAT32 else 1e-6
    worst = 0.0
    for i in range(k):
        up, down = (
            chain(copy_scheduler(base), x + h * start[i], network, h * directions[i], arguments=arguments)
            for h in (step, -step)
        )
        difference = (up - down).double() / (2 * step)
        worst = max(worst, float((tangent[i] - difference).norm() / difference.norm()))
    if "clip" in name or name == "ddim-x0":
        assert clipped > 10, "the case must clip something to test clipping"
    assert worst < (2e-5 if name in FLOAT32 else 1e-7), f"{name}: relative error {worst:.2g}"


def test_clipping_matters():
    """The derivative with clipping is not that without: the test above can fail."""
    results = []
    for clip in (True, False):
        s = diffusers.DDIMScheduler(clip_sample=clip)
        s.set_timesteps(5)
        x = 2 * torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with LinearizedScheduler(s, 1) as linearized:
            d = linearized.step(torch.ones(1, 1, 1, 4, 4), torch.ones(1, 1, 1, 4, 4), 0.5 * x, s.timesteps[-1], x)
        results.append(d)
    assert not torch.allclose(*results)


def test_the_users_scheduler_and_generator_stay_as_they_were():
    s = cases.scheduler()
    s.set_timesteps(4)
    before = copy.deepcopy(s.__dict__)
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    torch.manual_seed(0)
    default = torch.get_rng_state()
    x = torch.zeros(1, 1, 2, 2)
    with LinearizedScheduler(s, 2) as linearized:
        linearized.step(torch.ones(2, 1, 1, 2, 2), torch.ones(2, 1, 1, 2, 2), x, s.timesteps[0], x, generator=generator)
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), default)
    for key, value in before.items():
        same = torch.equal(value, s.__dict__[key]) if isinstance(value, torch.Tensor) else value == s.__dict__[key]
        assert same, key


def test_a_step_without_derivative_is_refused():
    class Rounding(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, **kwargs):
            x = super().step(model_output, timestep, sample).prev_sample
            return (torch.from_numpy(x.detach().numpy().copy()),)

    s = Rounding(clip_sample=False)
    s.set_timesteps(3)
    x = torch.zeros(1, 1, 2, 2)
    with LinearizedScheduler(s, 1) as linearized, pytest.raises(UnsupportedSchedulerError, match="Rounding"):
        linearized.step(torch.ones(1, 1, 1, 2, 2), torch.ones(1, 1, 1, 2, 2), x, s.timesteps[0], x)
