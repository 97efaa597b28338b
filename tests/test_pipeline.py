"""The watched pipeline: the pipe's own images, and a variance that is the trajectory's derivative."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

from bayesdiff import Gaussian, UncertaintyPipeline, fit
from bayesdiff.checks import (
    ArgumentError,
    HeadMismatchError,
    HeadNotFoundError,
    NegativeVarianceError,
    NonFiniteError,
    ShapeError,
    UnsupportedPipelineError,
    UnsupportedSchedulerError,
)
from bayesdiff.posterior import LaplacePosterior
from tests import cases

SAMPLERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False}, {}),
    "ddim-eta": (DDIMScheduler, {"clip_sample": False}, {"eta": 0.8}),
    "ddim-clip": (DDIMScheduler, {"clip_sample": True}, {}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}, {}),
    "ddpm-clip": (DDPMScheduler, {"clip_sample": True}, {}),
}


def make(name="ddim", dtype=torch.float32, scale=1.0, seed=0):
    """A diffusers pipeline on a tiny U-Net, and a posterior fitted to it."""
    cls, config, kwargs = SAMPLERS[name]
    unet = cases.tiny_unet(channels=1, seed=seed).to(dtype)
    scheduler = cls(num_train_timesteps=1000, **config)
    pipe = (DDIMPipeline if cls is DDIMScheduler else DDPMPipeline)(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    posterior = fit(
        pipe, images, dataset_size=round(32 * scale), generator=torch.Generator().manual_seed(2), progress=False
    )
    return pipe, posterior, kwargs


def seeds(*values):
    return [torch.Generator().manual_seed(v) for v in values]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("propagation", ["tangents", "ensemble"])
def test_images_are_the_pipes_own(name, propagation):
    pipe, posterior, kwargs = make(name)
    plain = pipe(
        batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np", **kwargs
    )
    generator = torch.Generator().manual_seed(0)
    up = UncertaintyPipeline(pipe, posterior, propagation=propagation, num_tangents=3)
    out = up(batch_size=2, generator=generator, num_inference_steps=5, output_type="np", **kwargs)
    assert (out.images == plain.images).all()
    assert out.std.shape == out.variance.shape == (2, 1, 8, 8)
    assert float(out.variance.min()) >= 0
    assert float(out.std.mean()) > 0
    torch.testing.assert_close(out.latents.variance / 4, out.variance)
    assert len(out.steps) == 5
    assert all(isinstance(s, Gaussian) and s.shape == (2, 1, 8, 8) for s in out.steps)
    # The generator ends where the plain run leaves it, so that what follows is unchanged too.
    reference = torch.Generator().manual_seed(0)
    pipe(batch_size=2, generator=reference, num_inference_steps=5, output_type="np", **kwargs)
    assert torch.equal(generator.get_state(), reference.get_state())


@pytest.mark.parametrize("name", SAMPLERS)
def test_tangents_are_the_derivative_of_the_trajectory(name):
    """r = 1 and ten thousand times the data: tangents equal differences of whole trajectories, draw by draw."""
    # With clipping, deviations must be too small to reach over a kink.
    pipe, posterior, kwargs = make(name, torch.float64, scale=1e12 if "clip" in name else 1e6)
    up = UncertaintyPipeline(pipe, posterior, num_tangents=3, refresh=1)

    def trajectory(delta=None):
        last = []
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda *a, **k: last.append(step(*a, **k)) or last[-1]
        try:
            with up.head.shifted(torch.zeros(1, 73, dtype=torch.float64) if delta is None else delta):
                pipe(batch_size=2, generator=seeds(4, 5), num_inference_steps=6, **kwargs)
        finally:
            del pipe.scheduler.step
        return last[-1][0] if isinstance(last[-1], tuple) else last[-1].prev_sample

    out = up(batch_size=2, generator=seeds(4, 5), num_inference_steps=6, **kwargs)
    differences = torch.stack([(trajectory(d) - trajectory(-d)) / 2 for d in up.deviations])
    expected = differences.square().mean(0)
    error = float((out.latents.std - expected.sqrt()).norm() / expected.sqrt().norm())
    assert error < 1e-4


def test_ensemble_agrees_with_tangents_of_the_same_draws():
    pipe, posterior, _ = make(scale=1e4)
    maps = [
        UncertaintyPipeline(pipe, posterior, propagation=p, num_tangents=400 if p == "ensemble" else 40, refresh=1)(
            batch_size=1, generator=seeds(4), num_inference_steps=4
        ).std
        for p in ("tangents", "ensemble")
    ]
    # 40 draws: √(2/40)/2 = 11 % in a standard deviation, shared by all pixels that one direction moves.
    assert 0.7 < float((maps[0] / maps[1]).mean()) < 1.4


@pytest.mark.parametrize("name", ["ddim", "ddim-eta", "ddpm"])
def test_results_do_not_depend_on_the_batch(name):
    pipe, posterior, kwargs = make(name)
    up = UncertaintyPipeline(pipe, posterior, num_tangents=4, refresh=2)
    together = up(batch_size=3, generator=seeds(7, 8, 9), num_inference_steps=6, **kwargs)
    if name == "ddim":  # diffusers draws the noise of DDIM's η and of DDPM in one piece for a list, too
        alone = up(batch_size=1, generator=seeds(8), num_inference_steps=6, **kwargs)
    else:
        alone = up(batch_size=1, generator=seeds(8)[0], num_inference_steps=6, **kwargs)
    torch.testing.assert_close(alone.variance[0], together.variance[1], rtol=2e-3, atol=1e-9)
    again = up(batch_size=3, generator=seeds(7, 8, 9), num_inference_steps=6, **kwargs)
    assert torch.equal(again.variance, together.variance)
    fresh = UncertaintyPipeline(pipe, posterior, num_tangents=4, refresh=2)
    assert torch.equal(
        fresh(batch_size=3, generator=seeds(7, 8, 9), num_inference_steps=6, **kwargs).variance, together.variance
    )


def test_nothing_is_left_behind():
    pipe, posterior, _ = make()
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    config = copy.deepcopy(dict(pipe.scheduler.config))

    def clean():
        hooks = [h for m in pipe.unet.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
        return not hooks and "step" not in pipe.scheduler.__dict__ and dict(pipe.scheduler.config) == config

    up = UncertaintyPipeline(pipe, posterior, num_tangents=2)
    up(batch_size=1, generator=seeds(0), num_inference_steps=3)
    assert clean()
    with pytest.raises(TypeError):
        up(batch_size=1, generator=seeds(0), num_inference_steps=3, no_such_argument=1)
    assert clean()

    class Interrupt(KeyboardInterrupt):
        pass

    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 4:
            raise Interrupt

    handle = pipe.unet.conv_in.register_forward_hook(interrupt)
    with pytest.raises(Interrupt):
        up(batch_size=1, generator=seeds(0), num_inference_steps=3)
    handle.remove()
    assert clean()
    assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())


def test_steps_are_the_closed_form():
    pipe, posterior, _ = make()
    up = UncertaintyPipeline(pipe, posterior, num_tangents=1)
    features = []
    handle = pipe.unet.conv_out.register_forward_pre_hook(lambda _, a: features.append(a[0]))
    out = up(batch_size=2, generator=seeds(1, 2), num_inference_steps=2)
    handle.remove()
    torch.testing.assert_close(out.steps[0].variance, posterior.variance(features[0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.steps[0].mean, pipe.unet.conv_out(features[0]).detach())


class GuidedPipeline(DDIMPipeline):
    """DDIM with a guided U-Net: what a pipeline can do between network and scheduler."""

    rescale = 0.0
    mix = 0.0

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=5, scale=3.0, sequential=False):
        self.scheduler.set_timesteps(num_inference_steps)
        shape = (batch_size, 1, 8, 8)
        x = diffusers.utils.torch_utils.randn_tensor(shape, generator=generator, dtype=self.unet.dtype)
        for t in self.scheduler.timesteps:
            labels = [torch.full((batch_size,), 3), torch.arange(batch_size) % 3]
            if sequential:
                f_u, f_c = (self.unet(x, t, class_labels=y).sample for y in labels)
            else:
                f_u, f_c = self.unet(torch.cat([x, x]), t, class_labels=torch.cat(labels)).sample.chunk(2)
            g = f_u + scale * (f_c - f_u)
            if self.rescale:
                g = g * (
                    1 - self.rescale + self.rescale * f_c.std((1, 2, 3), keepdim=True) / g.std((1, 2, 3), keepdim=True)
                )
            x = self.scheduler.step(g, t, x).prev_sample
            x = x + self.mix
        images = (x / 2 + 0.5).clamp(0, 1)
        return diffusers.ImagePipelineOutput(images=images)


def guided(dtype=torch.float32, scale=1.0):
    unet = cases.tiny_unet(channels=1, classes=4).to(dtype)
    pipe = GuidedPipeline(unet, DDIMScheduler(clip_sample=False))
    generator = torch.Generator().manual_seed(1)
    data = {
        "images": torch.rand(32, 1, 8, 8, generator=generator) * 2 - 1,
        "class_labels": torch.randint(4, (32,), generator=generator),
    }
    posterior = fit(
        pipe, data, dataset_size=round(32 * scale), generator=torch.Generator().manual_seed(2), progress=False
    )
    return pipe, posterior


@pytest.mark.parametrize("sequential", [False, True])
def test_guidance_is_followed_in_feature_space(sequential):
    """The guided step's variance is that of f_u + s(f_c − f_u) over weight draws, not of independent branches."""
    pipe, posterior = guided()
    s = 7.5
    up = UncertaintyPipeline(pipe, posterior, num_tangents=2)
    features = []
    handle = pipe.unet.conv_out.register_forward_pre_hook(lambda _, a: features.extend(a[0].split(2)))
    out = up(batch_size=2, generator=seeds(1, 2), num_inference_steps=2, scale=s, sequential=sequential)
    handle.remove()
    uncond, cond = features[:2]
    weights = posterior.sample(4000, torch.Generator().manual_seed(3)).float()
    f_u, f_c = (posterior.geometry.apply(f, weights) for f in (uncond, cond))
    brute = (f_u + s * (f_c - f_u)).var(0)
    ratio = out.steps[0].variance / brute
    assert float((ratio - 1).abs().max()) < 5 * (2 / 3999) ** 0.5
    independent = (1 - s) ** 2 * posterior.variance(uncond) + s**2 * posterior.variance(cond)
    assert float((independent / brute).median()) > 2


def test_guided_tangents_are_the_derivative():
    pipe, posterior = guided(torch.float64, scale=1e6)
    up = UncertaintyPipeline(pipe, posterior, num_tangents=2, refresh=1)
    out = up(batch_size=2, generator=seeds(1, 2), num_inference_steps=4)

    def images(delta):
        with up.head.shifted(delta):
            return pipe(batch_size=2, generator=seeds(1, 2), num_inference_steps=4).images

    inside = ((out.images > 0.01) & (out.images < 0.99)).double()
    expected = torch.stack([(images(d) - images(-d)) / 2 for d in up.deviations]).square().mean(0).sqrt()
    assert float(((out.std - expected) * inside).norm() / (expected * inside).norm()) < 1e-4


def test_what_cannot_be_followed_is_refused_with_its_residual():
    pipe, posterior = guided()
    pipe.rescale = 0.7
    with pytest.raises(UnsupportedPipelineError, match=r"residual of \d"):
        UncertaintyPipeline(pipe, posterior)(generator=seeds(0), num_inference_steps=2)
    pipe.rescale, pipe.mix = 0.0, 0.1
    with pytest.raises(UnsupportedPipelineError, match=r"changed by up to 0\.1"):
        UncertaintyPipeline(pipe, posterior)(generator=seeds(0), num_inference_steps=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(dtype):
    pipe, posterior = guided()
    up = UncertaintyPipeline(pipe, posterior, num_tangents=4, refresh=1)
    exact = up(batch_size=2, generator=seeds(0, 1), num_inference_steps=3, scale=1.5)
    torch.nn.Module.to(pipe.unet, dtype)
    half = up(batch_size=2, generator=seeds(0, 1), num_inference_steps=3, scale=1.5)
    assert half.images.dtype == dtype
    assert half.variance.dtype == torch.float32
    assert 0.8 < float(half.std.mean() / exact.std.mean()) < 1.25


def test_bad_input():
    pipe, posterior, _ = make()
    other, *_ = make(seed=1)
    with pytest.raises(HeadMismatchError, match="another network"):
        UncertaintyPipeline(other, posterior)
    with pytest.raises(ArgumentError, match="'tangents', 'ensemble'"):
        UncertaintyPipeline(pipe, posterior, propagation="magic")
    with pytest.raises(ArgumentError, match="num_tangents >= 1"):
        UncertaintyPipeline(pipe, posterior, num_tangents=0)
    with pytest.raises(ArgumentError, match="num_inference_steps >= 1"):
        UncertaintyPipeline(pipe, posterior)(num_inference_steps=0)
    with pytest.raises(ArgumentError, match="generator="):
        UncertaintyPipeline(pipe, posterior, propagation="ensemble")(num_inference_steps=2)
    with pytest.raises(HeadNotFoundError, match="unet"):
        UncertaintyPipeline(object(), posterior)
    latent = copy.copy(pipe)
    object.__setattr__(latent, "vae", torch.nn.Identity())
    with pytest.raises(UnsupportedPipelineError, match="decodes latents"):
        UncertaintyPipeline(latent, posterior)


def test_random_networks_are_refused():
    pipe, posterior, _ = make()
    dropping = copy.deepcopy(pipe.unet)
    dropping.mid_block.resnets[0].dropout.p = 0.1
    other = DDIMPipeline(dropping, pipe.scheduler)
    UncertaintyPipeline(other, posterior)
    dropping.train()
    with pytest.raises(ArgumentError, match="evaluation mode"):
        UncertaintyPipeline(other, posterior)
    with pytest.raises(ArgumentError, match="evaluation mode"):
        fit(other, torch.zeros(2, 1, 8, 8), progress=False)


def test_a_poisoned_network_is_noticed():
    pipe, posterior, _ = make()
    poisoned = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        poisoned.conv_in.weight.fill_(float("nan"))
    up = UncertaintyPipeline(DDIMPipeline(poisoned, pipe.scheduler), posterior)
    with pytest.raises(NonFiniteError):
        up(generator=seeds(0), num_inference_steps=2)


def test_gaussians_are_checked():
    with pytest.raises(ShapeError):
        Gaussian(torch.zeros(2), torch.zeros(3))
    for bad in (-1.0, float("nan")):
        with pytest.raises(NegativeVarianceError):
            Gaussian(torch.zeros(1), torch.full((1,), bad))


def test_zero_terminal_snr_is_refused():
    pipe, posterior, _ = make()
    cosine = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing="trailing")
    bad = DDIMPipeline(pipe.unet, pipe.scheduler)
    bad.scheduler = cosine
    up = UncertaintyPipeline(bad, posterior)
    with pytest.raises(UnsupportedSchedulerError, match="zero terminal SNR"):
        up(generator=seeds(0), num_inference_steps=3)


def test_a_loaded_posterior_gives_the_same_map(tmp_path):
    pipe, posterior, _ = make()
    posterior.save(tmp_path)
    loaded = LaplacePosterior.load(tmp_path)
    maps = [
        UncertaintyPipeline(pipe, p, num_tangents=2)(generator=seeds(0), num_inference_steps=3).variance
        for p in (posterior, loaded)
    ]
    assert torch.equal(*maps)
