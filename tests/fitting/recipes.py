"""One training step of each model, written out by hand from its own recipe: encoders, network and schedule called one by one.

Each takes the pipe, images in [−1, 1], prompts, t and ε, and returns what the network gives and what it is trained to give.
"""

from __future__ import annotations

import torch
from torch import Tensor

PROMPTS = ["a wet cat", "a dog and a boat", "birds"]
OFF = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}


def column(v: Tensor, like: Tensor) -> Tensor:
    return v.view(-1, *(1,) * (like.ndim - 1))


def ddpm(scheduler, z: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Ho et al. 2020, and v of Salimans & Ho 2022."""
    a = column(scheduler.alphas_cumprod[t].to(z), z)
    x = a.sqrt() * z + (1 - a).sqrt() * noise
    v = scheduler.config.prediction_type == "v_prediction"
    return x, a.sqrt() * noise - (1 - a).sqrt() * z if v else noise


def flow(z: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Rectified flow, Esser et al. 2024."""
    s = column(t / 1000, z).to(z)
    return (1 - s) * z + s * noise, noise - z


def latents(pipe, images: Tensor) -> Tensor:
    config = pipe.vae.config
    z = pipe.vae.encode(images).latent_dist.mode()
    return (z - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


def packed(z: Tensor) -> Tensor:
    """Patches of 2 × 2 as tokens, channels first, as Flux has them."""
    b, c, h, w = z.shape
    return z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def stable_diffusion(pipe, images, t, noise, beside=None, **given):
    x, target = ddpm(pipe.scheduler, latents(pipe, images), t, noise)
    text = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    x = x if beside is None else torch.cat([x, *beside], dim=1)
    return pipe.unet(x, t, encoder_hidden_states=text, **given).sample, target


def sdxl(pipe, images, t, noise):
    text, _, pooled, _ = pipe.encode_prompt(PROMPTS, **OFF)
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * len(images)).to(text)
    x, target = ddpm(pipe.scheduler, latents(pipe, images), t, noise)
    added = {"text_embeds": pooled, "time_ids": sizes}
    return pipe.unet(x, t, encoder_hidden_states=text, added_cond_kwargs=added).sample, target


def inpainting(pipe, images, t, noise):
    """The mask and the image with a hole beside x; all is hole here but a half."""
    mask, hole = holes(images)
    return stable_diffusion(
        pipe, images, t, noise, [torch.nn.functional.interpolate(mask, size=(8, 8)).to(images), latents(pipe, hole)]
    )


def holes(images):
    mask = torch.zeros(len(images), 1, 16, 16)
    mask[:, :, :, 8:] = 1
    return mask, images * (mask < 0.5)


def controlnet(pipe, images, t, noise, control):
    x, target = ddpm(pipe.scheduler, latents(pipe, images), t, noise)
    text = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    down, mid = pipe.controlnet(x, t, encoder_hidden_states=text, controlnet_cond=control, return_dict=False)
    return pipe.unet(
        x, t, encoder_hidden_states=text, down_block_additional_residuals=down, mid_block_additional_residual=mid
    ).sample, target


def lcm(pipe, images, t, noise):
    w = pipe.get_guidance_scale_embedding(torch.tensor([4.0 - 1] * len(images)), 8).to(images)
    return stable_diffusion(pipe, images, t, noise, timestep_cond=w)


def deepfloyd(pipe, images, t, noise):
    text, _ = pipe.encode_prompt(PROMPTS, False, clean_caption=False)
    x, target = ddpm(pipe.scheduler, images, t, noise)
    return pipe.unet(x, t, encoder_hidden_states=text).sample[:, :3], target


def sd3(pipe, images, t, noise):
    text, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=16, **OFF)
    x, target = flow(latents(pipe, images), t, noise)
    return pipe.transformer(x, timestep=t, encoder_hidden_states=text, pooled_projections=pooled).sample, target


def flux(pipe, images, t, noise):
    text, pooled, text_ids = pipe.encode_prompt(PROMPTS, None, max_sequence_length=16)
    places = torch.tensor([[0.0, i, j] for i in range(4) for j in range(4)]).to(text)
    x, target = flow(packed(latents(pipe, images)), t, noise)
    guidance = torch.full((len(images),), 3.5)
    return pipe.transformer(
        x, timestep=t / 1000, guidance=guidance, pooled_projections=pooled, encoder_hidden_states=text, txt_ids=text_ids,
        img_ids=places,
    ).sample, target  # fmt: skip


def pixart(pipe, images, t, noise):
    text, mask, _, _ = pipe.encode_prompt(PROMPTS, False, clean_caption=False, max_sequence_length=16)
    x, target = ddpm(pipe.scheduler, latents(pipe, images), t, noise)
    output = pipe.transformer(
        x, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=t,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample  # fmt: skip
    return output[:, :4], target


def dit(pipe, images, t, noise):
    x, target = ddpm(pipe.scheduler, latents(pipe, images), t, noise)
    return pipe.transformer(x, timestep=t, class_labels=torch.tensor([1, 2, 0])).sample[:, :4], target


def hunyuan(pipe, images, t, noise):
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    same = {"device": "cpu", "dtype": images.dtype, "do_classifier_free_guidance": False}
    text, _, mask, _ = pipe.encode_prompt(PROMPTS, max_sequence_length=77, text_encoder_index=0, **same)
    text2, _, mask2, _ = pipe.encode_prompt(PROMPTS, max_sequence_length=256, text_encoder_index=1, **same)
    side = 16 // 8 // 2  # the pipe takes every VAE's factor to be 8
    region = get_resize_crop_region_for_grid((side, side), 512 // 8 // 2)
    rotary = get_2d_rotary_pos_embed(8, region, (side, side), output_type="pt")
    x, target = ddpm(pipe.scheduler, latents(pipe, images), t, noise)
    output = pipe.transformer(
        x, t.to(x), encoder_hidden_states=text, text_embedding_mask=mask, encoder_hidden_states_t5=text2,
        text_embedding_mask_t5=mask2, image_meta_size=torch.tensor([[1024.0, 1024, 16, 16, 0, 0]] * len(x)).to(x),
        style=torch.zeros(len(x), dtype=torch.long), image_rotary_emb=rotary,
    ).sample  # fmt: skip
    return output.chunk(2, dim=1)[0], target


def auraflow(pipe, images, t, noise):
    text, *_ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=16)
    x, target = flow(latents(pipe, images), t, noise)
    return pipe.transformer(x, encoder_hidden_states=text, timestep=(t / 1000).float().to(x)).sample, target


def normalised(pipe, images):
    """Qwen's and Wan's latents: each channel by its own mean and standard deviation."""
    z = pipe.vae.encode(images).latent_dist.mode()
    mean, std = (
        torch.tensor(getattr(pipe.vae.config, k)).view(1, -1, 1, 1, 1).to(z) for k in ("latents_mean", "latents_std")
    )
    return (z - mean) / std


def qwen(pipe, images, t, noise):
    text, mask = pipe.encode_prompt(PROMPTS, max_sequence_length=16)
    x, target = flow(packed(normalised(pipe, images.unsqueeze(2))[:, :, 0]), t, noise)
    shapes = [[(1, 4, 4)]] * len(images)
    return pipe.transformer(
        x, timestep=t / 1000, encoder_hidden_states=text, encoder_hidden_states_mask=mask, img_shapes=shapes
    ).sample, target


def wan(pipe, videos, t, noise):
    text, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=16)
    x, target = flow(normalised(pipe, videos), t, noise)
    return pipe.transformer(x, timestep=t, encoder_hidden_states=text).sample, target


def lumina2(pipe, images, t, noise):
    """Time runs from noise to data, and so does the velocity."""
    text, mask, _, _ = pipe.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, system_prompt="paint", max_sequence_length=48
    )
    x, target = flow(latents(pipe, images), t, noise)
    return -pipe.transformer(
        x, timestep=1 - t / 1000, encoder_hidden_states=text, encoder_attention_mask=mask
    ).sample, target


def z_image(pipe, images, t, noise):
    text, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=16)
    x, target = flow(latents(pipe, images), t, noise)
    out = pipe.transformer(list(x.unsqueeze(2)), (1000 - t) / 1000, text, return_dict=False)[0]
    return -torch.stack(list(out))[:, :, 0], target


def unconditional(pipe, images, t, noise):
    x, target = ddpm(pipe.scheduler, images, t, noise)
    return pipe.unet(x, t).sample, target
