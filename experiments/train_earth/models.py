"""The networks: a VAE, a tokenizer, text encoders, and the two denoisers with their schedules."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from experiments.train_earth.data import SIZE

LATENT_SIZE, LATENT_CHANNELS = SIZE // 4, 4
TEXT_LENGTH, TEXT_WIDTH = 24, 128


def build_vae() -> AutoencoderKL:
    """64 × 64 × 3 to 16 × 16 × 4; no attention, so that a step is cheap."""
    return AutoencoderKL(
        sample_size=SIZE,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_tokenizer(prompts: Iterable[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with byte pairs learned from ``prompts``; every letter is known, also at the end of a word."""
    blank = CLIPTokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [blank.bos_token, blank.eos_token]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=special,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    blank.backend_tokenizer.train_from_iterator(prompts, trainer)
    model = json.loads(blank.backend_tokenizer.to_str())["model"]
    vocabulary = model["vocab"]
    for letter in alphabet:
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    return CLIPTokenizer(vocabulary, [tuple(pair) for pair in model["merges"]], model_max_length=TEXT_LENGTH)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """``save_pretrained``, and beside it the two files that transformers 4 reads."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")


def build_text_encoder(tokenizer: CLIPTokenizer, *, projection: bool) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Two layers of width 128; SD3 takes the output of the last but one, and a projection of the last."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def build_no_t5() -> tuple[T5TokenizerFast, T5EncoderModel]:
    """A third text encoder of SD3 that puts zeros, as the pipeline itself does where it has none.

    A pipeline without it is saved, but not loaded again unless ``text_encoder_3=None`` is said each time.
    """
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=2 * TEXT_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=1, dropout_rate=0.0
    )
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return tokenizer, encoder


def build_unet() -> UNet2DConditionModel:
    """Cross-attention at 8 × 8 and 4 × 4."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers reads it as the number of heads
        norm_num_groups=16,
    )


def build_ddim() -> DDIMScheduler:
    """Stable Diffusion's schedule with a larger last β: √ᾱ_T = 0.016, so that little of x0 is left at t = T."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )


def build_transformer() -> SD3Transformer2DModel:
    """An MMDiT of six blocks; 64 image tokens. Modulations and output start at zero (Peebles & Xie 2023)."""
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=5,
        caption_projection_dim=160,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE // 2,
        qk_norm="rms_norm",
    )
    zero = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        zero += [block.norm1.linear, block.norm1_context.linear]
    for linear in zero:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def build_flow() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow without a shift: 64 pixels need none."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


def count(*modules: nn.Module) -> int:
    """The number of weights."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
