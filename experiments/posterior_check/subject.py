"""A model under the judge: what enters its head and what the head leaves, for draws that the judge chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bayesdiff.diffusion.density import Density
from bayesdiff.diffusion.noising import draw, noised
from bayesdiff.diffusion.weighting import Weighting
from bayesdiff.fitting.samples import Clean
from bayesdiff.fitting.seen import Seen
from bayesdiff.fitting.source import source_of, training_timesteps
from bayesdiff.head.find import Head
from bayesdiff.rng import item_generator

#: Rows in a network call, and images in one of the encoder.
BATCH = 50


def put(head: Head, weight: Tensor) -> None:
    """Write C × D weights, bias last, into the head's layer."""
    layer: Any = head.layer
    number = head.geometry.num_weights
    with torch.no_grad():
        layer.weight.copy_(weight[:, :number].view(layer.weight.shape))
        if head.geometry.bias:
            layer.bias.copy_(weight[:, number])


class Subject:
    """A pipeline's network, called by its pipeline, with clean samples of its own.

    Args:
        pipe: The pipeline.
        data: A mapping with ``"images"`` and, beside them, what the pipeline is told of each.
        given: Keywords of every call.
        encode: ``"sample"`` of the encoder's posterior, anew for each draw, or its ``"mean"``.
    """

    def __init__(self, pipe: Any, data: Any, given: Mapping[str, Any] | None = None, encode: str = "sample") -> None:
        self.source = source_of(
            pipe, head=None, scheduler=None, call=None, pipe_kwargs=given, space=None, encode=encode
        )
        self.conditioning = {k: v for k, v in data.items() if k != "images"}
        parts = [self.source.clean(images, self.conditioning) for images in data["images"].split(BATCH)]
        stds = [p.std for p in parts if p.std is not None]
        self.clean = Clean(torch.cat([p.mean for p in parts]), torch.cat(stds) if stds else None)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.clean)

    @property
    def head(self) -> Head:
        return self.source.observer.head

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample."""
        return tuple(self.clean.mean.shape[1:])

    @property
    def num_timesteps(self) -> int:
        return training_timesteps(self.source.scheduler)

    def observe(
        self, rows: Tensor, t: Tensor, noise: Tensor, encoder_noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What enters the head, and the residuals of what it returns, for some images noised to t.

        Without ``encoder_noise`` an image's sample is the mean of the encoder's posterior.
        """
        t = self.source.timesteps(t)
        x_t, wanted = noised(self.source.scheduler, self.clean.draw(rows, encoder_noise), noise, t)
        found: list[tuple[Tensor, Tensor]] = []

        def consume(_: int, which: list[int], seen: Seen) -> None:
            ((x, r, *_rest),) = seen.fold.observations(self.head, seen.inputs, wanted[which] - seen.output)
            found.append((x, r))

        self.source.run(self.conditioning, rows.tolist(), 0, lambda _: x_t, [t], consume)
        inputs, residuals = zip(*found, strict=True)
        return torch.cat(inputs), torch.cat(residuals)

    def draws(
        self, seed: int, number: int, density: Density | None, weighting: Weighting | None, bin_weights: Tensor
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """``number`` draws of each image: the first one's number, the head's inputs, residuals, weights in the loss."""
        bins = len(bin_weights)
        per_call = max(1, BATCH // number)
        for first in range(0, len(self), per_call):
            count = min(per_call, len(self) - first)
            t, noise = draw(self.source.scheduler, self.shape, seed, first, count, number, density)
            encoder_noise = None
            if self.clean.std is not None:
                generators = [
                    item_generator(seed + 1, i, j) for i in range(first, first + count) for j in range(number)
                ]
                encoder_noise = torch.stack([torch.randn(self.shape, generator=g) for g in generators])
            rows = torch.arange(first, first + count).repeat_interleave(number)
            x, r = self.observe(rows, t, noise, encoder_noise)
            weights = bin_weights[(t * bins / self.num_timesteps).long().clamp(max=bins - 1)]
            yield (
                first * number,
                x,
                r,
                weights if weighting is None else weights * weighting(self.source.scheduler, t),
            )
