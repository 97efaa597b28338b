"""Pipelines around transformers: DiT and its descendants, images, video and sound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
import transformers as tf
from torch import nn

from . import TOKENS, WIDTH, Case, byte_tokenizer, clip, clip_tokenizer, picture, prompted, seeded, t5, vae

SIZE = {"height": 16, "width": 16}
NEGATIVE = {"negative_prompt": "dog"}
LEADING = {"beta_end": 0.01, "timestep_spacing": "leading"}  # or x outgrows what the network's norms let through
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def flow_vae(latent_channels: int = 4) -> d.AutoencoderKL:
    """As flow models have it: latents are shifted and scaled, and no convolutions around them."""
    return vae(latent_channels, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False)


def decoder_only(cls: type, config: type, **kwargs: Any) -> nn.Module:
    """A language model that encodes the prompt: Gemma, Qwen."""
    fixed = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return cls(config(**fixed, num_key_value_heads=2, head_dim=8, **TOKENS, **kwargs))


def gemma() -> nn.Module:
    return decoder_only(tf.Gemma2Model, tf.Gemma2Config)


def sd3(cls: type = d.StableDiffusion3Pipeline, **options: Any) -> Callable[[], Any]:
    """Two CLIPs and T5."""

    def build() -> Any:
        network = d.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=8, **options,
        )  # fmt: skip
        return cls(
            transformer=network, scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=flow_vae(),
            text_encoder=clip(projected=True), tokenizer=clip_tokenizer(), text_encoder_2=clip(projected=True),
            tokenizer_2=clip_tokenizer(), text_encoder_3=t5(2 * WIDTH), tokenizer_3=byte_tokenizer(),
        )  # fmt: skip

    return seeded(build)


def flux(cls: type = d.FluxPipeline) -> Callable[[], Any]:
    """Guidance is an input of the network; true guidance is on top of it."""

    def build() -> Any:
        network = d.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
        )  # fmt: skip
        return cls(
            transformer=network, scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=flow_vae(), text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=t5(),
            tokenizer_2=byte_tokenizer(),
        )  # fmt: skip

    return seeded(build)


def flux2() -> Any:
    """Latents are normalised by the running statistics of a batch norm in the VAE."""
    network = d.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    decoder = d.AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return d.Flux2KleinPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=decoder, transformer=network,
        text_encoder=decoder_only(tf.Qwen3ForCausalLM, tf.Qwen3Config), tokenizer=byte_tokenizer(chat=CHAT),
    )  # fmt: skip


def dit(scheduler: type, **options: Any) -> Callable[[], Any]:
    """Class labels; noise and a learned variance side by side."""

    def build() -> Any:
        network = d.DiTTransformer2DModel(
            sample_size=8, patch_size=2, num_layers=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            out_channels=8,
        )  # fmt: skip
        return d.DiTPipeline(network, vae(), scheduler(**options))

    return seeded(build)


def pixart_sigma() -> Any:
    network = d.PixArtTransformer2DModel(
        sample_size=8, patch_size=2, num_layers=2, attention_head_dim=8, num_attention_heads=2, cross_attention_dim=16,
        caption_channels=WIDTH, in_channels=4, out_channels=8,
    )  # fmt: skip
    return d.PixArtSigmaPipeline(byte_tokenizer(), t5(), vae(), network, d.DPMSolverMultistepScheduler(**LEADING))


def qwen_image() -> Any:
    """Guidance brought back to the length of the conditional prediction."""
    network = d.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    text = {
        "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "rope_theta": 1e4, **TOKENS,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    }  # fmt: skip
    sight = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": WIDTH}
    encoder = tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(text_config=text, vision_config=sight, vision_start_token_id=3, vision_end_token_id=4)
    )
    decoder = d.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1] * 4, latents_std=[1.5] * 4,
    )  # fmt: skip
    pipe = d.QwenImagePipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=decoder, text_encoder=encoder,
        tokenizer=byte_tokenizer(), transformer=network,
    )  # fmt: skip
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0  # 200 bytes, else, before the prompt
    return pipe


def z_image() -> Any:
    """A list of images in, a list out, and with the sign turned."""
    network = d.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    for token in (network.x_pad_token, network.cap_pad_token):  # left as memory is
        nn.init.normal_(token)
    return d.ZImagePipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=flow_vae(), transformer=network,
        text_encoder=decoder_only(tf.Qwen3Model, tf.Qwen3Config), tokenizer=byte_tokenizer(length=64, chat=CHAT),
    )  # fmt: skip


def lumina2() -> Any:
    network = d.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(256, 16, 16),
        cap_feat_dim=WIDTH,
    )  # fmt: skip
    return d.Lumina2Pipeline(
        transformer=network, scheduler=d.FlowMatchEulerDiscreteScheduler(shift=6.0), vae=flow_vae(),
        text_encoder=gemma(), tokenizer=byte_tokenizer(length=256),
    )  # fmt: skip


def sana(cls: type, scheduler: Any, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        network = d.SanaTransformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
            attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
            caption_channels=WIDTH, **options,
        )  # fmt: skip
        blocks = ("ResBlock", "EfficientViTBlock")
        decoder = d.AutoencoderDC(
            latent_channels=4, attention_head_dim=4, encoder_block_types=blocks, decoder_block_types=blocks,
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
            downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.41407,
        )  # fmt: skip
        return cls(byte_tokenizer(), gemma(), decoder, network, scheduler())

    return seeded(build)


def wan(scheduler: Callable[[], Any], networks: int = 1) -> Callable[[], Any]:
    """Video; the second network, if any, takes over where there is less noise."""

    def build() -> Any:
        network = [
            d.WanTransformer3DModel(
                patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
                text_dim=WIDTH, freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
            ) for _ in range(networks)
        ]  # fmt: skip
        decoder = d.AutoencoderKLWan(
            base_dim=16, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
        return d.WanPipeline(
            tokenizer=byte_tokenizer(), text_encoder=t5(multilingual=True), vae=decoder, scheduler=scheduler(),
            transformer=network[0], **({"transformer_2": network[1], "boundary_ratio": 0.8} if networks == 2 else {}),
        )  # fmt: skip

    return seeded(build)


def cogvideox(scheduler: type) -> Callable[[], Any]:
    """Video; with its own DPM solver the pipeline keeps the history of x0, and not the scheduler."""

    def build() -> Any:
        network = d.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
            text_embed_dim=WIDTH, num_layers=2, sample_width=4, sample_height=4, sample_frames=9, patch_size=2,
            temporal_compression_ratio=4, max_text_seq_length=16,
        )  # fmt: skip
        decoder = d.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), down_block_types=("CogVideoXDownBlock3D",) * 4, latent_channels=4,
            up_block_types=("CogVideoXUpBlock3D",) * 4, layers_per_block=1, norm_num_groups=2,
        )  # fmt: skip
        sampler = scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
        return d.CogVideoXPipeline(byte_tokenizer(), t5(), decoder, network, sampler)

    return seeded(build)


def auraflow() -> Any:
    network = d.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=WIDTH,
        pos_embed_max_size=64,
    )  # fmt: skip
    network.time_step_proj.linear_2.weight.data *= 10  # its gates hang on it alone
    return d.AuraFlowPipeline(
        byte_tokenizer(), t5(multilingual=True), vae(), network, d.FlowMatchEulerDiscreteScheduler(shift=1.73)
    )


def hunyuan_dit() -> Any:
    network = d.HunyuanDiT2DModel(
        sample_size=8, patch_size=2, num_layers=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=WIDTH, hidden_size=16,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    bert = tf.BertConfig(
        hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, **TOKENS,
    )  # fmt: skip
    return d.HunyuanDiTPipeline(
        vae=vae(), text_encoder=tf.BertModel(bert), tokenizer=byte_tokenizer(length=77), transformer=network,
        scheduler=d.DDPMScheduler(
            beta_start=0.00085, beta_end=0.018, beta_schedule="scaled_linear", prediction_type="v_prediction",
            clip_sample=False, steps_offset=1,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, text_encoder_2=t5(),
        tokenizer_2=byte_tokenizer(length=256),
    )  # fmt: skip


def stable_audio() -> Any:
    network = d.StableAudioDiTModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        num_key_value_attention_heads=2, cross_attention_dim=8, cross_attention_input_dim=8, time_proj_dim=8,
        global_states_input_dim=16,
    )  # fmt: skip
    decoder = d.AutoencoderOobleck(
        encoder_hidden_size=8, downsampling_ratios=[1, 2], decoder_channels=8, decoder_input_channels=4,
        audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    scheduler = d.CosineDPMSolverMultistepScheduler(
        solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    )
    projection = d.StableAudioProjectionModel(text_encoder_dim=WIDTH, conditioning_dim=8, min_value=0, max_value=32)
    return d.StableAudioPipeline(decoder, t5(), projection, byte_tokenizer(), network, scheduler)


FLOW_DPM = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SHORT = {"max_sequence_length": 16}
# Lumina's pipeline believes that every VAE makes 8 pixels of one
LUMINA = {"height": 64, "width": 64, "system_prompt": "paint", "max_sequence_length": 48}
PLAIN = {**SHORT, "use_resolution_binning": False, "clean_caption": False}
SANA = {**PLAIN, "height": 32, "width": 32, "complex_human_instruction": []}
VIDEO = {**SHORT, **NEGATIVE, "height": 32, "width": 32, "num_frames": 5}

CASES = (
    Case("sd3", sd3(), prompted(**NEGATIVE, **SHORT, guidance_scale=5.0)),
    Case(
        "sd35-skip-layers", sd3(qk_norm="rms_norm", dual_attention_layers=(0,)),
        prompted(
            **NEGATIVE, **SHORT, guidance_scale=4.5, skip_guidance_layers=[1], skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=0.9,
        ),
    ),
    Case("flux", flux(), prompted(**SIZE, **SHORT, guidance_scale=3.5)),
    Case("flux-true-cfg", flux(), prompted(**SIZE, **SHORT, **NEGATIVE, guidance_scale=3.5, true_cfg_scale=4.0)),
    Case("flux-two-images", flux(), prompted(**SIZE, **SHORT, guidance_scale=3.5, num_images_per_prompt=2)),
    Case(
        "sd3-img2img", sd3(d.StableDiffusion3Img2ImgPipeline),
        prompted(**NEGATIVE, **SHORT, guidance_scale=5.0, image=picture(), strength=0.75),
    ),
    Case(
        "flux-inpaint", flux(d.FluxInpaintPipeline),
        prompted(
            **SIZE, **SHORT, guidance_scale=3.5, image=picture(), mask_image=picture(seed=8).round()[:, :1], strength=0.99
        ),
    ),
    Case("flux2", seeded(flux2), prompted(**SIZE, **SHORT, guidance_scale=4.0, text_encoder_out_layers=(0, 1))),
    Case(
        "pixart-sigma", seeded(pixart_sigma),
        prompted(**NEGATIVE, **PLAIN, guidance_scale=4.5),
    ),
    *(
        Case(
            f"dit-{name}", dit(scheduler, **options), output_types=("np", "pil"),
            call=prompted(prompt=None, output_type="np", class_labels=[1, 2], guidance_scale=4.0),
        )
        for name, scheduler, options in (
            ("ddim", d.DDIMScheduler, {**LEADING, "clip_sample": False}), ("dpm++", d.DPMSolverMultistepScheduler, LEADING),
        )
    ),
    Case("qwen-image", seeded(qwen_image), prompted(**SIZE, **SHORT, **NEGATIVE, true_cfg_scale=4.0)),
    Case("z-image", seeded(z_image), prompted(**SIZE, **SHORT, **NEGATIVE, guidance_scale=4.0)),
    Case("lumina2", seeded(lumina2), prompted(**LUMINA, **NEGATIVE, guidance_scale=4.0)),
    Case(
        "sana-dpm-flow", sana(d.SanaPipeline, lambda: d.DPMSolverMultistepScheduler(**FLOW_DPM)),
        prompted(**SANA, **NEGATIVE, guidance_scale=4.5),
    ),
    Case(
        "sana-sprint",
        sana(d.SanaSprintPipeline, d.SCMScheduler, qk_norm="rms_norm_across_heads", guidance_embeds=True),
        prompted(2, **SANA, guidance_scale=4.5),
    ),
    Case(
        "wan-euler", wan(lambda: d.FlowMatchEulerDiscreteScheduler(shift=3.0)), prompted(**VIDEO, guidance_scale=5.0),
        output="frames",
    ),
    Case(
        "wan-unipc", wan(lambda: d.UniPCMultistepScheduler(**FLOW_DPM)), prompted(**VIDEO, guidance_scale=5.0),
        output="frames",
    ),
    Case(
        "wan-two-networks", wan(lambda: d.UniPCMultistepScheduler(**FLOW_DPM), networks=2),
        prompted(**VIDEO, guidance_scale=5.0, guidance_scale_2=3.0), output="frames",
    ),
    Case("cogvideox-ddim", cogvideox(d.CogVideoXDDIMScheduler), prompted(**VIDEO, guidance_scale=6.0), output="frames"),
    Case("cogvideox-dpm", cogvideox(d.CogVideoXDPMScheduler), prompted(**VIDEO, guidance_scale=6.0), output="frames"),
    Case("auraflow", seeded(auraflow), prompted(**SIZE, **SHORT, **NEGATIVE, guidance_scale=3.5)),
    Case(
        "hunyuan-dit", seeded(hunyuan_dit), prompted(**SIZE, **NEGATIVE, guidance_scale=5.0, use_resolution_binning=False)
    ),
    Case(
        "stable-audio", seeded(stable_audio), prompted(**NEGATIVE, guidance_scale=5.0), output="audios",
        output_types=("pt", "np", "latent"),
    ),
)  # fmt: skip
