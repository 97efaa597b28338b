"""Two problems small enough to be trained dozens of times: noisy sines, and Fashion-MNIST at 28 × 28.

Network k is trained on images of its own, which no other has seen, from initial weights and draws (t, ε) of its own seed. So the
spread over networks is of everything that a training draws: data, noise, order, initial weights.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.train_fashion_ddpm.train import fashion_mnist, to_model_space

FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Recipe:
    """How each network is trained.

    Args:
        networks: How many.
        size: N, images of each.
        steps: Optimiser steps.
        batch: Draws in one.
        rate: The learning rate, after a warm-up; a cosine takes it to zero.
        average: Decay of the moving average of the weights, which is what is kept.
        together: Networks trained in one loop.
        same_data: All networks get the images of the first: they differ in initial weights, draws and their order only.
    """

    networks: int
    size: int
    steps: int
    batch: int
    rate: float
    average: float
    together: int
    same_data: bool = False

    @property
    def training_draws(self) -> float:
        """M = S·b/N, draws (t, ε) of each image."""
        return self.steps * self.batch / self.size


class Problem(ABC):
    """Data, network and schedule.

    Args:
        recipe: Of the trainings; by default the problem's own.
    """

    name: str
    recipe: Recipe
    rows: int  # in a network call
    vmapped: bool  # whether several networks are called at once
    scheduler: DDIMScheduler

    def __init__(self, recipe: Recipe | None = None) -> None:
        self.recipe = recipe or self.recipe

    def of_one_data_set(self, networks: int) -> Problem:
        """The same problem, all of whose networks get the first one's images."""
        other = copy.copy(self)
        other.recipe = replace(self.recipe, networks=networks, same_data=True)
        return other

    @abstractmethod
    def build(self) -> nn.Module:
        """An untrained network, from the global generator."""

    @abstractmethod
    def data(self, number: int) -> dict[str, Tensor]:
        """``"images"`` that network ``number`` is trained on, and its other arguments."""

    @abstractmethod
    def heldout(self, count: int) -> dict[str, Tensor]:
        """Images that no network has seen."""


class WaveNetwork(nn.Module):
    """An MLP of (x, t) with a residual block, called as diffusers' networks are."""

    def __init__(self, width: int = 48, frequencies: int = 8, length: int = 10) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.first = nn.Linear(length + 2 * frequencies, width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, length)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """ε of ``sample`` ``(n, length)`` at ``timestep`` ``(n,)`` or a number."""
        u = torch.as_tensor(timestep, device=sample.device).expand(len(sample)).to(sample.dtype) / 1000
        angles = u[:, None] * math.pi * 2.0 ** torch.arange(self.frequencies, device=sample.device).to(sample.dtype) / 2
        h = F.silu(self.first(torch.cat([sample, angles.sin(), angles.cos()], 1)))
        return (self.head(h + F.silu(self.second(h))),)


class Sines(Problem):
    """x_j = sin(2π j/10 + φ) + 0.1 z_j with a random phase φ, ten numbers (Time series as in FLARE, arXiv 2602.09170)."""

    name = "sines"
    rows = 20_000
    vmapped = True
    recipe = Recipe(networks=48, size=2000, steps=6000, batch=256, rate=3e-3, average=0.999, together=48)

    def __init__(self, recipe: Recipe | None = None) -> None:
        super().__init__(recipe)
        self.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)

    def build(self) -> nn.Module:
        return WaveNetwork()

    def _waves(self, count: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        phase = 2 * math.pi * torch.rand(count, 1, generator=generator)
        waves = torch.sin(2 * math.pi * torch.arange(10) / 10 + phase)
        return {"images": waves + 0.1 * torch.randn(count, 10, generator=generator)}

    def data(self, number: int) -> dict[str, Tensor]:
        return self._waves(self.recipe.size, 1 if self.recipe.same_data else 1 + number)

    def heldout(self, count: int) -> dict[str, Tensor]:
        return self._waves(count, 0)


class Fashion(Problem):
    """Fashion-MNIST; four neighbouring pixels are the four channels of one of 14 × 14 places (a pixel-unshuffle, no loss).

    Args:
        recipe: As of :class:`Problem`.
        folder: With the four files.
    """

    name = "fashion"
    rows = 100
    vmapped = False
    recipe = Recipe(networks=12, size=4000, steps=500, batch=64, rate=2e-3, average=0.99, together=2)

    def __init__(self, recipe: Recipe | None = None, folder: Path = FASHION) -> None:
        super().__init__(recipe)
        self.folder = folder
        # Of v, because ε predicted by networks trained this shortly is divided by √ᾱ = 0.006 in the first steps.
        self.scheduler = DDIMScheduler(beta_schedule="linear", prediction_type="v_prediction", clip_sample=False)
        self._train: tuple[Tensor, Tensor] | None = None

    def build(self) -> nn.Module:
        return UNet2DModel(
            sample_size=14, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(24, 32),
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=8,
            num_class_embeds=10, add_attention=False,
        )  # fmt: skip

    def data(self, number: int) -> dict[str, Tensor]:
        if self._train is None:
            self._train = fashion_mnist(self.folder, "train")
        images, labels = self._train
        number = 0 if self.recipe.same_data else number
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        chosen = order[number * self.recipe.size :][: self.recipe.size]
        if len(chosen) < self.recipe.size:
            raise ValueError(f"expected {self.recipe.size} images for network {number}, {len(chosen)} are left")
        return self._packed(images[chosen], labels[chosen])

    def heldout(self, count: int) -> dict[str, Tensor]:
        images, labels = fashion_mnist(self.folder, "t10k")
        return self._packed(images[:count], labels[:count])

    def _packed(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"images": F.pixel_unshuffle(to_model_space(images), 2), "class_labels": labels}
