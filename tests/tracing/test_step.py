"""The steps of a scheduler, seen, and the guidance weights read off from what reaches it."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers

from bayesdiff.head.find import find_head
from bayesdiff.tracing.network import Session
from bayesdiff.tracing.rerun import Rerun
from bayesdiff.tracing.step import Probe, Spy, call_step, previous_sample
from tests import cases

STEPS = 3


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the spy ---


def spied(scheduler):
    seen = []

    def on_step(original, given):
        seen.append(given)
        return call_step(original, given)

    return Spy(scheduler, on_step), seen


def test_a_spy_is_the_scheduler_to_all_who_look():
    scheduler = EulerDiscreteScheduler()
    spy, seen = spied(scheduler)
    assert isinstance(spy, EulerDiscreteScheduler)
    assert spy.__class__ is EulerDiscreteScheduler
    assert spy.__class__.__name__ in {k.name for k in KarrasDiffusionSchedulers}
    assert inspect.signature(spy.step) == inspect.signature(scheduler.step)
    assert len(spy) == len(scheduler)
    assert spy.config is scheduler.config
    spy.set_timesteps(4)
    spy.is_scale_input_called = True
    assert scheduler.is_scale_input_called
    assert torch.equal(spy.timesteps, scheduler.timesteps)
    assert spy.order == 1
    assert not hasattr(spy, "no_such_attribute")
    x = noise(1, 1, 2, 2)
    out = spy.step(0.5 * x, spy.timesteps[0], sample=x, return_dict=False)
    assert seen[0].keys() == {"model_output", "timestep", "sample", "return_dict"}
    again = copy.deepcopy(scheduler)
    again._step_index = 0
    assert torch.equal(out[0], again.step(0.5 * x, again.timesteps[0], x).prev_sample)
    assert "step" not in vars(scheduler)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_spy_is_a_scheduler_whose_steps_are_not_seen(how):
    """Some pipelines step a copy beside the scheduler: frames and sound."""
    scheduler = DDIMScheduler()
    spy, seen = spied(scheduler)
    spy.set_timesteps(4)
    other = how(spy)
    assert type(other) is DDIMScheduler
    assert other is not scheduler
    assert torch.equal(other.timesteps, scheduler.timesteps)
    other.step(noise(1, 1, 2, 2), other.timesteps[0], noise(1, 1, 2, 2))
    assert not seen


def test_a_step_that_takes_anything():
    class Passing(DDIMScheduler):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    scheduler = Passing()
    spy, seen = spied(scheduler)
    spy.set_timesteps(4)
    x, t = noise(1, 1, 2, 2), scheduler.timesteps[1]
    expected = DDIMScheduler.step(scheduler, 0.5 * x, t, x, eta=0.0).prev_sample
    assert torch.equal(spy.step(0.5 * x, t, x, eta=0.0).prev_sample, expected)
    assert torch.equal(spy.step(model_output=0.5 * x, timestep=t, sample=x).prev_sample, expected)
    assert [given.keys() for given in seen] == [
        {"model_output", "timestep", "sample", "eta"},
        {"model_output", "timestep", "sample"},
    ]


def test_previous_sample():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(2)
    x = noise(1, 1, 2, 2)
    as_object = scheduler.step(x, scheduler.timesteps[0], x)
    as_tuple = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)
    assert torch.equal(previous_sample(as_object), previous_sample(as_tuple))
    assert torch.equal(previous_sample(x), x)


# --- the weights ---


def probed(pipe, **kwargs):
    """Every step, as the probe sees it."""
    given = {"generator": cases.seeds(1, 2), "num_inference_steps": STEPS, "batch_size": 2, **kwargs}
    session = Session(Rerun(pipe, (), given), pipe.unet, find_head(pipe))
    session.record()
    probe = Probe(session)
    clone = copy.copy(pipe)
    vars(clone)["scheduler"] = Spy(pipe.scheduler, probe.on_step)
    session.replay(probe.on_network, None, clone)
    return session, probe.steps


def combined(session, step):
    """Σ w f of each sample's sources."""
    outputs = [session.network.calls[n].output.sample for n in step.calls]
    return torch.stack([
        sum(s.weight * outputs[s.call - step.calls[0]][s.row] for s in sources) for sources in step.sources
    ])  # fmt: skip


def weights(step):
    return [[(s.call - step.calls[0], s.row, round(s.weight, 6)) for s in sources] for sources in step.sources]


@pytest.fixture(scope="module")
def pipe():
    return cases.guided()[0]


@pytest.fixture(autouse=True)
def as_it_was(pipe):
    yield
    for name in ("rescale", "interval", "single", "bend", "mix"):
        vars(pipe).pop(name, None)


@pytest.mark.parametrize("s", [0.0, 0.5, 3.0, 7.5, 15.0])
def test_classifier_free_guidance(pipe, s):
    session, steps = probed(pipe, scale=s)
    assert [step.index for step in steps] == list(range(STEPS))
    for n, step in enumerate(steps):
        assert step.exact
        assert step.calls == (n,)
        assert weights(step) == [[part for part in ((0, b, 1 - s), (0, 2 + b, s)) if part[2]] for b in (0, 1)]
        torch.testing.assert_close(combined(session, step), step.output, rtol=0, atol=2e-5)
        assert step.places.tolist() == list(range(64))


def test_branches_in_calls_of_their_own(pipe):
    _, steps = probed(pipe, scale=7.5, sequential=True)
    for n, step in enumerate(steps):
        assert step.calls == (2 * n, 2 * n + 1)
        assert weights(step) == [[(0, b, -6.5), (1, b, 7.5)] for b in (0, 1)]


def test_every_sample_has_a_scale_of_its_own(pipe):
    session, steps = probed(pipe, scale=[1.5, 9.5])
    assert weights(steps[1]) == [[(0, 0, -0.5), (0, 2, 1.5)], [(0, 1, -8.5), (0, 3, 9.5)]]
    torch.testing.assert_close(combined(session, steps[1]), steps[1].output, rtol=0, atol=2e-5)


def test_guidance_in_some_steps_only(pipe):
    pipe.interval = (1, 1)
    _, steps = probed(pipe, scale=3.0)
    assert [len(step.sources[0]) for step in steps] == [1, 2, 1]
    assert weights(steps[0]) == [[(0, 0, 1.0)], [(0, 1, 1.0)]]


FOLLOWED = {
    "negated": lambda g: -g,
    "scaled": lambda g: 1.02 * g,
    "cast": lambda g: g.double().float(),
    "in-place": lambda g: g.mul_(2),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_else_is_linear_is_in_the_weights(pipe, name):
    pipe.bend = FOLLOWED[name]
    session, steps = probed(pipe)
    assert all(step.exact for step in steps)
    torch.testing.assert_close(combined(session, steps[-1]), steps[-1].output, rtol=0, atol=2e-5)


def test_numbers_that_change_their_places(pipe):
    pipe.bend = lambda g: g.flip(-1)
    _, steps = probed(pipe)
    assert steps[0].exact
    assert steps[0].places.view(8, 8)[0].tolist() == list(range(7, -1, -1))


BENT = {
    "clipped": lambda g: g.clamp(-0.1, 0.1),
    "squared": lambda g: g.square(),
    "normed": lambda g: g / g.norm(),
    "mixed": lambda g: g + 0.1 * g.flip(-1),
    "averaged": lambda g: g.mean((2, 3), keepdim=True).expand_as(g).clone(),
    "masked": lambda g: torch.where(torch.arange(64).view(8, 8) < 7, g, 2 * g),
    "lost": lambda g: torch.from_numpy(g.numpy().copy()),
}


@pytest.mark.parametrize("name", BENT)
def test_what_is_no_weighted_sum_is_not_exact(pipe, name):
    pipe.bend = BENT[name]
    _, steps = probed(pipe)
    assert not any(step.exact for step in steps)


def test_rescaled_guidance_is_not_exact(pipe):
    pipe.rescale = 0.7
    _, steps = probed(pipe, scale=3.0)
    assert not any(step.exact for step in steps)


class Denoising(cases.GuidedPipeline):
    """Its scheduler is given x + f."""

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=STEPS):
        self.scheduler.set_timesteps(num_inference_steps)
        x = noise(batch_size, 1, 8, 8)
        for t in self.scheduler.timesteps:
            f = self.unet(x, t, class_labels=torch.zeros(batch_size, dtype=torch.long)).sample
            x = self.scheduler.step(0.1 * x + f, t, x).prev_sample
        return (x,)


def test_the_sample_is_as_it_is(pipe):
    """The variance of a step is that of what it is given, at the sample where it is given."""
    session, steps = probed(Denoising(pipe.unet, pipe.scheduler))
    for step in steps:
        assert weights(step) == [[(0, 0, 1.0)], [(0, 1, 1.0)]]
        torch.testing.assert_close(combined(session, step), step.output - 0.1 * step.sample)
