"""Calls of ``fit`` that are right but unusual, and settings that are wrong: each as it should be, or an error by name."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLMochi,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    UNet2DModel,
)

import bayesdiff as bd
from bayesdiff.checks import ArgumentError, BayesdiffWarning, UnsupportedHeadError
from bayesdiff.diffusion.parametrization import check_levels
from bayesdiff.fitting.samples import are_pixels
from tests import cases
from tests.fitting.test_fit import assert_same
from tests.fitting.test_with_pipes import MADE, PROMPTS, double, fitted, images
from tests.pipelines import WIDTH, byte_tokenizer, seeded, t5, vae
from tests.pipelines.build_unet import BETAS


@pytest.fixture(scope="module")
def pixels():
    return MADE["ddim-pixels"]()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_scale_that_depends_on_t_is_seen_in_calls_of_one_row_too(batch_size):
    config = {k: v for k, v in cases.tiny_unet().config.items() if not k.startswith("_")}
    pipe = MADE["ddim-pixels"]()
    pipe.unet = UNet2DModel(**{**config, "time_embedding_type": "fourier"}).eval()
    for model, schedule in ((pipe, None), (pipe.unet, pipe.scheduler)):
        with pytest.raises(UnsupportedHeadError, match="conv_out"):
            fitted(model, images(3, size=8), scheduler=schedule, batch_size=batch_size)


def test_more_draws_than_a_scheduler_has_steps(pixels):
    """LCM's has 50; this one 10."""
    x, pipe = images(2, size=8, dtype=torch.float64), double(MADE["ddim-pixels"]())
    pipe.scheduler = DDIMScheduler(num_train_timesteps=10)
    alone = fitted(pipe.unet, x, scheduler=pipe.scheduler, draws_per_image=25)
    for size in (1, 2):
        assert_same(fitted(pipe, x, draws_per_image=25, batch_size=size), alone)
    assert fitted(MADE["lcm"](), images(1), PROMPTS[:1], draws_per_image=52, batch_size=1).statistics.num_draws == 52


@pytest.mark.parametrize("scheduler", [KDPM2DiscreteScheduler, HeunDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_any_sampler_of_one_schedule_gives_one_posterior(pixels, scheduler):
    """Two-stage ones keep their noise levels in an order of their own."""
    x = images(2, size=8)
    once = fitted(pixels, x)
    for options in ({}, {"use_karras_sigmas": True}):
        kept = {k: v for k, v in options.items() if k in inspect.signature(scheduler).parameters}
        same = ("beta_start", "beta_end", "beta_schedule", "prediction_type")
        sampler = scheduler(**{k: pixels.scheduler.config[k] for k in same}, **kept)
        sampler.set_timesteps(3)
        check_levels(sampler, sampler.timesteps)
        assert_same(fitted(pixels.unet, x, scheduler=sampler), once)


def latte():
    network = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, cross_attention_dim=16,
        sample_size=8, patch_size=2, norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=WIDTH,
        video_length=2, activation_fn="gelu-approximate", attention_bias=True, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return LattePipeline(byte_tokenizer(), t5(), vae(), network, DDIMScheduler(**BETAS, clip_sample=False))


def test_a_pipeline_whose_rows_are_others_alone_is_run_row_by_row():
    """Latte cuts the padding of one prompt off, and leaves that of several as zeros that are attended to."""
    pipe = double(seeded(latte)())
    data = {"images": images(3)[:, :, None].expand(-1, -1, 2, -1, -1).double(), "prompts": PROMPTS[:3]}
    given = {"pipe_kwargs": {"clean_caption": False, "video_length": 2}}
    alone = fitted(pipe, data, batch_size=1, **given)
    assert_same(fitted(pipe, data, **given), alone)


def test_an_encoder_that_makes_more_channels_itself_takes_pixels():
    small = {
        "encoder_block_out_channels": (32,) * 4,
        "decoder_block_out_channels": (32,) * 4,
        "layers_per_block": (1,) * 5,
    }
    encoder = AutoencoderKLMochi(latent_channels=12, **small)
    assert encoder.config.in_channels == 15
    assert are_pixels(torch.zeros(1, 3, 7, 16, 16), encoder, None)
    assert not are_pixels(torch.zeros(1, 12, 2, 2, 2), encoder, None)


def test_of_captions_and_labels_those_that_the_model_takes():
    x, labels, short = images(3, dtype=torch.float64), torch.tensor([2, 0, 1]), {"max_sequence_length": 16}
    both = {"images": x, "prompts": PROMPTS[:3], "class_labels": labels}
    for name, alone, given, left in (
        ("sd3", {"prompts": PROMPTS[:3]}, short, "class_labels"), ("dit-ddim", {"class_labels": labels}, {}, "prompts"),
    ):  # fmt: skip
        pipe = double(MADE[name]())
        with pytest.warns(BayesdiffWarning, match=f"does not take {left}: they are left out"):
            chosen = fitted(pipe, both, pipe_kwargs=given)
        assert_same(chosen, fitted(pipe, {"images": x, **alone}, pipe_kwargs=given))


def test_a_text_encoder_in_training_mode():
    """As a T5 is that was built and not loaded: its dropout would be in every embedding."""
    pipe = MADE["pixart-sigma"]()
    pipe.text_encoder.train()
    with pytest.raises(ArgumentError, match=r"call \.eval\(\) on the pipe's text_encoder first"):
        fitted(pipe, images(2), "a")


def fails(*_):
    raise ZeroDivisionError("the user's own")


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"training_draws": "8"}, ArgumentError, "training_draws >= 1"),
        ({"generator": 3}, ArgumentError, r"generator=torch.Generator\(\)"),
        ({"checkpoint": 3}, ArgumentError, "a folder for the checkpoint"),
        ({"loss_weights": lambda u: u * 0}, ArgumentError, "some draws have a weight in"),
        ({"loss_weights": torch.zeros(10)}, ArgumentError, "not all 0"),
        ({"loss_weights": lambda u: None}, ArgumentError, r"return a tensor \(2,\), got NoneType"),
        ({"timestep_density": lambda g, n: "a"}, ArgumentError, r"return a tensor \(1,\), got str"),
        ({"loss_weights": fails}, ZeroDivisionError, "the user's own"),  # not taken for the pipeline's
        ({"timestep_density": fails}, ZeroDivisionError, "the user's own"),
    ],
)
def test_bad_settings(pixels, kwargs, error, message):
    with pytest.raises(error, match=message):
        bd.fit(pixels, images(2, size=8), progress=False, **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [{"dataset_size": 1}, {"covariance": "ef", "loss": "l1"}, {"covariance": "ef", "loss_weights": "min-snr"}],
)
def test_what_cannot_become_a_posterior_is_refused_before_the_work(pixels, kwargs):
    calls = []
    handle = pixels.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ArgumentError, match=r"dataset_size >= the 2 images|squares without weights"):
            fitted(pixels, images(2, size=8), **kwargs)
    finally:
        handle.remove()
    assert not calls


@pytest.mark.parametrize("draws", [torch.tensor(3.0), np.float32(3), 3])
def test_numbers_of_other_kinds_are_saved(pixels, draws, tmp_path):
    posterior = fitted(pixels, images(2, size=8), training_draws=draws, dataset_size=np.int64(8))
    posterior.save(tmp_path)
    loaded = bd.LaplacePosterior.load(tmp_path)
    assert (loaded.training_draws, loaded.dataset_size) == (3.0, 8)
