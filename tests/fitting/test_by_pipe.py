"""Features and targets through pipelines: those of a training step written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bayesdiff as bd
from tests.fitting import recipes
from tests.pipelines import picture
from tests.pipelines.build import CASES

MADE = {case.name: case.make for case in CASES}
#: Of float64; what the pipelines themselves compute in float32 (schedules, timesteps) is equally rounded on both sides.
CLOSE = 1e-6
SHORT = {"max_sequence_length": 16}
PLAIN = {**SHORT, "use_resolution_binning": False, "clean_caption": False}

RECIPES = {
    "sd-ddim-guided": (recipes.stable_diffusion, "conv_out", {}),
    "sd-pndm-guided": (recipes.stable_diffusion, "conv_out", {"guidance_scale": 7.5, "guidance_rescale": 0.7}),
    "sd2-euler-v": (recipes.stable_diffusion, "conv_out", {}),
    "sdxl-euler-zeros": (recipes.sdxl, "conv_out", {}),
    "inpaint-9-channels": (recipes.inpainting, "conv_out", {}),
    "controlnet-1": (recipes.controlnet, "conv_out", {}),
    "lcm": (recipes.lcm, "conv_out", {"guidance_scale": 4.0}),
    "if": (recipes.deepfloyd, "conv_out", {"clean_caption": False}),
    "ddim-pixels": (recipes.unconditional, "conv_out", {}),
    "sd3": (recipes.sd3, "proj_out", SHORT),
    "flux": (recipes.flux, "proj_out", {**SHORT, "guidance_scale": 3.5}),
    "flux-true-cfg": (recipes.flux, "proj_out", {**SHORT, "true_cfg_scale": 4.0, "negative_prompt": "dog"}),
    "pixart-sigma": (recipes.pixart, "proj_out", PLAIN),
    "dit-ddim": (recipes.dit, "proj_out_2", {}),
    "hunyuan-dit": (recipes.hunyuan, "proj_out", {"use_resolution_binning": False}),
    "auraflow": (recipes.auraflow, "proj_out", SHORT),
    "qwen-image": (recipes.qwen, "proj_out", SHORT),
    "wan-euler": (recipes.wan, "proj_out", SHORT),
    "lumina2": (recipes.lumina2, "norm_out.linear_2", {"max_sequence_length": 48, "system_prompt": "paint"}),
    "z-image": (recipes.z_image, "all_final_layer.2-1.linear", SHORT),
}


def double(pipe):
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.float64)
    return pipe


def data_of(name):
    generator = torch.Generator().manual_seed(1)
    size = {"wan-euler": (3, 5, 32, 32), "if": (3, 8, 8), "ddim-pixels": (3, 8, 8)}.get(name, (3, 16, 16))
    images = torch.rand(3, *size, generator=generator, dtype=torch.float64) * 2 - 1
    data = {"images": images}
    if name == "dit-ddim":
        data["class_labels"] = torch.tensor([1, 2, 0])
    elif name != "ddim-pixels":
        data["prompts"] = recipes.PROMPTS
    if name == "controlnet-1":
        data["image"] = picture(batch=3).double()
    if name == "inpaint-9-channels":
        data["mask_image"], data["image"] = recipes.holes(images)[0], images
    return data


def by_hand(recipe, pipe, head, data, t, noise):
    """φ and the head's module, what the network returns, and the target."""
    network = getattr(pipe, "unet", None) or pipe.transformer
    layer = network.get_submodule(head)
    entered = []
    handle = layer.register_forward_pre_hook(lambda _, args: entered.append(args[0].clone()))
    more = [data["image"]] if recipe is recipes.controlnet else []
    try:
        with torch.no_grad():
            output, target = recipe(pipe, data["images"], t, noise, *more)
    finally:
        handle.remove()
    return entered[-1], output, target


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_is_that_of_the_models_own_recipe(name):
    recipe, head, given = RECIPES[name]
    pipe, data = MADE[name](), data_of(name)
    if name == "wan-euler":  # its convolutions over frames take minutes in float64
        data["images"] = data["images"].float()
    else:
        double(pipe)
    flows = "FlowMatch" in type(pipe.scheduler).__name__
    t = torch.tensor([30.5, 500.25, 950.125], dtype=torch.float64) if flows else torch.tensor([20, 500, 950])
    probe = bd.features(pipe, data, timesteps=t, pipe_kwargs=given, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(probe.noisy.shape, generator=torch.Generator().manual_seed(4)).to(data["images"])
    found = bd.features(pipe, data, timesteps=t, noise=noise, pipe_kwargs=given)
    inputs, output, target = by_hand(recipe, pipe, head, data, t, noise)
    assert found.head.path == head
    assert found.inputs.shape == inputs.shape
    errors = [relative(found.inputs, inputs), relative(found.output, output), relative(found.target, target)]
    print(name, errors)
    assert max(errors) <= CLOSE
    assert not torch.allclose(probe.inputs.double(), found.inputs.double())  # of other noise
