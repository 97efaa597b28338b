"""BayesDiff's recursion through real pipelines, against the paper's formulas written from ᾱ alone."""

from __future__ import annotations

import copy
import functools
import warnings
from itertools import pairwise
from unittest import mock

import diffusers
import pytest
import torch

import bayesdiff as bd
from bayesdiff.checks import NegativeVarianceWarning, UnsupportedPipelineError, UnsupportedSchedulerError
from bayesdiff.propagation.recursion import Recursion
from bayesdiff.zoo import ClassConditionalPipeline
from tests import cases, references

#: Networks without training need more calls than others: maps are what is looked at here, not how good they are.
pytestmark = pytest.mark.filterwarnings("ignore:the network's response is not well known")

STEPS = 7
SAMPLERS = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "ddpm-large": (diffusers.DDPMScheduler, {"clip_sample": False, "variance_type": "fixed_large"}),
}


def exact(scheduler):
    """With its schedule in float64, so that formulas agree to more than float32's rounding."""
    for name in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod", "one"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def make(name, scale=1e4, dtype=torch.float64):
    cls, config = SAMPLERS[name]
    pipe = cases.class_pipeline(exact(cls(**config)), dtype)
    return pipe, cases.class_posterior(pipe, scale)


def run(pipe, posterior, steps=STEPS, classes=(0, 2), seeds=(3, 4), guidance_scale=1.0, eta=0.0, **kwargs):
    """The output, the recursion, and its mean and variance behind each step in float64."""
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.BayesDiff(trajectory=True, **kwargs))
    seen, advance = [], Recursion._advance

    def spy(self, step):
        advance(self, step)
        seen.append((self, self._mean.clone(), self._variance.clone()))

    with mock.patch.object(Recursion, "_advance", spy), warnings.catch_warnings():
        warnings.simplefilter("ignore", NegativeVarianceWarning)
        out = up(
            list(classes), generator=cases.seeds(*seeds), num_inference_steps=steps, guidance_scale=guidance_scale,
            eta=eta, output_type="latent",
        )  # fmt: skip
    return out, seen[0][0], [(mean, variance) for _, mean, variance in seen]


def abars(scheduler):
    """ᾱ at each step's timestep, and 1 where the last ends."""
    return [*(float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps), 1.0]


def reference(name, pipe, posterior, samples, recursion, guidance_scale=1.0, classes=(0, 2), **kwargs):
    labels = torch.tensor(classes)
    levels = abars(pipe.scheduler)

    def branches(x, n):
        features = []
        handle = pipe.unet.conv_out.register_forward_pre_hook(lambda _, a: features.append(a[0]))
        t = pipe.scheduler.timesteps[n]
        with torch.no_grad():
            outputs = [pipe.unet(x, t, class_labels=y).sample for y in (torch.full_like(labels, 3), labels)]
        handle.remove()
        return outputs, [posterior.variance(f) for f in features]

    def network(x, n):
        f_u, f_c = branches(x, n)[0]
        return f_u + guidance_scale * (f_c - f_u)

    variances = []
    for n, x in enumerate(samples):
        v_u, v_c = branches(x, n)[1]
        variances.append((1 - guidance_scale) ** 2 * v_u + guidance_scale**2 * v_c)
    large = name == "ddpm-large"
    noises = [0.0 if name == "ddim" else references.posterior_noise(a, b, large=large) for a, b in pairwise(levels)]
    return references.bayesdiff_recursion(
        references.ddim_moments if name == "ddim" else references.ddpm_moments, noises, levels, network, samples,
        variances, [recursion.draws(n, samples[0].shape[1:]) for n in range(len(samples))], **kwargs,
    )  # fmt: skip


def samples_of(pipe, **kwargs):
    """The pipe's own samples, x at the start of each step, in the network's dtype."""
    kept = []
    step = pipe.scheduler.step

    @functools.wraps(step)  # the pipe asks whether it takes a generator
    def keep(output, t, sample, **arguments):
        kept.append(sample)
        return step(output, t, sample, **arguments)

    with mock.patch.object(pipe.scheduler, "step", keep):
        pipe([0, 2], generator=cases.seeds(3, 4), num_inference_steps=STEPS, output_type="latent", **kwargs)
    return kept


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(
    ("name", "skip_interval", "guidance_scale"),
    [*((n, k, 1.0) for n in SAMPLERS for k in (1, 3)), ("ddim", 1, 3.0), ("ddim", 3, 3.0), ("ddpm", 1, 3.0)],
)
def test_the_papers_formulas(name, skip_interval, guidance_scale, centered):
    pipe, posterior = make(name)
    samples = samples_of(pipe, guidance_scale=guidance_scale)
    out, recursion, found = run(
        pipe, posterior, guidance_scale=guidance_scale, samples=10, skip_interval=skip_interval, centered=centered
    )
    mean, after = reference(
        name, pipe, posterior, samples, recursion, guidance_scale, skip_interval=skip_interval, centered=centered
    )
    assert len(found) == len(out.trajectory) == STEPS
    torch.testing.assert_close(found[-1][0], mean, rtol=0, atol=1e-9 * float(mean.abs().max()))
    for (_, got), expected, kept in zip(found, after, out.trajectory, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
        assert torch.equal(kept.variance, got.clamp(min=0).float())
    assert torch.equal(out.variance, found[-1][1].float())
    torch.testing.assert_close(out.latents.mean, mean.float())
    quantified = len(range(0, STEPS, skip_interval))
    assert out.plain_calls == STEPS
    assert out.calls == STEPS + 10 * (quantified - 1) + 1  # the last asks whether the network repeats itself


def test_branches_are_taken_as_independent():
    """Σ w²v: several times the variance of g, which is the head's of ψ."""
    pipe, posterior = make("ddim")
    out, *_ = run(pipe, posterior, steps=1, guidance_scale=3.0)
    level = abars(pipe.scheduler)[0]
    from_g = out.steps[0].variance * (1 - level) / level  # x' = x0, so B = −σ/α
    assert float((out.latents.variance / from_g).median()) > 1.5
    alone, *_ = run(pipe, posterior, steps=1)
    torch.testing.assert_close(alone.latents.variance.double(), alone.steps[0].variance * (1 - level) / level)


def sigmas(scheduler):
    return [float(s) for s in scheduler.sigmas]


def ddim_eta(scheduler, eta):
    """A and s² of each step."""
    for a, b in pairwise(abars(scheduler)):
        yield (b / a) ** 0.5, eta**2 * (1 - b) / (1 - a) * (1 - a / b)


def ddpm(scheduler, large):
    for a, b in pairwise(abars(scheduler)):
        yield (b / a) ** 0.5, references.posterior_noise(a, b, large=large)


def euler_ancestral(scheduler):
    """Karras et al. 2022 as k-diffusion has it; x = x0 + σε."""
    for a, b in pairwise(sigmas(scheduler)):
        yield 1.0, b**2 * (a**2 - b**2) / a**2


NOISES = {
    "ddim": (diffusers.DDIMScheduler(clip_sample=False), 0.0, lambda s: ddim_eta(s, 0.0)),
    "ddim-eta-0.5": (diffusers.DDIMScheduler(clip_sample=False), 0.5, lambda s: ddim_eta(s, 0.5)),
    "ddim-eta-1": (diffusers.DDIMScheduler(clip_sample=False), 1.0, lambda s: ddim_eta(s, 1.0)),
    "ddpm": (diffusers.DDPMScheduler(clip_sample=False), 0.0, lambda s: ddpm(s, False)),
    "ddpm-large": (
        diffusers.DDPMScheduler(clip_sample=False, variance_type="fixed_large"), 0.0, lambda s: ddpm(s, True)
    ),
    "euler": (diffusers.EulerDiscreteScheduler(), 0.0, lambda s: ((1.0, 0.0) for _ in s.timesteps)),
    "euler-ancestral": (diffusers.EulerAncestralDiscreteScheduler(), 0.0, euler_ancestral),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NOISES)
def test_the_noise_of_a_step_is_measured(name, dtype):
    """With certain weights and no step quantified after the first, Var[x'] = A² Var[x] + s²."""
    scheduler, eta, formula = NOISES[name]
    scheduler = copy.deepcopy(scheduler)
    pipe = cases.class_pipeline(exact(scheduler) if dtype == torch.float64 else scheduler, dtype)
    posterior = cases.class_posterior(pipe, 1e14)
    out, _, found = run(pipe, posterior, eta=eta, skip_interval=STEPS)
    assert out.calls == STEPS + 1
    variance = 0.0
    for (_, got), (of_x, noise) in zip(found, formula(pipe.scheduler), strict=True):
        variance = of_x**2 * variance + noise
        torch.testing.assert_close(got, torch.full_like(got, variance), rtol=2e-5, atol=1e-8)
    assert (variance > 1e-3) == (name not in ("ddim", "euler"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["ddim-eta-1", "ddpm", "euler-ancestral"])
def test_noise_in_half_precision(name, dtype):
    scheduler, eta, formula = NOISES[name]
    pipe = cases.class_pipeline(copy.deepcopy(scheduler))
    posterior = cases.class_posterior(pipe, 1e14)
    torch.nn.Module.to(pipe.unet, dtype)
    _, _, found = run(pipe, posterior, eta=eta, skip_interval=STEPS)
    variance = 0.0
    for (_, got), (of_x, noise) in zip(found, formula(pipe.scheduler), strict=True):
        variance = of_x**2 * variance + noise
        torch.testing.assert_close(got, torch.full_like(got, variance), rtol=2e-2, atol=1e-8)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (diffusers.DPMSolverMultistepScheduler, {}),
        (diffusers.UniPCMultistepScheduler, {}),
        (diffusers.HeunDiscreteScheduler, {}),
        (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
        (diffusers.LMSDiscreteScheduler, {}),
        (diffusers.DEISMultistepScheduler, {}),
    ],
)
def test_samplers_with_a_memory_are_refused(cls, config):
    pipe = cases.class_pipeline(cls(**config))
    posterior = cases.class_posterior(pipe)
    up = bd.UncertaintyPipeline(pipe, posterior, propagation="bayesdiff")
    with pytest.raises(UnsupportedSchedulerError, match=rf"one-step sampler.*{cls.__name__}.*contribute (\S+) of") as e:
        up([0], generator=cases.seeds(0), num_inference_steps=6)
    share = float(str(e.value).split("contribute ")[1].split()[0])
    assert 1e-5 < share < 10
    # And the same sampler is followed by tangents.
    tangents = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Tangents(draws=2))
    assert bool(torch.isfinite(tangents([0], generator=cases.seeds(0), num_inference_steps=6).variance).all())


def test_first_order_of_a_multistep_sampler_is_followed():
    pipe = cases.class_pipeline(diffusers.DPMSolverMultistepScheduler(solver_order=1))
    out, *_ = run(pipe, cases.class_posterior(pipe, 1e4), samples=2)
    assert out.calls == STEPS + 2 * (STEPS - 1) + 1


class Rescaling(ClassConditionalPipeline):
    """With guidance rescale (Lin et al. 2023)."""

    @torch.no_grad()
    def __call__(self, generator):
        self.scheduler.set_timesteps(3)
        x = torch.randn(2, 1, 8, 8, generator=generator, dtype=self.unet.dtype)
        for t in self.scheduler.timesteps:
            labels = torch.tensor([3, 3, 0, 1])
            f_u, f_c = self.unet(torch.cat([x, x]), t, class_labels=labels).sample.chunk(2)
            g = f_u + 3 * (f_c - f_u)
            g = g * (0.3 + 0.7 * f_c.std((1, 2, 3), keepdim=True) / g.std((1, 2, 3), keepdim=True))
            x = self.scheduler.step(g, t, x).prev_sample
        return diffusers.ImagePipelineOutput(images=x)


def test_rescaled_guidance_is_refused():
    pipe, posterior = make("ddim")
    up = bd.UncertaintyPipeline(Rescaling(pipe.unet, pipe.scheduler), posterior, propagation="bayesdiff")
    with pytest.raises(UnsupportedPipelineError, match=r'that is rescaled\?\); use propagation="tangents"'):
        up(torch.Generator().manual_seed(0))


class Decoding(ClassConditionalPipeline):
    """What it returns is more than its last sample, scaled."""

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        images = super().__call__(*args, **kwargs).images
        return diffusers.ImagePipelineOutput(images=images.tanh())


@pytest.mark.filterwarnings("ignore:.* of the recursion's variances are negative")
def test_a_result_that_is_not_the_last_sample_is_refused():
    """A variance for each number and no covariance: nothing can be decoded."""
    pipe, posterior = make("ddim")
    up = bd.UncertaintyPipeline(Decoding(pipe.unet, pipe.scheduler), posterior, propagation=bd.BayesDiff(samples=2))
    with pytest.raises(UnsupportedPipelineError, match=r"returns its last sample, scaled.*output_type=\"latent\""):
        up([0], num_inference_steps=2, generator=cases.seeds(0), output_type="latent")
    with pytest.raises(UnsupportedPipelineError, match="a pipeline with a scheduler for the recursion"):
        bd.propagate(
            lambda x: pipe.unet(x, 5).sample, pipe.unet, posterior, torch.zeros(1, 1, 8, 8), propagation="bayesdiff"
        )


def test_pixels_have_a_quarter_of_the_samples_variance():
    pipe, posterior = make("ddim")
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.BayesDiff(samples=3, centered=True))
    pixels, latent = (
        up([0], num_inference_steps=3, generator=cases.seeds(0), output_type=kind) for kind in ("pil", "latent")
    )
    torch.testing.assert_close(4 * pixels.variance, latent.variance)
    assert torch.equal(pixels.latents.variance, latent.latents.variance)


def test_negative_variances_are_kept_and_warned_of():
    """Ten uncentred draws on a network that is not certain: the paper's variance is soon negative."""
    pipe, posterior = make("ddim", scale=1.0, dtype=torch.float32)
    up = bd.UncertaintyPipeline(pipe, posterior, propagation="bayesdiff")
    with pytest.warns(
        NegativeVarianceWarning, match=r'% of the recursion.*in \d+ steps.*propagation="tangents"'
    ) as seen:
        out = up([0, 1], generator=cases.seeds(3, 4), num_inference_steps=STEPS, output_type="latent")
    negative = out.variance < 0
    share = float(negative.double().mean())
    assert share > 0.01
    assert f"{share:.1%}" in str(seen[0].message)
    assert bool((out.std[negative] == 0).all())
    assert bool((out.latents.variance[negative] == 0).all())
    torch.testing.assert_close(out.std[~negative], out.variance[~negative].sqrt())


def test_the_same_object_gives_the_same_map_and_another_seed_another():
    pipe, posterior = make("ddpm", dtype=torch.float32)
    ups = [
        bd.UncertaintyPipeline(
            pipe, posterior,
            propagation=bd.BayesDiff(centered=True, samples=3, generator=torch.Generator().manual_seed(seed)),
        )
        for seed in (0, 0, 1)
    ]  # fmt: skip
    one, again, same, other = (
        up([0], generator=cases.seeds(3), num_inference_steps=4, output_type="latent").variance for up in (ups[0], *ups)
    )
    assert torch.equal(one, again)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_images_and_generators_are_the_pipes_own():
    pipe, posterior = make("ddpm", dtype=torch.float32)
    mine, theirs = cases.seeds(5, 5)
    plain = pipe([0, 1], generator=theirs, num_inference_steps=4, output_type="np").images
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.BayesDiff(centered=True, samples=2))
    torch.manual_seed(0)
    default = torch.get_rng_state()
    out = up([0, 1], generator=mine, num_inference_steps=4, output_type="np")
    assert (out.images == plain).all()
    assert torch.equal(mine.get_state(), theirs.get_state())
    assert torch.equal(torch.get_rng_state(), default)
