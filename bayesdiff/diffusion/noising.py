r"""The forward process: clean data to what a network was trained on, :math:`(x_t, t, \text{target})`.

    x_t = α_t x_0 + σ_t ε,   t ~ U{0 … T−1} (flow matching: U(0, T)), or of another density,   ε ~ N(0, I)

Every (image, draw) pair has a generator of its own, so the draws depend on the base seed and on the
place of the image in the data, never on the batch size or the number of workers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesdiff.diffusion.density import Density, sample
from bayesdiff.diffusion.parametrization import alpha_sigma, is_flow, is_reversed, prediction_type, target
from bayesdiff.rng import item_generator


def draw(
    scheduler: Any,
    shape: tuple[int, ...],
    seed: int,
    first: int,
    count: int,
    draws: int,
    density: Density | None = None,
) -> tuple[Tensor, Tensor]:
    """Timesteps and noise for images ``first`` … ``first + count − 1``, ``draws`` of each, image by image.

    Args:
        scheduler: Whose timesteps they are; T of them.
        shape: Of one sample.
        seed: The base seed.
        first: Number of the first image.
        count: Images.
        draws: Of each.
        density: Of t/T; None: uniform. Where timesteps are whole numbers, t = ⌊uT⌋.

    Returns:
        t ``(count·draws,)`` (int64; float64 for flow matching) and noise ``(count·draws, *shape)`` float32.
    """
    num_t = int(scheduler.config.num_train_timesteps)
    timesteps, noise = [], []
    for image in range(first, first + count):
        for j in range(draws):
            generator = item_generator(seed, image, j)
            if density is not None:
                u = sample(density, generator) * num_t
                timesteps.append(u if is_flow(scheduler) else u.long().clamp(max=num_t - 1))
            elif is_flow(scheduler):
                timesteps.append(torch.rand((), generator=generator, dtype=torch.float64) * num_t)
            else:
                timesteps.append(torch.randint(num_t, (), generator=generator))
            noise.append(torch.randn(shape, generator=generator))
    return torch.stack(timesteps), torch.stack(noise)


def noised(scheduler: Any, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and the target for clean data in the network's space.

    Args:
        scheduler: The diffusers scheduler whose schedule the network was trained with.
        clean: x_0, ``(B, C, H, W)``.
        noise: ε, the same shape.
        t: ``(B,)``.

    Returns:
        x_t and the target, float64, shaped as ``clean``.
    """
    alpha, sigma = alpha_sigma(scheduler, t)
    view = (-1, *(1,) * (clean.ndim - 1))
    alpha, sigma = alpha.to(clean.device).view(view), sigma.to(clean.device).view(view)
    clean, noise = clean.double(), noise.double()
    wanted = target(prediction_type(scheduler), clean, noise, alpha, sigma)
    return alpha * clean + sigma * noise, -wanted if is_reversed(scheduler) else wanted
