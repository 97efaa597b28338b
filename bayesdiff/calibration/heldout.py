r"""Held-out residuals as the head has them: what a network got wrong about images that it never saw, at timesteps of our choice.

Each image is noised to a timestep of a bin, :math:`x_t = \alpha x_0 + \sigma\varepsilon`; the network, called as
:func:`bayesdiff.fit` calls it, returns f for the target g (ε, v, x_0 or a flow's velocity), and the residual is r = g − f.

At a few numbers of each sample the response ∂f/∂x is measured, too: one call more for each, with that number moved.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import BayesdiffWarning, EmptyDataError, UnsupportedPipelineError
from bayesdiff.data import ImageData
from bayesdiff.diffusion.noising import noised
from bayesdiff.diffusion.parametrization import alpha_sigma, is_flow, is_reversed, prediction_type
from bayesdiff.diffusion.tweedie import target_variance
from bayesdiff.fitting.by_call import check_images
from bayesdiff.fitting.samples import Clean
from bayesdiff.fitting.seen import Seen
from bayesdiff.fitting.source import Source, training_timesteps
from bayesdiff.rng import item_generator

#: Added to α and σ in a level, which is finite then.
LEAST = 0.01
#: Rounding of a network's outputs above which differences of them are not to be trusted.
COARSE = 1e-5


@dataclass(frozen=True)
class Observed:
    """Some rows of the head, of one bin of t.

    Args:
        inputs: What entered the head, ``(n, C_in, *size)`` or ``(n, tokens, C_in)``.
        residual: r, shaped as the head's output, in units of the target, float64.
        t: ``(n,)``.
        level: Of noise, log (σ + 0.01)/(α + 0.01) at t, ``(n,)`` float64.
        image: The number of the image of each row, ``(n,)``.
        tweedie: Var[g | x_t] by Tweedie's identity where it was measured, else NaN; shaped as ``residual``.
    """

    inputs: Tensor
    residual: Tensor
    t: Tensor
    level: Tensor
    image: Tensor
    tweedie: Tensor


class HeldOut:
    """Held-out images under one network.

    Args:
        source: Calls the network.
        data: The images, and what belongs to them.
        seed: Of timesteps, noise, and where the response is measured.
        batch_size: Rows in a network call.
        probes: At how many numbers of each sample the response is measured; 0: nowhere.
    """

    def __init__(self, source: Source, data: ImageData, seed: int, batch_size: int, probes: int) -> None:
        self.source, self.seed, self.probes = source, seed, probes
        self.batches: list[tuple[Clean, Mapping[str, Any]]] = []
        for x, conditioning in data.batches(batch_size):
            check_images(x)
            self.batches.append((source.clean(x, conditioning), conditioning))
        if not self.batches:
            raise EmptyDataError("expected held-out images, got none")
        self.total = training_timesteps(source.scheduler)
        if probes and torch.finfo(self.dtype).eps > COARSE:
            warnings.warn(
                f"responses are differences of network outputs, which {self.dtype} makes rough: Tweedie's variance is not to be "
                'trusted here; evaluate in float32, or leave "tweedie" out of the scales', BayesdiffWarning, stacklevel=3,
            )  # fmt: skip

    def __len__(self) -> int:
        """The number of images."""
        return sum(len(clean) for clean, _ in self.batches)

    def observe(self, stream: int, times: Times, chosen: Tensor) -> Iterator[Observed]:
        """Some of the images once, each at a timestep of its own.

        Args:
            stream: A number for this pass: timesteps, noise and places depend on it and the image alone.
            times: Where timesteps are drawn.
            chosen: Which images, ``(len(self),)`` bool.

        Raises:
            UnsupportedPipelineError: The network is not called at some of them.
        """
        first = 0
        for clean, conditioning in self.batches:
            rows = chosen[first : first + len(clean)].nonzero().flatten()
            if len(rows):
                yield from self._batch(stream, times, first, rows, clean, conditioning)
            first += len(clean)

    def _batch(
        self, stream: int, times: Times, first: int, rows: Tensor, clean: Clean, conditioning: Mapping[str, Any]
    ) -> Iterator[Observed]:
        scheduler, number, shape = self.source.scheduler, len(rows), tuple(clean.mean.shape[1:])
        generators = [item_generator(self.seed, stream, first + i) for i in rows.tolist()]
        t = self.source.timesteps(torch.stack([times(g, is_flow(scheduler)) for g in generators]))
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        places = torch.stack([torch.randperm(noise[0].numel(), generator=g)[: self.probes] for g in generators])
        encoder_noise = None
        if clean.std is not None:
            encoder_noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        x, target = noised(scheduler, clean.draw(rows, encoder_noise), noise.to(clean.mean.device), t)
        step = torch.finfo(self.dtype).eps ** 0.5 * x.flatten(1).norm(dim=1)
        each = torch.arange(number, device=x.device)

        def sample(n: int) -> Tensor:
            if n == 0:
                return x
            moved = x.flatten(1).clone()
            moved[each, places[:, n - 1].to(x.device)] += step
            return moved.view_as(x)

        steps: dict[int, list[tuple[list[int], Seen]]] = {}
        self.source.run(
            conditioning, rows.tolist(), first, sample, [t] * (1 + places.shape[1]),
            lambda n, which, seen: steps.setdefault(n, []).append((which, seen)),
        )  # fmt: skip
        plain = steps.get(0, [])
        if sum(len(which) for which, _ in plain) < number:
            raise UnsupportedPipelineError(
                "expected the network with the posterior's head to be called at all timesteps, got some at which another is; "
                "give timesteps=… at which it is called"
            )
        alpha, sigma = alpha_sigma(scheduler, t)
        level = ((sigma + LEAST) / (alpha + LEAST)).log()
        for k, (which, seen) in enumerate(plain):
            output, at = seen.output.double(), places[which].to(x.device)
            moved = [steps[n + 1][k][1].output.double() for n in range(places.shape[1])]
            slopes = _slopes(output, moved, at, step[which])
            if is_reversed(scheduler):
                slopes = -slopes
            measured = target_variance(
                prediction_type(scheduler), alpha[which, None].to(slopes), sigma[which, None].to(slopes), slopes
            )
            flat = torch.full((len(which), output[0].numel()), float("nan"), dtype=output.dtype, device=output.device)
            variance = flat.scatter_(1, at, measured).view(output.shape)
            image = first + rows[which]
            # The fold is linear, so it scales a variance once; of ones it makes that scale.
            parts = (target[which] - output, variance, torch.ones_like(output))
            folded = [seen.fold.observations(self.source.observer.head, seen.inputs, part) for part in parts]
            for (inputs, r, samples, group), (_, v, *_), (_, scale, *_) in zip(*folded, strict=True):
                own = (samples if group is None else samples[group]).cpu()
                of = torch.tensor(which)[own]
                yield Observed(inputs, r, t.cpu()[of], level[of], image[own], v * scale)

    @property
    def dtype(self) -> torch.dtype:
        """That network outputs have."""
        return next(p.dtype for p in self.source.network.parameters() if p.is_floating_point())


def _slopes(output: Tensor, moved: list[Tensor], places: Tensor, step: Tensor) -> Tensor:
    """∂f_i/∂x_i by differences: ``(n, p)`` of p outputs ``(n, …)``, each with one number of every row moved."""
    if not moved:
        return output.new_zeros(len(output), 0)
    ends = torch.stack([m.flatten(1).gather(1, places[:, n : n + 1])[:, 0] for n, m in enumerate(moved)], dim=1)
    return (ends - output.flatten(1).gather(1, places)) / step[:, None]


@dataclass(frozen=True)
class Times:
    """Where timesteps are drawn: evenly from low to high.

    Args:
        low: The least, at least 0.
        high: Where it ends; whole timesteps are less.
    """

    low: float
    high: float

    def __call__(self, generator: torch.Generator, continuous: bool) -> Tensor:
        """One timestep: float64 for flow matching, else int64."""
        if self.high <= self.low:
            return torch.tensor(self.low, dtype=torch.float64) if continuous else torch.tensor(round(self.low))
        if continuous:
            return self.low + (self.high - self.low) * torch.rand((), generator=generator, dtype=torch.float64)
        return torch.randint(round(self.low), max(round(self.low) + 1, round(self.high)), (), generator=generator)
