"""Whole trajectories with other weights: their moments, their noise, and what they leave behind."""

from __future__ import annotations

import diffusers
import pytest
import torch

import bayesdiff as bd
from bayesdiff.checks import NotRepeatableError
from bayesdiff.head.find import Head
from bayesdiff.propagation.ensemble import Moments
from tests import cases

#: Networks without training need more calls than others: maps are what is looked at here, not how good they are.
pytestmark = pytest.mark.filterwarnings("ignore:the network's response is not well known")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [2, 3, 50])
def test_moments(count, dtype):
    """Far from zero, where a sum of squares would lose all digits."""
    values = torch.randn(count, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype) + 1e4
    moments = Moments()
    for value in values:
        moments.add(value)
    assert moments.count == count
    assert moments.mean.dtype == moments.variance.dtype == torch.float64
    torch.testing.assert_close(moments.mean, values.double().mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.variance, values.double().var(0), rtol=1e-9, atol=0)


def make(name="ddim", scale=100.0, dtype=torch.float32):
    sampler = {
        "ddim": diffusers.DDIMScheduler(clip_sample=False),
        "ddpm": diffusers.DDPMScheduler(clip_sample=False),
    }[name]
    pipe = cases.class_pipeline(sampler, dtype)
    return pipe, cases.class_posterior(pipe, scale)


def run(pipe, posterior, seeds=(3, 4), steps=4, guidance_scale=1.0, **kwargs):
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Ensemble(**{"members": 6, **kwargs}))
    generator = cases.seeds(*seeds)
    return up, up(
        [0, 2], generator=generator, num_inference_steps=steps, guidance_scale=guidance_scale, output_type="latent"
    )


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_members_are_runs_with_other_weights(name):
    """Each is the plain pipe with δW added to the weights themselves, from the same noise."""
    pipe, posterior = make(name, dtype=torch.float64)
    up, out = run(pipe, posterior, factors=True, trajectory=True, guidance_scale=3.0)
    weight, bias = pipe.unet.conv_out.weight, pipe.unet.conv_out.bias
    plain = weight.detach().clone(), bias.detach().clone()
    members = []
    for delta in up.deviations.double():
        with torch.no_grad():
            weight.copy_(plain[0] + delta[:, :-1].view_as(weight))
            bias.copy_(plain[1] + delta[:, -1])
        members.append(
            pipe(
                [0, 2], generator=cases.seeds(3, 4), num_inference_steps=4, guidance_scale=3.0, output_type="latent"
            ).images
        )
    members = torch.stack(members)
    torch.testing.assert_close(out.variance.double(), members.var(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(out.latents.mean.double(), members.mean(0), rtol=1e-6, atol=1e-6)
    factors = (members - members.mean(0)) / 5**0.5
    torch.testing.assert_close(out.factors.double(), factors, rtol=1e-4, atol=1e-6)
    assert out.plain_calls == 4
    assert out.calls == 4 + 6 * 4 + 1  # the last asks whether the network repeats itself
    assert len(out.trajectory) == 4
    torch.testing.assert_close(out.trajectory[-1].variance, out.variance)
    assert out.residual is None


@pytest.mark.parametrize("redraw", [False, True])
def test_the_same_seeds_give_the_same_map(redraw):
    pipe, posterior = make()
    first, again, fresh = (
        run(pipe, posterior, redraw=redraw, generator=torch.Generator().manual_seed(s))[1] for s in (0, 0, 1)
    )
    assert torch.equal(first.variance, again.variance)
    assert not torch.equal(first.variance, fresh.variance)
    assert (first.images == fresh.images).all()
    # By default the weights have a seed of their own.
    assert torch.equal(run(pipe, posterior, redraw=redraw)[1].variance, run(pipe, posterior, redraw=redraw)[1].variance)
    up, out = run(pipe, posterior, redraw=redraw)
    again = up([0, 2], generator=cases.seeds(3, 4), num_inference_steps=4, output_type="latent")
    assert torch.equal(out.variance, again.variance)


@pytest.mark.parametrize("redraw", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_generators_end_where_the_plain_run_leaves_them(listed, redraw):
    pipe, posterior = make("ddpm")
    mine, theirs = cases.seeds(7, 7)
    torch.manual_seed(1)
    default = torch.get_rng_state()
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Ensemble(members=2, redraw=redraw))
    for _ in range(2):  # the second run goes on from there
        plain = pipe([1], generator=[theirs] if listed else theirs, num_inference_steps=3, output_type="np").images
        out = up([1], generator=[mine] if listed else mine, num_inference_steps=3, output_type="np")
        assert (out.images == plain).all()
        assert torch.equal(mine.get_state(), theirs.get_state())
    assert torch.equal(torch.get_rng_state(), default)


def test_generators_end_there_on_error_too():
    pipe, posterior = make("ddpm")
    generator, theirs = cases.seeds(7, 7)
    pipe([1], generator=theirs, num_inference_steps=3)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 5:  # in the first member
            raise OSError("lost")

    handle = pipe.unet.conv_in.register_forward_hook(fail)
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Ensemble(members=2))
    with pytest.raises(OSError, match="lost"):
        up([1], generator=generator, num_inference_steps=3)
    handle.remove()
    assert torch.equal(generator.get_state(), theirs.get_state())


@pytest.mark.parametrize("propagation", [bd.Ensemble(members=3), bd.Tangents(draws=2)])
def test_without_a_generator_the_global_one_is_set_back_and_left_where_one_run_leaves_it(propagation):
    pipe, posterior = make("ddpm")
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=propagation)
    torch.manual_seed(5)
    plain = pipe([1], num_inference_steps=3, output_type="pt").images
    after = torch.get_rng_state()
    torch.manual_seed(5)
    out = up([1], num_inference_steps=3, output_type="pt")
    assert torch.equal(out.images, plain)
    assert torch.equal(torch.get_rng_state(), after)
    assert float(out.std.mean()) > 0
    again = up([1], num_inference_steps=3, output_type="pt", generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(again.variance, out.variance)


def test_a_member_of_width_zero_is_the_plain_run():
    """And many of them have no variance."""
    pipe, posterior = make("ddpm")
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Ensemble(members=2))
    up.deviations = 0 * up.deviations
    out = up([0, 1], generator=cases.seeds(3, 4), num_inference_steps=4)
    assert bool((out.variance == 0).all())
    assert bool((out.std == 0).all())
    assert bool((out.latents.variance == 0).all())
    tangents = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Tangents(draws=2))
    tangents.deviations = 0 * tangents.deviations
    out = tangents([0, 1], generator=cases.seeds(3, 4), num_inference_steps=4)
    assert bool((out.variance == 0).all())


class Forgetful(diffusers.DDIMPipeline):
    """Another image in every call."""

    calls = 0

    @torch.no_grad()
    def __call__(self, generator, num_inference_steps):
        Forgetful.calls += 1
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(2, 1, 8, 8, generator=generator)
        for t in self.scheduler.timesteps:
            f = self.unet(x, t, class_labels=torch.tensor([0, 1])).sample
            x = self.scheduler.step(f, t, x).prev_sample
        return diffusers.ImagePipelineOutput(images=x + Forgetful.calls)


def test_a_run_with_certain_weights_must_be_the_first_run():
    pipe, posterior = make()
    up = bd.UncertaintyPipeline(Forgetful(pipe.unet, pipe.scheduler), posterior, propagation=bd.Ensemble(members=2))
    with pytest.raises(NotRepeatableError, match="a member with δW = 0"):
        up(generator=torch.Generator().manual_seed(0), num_inference_steps=2)


class SequentialPipeline(diffusers.DDIMPipeline):
    """Each branch of guidance in a call of its own."""

    @torch.no_grad()
    def __call__(self, generator, num_inference_steps):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(2, 1, 8, 8, generator=generator)
        for t in self.scheduler.timesteps:
            f_u, f_c = (self.unet(x, t, class_labels=torch.tensor(y)).sample for y in ([3, 3], [0, 1]))
            x = self.scheduler.step(f_u + 3 * (f_c - f_u), t, x).prev_sample
        return diffusers.ImagePipelineOutput(images=x)


def weights_in_use(monkeypatch, redraw):
    """δW of each call of the head: ``(members, steps, branches)`` by their sums."""
    pipe, posterior = make()
    sequential = SequentialPipeline(pipe.unet, pipe.scheduler)
    seen = []
    shifted = Head.shifted

    def spy(self, delta):
        current = delta if callable(delta) else lambda: delta

        def kept():
            value = current()
            seen.append(float(value.sum()))
            return value

        return shifted(self, kept)

    monkeypatch.setattr(Head, "shifted", spy)
    up = bd.UncertaintyPipeline(sequential, posterior, propagation=bd.Ensemble(members=3, redraw=redraw))
    out = up(generator=torch.Generator().manual_seed(0), num_inference_steps=4)
    assert out.calls == 4 * 2 * 4 + 1
    return torch.tensor(seen, dtype=torch.float64).view(3, 4, 2)


def test_redrawn_weights_are_one_draw_for_both_branches_of_a_step(monkeypatch):
    drawn = weights_in_use(monkeypatch, True)
    assert torch.equal(drawn[..., 0], drawn[..., 1])
    assert len(drawn[..., 0].unique()) == 3 * 4  # another in every step, and for every member


def test_shared_weights_are_one_draw_for_a_trajectory(monkeypatch):
    drawn = weights_in_use(monkeypatch, False)
    assert (drawn == drawn[:, :1, :1]).all()
    assert len(drawn.unique()) == 3


def test_redrawing_halves_the_standard_deviation_of_a_trained_model(shipped):
    """Errors that are taken as independent average out; one network's are not and do not."""
    pipe, posterior = shipped
    shared, redrawn = (
        bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Ensemble(members=8, redraw=redraw))(
            ["sneaker", "bag"], generator=cases.seeds(0, 1), num_inference_steps=8, output_type="pt"
        )
        for redraw in (False, True)
    )
    assert torch.equal(shared.images, redrawn.images)
    assert shared.calls == redrawn.calls
    ratio = float(redrawn.std.mean() / shared.std.mean())
    assert 0.2 < ratio < 0.75, ratio
