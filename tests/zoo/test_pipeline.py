"""The pipeline that runs class-conditional networks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from bayesdiff import zoo
from bayesdiff.checks import ArgumentError, BayesdiffError, ShapeError, UnknownNameError
from tests import cases
from tests.cases import seeds


def tiny(channels=1, **kwargs):
    pipe = zoo.ClassConditionalPipeline(
        cases.tiny_unet(channels=channels, classes=4), DDIMScheduler(clip_sample=False),
        {0: "T-shirt/top, tee", 1: "Bag", 2: "Ankle boot"}, **kwargs,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_guidance_is_extrapolation_from_the_null_class():
    """One DDIM step by hand, with the branches evaluated separately."""
    pipe = tiny()
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    got = pipe([1, 2], guidance_scale=3.0, num_inference_steps=1, latents=noise, output_type="latent").images
    pipe.scheduler.set_timesteps(1)
    t = pipe.scheduler.timesteps[0]
    with torch.no_grad():
        f_c = pipe.unet(noise, t, class_labels=torch.tensor([1, 2])).sample
        f_u = pipe.unet(noise, t, class_labels=torch.tensor([3, 3])).sample
    want = pipe.scheduler.step(f_u + 3 * (f_c - f_u), t, noise).prev_sample
    torch.testing.assert_close(got, want)
    plain = pipe([1, 2], num_inference_steps=1, latents=noise, output_type="latent").images
    torch.testing.assert_close(plain, pipe.scheduler.step(f_c, t, noise).prev_sample)
    assert not torch.allclose(plain, got)


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 2), (0.0, 4), (2.0, 4)])
def test_one_network_call_a_step(scale, rows):
    pipe, seen = tiny(), []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    pipe(["bag", 0], guidance_scale=scale, num_inference_steps=3, generator=seeds(0, 1))
    assert seen == [rows] * 3


def test_a_sample_depends_on_its_own_generator_only():
    pipe = tiny()
    pipe.scheduler = zoo.build_scheduler("ddpm", pipe.scheduler.config)  # draws noise in every step
    both = pipe([0, 1], num_inference_steps=4, generator=seeds(5, 6), output_type="pt").images
    alone = pipe([1], num_inference_steps=4, generator=seeds(6), output_type="pt").images
    torch.testing.assert_close(both[1:], alone)
    assert not torch.allclose(both[0], both[1])


def test_eta_reaches_the_schedulers_that_take_it():
    pipe = tiny()
    quiet, loud = (
        pipe(0, eta=eta, num_inference_steps=4, generator=seeds(0), output_type="pt").images for eta in (0.0, 1.0)
    )
    assert not torch.allclose(quiet, loud)
    pipe.scheduler = zoo.build_scheduler("euler", pipe.scheduler.config)
    pipe(0, eta=1.0, num_inference_steps=2, generator=seeds(0))


def test_initial_noise_is_scaled():
    pipe = tiny()
    pipe.scheduler = zoo.build_scheduler("euler", pipe.scheduler.config)
    noise, seen = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), []
    step = pipe.scheduler.step

    def watch(output, t, sample, **kwargs):
        seen.append(sample.clone())
        return step(output, t, sample, **kwargs)

    pipe.scheduler.step = watch
    pipe(0, num_inference_steps=2, latents=noise)
    assert pipe.scheduler.init_noise_sigma > 5
    torch.testing.assert_close(seen[0], noise * pipe.scheduler.init_noise_sigma)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types_are_one_image(channels, mode):
    pipe = tiny(channels)

    def run(kind):
        return pipe([0, 1], num_inference_steps=2, generator=seeds(0, 1), output_type=kind)

    latent, pt, array, pil = (run(kind).images for kind in ("latent", "pt", "np", "pil"))
    torch.testing.assert_close(pt, (latent / 2 + 0.5).clamp(0, 1))
    assert array.shape == (2, 8, 8, channels)
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert all(isinstance(image, Image.Image) and image.mode == mode for image in pil)
    np.testing.assert_array_equal(np.asarray(pil[1]).reshape(8, 8, channels), (array[1] * 255).round().astype(np.uint8))
    assert isinstance(pipe(0, num_inference_steps=1, return_dict=False), tuple)


@pytest.mark.parametrize(
    ("classes", "indices"),
    [
        ("bag", [1]),
        ("A  Bag", [1]),
        ("an ankle boot", [2]),
        (["TEE", "the t-shirt/top", 2], [0, 0, 2]),
        (np.int64(1), [1]),
        (torch.tensor([2, 0]).tolist(), [2, 0]),
    ],
)
def test_classes_by_name_or_index(classes, indices):
    assert tiny().class_indices(classes) == indices


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("bagg", r"'T-shirt/top', 'Bag', 'Ankle boot'\), got 'bagg'; did you mean 'bag'\?"),
        (["bag", "zebra"], "got 'zebra'$"),
        (3, "0 to 2 .*, got 3"),  # the null class is not one to ask for
        (-1, "got -1"),
        (True, "got True"),
    ],
)
def test_unknown_classes(classes, message):
    with pytest.raises(UnknownNameError, match=message):
        tiny().class_indices(classes)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"num_inference_steps": 0}, ArgumentError, "num_inference_steps >= 1, got 0"),
        ({"num_inference_steps": 2.5}, ArgumentError, "integer >= 1, got 2.5"),
        ({"generator": seeds(0)}, ArgumentError, "each of the 2 samples, got 1"),
        ({"output_type": "jpeg"}, ArgumentError, "'pil'.*got 'jpeg'"),
        ({"latents": torch.zeros(2, 1, 8, 7)}, ShapeError, r"\(2, 1, 8, 8\), got \(2, 1, 8, 7\)"),
        ({"classes": []}, ArgumentError, "at least one class"),
    ],
)
def test_wrong_arguments_are_found_before_the_network_runs(kwargs, error, message):
    pipe, calls = tiny(), []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(error, match=message) as caught:
        pipe(**{"classes": [0, 1], **kwargs})
    assert isinstance(caught.value, BayesdiffError)
    assert not calls


def test_a_network_without_classes_is_refused():
    with pytest.raises(ArgumentError, match="num_class_embeds = None"):
        zoo.ClassConditionalPipeline(cases.tiny_unet(), DDIMScheduler())
    with pytest.raises(ArgumentError, match=r"classes 0 to 2, got \[0\]"):
        zoo.ClassConditionalPipeline(cases.tiny_unet(classes=4), DDIMScheduler(), {0: "a"})


def test_save_and_load(tmp_path):
    pipe = tiny()
    pipe.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["id2label"]["1"] == "Bag"
    for again in (
        zoo.ClassConditionalPipeline.from_pretrained(tmp_path / "saved"),
        zoo.load_pipeline(tmp_path / "saved"),
    ):
        assert again.class_names == ("T-shirt/top", "Bag", "Ankle boot")
        again.set_progress_bar_config(disable=True)
        a, b = (p("tee", num_inference_steps=2, generator=seeds(0), output_type="pt").images for p in (pipe, again))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # loaded weights are aligned otherwise in memory


def test_a_network_without_names_takes_indices(tmp_path):
    pipe = zoo.ClassConditionalPipeline(cases.tiny_unet(channels=1, classes=3), DDIMScheduler())
    assert pipe.class_indices([0, 1]) == [0, 1]
    with pytest.raises(UnknownNameError, match=r"the integers 0 to 1\), got 'bag'"):
        pipe.class_indices("bag")
    pipe.save_pretrained(tmp_path / "saved")
    assert zoo.ClassConditionalPipeline.from_pretrained(tmp_path / "saved").class_names == ()
