"""A pipeline with uncertainty: its own images, and a variance that is the trajectory's derivative."""

from __future__ import annotations

import copy
import functools

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

import bayesdiff as bd
from bayesdiff.checks import (
    ArgumentError,
    BayesdiffWarning,
    HeadMismatchError,
    HeadNotFoundError,
    NegativeVarianceError,
    NonFiniteError,
    NotRepeatableError,
    ShapeError,
    UnsupportedSchedulerError,
)
from tests import cases
from tests.cases import guided, seeds

SAMPLERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False}, {}),
    "ddim-eta": (DDIMScheduler, {"clip_sample": False}, {"eta": 0.8}),
    "ddim-clip": (DDIMScheduler, {"clip_sample": True}, {}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}, {}),
    "ddpm-clip": (DDPMScheduler, {"clip_sample": True}, {}),
}
#: Networks without training need more calls than others: maps are what is looked at here, not how good they are.
pytestmark = pytest.mark.filterwarnings("ignore:the network's response is not well known")
#: One of each way, small.
WAYS = {
    "tangents": functools.partial(bd.Tangents, draws=6, refresh=2, num_directions=3),
    "ensemble": functools.partial(bd.Ensemble, members=3),
    "ensemble-redrawn": functools.partial(bd.Ensemble, members=3, redraw=True),
    "bayesdiff": functools.partial(bd.BayesDiff, samples=3),
    "bayesdiff-centered": functools.partial(bd.BayesDiff, samples=3, skip_interval=2, centered=True),
}
#: What tiny networks without training may make of a sampler or of the recursion.
noisy = pytest.mark.filterwarnings(
    "ignore:.*of the recursion's variances are negative", "ignore:the sampler clips or bends"
)


def make(name="ddim", dtype=torch.float32, scale=1.0, seed=0):
    """A diffusers pipeline on a tiny U-Net, and a posterior fitted to it."""
    cls, config, kwargs = SAMPLERS[name]
    unet = cases.tiny_unet(channels=1, seed=seed).to(dtype)
    scheduler = cls(num_train_timesteps=1000, **config)
    pipe = (DDIMPipeline if cls is DDIMScheduler else DDPMPipeline)(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    posterior = bd.fit(
        pipe, images, dataset_size=round(32 * scale), generator=torch.Generator().manual_seed(2), progress=False
    )
    return pipe, posterior, kwargs


@noisy
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("way", WAYS)
def test_images_are_the_pipes_own(name, way):
    """And generators end where the plain run leaves them, so that what follows is unchanged too."""
    pipe, posterior, kwargs = make(name)
    kwargs = {"num_inference_steps": 5, "output_type": "np", "batch_size": 2, **kwargs}
    mine, theirs = seeds(0, 0)
    torch.manual_seed(1)
    default = torch.get_rng_state()
    plain = pipe(generator=theirs, **kwargs)
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=WAYS[way]())
    out = up(generator=mine, **kwargs)
    assert (out.images == plain.images).all()
    assert type(out.output) is type(plain)
    assert torch.equal(mine.get_state(), theirs.get_state())
    assert torch.equal(torch.get_rng_state(), default)
    assert out.std.shape == out.variance.shape == (2, 1, 8, 8)
    assert out.variance.dtype == torch.float32
    assert float(out.std.mean()) > 0
    torch.testing.assert_close(out.latents.variance / 4, out.variance.clamp(min=0), rtol=1e-4, atol=1e-9)
    assert len(out.steps) == 5
    assert all(out.exact_steps)
    assert all(isinstance(s, bd.Gaussian) and s.shape == (2, 1, 8, 8) for s in out.steps)
    assert out.plain_calls == 5


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_every_output_type_has_the_same_map(output_type):
    """In its units, and shaped as PyTorch has images."""
    pipe = cases.class_pipeline(DDIMScheduler(clip_sample=False))
    up = bd.UncertaintyPipeline(pipe, cases.class_posterior(pipe, 1e4), propagation=bd.Tangents(draws=3))
    out, latent = (
        up([0, 2], num_inference_steps=4, generator=seeds(0, 1), output_type=kind) for kind in (output_type, "latent")
    )
    assert out.std.shape == (2, 1, 8, 8)
    torch.testing.assert_close(out.std * (1 if output_type == "latent" else 2), latent.std, rtol=1e-5, atol=0)
    plain = pipe([0, 2], num_inference_steps=4, generator=seeds(0, 1), output_type=output_type).images
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(out.images, plain, strict=True))


@noisy
@pytest.mark.parametrize("name", SAMPLERS)
def test_tangents_are_the_derivative_of_the_trajectory(name):
    """r = 1 and ten thousand times the data: tangents equal differences of whole trajectories, draw by draw."""
    # With clipping, deviations must be too small to reach over a kink.
    pipe, posterior, kwargs = make(name, torch.float64, scale=1e12 if "clip" in name else 1e6)
    settings = bd.Tangents(draws=3, refresh=1, num_directions=3, factors=True)
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=settings)

    def trajectory(delta):
        last = []
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda *a, **k: last.append(step(*a, **k)) or last[-1]
        try:
            with up.head.shifted(delta):
                pipe(batch_size=2, generator=seeds(4, 5), num_inference_steps=6, **kwargs)
        finally:
            del pipe.scheduler.step
        return last[-1][0] if isinstance(last[-1], tuple) else last[-1].prev_sample

    out = up(batch_size=2, generator=seeds(4, 5), num_inference_steps=6, **kwargs)
    differences = torch.stack([(trajectory(d) - trajectory(-d)) / 2 for d in up.deviations]) / 3**0.5
    error = float((2 * out.factors.double() - differences).norm() / differences.norm())
    assert error < 1e-4
    torch.testing.assert_close(out.latents.std.double(), differences.square().sum(0).sqrt(), rtol=1e-3, atol=0)


def test_ensemble_agrees_with_tangents():
    pipe, posterior, _ = make(scale=1e4)
    maps = [
        bd.UncertaintyPipeline(pipe, posterior, propagation=p)(
            batch_size=1, generator=seeds(4), num_inference_steps=4
        ).std
        for p in (bd.Tangents(draws=40, refresh=1, num_directions=40), bd.Ensemble(members=200))
    ]
    # 40 draws: √(2/40)/2 = 11 % in a standard deviation, shared by all pixels that one direction moves.
    assert 0.7 < float((maps[0] / maps[1]).mean()) < 1.4


@pytest.mark.parametrize("name", ["ddim", "ddim-eta", "ddpm"])
def test_results_do_not_depend_on_the_batch(name):
    pipe, posterior, kwargs = make(name)
    settings = bd.Tangents(draws=4, refresh=2)
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=settings)
    together = up(batch_size=3, generator=seeds(7, 8, 9), num_inference_steps=6, **kwargs)
    alone = up(batch_size=1, generator=seeds(8), num_inference_steps=6, **kwargs)
    torch.testing.assert_close(alone.variance[0], together.variance[1], rtol=5e-3, atol=1e-9)
    again = up(batch_size=3, generator=seeds(7, 8, 9), num_inference_steps=6, **kwargs)
    assert torch.equal(again.variance, together.variance)
    fresh = bd.UncertaintyPipeline(pipe, posterior, propagation=settings)
    assert torch.equal(
        fresh(batch_size=3, generator=seeds(7, 8, 9), num_inference_steps=6, **kwargs).variance, together.variance
    )


def same(alone, together, row):
    """To the last bit, sample ``row`` of a batch."""
    one = slice(row, row + 1)
    assert torch.equal(torch.as_tensor(alone.images), torch.as_tensor(together.images)[one])
    assert torch.equal(alone.variance, together.variance[one])
    assert torch.equal(alone.latents.mean, together.latents.mean[one])
    for a, b in zip(alone.steps + alone.trajectory, together.steps + together.trajectory, strict=True):
        assert torch.equal(a.mean, b.mean[one])
        assert torch.equal(a.variance, b.variance[one])


@noisy
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["ddim", "ddim-eta", "ddpm-clip"])
def test_a_sample_alone_and_in_a_batch_of_eight(name, way):
    """With batch_invariant=True, to the last bit."""
    pipe, posterior, kwargs = make(name)
    kwargs = {"num_inference_steps": 5, "output_type": "np", **kwargs}
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=WAYS[way](batch_invariant=True, trajectory=True))
    together = up(batch_size=8, generator=seeds(*range(8)), **kwargs)
    alone = up(batch_size=1, generator=seeds(5), **kwargs)
    same(alone, together, 5)
    assert (alone.images == pipe(batch_size=1, generator=seeds(5), **kwargs).images).all()
    pair = up(batch_size=2, generator=seeds(3, 5), **kwargs)
    same(alone, pair, 1)


@noisy
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(("way", "rescale"), [*((way, 0.0) for way in WAYS), ("tangents", 0.7), ("ensemble", 0.7)])
def test_a_guided_sample_alone_and_in_a_batch_of_eight(way, rescale, sequential):
    pipe, posterior = guided()
    pipe.rescale = rescale
    kwargs = {"num_inference_steps": 4, "sequential": sequential}
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=WAYS[way](batch_invariant=True, trajectory=True))
    together = up(batch_size=8, generator=seeds(*range(8)), **kwargs)
    same(up(batch_size=1, generator=seeds(5), classes=[5 % 3], **kwargs), together, 5)


@noisy
@pytest.mark.parametrize("way", ["tangents", "bayesdiff-centered"])
def test_the_shipped_model_alone_and_in_a_batch_of_eight(shipped, way):
    pipe, posterior = shipped
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=WAYS[way](batch_invariant=True, trajectory=True))
    for guidance_scale in (1.0, 3.0):
        kwargs = {"guidance_scale": guidance_scale, "num_inference_steps": 3, "output_type": "np"}
        together = up(list(range(8)), generator=seeds(*range(8)), **kwargs)
        alone = up([6], generator=seeds(6), **kwargs)
        same(alone, together, 6)
        if guidance_scale == 1:  # guided, the plain pipe evaluates two rows at once
            assert (alone.images == pipe([6], generator=seeds(6), **kwargs).images).all()


def test_calls_of_batch_invariant_maps():
    """Each evaluation of the batch counts once, row by row or not; one more checks the rows, and one asks again."""
    pipe, posterior, _ = make()
    calls = {}
    for invariant in (False, True):
        settings = bd.Tangents(draws=4, refresh=1, num_directions=3, batch_invariant=invariant)
        up = bd.UncertaintyPipeline(pipe, posterior, propagation=settings)
        out = up(batch_size=2, generator=seeds(1, 2), num_inference_steps=4)
        assert out.plain_calls == 4
        calls[invariant] = out.calls
    assert calls == {False: 4 + 3 * 3 + 1, True: 4 + 3 * 3 + 2}


def left(pipe):
    """What might be left on a pipe, its scheduler and its network."""
    hooks = [h for m in pipe.unet.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    parts = (pipe, pipe.scheduler, pipe.unet, pipe.unet.conv_out)
    return hooks, [sorted(vars(part)) for part in parts], dict(pipe.scheduler.config)


@noisy
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left_behind(way, batch_invariant):
    pipe, posterior, _ = make()
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    scheduler, unet = pipe.scheduler, pipe.unet
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=WAYS[way](batch_invariant=batch_invariant))
    pipe(batch_size=2, generator=seeds(0, 1), num_inference_steps=3)
    before = copy.deepcopy(left(pipe))
    up(batch_size=2, generator=seeds(0, 1), num_inference_steps=3)
    assert left(pipe) == before
    with pytest.raises(TypeError):
        up(batch_size=2, generator=seeds(0, 1), num_inference_steps=3, no_such_argument=1)
    assert left(pipe) == before

    class Interrupt(KeyboardInterrupt):
        pass

    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 12:
            raise Interrupt

    # In a call of the pipe's, in one of ours (or a member's).
    for given in (11, 0):
        calls[:] = [1] * given
        generators, theirs = seeds(0, 1), seeds(0, 1)
        handle = pipe.unet.conv_in.register_forward_hook(interrupt)
        with pytest.raises(Interrupt):
            up(batch_size=2, generator=generators, num_inference_steps=6)
        handle.remove()
        assert left(pipe) == before
        if given == 0:  # the pipe's own run was over
            pipe(batch_size=2, generator=theirs, num_inference_steps=6)
            assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(generators, theirs, strict=True))
    assert pipe.scheduler is scheduler
    assert pipe.unet is unet
    assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())


@pytest.mark.parametrize("name", ["ddim", "ddim-eta", "ddpm"])
def test_trajectory_and_factors_of_tangents_are_an_ensembles(name):
    """Draws in pairs ±δW: of what is linear, their mean is 0 and an ensemble's moments are the tangents'."""
    pipe, posterior, kwargs = make(name, torch.float64, scale=1e6)
    drawn, outs = posterior.deviations(4, torch.Generator().manual_seed(3)), []
    for settings in (
        bd.Tangents(draws=8, refresh=1, num_directions=8, trajectory=True, factors=True),
        bd.Ensemble(members=8, trajectory=True, factors=True),
    ):
        up = bd.UncertaintyPipeline(pipe, posterior, propagation=settings)
        up.deviations = torch.cat([drawn, -drawn])
        outs.append(up(batch_size=2, generator=seeds(4, 5), num_inference_steps=5, **kwargs))
    bessel = 7 / 8  # tangents are about 0, an ensemble about its mean
    for out in outs:
        assert len(out.trajectory) == len(out.steps) == 5
        assert torch.equal(out.trajectory[-1].variance, out.latents.variance)
        torch.testing.assert_close(out.trajectory[-1].variance / 4, out.variance)
        assert out.factors.shape == (8, 2, 1, 8, 8)
        torch.testing.assert_close(out.factors.square().sum(0), out.variance, rtol=1e-5, atol=0)
    tangents, ensemble = outs
    assert torch.equal(tangents.trajectory[-1].mean, tangents.latents.mean)
    for a, b in zip(tangents.trajectory, ensemble.trajectory, strict=True):
        torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-3)  # the pipe's own sample, and the members' mean
        torch.testing.assert_close(a.std, b.std * bessel**0.5, rtol=1e-3, atol=1e-3 * float(a.std.mean()))
    covariances = [torch.einsum("kbi,kbj->bij", *(o.factors.double().flatten(2),) * 2) for o in outs]
    error = float((covariances[0] - bessel * covariances[1]).norm() / covariances[0].norm())
    assert error < 1e-3
    # The sign of a covariance is a factor's, too: it is not that of independent pixels.
    apart = covariances[0] - torch.diag_embed(covariances[0].diagonal(dim1=1, dim2=2))
    assert float(apart.norm() / covariances[0].norm()) > 0.5


def test_trajectory_of_an_interpolated_response_is_that_of_the_last_pass():
    pipe, posterior, _ = make()
    up = bd.UncertaintyPipeline(
        pipe, posterior, propagation=bd.Tangents(draws=4, refresh=4, num_directions=2, trajectory=True)
    )
    out = up(generator=seeds(4), num_inference_steps=30)
    assert len(out.trajectory) == 30
    assert torch.equal(out.trajectory[-1].variance, out.latents.variance)


def test_draws_of_tangents_are_orthogonal_and_an_ensembles_are_not():
    pipe, posterior, _ = make()
    for settings, orthogonal in (
        (bd.Tangents(draws=5, generator=seeds(3)[0]), True), (bd.Ensemble(members=5, generator=seeds(3)[0]), False),
    ):  # fmt: skip
        up = bd.UncertaintyPipeline(pipe, posterior, propagation=settings)
        assert torch.equal(up.deviations, posterior.deviations(5, seeds(3)[0], orthogonal=orthogonal))


@noisy
@pytest.mark.parametrize("way", WAYS)
def test_nothing_more_is_returned_unasked(way):
    pipe, posterior, _ = make()
    out = bd.UncertaintyPipeline(pipe, posterior, propagation=WAYS[way]())(generator=seeds(4), num_inference_steps=6)
    assert out.trajectory is None
    assert out.factors is None
    assert (out.residual is None) == (way != "tangents")
    assert out.scores().keys() == {"total_variance", "mean_std", "max_std"}


def test_steps_are_the_closed_form():
    pipe, posterior, _ = make()
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Tangents(draws=1))
    features = []
    handle = pipe.unet.conv_out.register_forward_pre_hook(lambda _, a: features.append(a[0]))
    out = up(batch_size=2, generator=seeds(1, 2), num_inference_steps=2)
    handle.remove()
    torch.testing.assert_close(out.steps[0].variance, posterior.variance(features[0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.steps[0].mean, pipe.unet.conv_out(features[0]).detach())


@pytest.mark.parametrize("sequential", [False, True])
def test_a_guided_step_has_the_variance_of_weight_draws(sequential):
    """That of f_u + s(f_c − f_u), not of independent branches."""
    pipe, posterior = guided()
    s = 7.5
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Tangents(draws=2))
    features = []
    handle = pipe.unet.conv_out.register_forward_pre_hook(lambda _, a: features.extend(a[0].split(2)))
    out = up(batch_size=2, generator=seeds(1, 2), num_inference_steps=2, scale=s, sequential=sequential)
    handle.remove()
    uncond, cond = features[:2]
    weights = posterior.sample(4000, torch.Generator().manual_seed(3)).float()
    f_u, f_c = (posterior.geometry.apply(f, weights) for f in (uncond, cond))
    brute = (f_u + s * (f_c - f_u)).var(0)
    assert out.exact_steps == [True, True]
    ratio = out.steps[0].variance / brute
    assert float((ratio - 1).abs().max()) < 5 * (2 / 3999) ** 0.5
    independent = (1 - s) ** 2 * posterior.variance(uncond) + s**2 * posterior.variance(cond)
    assert float((independent / brute).median()) > 2


def relative_error(pipe, posterior, **kwargs):
    """Of exact tangents, against central differences of whole trajectories, draw by draw where pixels are not clamped."""
    settings = bd.Tangents(draws=2, refresh=1, num_directions=2, factors=True)
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=settings)
    out = up(generator=seeds(1, 2), batch_size=2, num_inference_steps=4, **kwargs)

    def images(delta):
        with up.head.shifted(delta):
            return pipe(batch_size=2, generator=seeds(1, 2), num_inference_steps=4, **kwargs).images

    inside = ((out.images > 0.01) & (out.images < 0.99)).double()
    expected = torch.stack([(images(d) - images(-d)) / 2 for d in up.deviations])
    return float(((out.factors * 2**0.5 - expected) * inside).norm() / (expected * inside).norm())


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_guided_tangents_are_the_derivative(rescale, sequential):
    pipe, posterior = guided(torch.float64, scale=1e6)
    pipe.rescale = rescale
    assert relative_error(pipe, posterior, sequential=sequential) < 1e-4


@pytest.mark.parametrize(("single", "rescale"), [(True, 0.0), (True, 0.7), (False, 0.0)], ids=str)
@pytest.mark.parametrize("interval", [(1, 2), (2, 3), (0, 0)], ids=str)
def test_guidance_in_some_steps_only(interval, single, rescale):
    """Kynkäänniemi et al. 2024. Outside the interval there is one branch, or two with weights 0 and 1."""
    pipe, posterior = guided(torch.float64, scale=1e6)
    pipe.interval, pipe.single, pipe.rescale = interval, single, rescale
    assert relative_error(pipe, posterior) < 1e-4


WHATEVER = {
    "rescaled-by-changing-amounts": {"rescale": [0.7, 0.5, 0.3, 0.9]},
    "squared": {"bend": lambda g: g + 0.1 * g.square()},
    "less": {"bend": lambda g: 0.9 * g},
    "negated": {"bend": lambda g: -0.2 * g},
    "normed": {"bend": lambda g: 8 * g / g.norm()},
    "clipped": {"bend": lambda g: g.clamp(-0.2, 0.2)},
    "changed-between-steps": {"mix": 0.1},
}


@noisy
@pytest.mark.parametrize("name", WHATEVER)
def test_whatever_a_pipeline_does_is_followed(name):
    """What was refused as long as it had to be recognised."""
    pipe, posterior = guided(torch.float64, scale=1e8)
    for key, value in WHATEVER[name].items():
        setattr(pipe, key, value)
    assert relative_error(pipe, posterior) < 1e-4


def test_a_derivative_that_is_not_followed_is_seen():
    """Without the derivative of the norm the tests above fail."""
    pipe, posterior = guided(torch.float64, scale=1e6)
    pipe.bend = lambda g: 8 * g / g.norm()
    assert relative_error(pipe, posterior) < 1e-4
    pipe.bend = lambda g: 8 * g / float(g.norm())
    with pytest.warns(BayesdiffWarning, match=r"values left PyTorch: __float__ at test_pipeline.py"):
        assert relative_error(pipe, posterior) > 0.05


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_the_variance_of_a_rescaled_step(rescale):
    """Against weight draws of the nonlinear g', within the noise of the 4000 tangents that estimate it."""
    pipe, posterior = guided(torch.float64, scale=100)
    pipe.rescale = rescale
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Tangents(draws=4000, num_directions=1))
    features = []
    handle = pipe.unet.conv_out.register_forward_pre_hook(lambda _, a: features.extend(a[0].split(2)))
    out = up(batch_size=2, generator=seeds(1, 2), num_inference_steps=1)
    handle.remove()
    n = 20_000
    weights = posterior.sample(n, torch.Generator().manual_seed(3))
    f_u, f_c = (posterior.geometry.apply(f, weights) for f in features[:2])
    g = f_u + 3 * (f_c - f_u)
    factor = f_c.std((2, 3, 4), keepdim=True) / g.std((2, 3, 4), keepdim=True)
    brute = (g * (1 - rescale + rescale * factor)).var(0)
    assert out.exact_steps == [False]
    assert float((out.steps[0].variance / brute - 1).abs().max()) < 5 * (2 / n + 2 / 4000) ** 0.5
    assert float((g.var(0) / brute).median()) > 1.1


def test_rescaled_guidance_of_a_trained_network_is_followed(shipped):
    pipe, posterior = shipped
    rescaling = cases.GuidedPipeline(pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config))
    rescaling.set_progress_bar_config(disable=True)
    rescaling.rescale = 0.7
    up = bd.UncertaintyPipeline(rescaling, posterior, propagation=bd.Tangents(draws=2, refresh=100, num_directions=1))
    out = up(batch_size=2, generator=seeds(0, 1), num_inference_steps=10, scale=1.5)
    assert bool(torch.isfinite(out.variance).all())
    assert out.exact_steps == [False] * 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(dtype):
    pipe, posterior = guided()
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Tangents(draws=4, refresh=1, num_directions=4))
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
        bd.UncertaintyPipeline(other, posterior)
    with pytest.raises(ArgumentError, match="'tangents', 'ensemble', 'bayesdiff', 'bayesdiff-centered'"):
        bd.UncertaintyPipeline(pipe, posterior, propagation="magic")
    for steps in (0, -1, 2.5):
        with pytest.raises(ArgumentError, match="num_inference_steps"):
            bd.UncertaintyPipeline(pipe, posterior)(num_inference_steps=steps)
    with pytest.raises(ArgumentError, match="a pipeline that can be called, got object"):
        bd.UncertaintyPipeline(object(), posterior)
    with pytest.raises(HeadNotFoundError, match="unet"):
        bd.UncertaintyPipeline(lambda: None, posterior)
    with pytest.raises(ArgumentError, match="expected a function, got int"):
        bd.propagate(3, pipe.unet, posterior)
    with pytest.raises(ArgumentError, match=r"expected the network as a torch\.nn\.Module, got DDIMPipeline"):
        bd.propagate(pipe, pipe, posterior)
    with pytest.raises(HeadMismatchError, match="another network"):
        bd.propagate(pipe, other.unet, posterior)


def test_a_pipe_that_does_not_step_its_scheduler_is_followed_with_a_warning():
    class Stepless(cases.GuidedPipeline):
        @torch.no_grad()
        def __call__(self, generator=None):
            x = torch.randn(1, 1, 8, 8, generator=generator)
            for t in (900, 500, 100):
                x = x - 0.1 * self.unet(x, t, class_labels=torch.tensor([0])).sample
            return (x,)

    pipe, posterior = guided()
    up = bd.UncertaintyPipeline(Stepless(pipe.unet, pipe.scheduler), posterior, propagation=bd.Tangents(draws=2))
    with pytest.warns(BayesdiffWarning, match="to call its scheduler's step, got no call"):
        out = up(generator=seeds(0)[0])
    assert (out.steps, out.latents) == ([], None)
    assert float(out.std.min()) > 0


def test_random_networks_are_refused():
    pipe, posterior, _ = make()
    dropping = copy.deepcopy(pipe.unet)
    dropping.mid_block.resnets[0].dropout.p = 0.1
    other = DDIMPipeline(dropping, pipe.scheduler)
    up = bd.UncertaintyPipeline(other, posterior)
    dropping.train()
    for call in (
        lambda: bd.UncertaintyPipeline(other, posterior), lambda: up(num_inference_steps=2),
        lambda: bd.fit(other, torch.zeros(2, 1, 8, 8), progress=False),
        lambda: bd.propagate(dropping, dropping, posterior, torch.zeros(1, 1, 8, 8), 5),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match="evaluation mode"):
            call()


class Own(DDIMScheduler):
    """A scheduler with noise from a source of its own."""

    def step(self, *args, **kwargs):
        out = super().step(*args, **kwargs)
        out.prev_sample = out.prev_sample + 0.1 * torch.randn(
            out.prev_sample.shape, generator=torch.Generator().manual_seed(torch.seed())
        )
        return out


@pytest.mark.parametrize("way", WAYS)
def test_noise_that_is_not_repeated_is_noticed(way):
    pipe, posterior, _ = make()
    other = DDIMPipeline(pipe.unet, pipe.scheduler)
    other.scheduler = Own.from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    with pytest.raises(NotRepeatableError, match="noise from a source of its own"):
        bd.UncertaintyPipeline(other, posterior, propagation=WAYS[way]())(num_inference_steps=3, generator=seeds(0)[0])


def test_a_poisoned_network_is_noticed():
    pipe, posterior, _ = make()
    poisoned = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        poisoned.conv_in.weight.fill_(float("nan"))
    up = bd.UncertaintyPipeline(DDIMPipeline(poisoned, pipe.scheduler), posterior)
    with pytest.raises(NonFiniteError):
        up(generator=seeds(0), num_inference_steps=2)


def test_gaussians_are_checked():
    with pytest.raises(ShapeError):
        bd.Gaussian(torch.zeros(2), torch.zeros(3))
    for bad in (-1.0, float("nan")):
        with pytest.raises(NegativeVarianceError):
            bd.Gaussian(torch.zeros(1), torch.full((1,), bad))


def test_zero_terminal_snr_is_refused():
    pipe, posterior, _ = make()
    bad = DDIMPipeline(pipe.unet, pipe.scheduler)
    bad.set_progress_bar_config(disable=True)
    bad.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing="trailing")
    up = bd.UncertaintyPipeline(bad, posterior)
    with pytest.raises(UnsupportedSchedulerError, match="zero terminal SNR"):
        up(generator=seeds(0), num_inference_steps=3)


class BentDDIM(DDIMScheduler):
    def step(self, *args, **kwargs):
        kwargs["return_dict"] = False
        return (super().step(*args, **kwargs)[0].tanh(),)


def test_a_scheduler_that_is_not_affine_is_followed():
    pipe = cases.class_pipeline(BentDDIM(clip_sample=False), torch.float64)
    posterior = cases.class_posterior(pipe, 1e8)
    settings = bd.Tangents(draws=2, refresh=1, num_directions=2, factors=True)
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=settings)
    kwargs = {"num_inference_steps": 4, "output_type": "latent"}
    out = up([0], generator=seeds(0), **kwargs)
    ends = []
    for sign in (1, -1):
        with up.head.shifted(sign * up.deviations[1]):
            ends.append(pipe([0], generator=seeds(0), **kwargs).images)
    torch.testing.assert_close(out.factors[1].double() * 2**0.5, (ends[0] - ends[1]) / 2, rtol=1e-3, atol=1e-8)
    assert "step" not in pipe.scheduler.__dict__


def test_a_loaded_posterior_gives_the_same_map(tmp_path):
    pipe, posterior, _ = make()
    posterior.save(tmp_path)
    loaded = bd.LaplacePosterior.load(tmp_path)
    maps = [
        bd.UncertaintyPipeline(pipe, p, propagation=bd.Tangents(draws=2))(
            generator=seeds(0), num_inference_steps=3
        ).variance
        for p in (posterior, loaded)
    ]
    assert torch.equal(*maps)


def test_a_pipeline_and_a_function_that_is_the_same_have_one_map():
    """``propagate`` of the pipe itself; and of a loop, told of the schedule."""
    pipe, posterior = guided()
    settings = bd.Tangents(draws=4, refresh=2, num_directions=2)
    kwargs = {"generator": seeds(1, 2), "batch_size": 2, "num_inference_steps": 6}
    out = bd.UncertaintyPipeline(pipe, posterior, propagation=settings)(**kwargs)
    same_out = bd.propagate(pipe, pipe.unet, posterior, propagation=settings, **{**kwargs, "generator": seeds(1, 2)})
    assert torch.equal(same_out.variance, out.variance)
    assert len(same_out.steps) == 6
    own = bd.propagate(
        lambda **kw: pipe(**kw).images, pipe.unet, posterior,
        propagation=bd.Tangents(draws=4, refresh=1, num_directions=4, schedule=pipe.scheduler),
        **{**kwargs, "generator": seeds(1, 2)},
    )  # fmt: skip
    exact = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Tangents(draws=4, refresh=1, num_directions=4))
    torch.testing.assert_close(
        own.variance, exact(**{**kwargs, "generator": seeds(1, 2)}).variance, rtol=1e-3, atol=1e-9
    )
    assert (own.steps, own.latents) == ([], None)


def test_an_uncertainty_pipeline_is_shown_in_a_line():
    pipe, posterior, _ = make()
    text = repr(bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Ensemble(members=3)))
    assert text.startswith("UncertaintyPipeline(DDIMPipeline, 'conv_out', Ensemble(")
    assert "members=3" in text
    assert "\n" not in text
    assert diffusers.DDIMPipeline is DDIMPipeline
