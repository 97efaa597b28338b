"""Random numbers that do not depend on how the work is cut into batches.

A generator that is shared by a batch gives every sample numbers that depend on its neighbours.
Here one draw from the caller's generator makes a base seed, and item i of a data set has a
generator of its own, seeded from (base, i). Numbers are drawn on the CPU in float32, so one seed
gives the same numbers on every device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor

from bayesdiff.checks import ArgumentError, check_int


def check_generator(generator: object) -> None:
    """Raise :class:`ArgumentError` for what is neither a torch generator nor None."""
    if not isinstance(generator, Generator | None):
        raise ArgumentError(
            f"expected a torch.Generator or None, got {generator!r}; a seed is given as torch.Generator().manual_seed(seed)"
        )


def base_seed(generator: Generator | None) -> int:
    """One 63-bit seed drawn from ``generator`` (torch's default generator when None).

    Raises:
        ArgumentError: It is something else.
    """
    check_generator(generator)
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, dtype=torch.int64, device=device))


def item_generator(base: int, *index: int) -> Generator:
    """The generator of item ``index`` under the base seed.

    Under one base, indices of one length are independent streams. Of different lengths they need not be: NumPy pads what it
    seeds from with zeros, so ``(i,)`` and ``(i, 0)`` are one stream. Published numbers depend on both, so they stay
    so; use one length under one base. "Independent" is up to 32 bits, which is all that torch's CPU generator keeps of a seed:
    two given items share a stream with probability 2⁻³², some two among 60,000 with probability 0.34.

    Args:
        base: The base seed, at least 0.
        index: One or two numbers from 0 to 2³² − 1; a larger one would take two of NumPy's words, and be mistaken for two.

    Raises:
        ArgumentError: The base or the index is something else.
    """
    if len(index) not in (1, 2):
        raise ArgumentError(
            f"expected an index of one or two numbers, got {len(index)}: of other lengths it would alias one of these"
        )
    numbers = [check_int("an index", i, least=0) for i in index]
    if max(numbers) >= 2**32:
        raise ArgumentError(f"expected an index below 2**32, got {max(numbers)}: larger ones alias others")
    words = [check_int("the base seed", base, least=0), *numbers]
    state = np.random.SeedSequence(words).generate_state(1, dtype=np.uint64)[0]
    return Generator().manual_seed(int(state) & (2**63 - 1))


def normal(shape: tuple[int, ...], generator: Generator | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers on the CPU, from a generator on any device."""
    check_generator(generator)
    device = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=dtype, device=device).cpu()


def orthogonal_normal(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    r"""Standard normal numbers whose rows are made orthogonal: the same second moments, with less noise in their mean.

    n rows of m numbers, m ≥ n, are √m times orthonormal rows that are distributed uniformly (Haar). For any a of length
    1 the mean of :math:`(a^\top z_k)^2` over n of them is 1 on average, with the variance
    :math:`2(m-n)/(n(m+2))` instead of 2/n: 0 for n = m, where the mean is exact. More rows than m come in blocks of m,
    independent of each other. (Yu et al. 2016, who give the rows random lengths; Mezzadri 2007 for the uniform
    distribution.)

    Args:
        shape: (n, …); a row is everything behind the first dimension.
        generator: Of as many numbers as :func:`normal` would draw.

    Returns:
        Float64, on the CPU.
    """
    rows = normal(shape, generator).flatten(1)
    blocks = []
    for block in rows.split(max(1, rows.shape[1])):
        q, r = torch.linalg.qr(block.T)
        signs = r.diagonal().sign()
        blocks.append(rows.shape[1] ** 0.5 * (q * torch.where(signs == 0, 1.0, signs)).T)
    return torch.cat(blocks).view(shape)
