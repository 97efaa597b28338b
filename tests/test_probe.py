"""Schedulers are probed before they are trusted."""

from __future__ import annotations

import copy
import time
from types import SimpleNamespace
from unittest import mock

import diffusers
import pytest
import torch
from bayesdiff.probe import adds_noise, check_affine

from bayesdiff import UncertaintyPipeline
from bayesdiff.checks import UnsupportedSchedulerError
from bayesdiff.propagation.tangents import plan
from tests import cases
from tests.test_linearized_scheduler import ALL


@pytest.mark.parametrize("case", ALL)
def test_what_is_affine_passes(case):
    check_affine(case.make(), channels=2, arguments=case.arguments)


NOISY = {
    "DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "SASolverScheduler", "LCMScheduler",
    "CosineDPMSolverMultistepScheduler", "FlowMatchLCMScheduler",
}  # fmt: skip


@pytest.mark.parametrize("case", [c for c in ALL if c.values[0].steps == 6])
def test_which_samplers_add_noise(case):
    options = case.config | case.arguments
    expected = (
        case.scheduler in NOISY or "sde" in str(options.get("algorithm_type"))
        or (options.get("eta", 0.3 if case.scheduler == "TCDScheduler" else 0) > 0)
        or options.get("s_churn", 0) > 0 or options.get("stochastic_sampling", False)
    )  # fmt: skip
    state = torch.get_rng_state()
    scheduler = case.make()
    # With a seed of its own (DPMSolverSDE's noise_sampler_seed) noise cannot be told from the rest.
    assert adds_noise(scheduler, arguments=case.arguments) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert scheduler.timesteps.equal(case.make().timesteps)


class Affine:
    """A sampler that no library has: x + s(g − x)/10 with a memory of one step."""

    order = 1

    def __init__(self):
        self.config = SimpleNamespace(num_train_timesteps=1000, prediction_type="sample")
        self.timesteps = torch.arange(9, -1, -1)
        self.last = None

    def step(self, model_output, timestep, sample, return_dict=True):
        move = 0.1 * (model_output - sample)
        prev = sample + 1.5 * move - 0.5 * (move if self.last is None else self.last)
        self.last = move
        return (prev,)


class Bent(Affine):
    def step(self, model_output, timestep, sample, return_dict=True):
        return (super().step(model_output, timestep, sample)[0].tanh(),)


class Detached(Affine):
    def step(self, model_output, timestep, sample, return_dict=True):
        return super().step(model_output.detach(), timestep, sample)


class Rounded(Affine):
    def step(self, model_output, timestep, sample, return_dict=True):
        x = super().step(model_output, timestep, sample)[0]
        return (x + torch.from_numpy(0.2 * (x - 0.3 * model_output).detach().cpu().numpy().copy()),)


class Normed(Affine):
    def step(self, model_output, timestep, sample, return_dict=True):
        x = super().step(model_output, timestep, sample)[0]
        return (x * x.norm() / 20,)


class BentLate(Affine):
    def step(self, model_output, timestep, sample, return_dict=True):
        x = super().step(model_output, timestep, sample)[0]
        return (x.sin() if int(timestep) == 2 else x,)


def test_an_unknown_affine_scheduler_passes():
    scheduler = Affine()
    check_affine(scheduler)
    assert scheduler.last is None


@pytest.mark.parametrize("cls", [Bent, Detached, Normed, BentLate, Rounded])
def test_what_is_not_affine_is_refused_with_what_was_measured(cls):
    expected = r"another (bend|slope).*at step \d, t = \d.*allowed: 0\.001"
    with pytest.raises(UnsupportedSchedulerError, match=rf"{cls.__name__}.*{expected}"):
        check_affine(cls())


def test_learned_variances_are_refused_for_what_they_are():
    """The noise of such a step is scaled by the output: its derivative is that of the noise that was drawn."""
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(5)
    with pytest.raises(UnsupportedSchedulerError, match="slope: its derivative is off"):
        check_affine(scheduler, channels=2, output_channels=4)
    assert adds_noise(scheduler, channels=2, output_channels=4)


def test_a_scheduler_that_overflows_is_refused():
    scheduler = diffusers.UniPCMultistepScheduler(solver_type="bh1")  # its last step multiplies infinity by 0
    scheduler.set_timesteps(5)
    with pytest.raises(UnsupportedSchedulerError, match="nan"):
        check_affine(scheduler)


def test_the_reason_names_the_step():
    with pytest.raises(UnsupportedSchedulerError, match="step 7, t = 2"):
        check_affine(BentLate())
    with pytest.raises(UnsupportedSchedulerError, match="derivative is off"):
        check_affine(Detached())


def test_a_run_that_starts_in_the_middle():
    """As image-to-image does."""
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(12)
    check_affine(scheduler, first=12)
    assert scheduler.step_index is None
    check_affine(BentLate(), first=8)


@pytest.mark.parametrize("name", ["DDIMScheduler", "SASolverScheduler", "EulerAncestralDiscreteScheduler"])
def test_nothing_is_touched_and_little_is_spent(name):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(50)
    before = copy.deepcopy(scheduler.__dict__)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    clock = time.perf_counter()
    check_affine(scheduler, channels=1)
    assert time.perf_counter() - clock < 5  # some 0.1 s; a bound that holds on a busy machine
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in before.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, scheduler.__dict__[key]), key


class BentDDIM(diffusers.DDIMScheduler):
    def step(self, *args, **kwargs):
        kwargs["return_dict"] = False
        return (super().step(*args, **kwargs)[0].tanh(),)


def test_a_pipeline_is_refused_before_its_first_step():
    pipe = cases.class_pipeline(BentDDIM(clip_sample=False))
    posterior = cases.class_posterior(pipe, 1e4)
    with pytest.raises(UnsupportedSchedulerError, match=r"BentDDIM with another bend.*ensemble"):
        UncertaintyPipeline(pipe, posterior)(0, num_inference_steps=4, generator=torch.Generator().manual_seed(0))
    assert "step" not in pipe.scheduler.__dict__
    ensemble = UncertaintyPipeline(pipe, posterior, propagation="ensemble", num_tangents=2)
    assert ensemble(0, num_inference_steps=4, generator=torch.Generator().manual_seed(0)).variance.min() >= 0


def test_a_setting_is_probed_once():
    pipe = cases.class_pipeline(diffusers.DDIMScheduler(clip_sample=False))
    up = UncertaintyPipeline(pipe, cases.class_posterior(pipe, 1e4), num_tangents=2)
    with mock.patch("bayesdiff.pipeline.check_affine", wraps=check_affine) as probed:
        for steps, eta in ((3, 0.0), (3, 0.0), (4, 0.0), (4, 0.5), (4, 0.5)):
            up(0, num_inference_steps=steps, eta=eta, generator=torch.Generator().manual_seed(0))
    assert probed.call_count == 3


def test_tangents_are_told_of_noise():
    pipe = cases.class_pipeline(diffusers.DDIMScheduler(clip_sample=False))
    up = UncertaintyPipeline(pipe, cases.class_posterior(pipe, 1e4), num_tangents=2)
    with mock.patch("bayesdiff.propagation.tangents.plan", wraps=plan) as planned:
        for eta in (0.0, 0.5):
            up(0, num_inference_steps=4, eta=eta, generator=torch.Generator().manual_seed(0))
    assert [call.args[-1] for call in planned.call_args_list] == [False, True]
