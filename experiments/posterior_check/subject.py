"""A model under the judge: what enters its head and what the head leaves, for draws that the judge chooses."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import bayesdiff
from bayesdiff.diffusion.density import Density
from bayesdiff.diffusion.noising import draw, noised
from bayesdiff.diffusion.weighting import Weighting
from bayesdiff.head.find import denoiser
from bayesdiff.head.fold import Fold

BATCH = 50


class Subject:
    """A pipeline's network with clean samples in its own space.

    Args:
        pipe: The pipeline.
        data: A mapping with ``"images"`` and, beside them, the network's other arguments by name.
    """

    def __init__(self, pipe: Any, data: Any) -> None:
        self.pipe, self.scheduler = pipe, pipe.scheduler
        self.network, self.head = denoiser(pipe), bayesdiff.find_head(pipe)
        self.images = data["images"]
        self.conditioning = {k: v for k, v in data.items() if k != "images"}
        self._fold: Fold | None = None

    @property
    def num_timesteps(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    def observe(self, rows: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the head, and the residuals of what it returns, for some images noised to t."""
        x_t, wanted = noised(self.scheduler, self.images[rows], noise, t)
        call = partial(
            self.network,
            x_t.float(),
            timestep=t,
            return_dict=False,
            **{k: v[rows] for k, v in self.conditioning.items()},
        )
        own: list[Tensor] = []
        with torch.no_grad(), self.head.capture(own) as captured:
            output = call()[0]
        if self._fold is None:
            with torch.no_grad():
                same = own[0].shape == output.shape and torch.equal(own[0], output)
                self._fold = Fold(None) if same else Fold.read(self.head, lambda: call()[0])
        if self._fold.index is not None and len(self._fold.index) != len(output):
            with torch.no_grad():  # a last batch of another size
                self._fold = Fold.read(self.head, lambda: call()[0])
        ((x, r, _, _),) = self._fold.observations(self.head, captured[0], wanted - output)
        return x, r

    def draws(
        self, seed: int, number: int, density: Density | None, weighting: Weighting | None, bin_weights: Tensor
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """``number`` draws of each image: the first one's number, the head's inputs, residuals, weights in the loss."""
        shape, bins = tuple(self.images.shape[1:]), len(bin_weights)
        per_call = max(1, BATCH // number)
        for first in range(0, len(self.images), per_call):
            count = min(per_call, len(self.images) - first)
            t, noise = draw(self.scheduler, shape, seed, first, count, number, density)
            rows = torch.arange(first, first + count).repeat_interleave(number)
            x, r = self.observe(rows, t, noise)
            weights = bin_weights[(t * bins / self.num_timesteps).long().clamp(max=bins - 1)]
            yield first * number, x, r, weights if weighting is None else weights * weighting(self.scheduler, t)
