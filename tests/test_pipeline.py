"""The watched pipeline: the pipe's own images, and a variance that is the trajectory's derivative."""

from __future__ import annotations

import copy
import dataclasses
from unittest import mock

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

from bayesdiff import Gaussian, UncertaintyPipeline, fit, zoo
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
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.propagation.response import Response, smoothed
from bayesdiff.propagation.tangents import plan
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


BATCH_INVARIANT = {
    "tangents": {"num_tangents": 6, "refresh": 2, "num_directions": 3},
    "ensemble": {"num_tangents": 3},
    "bayesdiff": {"num_samples": 3},
    "bayesdiff-centered": {"num_samples": 3, "skip_interval": 2},
}


def same(alone, together, row):
    """To the last bit, sample ``row`` of a batch."""
    one = slice(row, row + 1)
    assert torch.equal(torch.as_tensor(alone.images), torch.as_tensor(together.images)[one])
    assert torch.equal(alone.variance, together.variance[one])
    assert torch.equal(alone.latents.mean, together.latents.mean[one])
    for a, b in zip(alone.steps + alone.trajectory, together.steps + together.trajectory, strict=True):
        assert torch.equal(a.mean, b.mean[one])
        assert torch.equal(a.variance, b.variance[one])


@pytest.mark.filterwarnings("ignore::bayesdiff.checks.NegativeVarianceWarning")
@pytest.mark.parametrize("propagation", BATCH_INVARIANT)
@pytest.mark.parametrize("name", ["ddim", "ddim-eta", "ddpm-clip"])
def test_a_sample_alone_and_in_a_batch(name, propagation):
    """With batch_invariant=True, to the last bit."""
    pipe, posterior, kwargs = make(name)
    kwargs = {"num_inference_steps": 5, "output_type": "np", **kwargs}
    up = UncertaintyPipeline(
        pipe, posterior, propagation=propagation, batch_invariant=True, return_trajectory=True,
        **BATCH_INVARIANT[propagation],
    )  # fmt: skip
    together = up(batch_size=8, generator=seeds(*range(8)), **kwargs)
    for row in (0, 5):
        alone = up(batch_size=1, generator=seeds(row), **kwargs)
        same(alone, together, row)
        assert (alone.images == pipe(batch_size=1, generator=seeds(row), **kwargs).images).all()
    pair = up(batch_size=2, generator=seeds(3, 5), **kwargs)
    same(alone, pair, 1)


@pytest.mark.filterwarnings("ignore::bayesdiff.checks.NegativeVarianceWarning")
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(
    ("propagation", "rescale"),
    [
        *((p, 0.0) for p in ("tangents", "ensemble", "bayesdiff", "bayesdiff-centered")),
        *((p, 0.7) for p in ("tangents", "ensemble")),
    ],
)
def test_a_guided_sample_alone_and_in_a_batch(propagation, rescale, sequential):
    pipe, posterior = guided()
    pipe.rescale = rescale
    kwargs = {"num_inference_steps": 4, "sequential": sequential}
    up = UncertaintyPipeline(
        pipe, posterior, propagation=propagation, batch_invariant=True, return_trajectory=True,
        **BATCH_INVARIANT[propagation],
    )  # fmt: skip
    together = up(batch_size=8, generator=seeds(*range(8)), **kwargs)
    for row in (0, 5):
        same(up(batch_size=1, generator=seeds(row), classes=[row % 3], **kwargs), together, row)


@pytest.fixture(scope="module")
def shipped():
    pipe, data = zoo.load("fashion-ddpm")
    generator = torch.Generator().manual_seed(0)
    few = data.subset(slice(100))
    return pipe, fit(pipe, few, dataset_size=data.dataset_size, generator=generator, progress=False)


@pytest.mark.filterwarnings("ignore::bayesdiff.checks.NegativeVarianceWarning")
@pytest.mark.parametrize("propagation", ["tangents", "ensemble", "bayesdiff-centered"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_shipped_model_alone_and_in_a_batch(shipped, guidance_scale, propagation):
    pipe, posterior = shipped
    kwargs = {"guidance_scale": guidance_scale, "num_inference_steps": 3, "output_type": "np"}
    up = UncertaintyPipeline(
        pipe, posterior, propagation=propagation, batch_invariant=True, return_trajectory=True,
        **BATCH_INVARIANT[propagation],
    )  # fmt: skip
    together = up(list(range(8)), generator=seeds(*range(8)), **kwargs)
    alone = up([6], generator=seeds(6), **kwargs)
    same(alone, together, 6)
    if guidance_scale == 1:  # guided, the plain pipe evaluates two rows at once
        assert (alone.images == pipe([6], generator=seeds(6), **kwargs).images).all()


def test_calls_of_batch_invariant_maps():
    """Each evaluation of the batch counts once, row by row or not; one more checks the rows."""
    pipe, posterior, _ = make()
    calls = {}
    for invariant in (False, True):
        up = UncertaintyPipeline(pipe, posterior, num_tangents=3, refresh=1, batch_invariant=invariant)
        out = up(batch_size=2, generator=seeds(1, 2), num_inference_steps=4)
        assert out.plain_calls == 4
        calls[invariant] = out.calls
    assert calls == {False: 4 + 3 * 3, True: 4 + 3 * 3 + 1}


@pytest.mark.filterwarnings("ignore::bayesdiff.checks.NegativeVarianceWarning")
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("propagation", BATCH_INVARIANT)
def test_nothing_is_left_behind(propagation, batch_invariant):
    pipe, posterior, _ = make()
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    config = copy.deepcopy(dict(pipe.scheduler.config))

    def clean():
        hooks = [h for m in pipe.unet.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
        wrapped = "step" in pipe.scheduler.__dict__ or "forward" in pipe.unet.__dict__
        return not hooks and not wrapped and dict(pipe.scheduler.config) == config

    up = UncertaintyPipeline(
        pipe, posterior, propagation=propagation, batch_invariant=batch_invariant, **BATCH_INVARIANT[propagation]
    )
    up(batch_size=2, generator=seeds(0, 1), num_inference_steps=3)
    assert clean()
    with pytest.raises(TypeError):
        up(batch_size=2, generator=seeds(0, 1), num_inference_steps=3, no_such_argument=1)
    assert clean()

    class Interrupt(KeyboardInterrupt):
        pass

    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 10:
            raise Interrupt

    # In a call of the pipe's, in one of ours (or a member's).
    for before in (9, 0):
        calls[:] = [1] * before
        handle = pipe.unet.conv_in.register_forward_hook(interrupt)
        with pytest.raises(Interrupt):
            up(batch_size=2, generator=seeds(0, 1), num_inference_steps=6)
        handle.remove()
        assert clean()
    assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())


def symmetric(pipe, posterior, propagation, **kwargs):
    """Draws in pairs ±δW: of what is linear, their mean is 0 and an ensemble's moments are the tangents'."""
    up = UncertaintyPipeline(
        pipe, posterior, propagation=propagation, num_tangents=8, refresh=1, num_directions=8, **kwargs
    )
    drawn = posterior.deviations(4, torch.Generator().manual_seed(3))
    up.deviations = torch.cat([drawn, -drawn])
    return up


@pytest.mark.parametrize("name", ["ddim", "ddim-eta", "ddpm"])
def test_trajectory_and_factors_of_tangents_are_an_ensembles(name):
    pipe, posterior, kwargs = make(name, torch.float64, scale=1e6)
    outs = [
        symmetric(pipe, posterior, p, return_trajectory=True, return_factors=True)(
            batch_size=2, generator=seeds(4, 5), num_inference_steps=5, **kwargs
        )
        for p in ("tangents", "ensemble")
    ]
    bessel = 7 / 8  # tangents are about 0, an ensemble about its mean
    for out in outs:
        assert len(out.trajectory) == len(out.steps) == 5
        assert torch.equal(out.trajectory[-1].variance, out.latents.variance)
        assert torch.equal(out.trajectory[-1].variance / 4, out.variance)
        assert out.factors.shape == (8, 2, 1, 8, 8)
        torch.testing.assert_close(out.factors.square().sum(0), out.variance, rtol=1e-5, atol=0)
    tangents, ensemble = outs
    assert torch.equal(tangents.trajectory[-1].mean, tangents.latents.mean)
    for a, b in zip(tangents.trajectory, ensemble.trajectory, strict=True):
        assert torch.equal(a.mean, b.mean)  # the pipe's own sample
        torch.testing.assert_close(a.std, b.std * bessel**0.5, rtol=1e-3, atol=1e-3 * float(a.std.mean()))
    covariances = [torch.einsum("kbi,kbj->bij", *(o.factors.double().flatten(2),) * 2) for o in outs]
    error = float((covariances[0] - bessel * covariances[1]).norm() / covariances[0].norm())
    assert error < 1e-3
    # The sign of a covariance is a factor's, too: it is not that of independent pixels.
    apart = covariances[0] - torch.diag_embed(covariances[0].diagonal(dim1=1, dim2=2))
    assert float(apart.norm() / covariances[0].norm()) > 0.5


def test_trajectory_of_an_interpolated_response_is_that_of_the_second_pass():
    pipe, posterior, _ = make()
    up = UncertaintyPipeline(pipe, posterior, num_tangents=4, refresh=4, num_directions=2, return_trajectory=True)
    out = up(generator=seeds(4), num_inference_steps=30)
    assert len(out.trajectory) == 30
    assert torch.equal(out.trajectory[-1].variance, out.latents.variance)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_the_second_pass_uses_what_all_measurements_know(batch_invariant):
    pipe, posterior, _ = make()
    up = UncertaintyPipeline(
        pipe, posterior, num_tangents=6, refresh=4, num_directions=2, batch_invariant=batch_invariant
    )

    def run():
        return up(batch_size=2, generator=seeds(4, 5), num_inference_steps=20).variance

    plain = run()
    with mock.patch("bayesdiff.propagation.tangents.smoothed", wraps=smoothed) as spy:
        assert torch.equal(run(), plain)
    places = plan(20, up.extra_calls, 4, 2)[0]
    assert spy.call_count == (2 if batch_invariant else 1)  # samples that are worked on together
    for call in spy.call_args_list:
        (measured,) = call.args
        assert len(measured) == len(places)
        assert all(chosen.directions.shape[:2] == (1 if batch_invariant else 2, 2) for chosen, _ in measured)

    def silent(measured):  # no response at all
        return [dataclasses.replace(r, **{k: 0 * v for k, v in vars(r).items()}) for r in smoothed(measured)]

    with mock.patch("bayesdiff.propagation.tangents.smoothed", silent):
        assert float((run() / plain - 1).abs().max()) > 0.01


def test_measurements_of_a_two_stage_solver_do_not_know_of_each_other():
    pipe = cases.class_pipeline(diffusers.HeunDiscreteScheduler())
    up = UncertaintyPipeline(pipe, cases.class_posterior(pipe, 1e4), num_tangents=6, num_directions=2, refresh=2)
    with (
        mock.patch("bayesdiff.propagation.tangents.smoothed", wraps=smoothed) as together,
        mock.patch("bayesdiff.propagation.tangents.Response.fit", wraps=Response.fit) as each,
    ):
        up([0], num_inference_steps=7, generator=seeds(3))
    assert together.call_count == 0
    assert each.call_count > 2
    assert all(call.args[2] is None for call in each.call_args_list)


def test_draws_of_tangents_are_orthogonal_and_an_ensembles_are_not():
    pipe, posterior, _ = make()
    for propagation, orthogonal in (("tangents", True), ("ensemble", False), ("bayesdiff", False)):
        up = UncertaintyPipeline(pipe, posterior, propagation=propagation, num_tangents=5, generator=seeds(3)[0])
        generator = seeds(3)[0]
        if propagation == "bayesdiff":
            torch.randint(2**63 - 1, (), generator=generator, dtype=torch.int64)  # its own draws' seed
        assert torch.equal(up.deviations, posterior.deviations(5, generator, orthogonal=orthogonal))


@pytest.mark.parametrize("propagation", ["tangents", "ensemble", "bayesdiff-centered"])
@pytest.mark.filterwarnings("ignore::bayesdiff.checks.NegativeVarianceWarning")
def test_nothing_more_is_returned_unasked(propagation):
    pipe, posterior, _ = make()
    up = UncertaintyPipeline(pipe, posterior, propagation=propagation, num_tangents=2)
    out = up(generator=seeds(4), num_inference_steps=2)
    assert out.trajectory is None
    assert out.factors is None
    assert out.scores().keys() == {"total_variance", "mean_std", "max_std"}


def test_scores_by_hand():
    pipe, posterior, _ = make()
    out = UncertaintyPipeline(pipe, posterior, num_tangents=2, return_factors=True)(
        batch_size=2, generator=seeds(4, 5), num_inference_steps=2
    )
    # Two samples of two pixels: orthogonal factors 3 and 4 long; parallel ones.
    factors = torch.tensor([[[[[3.0, 0.0]]], [[[1.0, 0.0]]]], [[[[0.0, 4.0]]], [[[2.0, 0.0]]]]])
    variance = factors.square().sum(0)
    scores = dataclasses.replace(out, factors=factors, variance=variance).scores()
    expected = {
        "total_variance": [25, 5],
        "mean_std": [3.5, 5**0.5 / 2],
        "max_std": [4, 5**0.5],
        "top_share": [16 / 25, 1],
        "effective_rank": [25**2 / (9**2 + 16**2), 1],
    }
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        assert scores[name].tolist() == pytest.approx(values, rel=1e-6), name
    # A negative variance counts in the trace, and as a standard deviation of 0.
    scores = dataclasses.replace(out, factors=None, variance=torch.tensor([[[[4.0, -1.0]]]])).scores()
    assert {k: v.item() for k, v in scores.items()} == {"total_variance": 3.0, "mean_std": 1.0, "max_std": 2.0}
    assert float((out.scores()["effective_rank"] - 1).min()) > 0
    assert float(out.scores()["effective_rank"].max()) < 2


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
    """DDIM with a guided U-Net: what a pipeline can do between network and scheduler.

    Set on the object: ``rescale``, φ of guidance rescale, a number or one for each step; ``interval``, the first and the
    last guided step; ``bend``, what else is done to g; ``mix``, what is added to the sample.
    """

    rescale = 0.0
    interval = (0, 1000)
    single = True
    bend = staticmethod(lambda g: g)
    mix = 0.0

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=5, scale=3.0, sequential=False, classes=None):
        self.scheduler.set_timesteps(num_inference_steps)
        shape = (batch_size, 1, self.unet.config.sample_size, self.unet.config.sample_size)
        x = diffusers.utils.torch_utils.randn_tensor(shape, generator=generator, dtype=self.unet.dtype)
        kinds = torch.arange(batch_size) % 3 if classes is None else torch.tensor(classes)
        for n, t in enumerate(self.scheduler.timesteps):
            labels = [torch.full((batch_size,), self.unet.config.num_class_embeds - 1), kinds]
            s = scale if self.interval[0] <= n <= self.interval[1] else 1.0
            if s == 1 and self.single:
                g = self.unet(x, t, class_labels=labels[1]).sample
            else:
                if sequential:
                    f_u, f_c = (self.unet(x, t, class_labels=y).sample for y in labels)
                else:
                    f_u, f_c = self.unet(torch.cat([x, x]), t, class_labels=torch.cat(labels)).sample.chunk(2)
                g = f_u + s * (f_c - f_u)
                amount = self.rescale[n] if isinstance(self.rescale, list) else self.rescale
                if amount:
                    g = g * (1 - amount + amount * f_c.std((1, 2, 3), keepdim=True) / g.std((1, 2, 3), keepdim=True))
            x = self.scheduler.step(self.bend(g), t, x).prev_sample
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


def relative_error(pipe, up, **kwargs):
    """Of the std of tangents, against central differences of whole trajectories."""
    out = up(generator=seeds(1, 2), batch_size=2, num_inference_steps=4, **kwargs)

    def images(delta):
        with up.head.shifted(delta):
            return pipe(batch_size=2, generator=seeds(1, 2), num_inference_steps=4, **kwargs).images

    inside = ((out.images > 0.01) & (out.images < 0.99)).double()
    expected = torch.stack([(images(d) - images(-d)) / 2 for d in up.deviations]).square().mean(0).sqrt()
    return float(((out.std - expected) * inside).norm() / (expected * inside).norm())


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_guided_tangents_are_the_derivative(rescale, sequential):
    pipe, posterior = guided(torch.float64, scale=1e6)
    pipe.rescale = rescale
    up = UncertaintyPipeline(pipe, posterior, num_tangents=2, refresh=1)
    assert relative_error(pipe, up, sequential=sequential) < 1e-4


def test_the_derivative_of_rescaling_matters():
    """Without δλ the test above fails."""
    pipe, posterior = guided(torch.float64, scale=1e6)
    pipe.rescale = 0.7
    up = UncertaintyPipeline(pipe, posterior, num_tangents=2, refresh=1)
    with mock.patch("bayesdiff.guidance.Guidance.push", lambda self, outputs, d_guided, d_conditional: d_guided):
        assert relative_error(pipe, up) > 1e-2


@pytest.mark.parametrize(("single", "rescale"), [(True, 0.0), (True, 0.7), (False, 0.0)], ids=str)
@pytest.mark.parametrize("interval", [(1, 2), (2, 3), (0, 0)], ids=str)
def test_guidance_in_some_steps_only(interval, single, rescale):
    """Kynkäänniemi et al. 2024. Outside the interval there is one branch, or two with weights 0 and 1."""
    pipe, posterior = guided(torch.float64, scale=1e6)
    pipe.interval, pipe.single, pipe.rescale = interval, single, rescale
    up = UncertaintyPipeline(pipe, posterior, num_tangents=2, refresh=1)
    assert relative_error(pipe, up) < 1e-4


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_the_variance_of_a_rescaled_step(rescale):
    """Against weight draws of the nonlinear g', within the noise of the 4000 tangents that estimate the ratio."""
    pipe, posterior = guided(torch.float64, scale=100)
    pipe.rescale = rescale
    up = UncertaintyPipeline(pipe, posterior, num_tangents=4000, num_directions=1)
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
    # The ratio's own noise comes from what rescaling changes only, and is less than that of a variance.
    assert float((out.steps[0].variance / brute - 1).abs().max()) < 5 * (2 / n + 2 / 4000) ** 0.5
    assert float((g.var(0) / brute).median()) > 1.1


def test_a_rescaling_that_changes_is_refused():
    pipe, posterior = guided()
    pipe.rescale = [0.7, 0.7, 0.5]
    with pytest.raises(UnsupportedPipelineError, match="same amount"):
        UncertaintyPipeline(pipe, posterior)(batch_size=2, generator=seeds(0, 1), num_inference_steps=3)
    pipe.rescale = [0.7, 0.7, 0.7]
    UncertaintyPipeline(pipe, posterior)(batch_size=2, generator=seeds(0, 1), num_inference_steps=3)


def test_rescaled_guidance_of_a_trained_network_is_followed(shipped):
    """Where std(f_c) and std(g) are near each other, φ is known to a few digits only."""
    pipe, posterior = shipped
    rescaling = GuidedPipeline(pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config))
    rescaling.set_progress_bar_config(disable=True)
    rescaling.rescale = 0.7
    up = UncertaintyPipeline(rescaling, posterior, num_tangents=2, refresh=100, num_directions=1)
    out = up(batch_size=2, generator=seeds(0, 1), num_inference_steps=10, scale=1.5)
    assert bool(torch.isfinite(out.variance).all())


BENDS = {
    "squared": lambda g: g + 0.1 * g.square(),
    "clipped": lambda g: g.clamp(-0.05, 0.05),
    "less": lambda g: 0.9 * g,
}


@pytest.mark.parametrize("name", BENDS)
def test_what_cannot_be_followed_is_refused_with_its_residual(name):
    pipe, posterior = guided()
    pipe.bend = BENDS[name]
    with pytest.raises(UnsupportedPipelineError, match=r"residual of \d"):
        UncertaintyPipeline(pipe, posterior)(batch_size=2, generator=seeds(0, 1), num_inference_steps=2)


def test_a_sample_that_is_changed_between_steps_is_refused():
    pipe, posterior = guided()
    pipe.mix = 0.1
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
    with pytest.raises(ArgumentError, match="'tangents', 'ensemble', 'bayesdiff', 'bayesdiff-centered'"):
        UncertaintyPipeline(pipe, posterior, propagation="magic")
    with pytest.raises(ArgumentError, match="num_tangents >= 1"):
        UncertaintyPipeline(pipe, posterior, num_tangents=0)
    with pytest.raises(ArgumentError, match="num_samples >= 2, got 1"):
        UncertaintyPipeline(pipe, posterior, propagation="bayesdiff", num_samples=1)
    with pytest.raises(ArgumentError, match="skip_interval >= 1, got 0"):
        UncertaintyPipeline(pipe, posterior, propagation="bayesdiff", skip_interval=0)
    with pytest.raises(ArgumentError, match="num_tangents >= 2, got 1"):
        UncertaintyPipeline(pipe, posterior, propagation="ensemble", num_tangents=1)
    for propagation in ("tangents", "bayesdiff", "bayesdiff-centered"):
        with pytest.raises(ArgumentError, match=f"\"ensemble\" with redraw=True, got '{propagation}'"):
            UncertaintyPipeline(pipe, posterior, propagation=propagation, redraw=True)
    for propagation in ("bayesdiff", "bayesdiff-centered"):
        with pytest.raises(ArgumentError, match=f"return_factors=True, got '{propagation}'"):
            UncertaintyPipeline(pipe, posterior, propagation=propagation, return_factors=True)
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


@pytest.mark.parametrize("sequential", [False, True])
def test_directions_that_share_a_network_call(sequential):
    """The same map but for rounding, and the same count."""
    pipe, posterior = guided(torch.float64)
    seen = []
    handle = pipe.unet.register_forward_hook(lambda _, __, output: seen.append(len(output.sample)))
    outputs = []
    for together in (1, 3, 100):
        seen.clear()
        up = UncertaintyPipeline(
            pipe, posterior, num_tangents=7, refresh=1, num_directions=5, directions_per_call=together
        )
        outputs.append(up(batch_size=2, generator=seeds(1, 2), num_inference_steps=4, sequential=sequential))
        rows = 2 if sequential else 4
        assert max(seen) == rows * min(together, 5)
    handle.remove()
    for out in outputs[1:]:
        assert out.calls == outputs[0].calls
        torch.testing.assert_close(out.variance, outputs[0].variance, rtol=1e-5, atol=0)
