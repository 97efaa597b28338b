"""Fitting through pipelines: the same posterior however it is cut, the pipe left as it was, and errors by name."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import nn

import bayesdiff as bd
from bayesdiff.checks import (
    ArgumentError,
    BayesdiffWarning,
    NonFiniteError,
    ShapeError,
    UnsupportedPipelineError,
    UnsupportedSchedulerError,
)
from bayesdiff.diffusion.noising import draw
from bayesdiff.fitting.compare import occurrences, rows_alike, unlike_others
from bayesdiff.fitting.told import Told
from bayesdiff.head.find import denoiser
from bayesdiff.rng import base_seed, item_generator
from tests import cases
from tests.fitting import recipes
from tests.fitting.test_by_pipe import MADE, RECIPES, data_of, double
from tests.fitting.test_fit import assert_same, state
from tests.pipelines import noise as normal
from tests.pipelines import picture

N = 5
PROMPTS = ["a wet cat", "a dog", "birds and a boat", "", "a coast"]


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def images(n=N, channels=3, size=16, dtype=torch.float32):
    return (torch.rand(n, channels, size, size, generator=generator(1)) * 2 - 1).to(dtype)


def fitted(pipe, x, prompts=None, seed=3, **kwargs):
    return bd.fit(pipe, x, prompts, generator=generator(seed), progress=False, **kwargs)


@pytest.fixture(scope="module")
def sd():
    return double(MADE["sd-ddim-guided"]())


# One posterior however the work is cut.


def test_the_batch_size_changes_nothing(sd):
    x = images(dtype=torch.float64)
    whole = fitted(sd, x, PROMPTS, draws_per_image=4)
    assert whole.statistics.num_draws == 4 * N
    for size in (1, 2, 3, 7):
        assert_same(fitted(sd, x, PROMPTS, draws_per_image=4, batch_size=size), whole)
    other = fitted(sd, x, PROMPTS[::-1], draws_per_image=4)
    assert not torch.equal(other.precision, whole.precision)


def test_rows_that_are_told_apart_by_a_replaced_argument():
    """The inpainting pipeline makes one number of t."""
    pipe = double(MADE["inpaint-9-channels"]())
    x = images(3, dtype=torch.float64)
    data = {"images": x, "prompts": PROMPTS[:3], "mask_image": recipes.holes(x)[0], "image": x / 2 + 0.5}
    whole = fitted(pipe, data, draws_per_image=2)
    assert_same(fitted(pipe, data, draws_per_image=2, batch_size=1), whole)


def test_the_text_encoder_runs_once_for_a_batch(sd):
    calls = []
    handle = sd.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        counts = []
        for draws in (1, 6):
            calls.clear()
            fitted(sd, images(dtype=torch.float64), PROMPTS, draws_per_image=draws)
            counts.append(len(calls))
    finally:
        handle.remove()
    assert counts[0] == counts[1]


def test_a_network_call_for_each_row_of_draws(sd):
    sizes = []
    handle = sd.unet.conv_out.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    try:
        fitted(sd, images(dtype=torch.float64), PROMPTS, draws_per_image=4, batch_size=3)
    finally:
        handle.remove()
    # The first is made twice, and once more before the third, the fifth and the eighth.
    assert sizes[-12:] == [3] * 7 + [2] * 3 + [3, 2]
    assert len(sizes) <= 12 + 7  # those of the examination, and one that shows what comes back for three rows


def test_the_encoders_posterior_is_sampled_for_each_draw(sd):
    x, seed = images(1, dtype=torch.float64), base_seed(generator())
    out = fitted(sd, x, "a cat", draws_per_image=2)
    posterior, scale = sd.vae.encode(x).latent_dist, sd.vae.config.scaling_factor
    text = sd.encode_prompt(["a cat"], "cpu", 1, False)[0]
    expected = 0.0
    for j, (t, noise) in enumerate(zip(*draw(sd.scheduler, (4, 8, 8), seed, 0, 1, 2), strict=True)):
        own = torch.randn(4, 8, 8, generator=item_generator(seed + 1, 0, j)).double()
        z = scale * (posterior.mode() + posterior.std * own)
        x_t, target = recipes.ddpm(sd.scheduler, z, t[None], noise.double()[None])
        with torch.no_grad():
            expected += (target - sd.unet(x_t, t, encoder_hidden_states=text).sample).square().sum()
    torch.testing.assert_close(out.statistics.squared_residuals.sum(), expected, rtol=1e-6, atol=0)
    mean = fitted(sd, x, "a cat", draws_per_image=2, encode="mean")
    assert not torch.equal(mean.precision, out.precision)


def test_samples_are_taken_as_they_are(sd):
    x = images(3, dtype=torch.float64)
    z = recipes.latents(sd, x).detach()
    assert_same(fitted(sd, z, PROMPTS[:3]), fitted(sd, x, PROMPTS[:3], encode="mean"))
    small = fitted(sd, z[:, :, :4, :4], PROMPTS[:3])  # not the size of the pipe's own
    assert small.statistics.positions.sum() == 3 * 16


def test_inputs_of_the_network_itself(sd):
    """Given embeddings take the place of the pipe's."""
    x = images(3, dtype=torch.float64)
    text = sd.encode_prompt(PROMPTS[:3], "cpu", 1, False)[0]
    given = fitted(sd, {"images": x, "encoder_hidden_states": text})
    assert_same(given, fitted(sd, {"images": x, "prompt_embeds": text}))
    assert_same(given, fitted(sd, x, PROMPTS[:3]))


@pytest.mark.parametrize("name", ["sdxl-euler-zeros", "dit-ddim", "if", "z-image", "flux", "lumina2", "auraflow"])
def test_scores_are_the_gradients_of_the_training_loss(name):
    """Σ r φᵀ of an image is −∂/∂W of ½ ‖target − f‖², by autograd through the recipe written out by hand."""
    recipe, head, given = RECIPES[name]
    pipe, data = double(MADE[name]()), data_of(name)
    out = fitted(pipe, data, pipe_kwargs=given, encode="mean")
    shape = bd.features(pipe, data, timesteps=[1, 1, 1], pipe_kwargs=given).noisy.shape[1:]
    t, noise = draw(pipe.scheduler, tuple(shape), base_seed(generator()), 0, 3, 1)
    output, target = recipe(pipe, data["images"], t, noise.double())
    residuals = (target - output).double()
    layer = denoiser(pipe).get_submodule(head)
    for i, score in enumerate(out.statistics.image_scores(torch.ones(10))):
        loss = 0.5 * residuals[i].square().sum()
        weight, *bias = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
        expected = torch.cat([weight.flatten(1), *(b[:, None] for b in bias)], dim=1)
        torch.testing.assert_close(score, -expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    learned = name in ("dit-ddim", "if")
    assert out.statistics.trained_channels == layer.weight.shape[0] // (2 if learned else 1)
    squares = float(residuals.detach().square().mean())
    assert out.statistics.pooled_variance() == pytest.approx(squares, rel=1e-6)


def test_networks_that_take_turns():
    pipe = MADE["wan-two-networks"]()
    x = torch.rand(6, 3, 1, 16, 16, generator=generator(1)) * 2 - 1
    with pytest.warns(
        BayesdiffWarning, match=r"another network than the one with 'transformer_2.proj_out' at t = (8|9)"
    ):
        out = fitted(
            pipe, x, "a cat", head="transformer_2.proj_out", pipe_kwargs={"max_sequence_length": 16}, draws_per_image=3
        )
    t, _ = draw(pipe.scheduler, (1,), base_seed(generator()), 0, 6, 3)
    assert out.statistics.num_draws == int((t < 800).sum()) < 18


def test_labels_are_told_to_the_pipe_or_to_the_network():
    pipe = cases.class_pipeline(cases.scheduler(), torch.float64)
    x, labels = images(4, 1, 8, torch.float64), torch.tensor([0, 1, 2, 2])
    whole = fitted(pipe, {"images": x, "class_labels": labels})
    assert_same(whole, fitted(pipe, {"images": x, "classes": labels.tolist()}))
    assert_same(whole, fitted(pipe.unet, {"images": x, "class_labels": labels}, scheduler=pipe.scheduler))


def test_a_network_that_is_called_in_a_way_of_its_own():
    """As k-diffusion and EDM have them: the noise level goes in, and scaled."""
    network, scheduler = cases.tiny_unet(channels=1).double(), cases.scheduler()

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, noisy, log_level, kind):
            assert kind == ["a"] * len(noisy)
            return {"pred": self.inner(noisy, (log_level * 100).round()).sample}

    x = images(4, 1, 8, torch.float64)
    data = {"images": x, "kind": ["a"] * 4}
    own = fitted(
        Named().eval(), data, scheduler=scheduler, call=lambda net, x, t, batch: net(x, t / 100, batch["kind"]),
        draws_per_image=2,
    )  # fmt: skip
    assert own.head_path == "inner.conv_out"
    assert_same(own, fitted(network, x, scheduler=scheduler, draws_per_image=2))
    step = bd.features(network, x, timesteps=[1, 5, 500, 999], scheduler=scheduler, generator=generator())
    with torch.no_grad():
        output = network(step.noisy, step.timesteps).sample
    torch.testing.assert_close(step.output, output)
    torch.testing.assert_close(step.residual, step.target - output)


# The pipe is left as it was.


def everything(pipe):
    parts = [v for v in pipe.components.values() if isinstance(v, nn.Module)]
    scheduler = {k: v for k, v in vars(pipe.scheduler).items() if not isinstance(v, torch.Tensor)}
    processors = [(n, id(m.processor)) for p in parts for n, m in p.named_modules() if hasattr(m, "processor")]
    shown = {k: id(v) for k, v in vars(pipe).items()}
    return [state(p) for p in parts], [list(vars(m)) for p in parts for m in p.modules()], scheduler, processors, shown


@pytest.mark.parametrize("call", [1, 4, None])
@pytest.mark.parametrize("name", ["sd-pag", "sd3"])
def test_nothing_is_left_behind_also_when_interrupted(name, call):
    pipe, calls = MADE[name](), []
    before, random = copy.deepcopy(everything(pipe)), torch.get_rng_state()

    def interrupt(*_):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    network = denoiser(pipe)
    handle = network.register_forward_hook(interrupt)
    given = {"pipe_kwargs": {"max_sequence_length": 16}} if name == "sd3" else {}
    try:
        if call is None:
            fitted(pipe, images(), PROMPTS, **given)
        else:
            with pytest.raises(KeyboardInterrupt):
                fitted(pipe, images(), PROMPTS, **given)
    finally:
        handle.remove()
    assert everything(pipe) == before
    assert torch.equal(torch.get_rng_state(), random)


# Errors.


def spoilt():
    x = images()
    x[2, 0, 3, 3] = float("nan")
    return x


HALF = picture(seed=8, batch=2).round()[:, :1]

BAD = {
    "no-prompts": ("sd-ddim-guided", images(), {}, ArgumentError, "expected prompts for StableDiffusionPipeline, got none"),
    "too-few-prompts": ("sd3", images(), {"prompts": PROMPTS[:3]}, ArgumentError, "5 prompts, one for each image, got 3"),
    "too-many-prompts": ("sd3", images(3), {"prompts": PROMPTS}, ArgumentError, "3 prompts, one for each image, got 5"),
    "numbers-for-prompts": ("sd3", images(3), {"prompts": [1, 2, 3]}, ArgumentError, "takes, got 'class_labels'"),
    "no-labels": ("dit-ddim", images(), {}, ArgumentError, "'class_labels', which DiTPipeline must be told"),
    "label-out-of-range": (
        "dit-ddim", {"images": images(), "class_labels": torch.tensor([0, 1, 2, 1000, 3])}, {}, ArgumentError,
        "class labels from 0 to 999, got 0 to 1000",
    ),
    "negative-label": (
        "dit-ddim", {"images": images(2), "class_labels": [0, -1]}, {}, ArgumentError, "class labels from 0 to 999, got -1",
    ),
    "nan": ("sd3", spoilt(), {"prompts": PROMPTS}, NonFiniteError, "finite images, got 1 NaN"),
    "latents-for-pixels": (
        "ddim-pixels", images(2, 4, 8), {}, ShapeError, r"samples \(3, 8, 8\), as DDIMPipeline makes them, got data \(4, 8, 8\)",
    ),
    "five-channels": (
        "sd-ddim-guided", images(2, 5, 8), {"prompts": "a"}, ShapeError, r"samples \(4, 8, 8\).*got data \(5, 8, 8\); images are",
    ),
    "grey": ("sd-ddim-guided", images(2, 1, 16), {"prompts": "a"}, ShapeError, r"got data \(1, 16, 16\)"),
    "integers": ("sd3", (images(2) * 100).long(), {"prompts": "a"}, ArgumentError, "as uint8, got torch.int64"),
    "unknown-keyword": (
        "sd3", images(2), {"prompts": "a", "pipe_kwargs": {"guidance": 3}}, ArgumentError,
        "StableDiffusion3Pipeline takes, got 'guidance'",
    ),
    "unknown-column": (
        "sd3", {"images": images(2), "sepia": ["a", "b"]}, {}, ArgumentError, "takes, got 'sepia'; the pipe takes prompt",
    ),
    "mixed": (
        "inpaint-4-channels",
        {"images": images(2), "prompts": PROMPTS[:2], "image": picture(batch=2), "mask_image": HALF},
        {}, UnsupportedPipelineError, r"noisy sample to its network as it is, got \d\d%",
    ),
    "another-time": (
        "svd", torch.rand(1, 3, 3, 16, 16) * 2 - 1, {"space": "pixels"}, ArgumentError,
        "'image', which StableVideoDiffusionPipeline must be",
    ),
    "no-schedule": ("consistency", images(2, 3, 8), {}, UnsupportedSchedulerError, "CMStochasticIterativeScheduler"),
    "the-pipe-refuses": (
        "sd3", images(2), {"prompts": "a", "pipe_kwargs": {"max_sequence_length": 10**6}}, ArgumentError, "the pipe says: .*512",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_data(name):
    case, data, kwargs, error, message = BAD[name]
    pipe = MADE[case]()
    calls = []
    denoiser(pipe).register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(error, match=message):
        fitted(pipe, data, **kwargs)
    assert len(calls) <= 8  # before the work


@pytest.mark.parametrize("end", [0.2, 0.5])
def test_inputs_that_are_others_in_later_steps_are_refused(end):
    """A ControlNet that ends early: some draws would be without it."""
    pipe, data = MADE["controlnet-1"](), {"images": images(2), "prompts": PROMPTS[:2], "image": picture(batch=2)}
    with pytest.raises(UnsupportedPipelineError, match="the same in each step with the same sample and timestep"):
        fitted(pipe, data, pipe_kwargs={"control_guidance_end": end})


def test_a_noise_level_by_the_number_of_the_step_is_refused():
    """The latent upscaler tells its network log σ/4 of the scheduler's own steps."""
    pipe = MADE["latent-upscale"]()
    data = {"images": images(1, 4, 16), "prompts": ["a cat"], "image": normal(1, 4, 8, 8)}
    with pytest.raises(UnsupportedPipelineError, match="the same in each step with the same sample and timestep"):
        fitted(pipe, data, space="samples")


def test_a_flow_whose_time_runs_from_noise_to_data():
    """Mochi's scheduler: one of its own steps, from x_t with the target for the output, is on the straight line to x_0."""
    pipe = MADE["sd3"]()
    x0 = images(2, 4, 8)
    noise = torch.randn(x0.shape, generator=generator())
    for inverted in (False, True):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=inverted)
        pipe.scheduler.set_timesteps(4)
        first, second = pipe.scheduler.timesteps[1:3]
        there, then = (
            bd.features(pipe, x0, "a", timesteps=t.repeat(2), noise=noise, pipe_kwargs={"max_sequence_length": 16})
            for t in (first, second)
        )
        assert (float(first) < float(second)) == inverted
        stepped = pipe.scheduler.step(there.target, first, there.noisy).prev_sample
        torch.testing.assert_close(stepped, then.noisy, rtol=0, atol=1e-5)
        assert float((then.noisy - x0).norm()) < float((there.noisy - x0).norm())


def test_a_schedule_of_another_time():
    """Stable Video Diffusion tells its network log σ/4."""
    scheduler = MADE["svd"]().scheduler
    pipe = MADE["sd2-euler-v"]()
    pipe.scheduler = scheduler
    with pytest.raises(
        UnsupportedSchedulerError, match="EulerDiscreteScheduler to have the noise levels of its timesteps"
    ):
        fitted(pipe, images(2), "a")


def test_prompts_need_a_pipeline(sd):
    with pytest.raises(ArgumentError, match="a pipeline to encode prompts, got a network"):
        fitted(sd.unet, images(2, 4, 8), "a", scheduler=sd.scheduler)
    with pytest.raises(ArgumentError, match="pipe_kwargs beside a pipeline"):
        fitted(sd.unet, images(2, 4, 8), scheduler=sd.scheduler, pipe_kwargs={"eta": 0.0})


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"timesteps": [3]}, ArgumentError, "2 timesteps from 0 to 1000"),
        ({"timesteps": [3, 1001]}, ArgumentError, "2 timesteps from 0 to 1000"),
        (
            {"timesteps": [3, 5], "noise": torch.zeros(2, 4, 8, 9)},
            ShapeError,
            r"noise \(2, 4, 8, 8\), got \(2, 4, 8, 9\)",
        ),
        ({"timesteps": [3, 5], "encode": "mode"}, ArgumentError, "encode to be one of 'sample', 'mean'"),
        ({"timesteps": [3, 5], "space": "latent"}, ArgumentError, "space to be one of"),
    ],
)
def test_bad_arguments_of_features(sd, kwargs, error, message):
    with pytest.raises(error, match=message):
        bd.features(sd, images(2, dtype=torch.float64), "a cat", **kwargs)


def test_how_a_network_is_told_the_time():
    x, times = torch.randn(2, 3), [250.0, 750.0, 30.0]
    scalar = [[x, torch.tensor(1 - t / 1000), "a"] for t in times]
    told = Told.read(scalar, times)
    assert told is not None
    (_, replaced, _), _ = told.replace((x, scalar[0][1], "a"), {}, torch.tensor([100.0, 900.0]))
    torch.testing.assert_close(replaced, torch.tensor([0.9, 0.1]))
    assert Told.read([[x, torch.tensor(t).log()] for t in times], times) is None
    assert Told.read([[x * t] for t in times], times) is None
    assert Told.read([[x, t] for t in times], times) is None
    assert Told.read([[x] for _ in times], times) is None


def test_what_follows_a_convolution_is_scaled_by_the_timestep():
    config = {k: v for k, v in cases.tiny_unet().config.items() if not k.startswith("_")}
    pipe = MADE["ddim-pixels"]()
    pipe.unet = UNet2DModel(**{**config, "time_embedding_type": "fourier"}).eval()
    with pytest.raises(bd.BayesdiffError, match="conv_out"):
        fitted(pipe, images(3, size=8))


def test_rows_that_get_what_they_would_get_alone():
    x, t = torch.randn(2, 4), torch.tensor([250.0, 750.0])
    scaled = [x * s for s in t]  # another input that depends on t
    mixed = torch.stack([scaled[0][0], scaled[1][1]])
    first, second = [x, t[0], "a", scaled[0]], [x, t[1], "a", scaled[1]]
    assert rows_alike([x, t, "a", mixed], first, second)
    assert not rows_alike([x, t, "a", scaled[0]], first, second)  # one timestep for both
    assert not rows_alike([x, t, "a", mixed.flip(0)], first, second)
    assert not rows_alike([x, t.flip(0), "a", mixed], first, second)
    assert not rows_alike([x, t.mean(), "a", mixed], first, second)
    assert not rows_alike([x, t, "b", mixed], first, second)
    assert not rows_alike([x, t, 250.0, mixed], [x, t[0], 250.0, scaled[0]], [x, t[1], 750.0, scaled[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_often_a_sample_reaches_a_network(dtype):
    x = unlike_others((2, 4, 8, 8))
    other = torch.randn(2, 3000, generator=generator()).to(dtype) * 60  # has some of its numbers where they are rounded
    given = x.to(dtype)
    assert occurrences([given, other], x) == 1
    assert occurrences([torch.cat([given, given]), other], x) == 2
    assert occurrences([*given.permute(0, 2, 3, 1), other], x) == 1
    assert occurrences([torch.cat([given[:, :, :4], given[:, :, :4] * 0]), other * 0], x) < 1
    assert occurrences([other * 0], x) == 0
