"""Pipelines around U-Nets: Stable Diffusion and its relatives, pixel space, video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
from diffusers.image_processor import VaeImageProcessor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from . import WIDTH, Case, byte_tokenizer, clip, clip_tokenizer, noise, picture, prompted, seeded, t5, vae

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DOWN, UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
GUIDED = {"guidance_scale": 7.5, "negative_prompt": "dog"}
MASKED = {"image": picture(), "mask_image": picture(seed=8).round()[:, :1]}


def schedule(cls: type, **kwargs: Any) -> Any:
    """A scheduler as Stable Diffusion configures it."""
    fixed = {**BETAS, "steps_offset": 1, "timestep_spacing": "leading"}
    if cls in (d.DDIMScheduler, d.LCMScheduler):
        fixed |= {"clip_sample": False, "set_alpha_to_one": False}
    if cls is d.PNDMScheduler:
        fixed |= {"skip_prk_steps": True, "set_alpha_to_one": False}
    return cls(**{**fixed, **kwargs})


def unet(**kwargs: Any) -> d.UNet2DConditionModel:
    fixed = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16),
        "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": WIDTH,
        "down_block_types": DOWN, "up_block_types": UP,
    }  # fmt: skip
    return d.UNet2DConditionModel(**{**fixed, **kwargs})


def stable_diffusion(
    scheduler: type, cls: type = d.StableDiffusionPipeline, network: dict | None = None, parts: Callable[[], dict] = dict,
    **options: Any,
) -> Callable[[], Any]:  # fmt: skip
    """A builder of Stable Diffusion, or of ``cls`` with more ``parts``; ``options`` are the scheduler's."""

    def build() -> Any:
        return cls(
            vae=vae(), text_encoder=clip(), tokenizer=clip_tokenizer(), unet=unet(**network or {}), safety_checker=None,
            scheduler=schedule(scheduler, **options), feature_extractor=None, requires_safety_checker=False, **parts(),
        )  # fmt: skip

    return seeded(build)


def sdxl(scheduler: type, cls: type = d.StableDiffusionXLPipeline, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        network = unet(
            cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH, transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        )  # fmt: skip
        return cls(
            vae=vae(), text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=clip(projected=True),
            tokenizer_2=clip_tokenizer(), unet=network, scheduler=schedule(scheduler, **options), add_watermarker=False,
        )  # fmt: skip

    return seeded(build)


def controlnet() -> dict:
    network = d.ControlNetModel(
        in_channels=4, down_block_types=DOWN, block_out_channels=(8, 16), layers_per_block=1,
        attention_head_dim=4, norm_num_groups=4, cross_attention_dim=WIDTH, conditioning_embedding_out_channels=(4, 8),
    )  # fmt: skip
    return {"controlnet": network}


def upscaler() -> Any:
    """Four times as large; the network sees the small image beside x, and how noisy it is."""
    return d.StableDiffusionUpscalePipeline(
        vae=vae(blocks=3, scaling_factor=0.08333), text_encoder=clip(), tokenizer=clip_tokenizer(),
        unet=unet(in_channels=7, num_class_embeds=1000), low_res_scheduler=schedule(d.DDPMScheduler),
        scheduler=schedule(d.DDIMScheduler, prediction_type="v_prediction"),
    )  # fmt: skip


def marigold() -> Any:
    """Depth, by diffusion, of an image."""
    return d.MarigoldDepthPipeline(
        unet=unet(in_channels=8), vae=vae(), scheduler=schedule(d.DDIMScheduler, prediction_type="v_prediction"),
        text_encoder=clip(), tokenizer=clip_tokenizer(), prediction_type="depth", scale_invariant=True, shift_invariant=True,
        default_processing_resolution=0,
    )  # fmt: skip


def deepfloyd(**options: Any) -> Callable[[], Any]:
    """Pixels, learned variances, dynamic thresholding."""

    def build() -> Any:
        network = unet(
            in_channels=3, out_channels=6, encoder_hid_dim=WIDTH, addition_embed_type="text", addition_embed_type_num_heads=2,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=32,
            cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift", act_fn="gelu",
        )  # fmt: skip
        scheduler = d.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.5,
            variance_type="learned_range", **options,
        )  # fmt: skip
        return d.IFPipeline(
            tokenizer=byte_tokenizer(), text_encoder=t5(), unet=network, scheduler=scheduler, safety_checker=None,
            feature_extractor=None, watermarker=None, requires_safety_checker=False,
        )  # fmt: skip

    return seeded(build, gain=1.0)


def video() -> Any:
    """Stable Video Diffusion: frames from an image, guidance that grows with the frame."""
    network = d.UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, out_channels=4, layers_per_block=1, block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=WIDTH,
        num_attention_heads=2, addition_time_embed_dim=8, projection_class_embeddings_input_dim=3 * 8,
    )  # fmt: skip
    scheduler = d.EulerDiscreteScheduler(
        **BETAS, interpolation_type="linear", prediction_type="v_prediction", sigma_max=700.0, sigma_min=0.002,
        timestep_spacing="leading", timestep_type="continuous", use_karras_sigmas=True,
    )  # fmt: skip
    decoder = d.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=24, projection_dim=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        image_size=224, patch_size=56,
    )  # fmt: skip
    return d.StableVideoDiffusionPipeline(
        vae=decoder, image_encoder=CLIPVisionModelWithProjection(vision), unet=network, scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(),
    )  # fmt: skip


def animatediff() -> Any:
    """Stable Diffusion with attention between frames."""
    motion = d.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    return d.AnimateDiffPipeline(
        vae=vae(), text_encoder=clip(), tokenizer=clip_tokenizer(), unet=unet(), motion_adapter=motion,
        scheduler=schedule(d.DDIMScheduler, beta_schedule="linear"),
    )  # fmt: skip


def kandinsky() -> Any:
    """Conditioned on an image's embedding; guidance leaves the learned variance alone."""
    network = unet(
        out_channels=8, addition_embed_type="image", encoder_hid_dim=WIDTH, encoder_hid_dim_type="image_proj",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    scheduler = d.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, clip_sample=False, variance_type="learned_range", timestep_spacing="leading"
    )
    movq = d.VQModel(
        latent_channels=4, vq_embed_dim=4, num_vq_embeddings=12, block_out_channels=(32, 32), norm_num_groups=4,
        norm_type="spatial", down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    for name, weight in movq.decoder.named_parameters():
        if name.endswith(("conv_y.weight", "conv_b.weight")):  # the latents modulate every norm: gently
            weight.data /= 8
    return d.KandinskyV22Pipeline(unet=network, scheduler=scheduler, movq=movq)


def pixels(cls: type, scheduler: type, **options: Any) -> Callable[[], Any]:
    """Unconditional, in pixel space."""

    def build() -> Any:
        network = d.UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
            attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        return cls(network, scheduler(**options))

    return seeded(build, gain=1.0)


def unconditional(**kwargs: Any) -> Callable[[Any, Any], dict]:
    return prompted(prompt=None, **{"output_type": "np", "batch_size": 2, **kwargs})


CASES = (
    Case("sd-pndm-guided", stable_diffusion(d.PNDMScheduler), prompted(**GUIDED)),
    Case("sd-ddim-guided", stable_diffusion(d.DDIMScheduler), prompted(**GUIDED)),
    Case("sd-dpm++-guided", stable_diffusion(d.DPMSolverMultistepScheduler), prompted(**GUIDED)),
    Case("sd-ddim-rescaled", stable_diffusion(d.DDIMScheduler), prompted(**GUIDED, guidance_rescale=0.7)),
    Case("sd-ddim-unguided", stable_diffusion(d.DDIMScheduler), prompted(guidance_scale=1.0)),
    Case("sd-ddim-two-images", stable_diffusion(d.DDIMScheduler), prompted(**GUIDED, num_images_per_prompt=2)),
    Case(
        "sd2-euler-v", stable_diffusion(d.EulerDiscreteScheduler, prediction_type="v_prediction"), prompted(**GUIDED)
    ),
    Case("sdxl-euler-zeros", sdxl(d.EulerDiscreteScheduler), prompted(guidance_scale=5.0)),
    Case("sdxl-ddim-negative", sdxl(d.DDIMScheduler), prompted(**GUIDED)),
    Case(
        "img2img-ddim",
        stable_diffusion(d.DDIMScheduler, d.StableDiffusionImg2ImgPipeline),
        prompted(**GUIDED, image=picture(), strength=0.75),
    ),
    Case(
        "inpaint-4-channels",
        stable_diffusion(d.DDIMScheduler, d.StableDiffusionInpaintPipeline),
        prompted(**GUIDED, **MASKED, height=16, width=16),
    ),
    Case(
        "inpaint-9-channels",
        stable_diffusion(d.DDIMScheduler, d.StableDiffusionInpaintPipeline, {"in_channels": 9}),
        prompted(**GUIDED, **MASKED, height=16, width=16),
    ),
    *(
        Case(
            f"controlnet-{scale:g}",
            stable_diffusion(d.DDIMScheduler, d.StableDiffusionControlNetPipeline, parts=controlnet),
            prompted(**GUIDED, image=picture(), controlnet_conditioning_scale=scale),
        )
        for scale in (1.0, 10.0)
    ),
    Case(
        "lcm",
        stable_diffusion(d.LCMScheduler, d.LatentConsistencyModelPipeline, {"time_cond_proj_dim": 8}),
        prompted(guidance_scale=8.5),
    ),
    Case(
        "if", deepfloyd(), prompted(**GUIDED, clean_caption=False), kinks=True, output_types=("pt", "np", "pil")
    ),
    Case("ddpm-pixels", pixels(d.DDPMPipeline, d.DDPMScheduler), unconditional(), kinks=True, output_types=("np", "pil")),
    Case(
        "ddim-pixels", pixels(d.DDIMPipeline, d.DDIMScheduler, clip_sample=False, prediction_type="v_prediction"),
        unconditional(),
        output_types=("np", "pil"),
    ),
    Case(
        "svd", seeded(video), output="frames",
        call=prompted(
            prompt=None, image=VaeImageProcessor().postprocess(picture() * 2 - 1), num_frames=3, height=16, width=16,
            min_guidance_scale=1.0, max_guidance_scale=3.0,
        ),
    ),
    Case("sd-ddim-eta", stable_diffusion(d.DDIMScheduler), prompted(**GUIDED, eta=1.0)),
    Case("sd-pag", stable_diffusion(d.DDIMScheduler, d.StableDiffusionPAGPipeline), prompted(**GUIDED, pag_scale=3.0)),
    Case(
        "pix2pix", stable_diffusion(d.DDIMScheduler, d.StableDiffusionInstructPix2PixPipeline, {"in_channels": 8}),
        prompted(**GUIDED, image=picture(), image_guidance_scale=1.5),
    ),
    Case("upscale-4", seeded(upscaler), prompted(**GUIDED, image=picture(8), noise_level=20)),
    Case(
        "sdxl-img2img", sdxl(d.DPMSolverMultistepScheduler, d.StableDiffusionXLImg2ImgPipeline),
        prompted(**GUIDED, image=picture(), strength=0.75),
    ),
    Case(
        "sdxl-inpaint", sdxl(d.EulerDiscreteScheduler, d.StableDiffusionXLInpaintPipeline),
        prompted(**GUIDED, **MASKED, height=16, width=16, strength=0.99),
    ),
    Case(
        "marigold-depth", seeded(marigold), output="prediction", output_types=("pt", "np"),
        call=prompted(prompt=None, image=picture(), processing_resolution=0, ensemble_size=1),
    ),
    Case(
        "consistency", pixels(d.ConsistencyModelPipeline, d.CMStochasticIterativeScheduler), kinks=True,
        call=unconditional(output_type="pt"), output_types=("pt", "np", "pil"),
    ),
    Case("animatediff", seeded(animatediff), prompted(**GUIDED, num_frames=3), output="frames"),
    Case(
        "kandinsky", seeded(kandinsky, gain=1.0),
        prompted(
            prompt=None, image_embeds=noise(1, WIDTH), negative_image_embeds=noise(1, WIDTH, seed=8), guidance_scale=4.0,
            height=16, width=16,
        ),
    ),
)  # fmt: skip
