"""Heads at the true shapes of published models, with synthetic features that are correlated as real ones are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesdiff.head.find import Head
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.laplace.statistics import Statistics


@dataclass(frozen=True)
class Shape:
    """A head, and what enters it for one image."""

    name: str
    kind: str
    in_channels: int
    out_channels: int
    size: int  # side of the latent for a convolution, number of tokens for a linear layer

    def layer(self) -> nn.Module:
        torch.manual_seed(0)
        if self.kind == "conv":
            return nn.Conv2d(self.in_channels, self.out_channels, 3, padding=1)
        return nn.Linear(self.in_channels, self.out_channels)

    def features(self, images: int, seed: int, size: int | None = None) -> Tensor:
        """SiLU of Gaussians with a decaying spectrum over channels; for a convolution smooth in space."""
        generator = torch.Generator().manual_seed(seed)
        size = self.size if size is None else size
        c = self.in_channels
        mix = torch.linalg.qr(torch.randn(c, c, generator=torch.Generator().manual_seed(1))).Q
        mix = mix * (torch.arange(1, c + 1) ** -0.4)
        mix = mix / mix.square().sum(1).mean().sqrt()
        if self.kind == "linear":
            return nn.functional.silu(torch.randn(images, size, c, generator=generator) @ mix.T)
        z = torch.randn(images, c, size, size, generator=generator)
        smooth = nn.functional.avg_pool2d(z, 3, stride=1, padding=1) * 3
        z = (z + smooth) / 2**0.5
        return nn.functional.silu(torch.einsum("bchw,dc->bdhw", z, mix))


SHAPES = (
    Shape("SD 1.5, 64 x 64", "conv", 320, 4, 64),
    Shape("SD 1.5, 96 x 96", "conv", 320, 4, 96),
    Shape("SDXL, 128 x 128", "conv", 320, 4, 128),
    Shape("DiT-XL/2, 256 tokens", "linear", 1152, 32, 256),
    Shape("SD 3.5, 1024 tokens", "linear", 1536, 64, 1024),
    Shape("SD 3.5, 4096 tokens", "linear", 1536, 64, 4096),
    Shape("Flux, 4096 tokens", "linear", 3072, 64, 4096),
)


def fitted(shape: Shape, images: int = 8) -> tuple[Head, Statistics]:
    """The sums of a few images: more positions than features, so that the precision has full rank."""
    layer = shape.layer()
    head = Head("head", layer, HeadGeometry.of(layer))
    statistics = Statistics(head.geometry, 1)
    size = 64 if shape.kind == "conv" else 1024
    for i in range(images):
        x = shape.features(1, 100 + i, size)
        with torch.no_grad():
            out = layer(x)
        generator = torch.Generator().manual_seed(200 + i)
        # Residuals of neighbouring positions are correlated too.
        residual = torch.randn(out.shape, generator=generator) + torch.randn(1, generator=generator)
        statistics.update(x, residual, torch.zeros(1, dtype=torch.long), torch.tensor([i]))
    return head, statistics
