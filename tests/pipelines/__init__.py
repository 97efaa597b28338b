"""Tiny genuine diffusers pipelines: real classes, schedulers, networks, text encoders and tokenizers; random weights.

The table is ``tests.pipelines.build.CASES``; this file has what its rows share.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

PAD, EOS, BOS = 0, 1, 2
SPECIAL = ("<pad>", "</s>", "<s>")
# every tokenizer has these and the bytes
TOKENS = {"vocab_size": len(SPECIAL) + 256, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
WIDTH = 16  # of what text encoders return


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], Any]  # the pipeline, with the same weights each time
    call: Callable[[Any, torch.Generator], dict]  # what to call it with
    output: str = "images"  # the attribute of what it returns; "frames", "audios"
    kinks: bool = False  # clips or thresholds between steps: not differentiable everywhere
    output_types: tuple[str, ...] = ("pt", "np", "pil", "latent")  # all that run; call() asks for the first


def seeded(build: Callable[[], Any], seed: int = 0, gain: float = 4.0) -> Callable[[], Any]:
    """``build``, with the weights of ``seed``, in eval mode, silent, and with no matrix left at zero."""

    @functools.wraps(build)
    def make() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe = build()
            for part in pipe.components.values():
                if isinstance(part, nn.Module):
                    wake(part.eval(), gain)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@torch.no_grad()
def wake(module: nn.Module, gain: float) -> None:
    """Random weights where training starts from zero (heads, gates, ControlNets), an effect of text and time that shows, and
    ``gain`` for the head of a U-Net, whose output is else too small to matter beside the noise."""
    for name, weight in module.named_parameters():
        if weight.ndim > 1 and not weight.any():
            weight.normal_(std=1 / math.sqrt(weight[0].numel()))
        if name.endswith("to_out.0.weight") or ("norm" in name and name.endswith("linear.weight")):  # attention, gates
            weight *= 4
        if name == "conv_out.weight":
            weight *= gain


def prompted(steps: int = 4, **kwargs: Any) -> Callable[[Any, torch.Generator], dict]:
    """The keyword arguments of a call with a prompt; a keyword that is None is left out."""
    given = {"prompt": "a wet cat", "num_inference_steps": steps, "output_type": "pt", **kwargs}
    given = {key: value for key, value in given.items() if value is not None}
    return lambda pipe, generator: {**given, "generator": generator}


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(size: int = 16, batch: int = 1, seed: int = 7) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def byte_tokenizer(*, length: int = 16, start: bool = False, side: str = "right", chat: str | None = None) -> Any:
    """One token a byte, and an end; ``start`` puts one before it too, as CLIP has it."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    first = "<s> " if start else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}$A </s>", pair=f"{first}$A </s> $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, padding_side=side, chat_template=chat,
        pad_token="<pad>", eos_token="</s>", bos_token="<s>", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def clip_tokenizer() -> Any:
    return byte_tokenizer(start=True)


def clip(*, projected: bool = False) -> nn.Module:
    """CLIP's text encoder; ``projected`` returns a pooled embedding beside the hidden states."""
    config = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16,
        projection_dim=WIDTH, **TOKENS,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(width: int = WIDTH, *, multilingual: bool = False) -> nn.Module:
    config, model = (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    return model(config(d_model=width, d_kv=8, d_ff=24, num_layers=2, num_heads=2, **TOKENS))


def vae(latent_channels: int = 4, *, blocks: int = 2, **kwargs: Any) -> AutoencoderKL:
    """Two blocks halve the image: latents of 8 × 8 for pixels of 16 × 16."""
    return AutoencoderKL(
        latent_channels=latent_channels, block_out_channels=(8, 16, 16)[:blocks], layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, sample_size=16,
        force_upcast=False, **kwargs,
    )  # fmt: skip
