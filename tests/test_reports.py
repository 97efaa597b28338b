"""What users' code does and ours once did not expect, each kind with its neighbours: right, or a typed error.

Networks that are no functions, layers that do not compute Wφ, precision, files, numbers and changed weights have test modules of
their own; the table is in docs/soundness.md.
"""

from __future__ import annotations

import functools
import threading
import types

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverSDEScheduler

import bayesdiff as bd
from bayesdiff.checks import BayesdiffError, NotRepeatableError, UnsupportedPipelineError, UnsupportedSchedulerError
from tests import cases

TANGENTS, ENSEMBLE = bd.Tangents(draws=4), bd.Ensemble(members=4)


@pytest.fixture(scope="module")
def made():
    pipe = cases.class_pipeline(DDIMScheduler(clip_sample=False))
    return pipe, cases.class_posterior(pipe)


def other(pipe, scheduler, kind=None):
    """Another pipeline of the same network."""
    out = (kind or type(pipe))(pipe.unet, DDIMScheduler(clip_sample=False))
    vars(out)["scheduler"] = scheduler  # past diffusers' own look at its class
    out.set_progress_bar_config(disable=True)
    return out


def mapped(pipe, posterior, propagation=TANGENTS, **kwargs):
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=propagation)
    return up([1], num_inference_steps=3, generator=cases.seeds(0), **kwargs)


# A scheduler behind another object


class Delegating:
    """As servers put one there for each request."""

    def __init__(self, inner):
        self.__dict__["inner"] = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __setattr__(self, name, value):
        setattr(self.inner, name, value)


class Inherited(DDIMScheduler):
    """One that delegates its step only."""

    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


def patched(scheduler):
    """One whose step was replaced on the instance."""
    step = scheduler.step

    @functools.wraps(step)
    def logged(*args, **kwargs):
        return step(*args, **kwargs)

    scheduler.step = logged
    return scheduler


def twice(scheduler):
    return Delegating(Delegating(scheduler))


def namespace(scheduler):
    """No class at all: only what a pipeline calls."""
    names = ("set_timesteps", "scale_model_input", "step", "config", "init_noise_sigma", "order")
    out = types.SimpleNamespace(**{n: getattr(scheduler, n) for n in names})

    def set_timesteps(*args, **kwargs):
        scheduler.set_timesteps(*args, **kwargs)
        out.timesteps = scheduler.timesteps

    out.set_timesteps = set_timesteps
    return out


@pytest.mark.parametrize("wrapped", [Delegating, twice, patched, namespace, lambda s: Inherited.from_config(s.config)])
@pytest.mark.parametrize("propagation", [TANGENTS, ENSEMBLE], ids=["tangents", "ensemble"])
def test_schedulers_behind_other_objects(made, wrapped, propagation):
    pipe, posterior = made
    expected = mapped(pipe, posterior, propagation)
    scheduler = DDIMScheduler(clip_sample=False)
    before = {**vars(scheduler)}
    wrapped_pipe = other(pipe, wrapped(scheduler))
    found = mapped(wrapped_pipe, posterior, propagation)
    if wrapped is namespace:  # tells no noise levels: the response is interpolated otherwise
        torch.testing.assert_close(found.std, expected.std, rtol=0.1, atol=0.02)
    else:
        assert torch.equal(found.std, expected.std)
    assert vars(scheduler).keys() - {"step"} == before.keys() - {"step"}  # nothing of ours is left on it
    plain = wrapped_pipe([1], num_inference_steps=3, generator=cases.seeds(0), output_type="pt")
    assert torch.equal(
        plain.images, pipe([1], num_inference_steps=3, generator=cases.seeds(0), output_type="pt").images
    )


# Noise of a sampler's own


class Noisy(DDIMScheduler):
    """Adds noise from the global generator, from one that it makes anew from the clock's, or from one that goes on."""

    own: torch.Generator | None = None

    def step(self, *args, **kwargs):
        sample = super().step(*args, **{**kwargs, "return_dict": False})[0]
        return (sample + 0.1 * torch.randn(sample.shape, generator=self.own),)


class Fresh(Noisy):
    def step(self, *args, **kwargs):
        self.own = torch.Generator()
        self.own.seed()
        return super().step(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:the network's response")  # to a spread of rounding's size
@pytest.mark.parametrize("propagation", [TANGENTS, ENSEMBLE], ids=["tangents", "ensemble"])
def test_noise_of_a_samplers_own(made, propagation):
    """The same in every run, or refused: an ensemble of certain weights has no spread."""
    pipe, posterior = made
    certain = posterior.recut(temperature=1e-12)
    sampler = DPMSolverSDEScheduler.from_config(pipe.scheduler.config)
    goes_on = Noisy(clip_sample=False)
    goes_on.own = torch.Generator().manual_seed(0)
    for scheduler in (sampler, Noisy(clip_sample=False), Fresh(clip_sample=False), goes_on):
        try:
            found = mapped(other(pipe, scheduler), certain, propagation)
        except NotRepeatableError:
            continue
        assert float(found.std.max()) < 1e-4, type(scheduler)
    with pytest.raises(NotRepeatableError):
        mapped(other(pipe, Fresh(clip_sample=False)), posterior, propagation)


# Units of what a pipe returns


def halved(x):
    return x / 2 + 0.5


UNITS = {
    "sample": lambda x: x, "halved": halved, "clamped": lambda x: halved(x).clamp(0, 1), "bytes": lambda x: 255 * halved(x),
    "negated": lambda x: -x, "shifted": lambda x: 3 + 0.1 * x,
}  # fmt: skip


@pytest.mark.parametrize(
    ("propagation", "units"), [*((TANGENTS, u) for u in UNITS), (ENSEMBLE, "sample"), (ENSEMBLE, "bytes")], ids=str
)
def test_std_is_in_the_units_of_what_is_returned(made, propagation, units):
    pipe, posterior = made

    class Loop:
        unet, scheduler = pipe.unet, DDIMScheduler(clip_sample=False)

        @torch.no_grad()
        def __call__(self, generator=None):
            self.scheduler.set_timesteps(3)
            x = torch.randn(1, 1, 8, 8, generator=generator)
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.unet(x, t, class_labels=torch.tensor([1]))[0], t, x).prev_sample
            return types.SimpleNamespace(images=UNITS[units](x))

    small = posterior.recut(temperature=1e-4)  # so that what is nonlinear does not matter
    up = bd.UncertaintyPipeline(Loop(), small, propagation=propagation)
    found = up(generator=cases.seeds(0)[0])
    images = []
    for deviation in up.deviations:
        with up.head.shifted(deviation):
            images.append(up.pipe(generator=cases.seeds(0)[0]).images)
    members = torch.stack(images)
    plain = up.pipe(generator=cases.seeds(0)[0]).images
    by_hand = members.std(0) if propagation == ENSEMBLE else (members - plain).square().mean(0).sqrt()
    free = by_hand > 0.5 * by_hand.mean()  # of pixels that are not clamped
    torch.testing.assert_close(found.std[free].mean(), by_hand[free].mean(), rtol=0.05, atol=0)


# What a pipe returns, and what its scheduler has


class Bare(cases.ClassConditionalPipeline):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs, output_type="pt").images


class InTuple(Bare):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs), "and more"


class InDict(Bare):
    def __call__(self, *args, **kwargs):
        return {"seed": 3, "images": super().__call__(*args, **kwargs)}


class InNumpy(Bare):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs).numpy()


@pytest.mark.parametrize("kind", [Bare, InTuple, InDict, InNumpy])
@pytest.mark.parametrize("propagation", [TANGENTS, ENSEMBLE], ids=["tangents", "ensemble"])
def test_pipes_that_return_something_else(made, kind, propagation):
    pipe, posterior = made
    expected = mapped(pipe, posterior, propagation, output_type="pt")
    assert torch.equal(mapped(other(pipe, pipe.scheduler, kind), posterior, propagation).std, expected.std)


@pytest.mark.parametrize("value", [None, "done"])
@pytest.mark.parametrize("propagation", [TANGENTS, ENSEMBLE], ids=["tangents", "ensemble"])
def test_pipes_that_return_nothing_of_the_network(made, value, propagation):
    pipe, posterior = made

    class Silent(Bare):
        def __call__(self, *args, **kwargs):
            super().__call__(*args, **kwargs)
            return value

    silent = other(pipe, pipe.scheduler, Silent)
    with pytest.raises(UnsupportedPipelineError, match="return"):
        mapped(silent, posterior, propagation)


class Plain:
    """A scheduler of one's own: no config, no order."""

    timesteps = None
    init_noise_sigma = 1.0

    def set_timesteps(self, n, device=None):
        self.timesteps = torch.linspace(900, 100, n).long()

    def scale_model_input(self, x, t):
        return x

    def step(self, model_output, timestep, sample, **_):
        return types.SimpleNamespace(prev_sample=sample - 0.1 * model_output)


class Unnamed(Plain):
    def step(self, eps, t, x, **_):
        return (x - 0.1 * eps,)


@pytest.mark.filterwarnings("ignore::bayesdiff.checks.NegativeVarianceWarning")  # of the published recursion
@pytest.mark.parametrize("kind", [Plain, Unnamed])
@pytest.mark.parametrize(
    "propagation", [TANGENTS, ENSEMBLE, bd.BayesDiff(samples=3)], ids=["tangents", "ensemble", "bayesdiff"]
)
def test_schedulers_without_a_configuration(made, kind, propagation):
    """A map; a fit does not know what the network was trained with, and says so."""
    pipe, posterior = made

    class Loop:
        unet, scheduler = pipe.unet, kind()

        def __call__(self, generator=None):
            self.scheduler.set_timesteps(3)
            x = torch.randn(1, 1, 8, 8, generator=generator)
            for t in self.scheduler.timesteps:
                out = self.scheduler.step(self.unet(x, t, class_labels=torch.tensor([1]))[0], t, x)
                x = out[0] if isinstance(out, tuple) else out.prev_sample
            return x

    loop = Loop()
    found = bd.UncertaintyPipeline(loop, posterior, propagation=propagation)(generator=cases.seeds(0)[0])
    assert float(found.std.mean()) > 0
    assert torch.equal(found.output, loop(generator=cases.seeds(0)[0]))
    with pytest.raises(UnsupportedSchedulerError, match="scheduler=…"):
        bd.fit(loop, torch.zeros(2, 1, 8, 8), progress=False)


@pytest.mark.parametrize("steps", [None, 0, -1, 2.5, "4", True, 10**20])
def test_numbers_of_steps(made, steps):
    """Ours, or the pipe's own refusal; None is left to the pipe."""
    pipe, posterior = made
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=TANGENTS)
    with pytest.raises((BayesdiffError, ValueError), match="num_inference_steps"):
        up([1], num_inference_steps=steps, generator=cases.seeds(0))
    assert float(up([1], num_inference_steps=2, generator=cases.seeds(0)).std.min()) > 0  # nothing is left behind


# Arithmetic that no dtype tells of


def by_accelerate(unet):
    from accelerate import Accelerator

    return Accelerator(mixed_precision="bf16", cpu=True).prepare(unet)


def by_hand(unet):
    """As accelerate does it: the forward under autocast, outputs in float32."""
    forward = unet.forward

    def lower(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            out = forward(*args, **{**kwargs, "return_dict": False})[0].float()
        return (out,) if kwargs.get("return_dict") is False else types.SimpleNamespace(sample=out)

    unet.forward = lower
    return unet


def inner(unet):
    """Only the middle."""
    unet.mid_block.forward = torch.autocast("cpu", torch.bfloat16)(unet.mid_block.forward)
    return unet


@pytest.mark.parametrize("lowered", [by_accelerate, by_hand, inner])
def test_networks_that_compute_in_less_than_their_dtype(made, lowered):
    """The map of the float32 network, up to what bfloat16 makes of it; and a fit."""
    pipe, posterior = made
    expected = mapped(pipe, posterior).std
    lower = cases.class_pipeline(DDIMScheduler(clip_sample=False))
    lower.unet = lowered(lower.unet)
    found = mapped(lower, posterior).std
    assert abs(float(found.mean() / expected.mean()) - 1) < 0.1
    assert float(torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1]) > 0.95
    data = {
        "images": torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        "class_labels": torch.arange(6) % 3,
    }
    own, plain = (bd.fit(p, data, generator=torch.Generator().manual_seed(0), progress=False) for p in (lower, pipe))
    assert abs(float(own.weight_variance().mean() / plain.weight_variance().mean()) - 1) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        around = bd.fit(pipe, data, generator=torch.Generator().manual_seed(0), progress=False, covariance="ggn")
    assert (
        abs(float(around.weight_variance().mean() / plain.recut(covariance="ggn").weight_variance().mean()) - 1) < 0.1
    )


# Threads


def test_two_networks_in_two_threads():
    """Both run, each as it does alone."""
    ups, expected, found = [], [], {}
    for seed in (0, 1):
        pipe = cases.class_pipeline(DDIMScheduler(clip_sample=False), seed=seed)
        ups.append(bd.UncertaintyPipeline(pipe, cases.class_posterior(pipe), propagation=TANGENTS))
        expected.append(ups[-1]([1], num_inference_steps=3, generator=cases.seeds(seed)).std)

    def run(i):
        try:
            found[i] = ups[i]([1], num_inference_steps=3, generator=cases.seeds(i)).std
        except BayesdiffError as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert not isinstance(found[i], Exception), found[i]
        assert torch.equal(found[i], expected[i])


# What is printed


def test_everything_public_prints_in_a_line_or_few(made):
    pipe, posterior = made
    found = mapped(pipe, posterior)
    shown = [
        found, posterior, posterior.sigma, posterior.statistics, posterior.network, posterior.geometry, found.latents,
        found.steps, bd.UncertaintyPipeline(pipe, posterior), bd.find_head(pipe),
    ]  # fmt: skip
    for one in shown:
        assert len(repr(one)) < 400, repr(one)[:100]
        assert "tensor(" not in repr(one)
        assert " at 0x" not in repr(one)
