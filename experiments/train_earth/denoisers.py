r"""The two training objectives on latents z, with the text encoders trained along.

earth-sd (v of Salimans & Ho 2022, t uniform):

.. math:: \|v_θ(\sqrt{ᾱ_t}\,z + \sqrt{1-ᾱ_t}\,ε,\; t, c) - (\sqrt{ᾱ_t}\,ε - \sqrt{1-ᾱ_t}\,z)\|^2

earth-sd3 (rectified flow, σ logit-normal, Esser et al. 2024):

.. math:: \|f_θ((1-σ)\,z + σ\,ε,\; 1000\,σ, c) - (ε - z)\|^2

The prompt is replaced by the empty one with probability 0.1.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from experiments.train_earth.data import read_data
from experiments.train_earth.models import (
    build_ddim,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_unet,
)
from experiments.train_earth.train import Run, Settings

EMPTY_PROBABILITY = 0.1
REPEATS = 256  # zero tokens that StableDiffusion3Pipeline puts for a missing T5, unless told otherwise


class EarthSD(nn.Module):
    """U-Net and text encoder of earth-sd.

    Args:
        prompts: Of the training set; the tokenizer is learned from them.
    """

    def __init__(self, prompts: list[str]) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer(prompts)
        self.unet = build_unet()
        self.text_encoder = build_text_encoder(self.tokenizer, projection=False)
        self.alphas_cumprod = build_ddim().alphas_cumprod

    def draw_times(self, count: int, generator: Generator) -> Tensor:
        """Timesteps 0 … 999, uniform and stratified."""
        return ((torch.arange(count) + torch.rand(count, generator=generator)) / count * 1000).long().clamp(max=999)

    def loss(self, z: Tensor, noise: Tensor, times: Tensor, tokens: Tensor, generator: Generator) -> Tensor:
        """Mean squared error of each sample, (B,)."""
        a = self.alphas_cumprod[times].view(-1, 1, 1, 1)
        states = self.text_encoder(tokens)[0]
        output = self.unet(a.sqrt() * z + (1 - a).sqrt() * noise, times, states).sample
        return (output - (a.sqrt() * noise - (1 - a).sqrt() * z)).square().flatten(1).mean(1)


class RepeatedLastToken:
    """Joint attention of SD3 in which the last context token stands for ``repeats`` copies of itself.

    Copies of a token without position have the same keys and values in every block, so n of them act like one
    whose attention logit is raised by log n.
    """

    repeats = 1

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """The same as ``JointAttnProcessor2_0`` on the context with its copies."""

        def heads(x: Tensor, norm: nn.Module | None) -> Tensor:
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        x, c = hidden_states, encoder_hidden_states
        q = torch.cat([heads(attn.to_q(x), attn.norm_q), heads(attn.add_q_proj(c), attn.norm_added_q)], 2)
        k = torch.cat([heads(attn.to_k(x), attn.norm_k), heads(attn.add_k_proj(c), attn.norm_added_k)], 2)
        v = torch.cat([heads(attn.to_v(x), None), heads(attn.add_v_proj(c), None)], 2)
        bias = q.new_zeros(1, 1, 1, k.shape[2])
        bias[..., -1] = math.log(self.repeats)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        x, c = mixed[:, : x.shape[1]], mixed[:, x.shape[1] :]
        return attn.to_out[1](attn.to_out[0](x)), (c if attn.context_pre_only else attn.to_add_out(c))


class EarthSD3(nn.Module):
    """Transformer and two text encoders of earth-sd3.

    The pipeline appends zero tokens in place of the third encoder, 256 or as many as ``max_sequence_length`` says.
    Each training step draws their number, log-uniform from 1 to 256, so that the model serves any of them.

    Args:
        prompts: Of the training set; the tokenizer is learned from them.
    """

    def __init__(self, prompts: list[str]) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer(prompts)
        self.transformer = build_transformer()
        self.text_encoder = build_text_encoder(self.tokenizer, projection=True)
        self.text_encoder_2 = build_text_encoder(self.tokenizer, projection=True)
        self.processor = RepeatedLastToken()
        self.transformer.set_attn_processor(self.processor)

    def draw_times(self, count: int, generator: Generator) -> Tensor:
        """σ = sigmoid(n), n standard normal."""
        return torch.randn(count, generator=generator).sigmoid()

    def loss(self, z: Tensor, noise: Tensor, times: Tensor, tokens: Tensor, generator: Generator) -> Tensor:
        """Mean squared error of each sample, (B,)."""
        self.processor.repeats = round(REPEATS ** torch.rand((), generator=generator).item())
        outputs = [e(tokens, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        states = torch.cat([states, torch.zeros_like(states[:, :1])], 1)
        pooled = torch.cat([output.text_embeds for output in outputs], -1)
        sigma = times.view(-1, 1, 1, 1)
        output = self.transformer(
            (1 - sigma) * z + sigma * noise,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=1000 * times,
        ).sample
        return (output - (noise - z)).square().flatten(1).mean(1)


MODELS: dict[str, type[EarthSD] | type[EarthSD3]] = {"sd": EarthSD, "sd3": EarthSD3}


def tokenize(tokenizer: Any, prompts: list[str]) -> Tensor:
    """(B, 24) int64, as the pipelines do it."""
    return tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def prompts_of(data: dict[str, np.ndarray], split: str) -> list[str]:
    """The captions of "train" or "heldout"."""
    return data[f"{split}_prompts"].tolist()


def latent_scaling(name: str, latents: Tensor) -> tuple[float, float]:
    """(shift, scale): the network sees (z − shift)·scale, of second moment 1; Stable Diffusion's pipeline has no shift."""
    shift = 0.0 if name == "sd" else latents.mean().item()
    return shift, 1 / (latents - shift).square().mean().sqrt().item()


def train_denoiser(name: str, work: Path, settings: Settings) -> None:
    """Train "sd" or "sd3" on the latents in ``work``; the checkpoint goes to its folder of that name."""
    prompts = prompts_of(read_data(work / "data.npz"), "train")
    latents = load_file(work / "latents.safetensors")["train"]
    shift, scale = latent_scaling(name, latents)
    latents = (latents - shift) * scale
    torch.manual_seed(settings.seed)
    model = MODELS[name](prompts)
    tokens, empty = tokenize(model.tokenizer, prompts), tokenize(model.tokenizer, [""])

    def loss_of(step: int, generator: Generator) -> Tensor:
        index = torch.randint(len(latents), (settings.batch_size,), generator=generator)
        times = model.draw_times(len(index), generator)
        noise = torch.randn((len(index), *latents.shape[1:]), generator=generator)
        drop = torch.rand(len(index), generator=generator) < EMPTY_PROBABILITY
        text = torch.where(drop[:, None], empty, tokens[index])
        with torch.autocast("cpu", torch.bfloat16):
            return model.loss(latents[index], noise, times, text, generator).mean()

    Run(model, settings, work / name).train(loss_of)
