"""The training steps of a batch of images: how much of it is held at once, and which draws are made in which network call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bayesdiff.data.sources import Batch
from bayesdiff.diffusion.density import Density
from bayesdiff.diffusion.noising import draw, noised
from bayesdiff.fitting.samples import Clean
from bayesdiff.fitting.seen import Seen
from bayesdiff.fitting.source import Source
from bayesdiff.rng import item_generator

#: Numbers that the noise and the noisy samples of a batch of images may have.
HELD = 2**26


def smaller(batch: Batch, draws: int) -> list[Batch]:
    """A batch in parts whose draws are no more numbers than :data:`HELD`."""
    images, conditioning = batch
    size = max(1, HELD // max(1, images[:1].numel() * draws))
    return [
        (images[i : i + size], {k: v[i : i + size] for k, v in conditioning.items()})
        for i in range(0, len(images), size)
    ]


class Steps:
    """The training steps of a batch of images: which draws are made in which network call.

    Args:
        source: Runs the network.
        clean: The samples of the batch.
        conditioning: What is told of them.
        seed: The base seed.
        first: The number of the batch's first image.
        draws: Of each image.
        rows: The most that a network call may have.
        density: Of t/T.
    """

    def __init__(
        self,
        source: Source,
        clean: Clean,
        conditioning: Mapping[str, Any],
        seed: int,
        first: int,
        draws: int,
        rows: int,
        density: Density | None = None,
    ) -> None:
        self.source, self.clean, self.conditioning = source, clean, conditioning
        self.first, count = first, len(clean)
        shape = tuple(clean.mean.shape[1:])
        t, self.noise = draw(source.scheduler, shape, seed, first, count, draws, density=density)
        self.t = source.timesteps(t)
        self.encoder_noise = None
        if clean.std is not None:
            own = (seed + 1) % 2**63
            self.encoder_noise = torch.stack([
                torch.randn(shape, generator=item_generator(own, first + i, j)) for i in range(count) for j in range(draws)
            ])  # fmt: skip
        # Few images with many draws: an image has several rows in a call.
        self.together = max(k for k in range(1, draws + 1) if draws % k == 0 and (k == 1 or k * count <= rows))
        self.order = (
            torch.arange(count * draws).view(count, draws // self.together, self.together).transpose(0, 1).flatten(1)
        )
        self.images = torch.arange(count).repeat_interleave(draws)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """x_t and the target of a step."""
        which = self.order[step]
        clean = self.clean.draw(self.images[which], None if self.encoder_noise is None else self.encoder_noise[which])
        return noised(self.source.scheduler, clean, self.noise[which].to(clean.device), self.t[which])

    def run(self, consume: Any) -> None:
        """All of them; ``consume(images, t, target, seen)`` for each network call."""
        targets: dict[int, Tensor] = {}

        def sample(step: int) -> Tensor:
            x, targets[step] = self.at(step)
            return x

        def consumed(step: int, rows: list[int], seen: Seen) -> None:
            which = self.order[step][rows]
            target = targets[step] if len(rows) == len(targets[step]) else targets[step][rows]
            consume(self.images[which], self.t[which], target, seen)
            if self.source_is_done(step, rows):
                del targets[step]

        rows = self.images[self.order[0]].tolist()
        self.source.run(self.conditioning, rows, self.first, sample, [self.t[o] for o in self.order], consumed)

    def source_is_done(self, step: int, rows: list[int]) -> bool:
        """Whether these were the last rows of a step."""
        return rows[-1] == self.order.shape[1] - 1
