"""Pipelines that nobody had in mind: preconditioned, with other latents or more inputs, asking for the type of a scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
import transformers as tf
from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from . import TOKENS, WIDTH, Case, byte_tokenizer, clip, clip_tokenizer, noise, picture, prompted, seeded, t5, vae
from .build_transformer import FLOW_DPM, SHORT, SIZE, decoder_only, flow_vae, gemma
from .build_unet import GUIDED, stable_diffusion

NEGATIVE = {"negative_prompt": "dog"}


def latent_upscaler() -> Any:
    """The preconditioning of Karras et al. (2022) around the network, in the pipeline; it is told log σ/4."""
    network = d.UNet2DConditionModel(
        act_fn="gelu", attention_head_dim=8, norm_num_groups=None, block_out_channels=(32, 32, 64, 64), conv_in_kernel=1,
        time_cond_proj_dim=128 + WIDTH, conv_out_kernel=1, cross_attention_dim=WIDTH, in_channels=8, out_channels=5,
        mid_block_type=None, down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
        resnet_time_scale_shift="scale_shift", time_embedding_type="fourier", timestep_post_act="gelu",
        only_cross_attention=False,
    )  # fmt: skip
    return d.StableDiffusionLatentUpscalePipeline(
        vae=vae(), text_encoder=clip(), tokenizer=clip_tokenizer(), unet=network,
        scheduler=d.EulerDiscreteScheduler(prediction_type="sample"),
    )  # fmt: skip


def cascade() -> Any:
    """Stable Cascade's second stage: the network is a ``decoder``, time a ratio."""
    network = StableCascadeUNet(
        in_channels=4, out_channels=4, conditioning_dim=16, block_out_channels=(8, 16), num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1), switch_level=None, clip_text_pooled_in_channels=WIDTH, dropout=(0.0, 0.0),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
    )  # fmt: skip
    return d.StableCascadeDecoderPipeline(
        decoder=network, vqgan=PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=16),
        text_encoder=clip(projected=True), tokenizer=clip_tokenizer(), scheduler=d.DDPMWuerstchenScheduler(),
        latent_dim_scale=4.0,
    )  # fmt: skip


def adapter() -> dict:
    return {"adapter": d.T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2)}


def flux(cls: type, more: int = 0) -> Callable[[], Any]:
    """``more`` channels beside x."""

    def build() -> Any:
        network = d.FluxTransformer2DModel(
            patch_size=1, in_channels=16 + more, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )  # fmt: skip
        return cls(
            transformer=network, scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=flow_vae(), text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=t5(), tokenizer_2=byte_tokenizer(),
        )  # fmt: skip

    return seeded(build)


def prx() -> Any:
    network = d.PRXTransformer2DModel(
        patch_size=1,
        in_channels=4,
        context_in_dim=WIDTH,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[4, 4],
    )
    config = tf.T5GemmaModuleConfig(
        hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        max_position_embeddings=64, layer_types=["full_attention"], query_pre_attn_scalar=8, dropout_rate=0.0,
        **TOKENS,
    )  # fmt: skip
    return d.PRXPipeline(
        transformer=network, scheduler=d.FlowMatchEulerDiscreteScheduler(), text_encoder=T5GemmaEncoder(config),
        tokenizer=byte_tokenizer(length=64), vae=flow_vae(),
    )  # fmt: skip


def hunyuan_video() -> Any:
    network = d.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    decoder = d.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.476986,
        mid_block_add_attention=False,
    )  # fmt: skip
    pooled = tf.CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        **TOKENS,
    )
    return d.HunyuanVideoPipeline(
        text_encoder=decoder_only(tf.LlamaModel, tf.LlamaConfig), tokenizer=byte_tokenizer(length=64), transformer=network,
        vae=decoder, scheduler=d.FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder_2=tf.CLIPTextModel(pooled),
        tokenizer_2=byte_tokenizer(start=True, length=77),
    )  # fmt: skip


def bria() -> Any:
    """It asks for the very type of its scheduler."""
    network = d.BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=None, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    return d.BriaPipeline(
        transformer=network, scheduler=d.FlowMatchEulerDiscreteScheduler(), vae=flow_vae(), text_encoder=t5(),
        tokenizer=byte_tokenizer(),
    )  # fmt: skip


def cogview4() -> Any:
    network = d.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=4, out_channels=4,
        text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    scheduler = d.FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return d.CogView4Pipeline(
        tokenizer=byte_tokenizer(side="left"), text_encoder=decoder_only(tf.GlmForCausalLM, tf.GlmConfig), vae=vae(),
        transformer=network, scheduler=scheduler,
    )  # fmt: skip


def chroma() -> Any:
    """Flux with all modulations from one small network, and guidance."""
    network = d.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=16, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    return d.ChromaPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(), vae=flow_vae(), text_encoder=t5(), tokenizer=byte_tokenizer(),
        transformer=network,
    )  # fmt: skip


def sana_video() -> Any:
    network = d.SanaVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_cross_attention_heads=2,
        cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=WIDTH, sample_size=8, patch_size=(1, 2, 2),
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    return d.SanaVideoPipeline(
        tokenizer=byte_tokenizer(), text_encoder=gemma(), vae=wan_vae(), transformer=network,
        scheduler=d.DPMSolverMultistepScheduler(**FLOW_DPM),
    )  # fmt: skip


def wan_vae() -> Any:
    return d.AutoencoderKLWan(
        base_dim=16, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def wan_image_to_video() -> Any:
    """The first frame beside x, and what CLIP sees in it."""
    network = d.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16, text_dim=WIDTH,
        freq_dim=16, ffn_dim=32, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32, image_dim=WIDTH,
    )  # fmt: skip
    vision = tf.CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=24, projection_dim=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    return d.WanImageToVideoPipeline(
        tokenizer=byte_tokenizer(), text_encoder=t5(multilingual=True), vae=wan_vae(), transformer=network,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0), image_encoder=tf.CLIPVisionModelWithProjection(vision),
        image_processor=tf.CLIPImageProcessor(crop_size=32, size=32),
    )  # fmt: skip


FILL: dict[str, Any] = {"image": picture(), "mask_image": picture(seed=8).round()[:, :1]}
FRAMES: dict[str, Any] = {**SHORT, "height": 16, "width": 16, "num_frames": 5}

CASES = (
    Case("latent-upscale", seeded(latent_upscaler), prompted(**GUIDED, image=noise(1, 4, 8, 8))),
    Case("cascade", seeded(cascade), prompted(**GUIDED, image_embeddings=noise(1, 16, 2, 2))),
    Case(
        "t2i-adapter", stable_diffusion(d.DDIMScheduler, d.StableDiffusionAdapterPipeline, parts=adapter),
        prompted(**GUIDED, image=picture()),
    ),
    Case(
        "flux-kontext", flux(d.FluxKontextPipeline),
        prompted(**SIZE, **SHORT, guidance_scale=3.5, image=picture(), max_area=256, _auto_resize=False),
    ),
    Case("flux-fill", flux(d.FluxFillPipeline, 32), prompted(**SIZE, **SHORT, **FILL, guidance_scale=30.0)),
    Case(
        "prx", seeded(prx), prompted(**SIZE, **NEGATIVE, guidance_scale=4.0, use_resolution_binning=False)
    ),
    Case(
        "hunyuan-video", seeded(hunyuan_video), output="frames",
        call=prompted(
            **FRAMES, guidance_scale=4.5, prompt_template={"template": "{}", "crop_start": 0},
        ),
    ),
    Case("bria", seeded(bria), prompted(**SIZE, **SHORT, **NEGATIVE, guidance_scale=5.0)),
    Case("cogview4", seeded(cogview4), prompted(**SIZE, **SHORT, **NEGATIVE, guidance_scale=5.0)),
    Case("chroma", seeded(chroma), prompted(**SIZE, **SHORT, **NEGATIVE, guidance_scale=5.0)),
    Case(
        "sana-video", seeded(sana_video), output="frames",
        call=prompted(
            **SHORT, **NEGATIVE, guidance_scale=6.0, height=32, width=32, frames=5, complex_human_instruction=[],
            use_resolution_binning=False,
        ),
    ),
    Case(
        "wan-from-image", seeded(wan_image_to_video), output="frames",
        call=prompted(**FRAMES, **NEGATIVE, guidance_scale=5.0, image=picture()),
    ),
)  # fmt: skip
