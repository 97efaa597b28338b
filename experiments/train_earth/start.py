"""A start for the VAE at which it is almost linear: principal components of 4 × 4 blocks in, block colours out.

From random weights a network this small spends most of an hour on colours alone: its group norms hide how bright an
area is. Here pixels pass through identities; in front of the two last norms each signal x goes with −x, K and −K in one
group, so that the norm divides by nearly a constant, and silu(x) − silu(−x) = x. All other channels start at random.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

LARGE = 4.0  # K, against signals of about 1
LOG_VARIANCE = -6.0


def principal_components(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the 48 numbers (channel, row, column) of 4 × 4 blocks: mean (48,), directions (48, 4), deviations (4,)."""
    blocks = F.unfold(images, 4, stride=4).transpose(1, 2).reshape(-1, 48).double()
    mean = blocks.mean(0)
    values, vectors = torch.linalg.eigh((blocks - mean).T @ (blocks - mean) / len(blocks))
    return mean.float(), vectors[:, -4:].flip(1).float(), values[-4:].flip(0).sqrt().float()


def _rows(conv: nn.Conv2d, rows: dict[int, tuple[dict[int, float], float]], kernel: Tensor | None = None) -> None:
    """Output channels as sums of input channels: {out: ({in: weight}, bias)}, spread by ``kernel``, or at the centre."""
    side = conv.kernel_size[0]
    if kernel is None:
        kernel = torch.zeros(side, side)
        kernel[side // 2, side // 2] = 1.0
    assert conv.bias is not None
    for out, (inputs, bias) in rows.items():
        conv.weight[out], conv.bias[out] = 0.0, bias
        for channel, weight in inputs.items():
            conv.weight[out, channel] = weight * kernel


def _pairs(conv: nn.Conv2d, group: int, signals: list[tuple[dict[int, float], float]]) -> None:
    """Signal k, its negative, K and −K as the first channels of the k-th group; the others of the group are small."""
    for k, (inputs, bias) in enumerate(signals):
        first = k * group
        conv.weight[first : first + group] *= 0.1
        negative = {channel: -weight for channel, weight in inputs.items()}
        _rows(conv, {first: (inputs, bias), first + 1: (negative, -bias)})
        _rows(conv, {first + 2: ({}, LARGE), first + 3: ({}, -LARGE)})


def _read_pairs(conv: nn.Conv2d, group: int, count: int) -> None:
    """The signals again, after the norm and silu."""
    scale = LARGE * (2 / group) ** 0.5
    _rows(conv, {k: ({k * group: scale, k * group + 1: -scale}, 0.0) for k in range(count)})


@torch.no_grad()
def start_linear(vae: AutoencoderKL, images: Tensor) -> None:
    """Set the weights of ``vae`` (three levels, four latent channels) from ``images`` ``(N, 3, H, W)`` in [−1, 1]."""
    mean, directions, deviations = principal_components(images)
    for block in (vae.encoder, vae.decoder):
        for module in block.modules():
            if type(module).__name__ == "ResnetBlock2D":
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)
    encoder: Any = vae.encoder
    decoder: Any = vae.decoder
    same = {c: ({c: 1.0}, 0.0) for c in range(12)}

    # Pixels, space to depth, components.
    _rows(encoder.conv_in, {c: ({c: 1.0}, 0.0) for c in range(3)})
    for a in range(2):
        for b in range(2):
            tap = torch.zeros(3, 3)
            tap[a, b] = 1.0
            first = 3 * (2 * a + b)
            down = encoder.down_blocks[0].downsamplers[0].conv
            _rows(down, {first + c: ({c: 1.0}, 0.0) for c in range(3)}, tap)
    _rows(encoder.down_blocks[1].resnets[0].conv_shortcut, same)
    down = encoder.down_blocks[1].downsamplers[0].conv
    weights = (directions / deviations).T.reshape(4, 3, 4, 4)
    _rows(down, {j: ({}, -float(mean @ directions[:, j] / deviations[j])) for j in range(4)})
    for c in range(3):
        for a in range(2):
            for b in range(2):  # place (a, b) within a 2 × 2 block, which itself is one of 2 × 2
                down.weight[:4, 3 * (2 * a + b) + c, :2, :2] = weights[:, c, a::2, b::2]
    group = encoder.conv_norm_out.num_channels // encoder.conv_norm_out.num_groups
    shortcut = encoder.down_blocks[2].resnets[0].conv_shortcut
    _pairs(shortcut, group, [({j: 1.0}, 0.0) for j in range(4)])
    _read_pairs(encoder.conv_out, group, 4)
    _rows(encoder.conv_out, {4 + j: ({}, LOG_VARIANCE) for j in range(4)})
    for conv in (vae.quant_conv, vae.post_quant_conv):
        _rows(conv, {c: ({c: 1.0}, 0.0) for c in range(conv.out_channels)})

    # The mean colour of each block, interpolated.
    smooth = torch.tensor([0.25, 0.5, 0.25])
    _rows(decoder.conv_in, {j: same[j] for j in range(4)})
    for block in decoder.up_blocks[:2]:
        _rows(block.upsamplers[0].conv, {j: same[j] for j in range(4)}, smooth[:, None] * smooth)
    _rows(decoder.up_blocks[1].resnets[0].conv_shortcut, {j: same[j] for j in range(4)})
    colours = (directions * deviations).reshape(3, 16, 4).mean(1)
    offsets = mean.reshape(3, 16).mean(1)
    group = decoder.conv_norm_out.num_channels // decoder.conv_norm_out.num_groups
    signals = [({j: float(colours[c, j]) for j in range(4)}, float(offsets[c])) for c in range(3)]
    _pairs(decoder.up_blocks[2].resnets[0].conv_shortcut, group, signals)
    _read_pairs(decoder.conv_out, group, 3)
