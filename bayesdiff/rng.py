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


def base_seed(generator: Generator | None) -> int:
    """One 63-bit seed drawn from ``generator`` (torch's default generator when None)."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, dtype=torch.int64, device=device))


def item_generator(base: int, *index: int) -> Generator:
    """The generator of item ``index`` under the base seed; distinct items get independent streams."""
    state = np.random.SeedSequence([base, *index]).generate_state(1, dtype=np.uint64)[0]
    return Generator().manual_seed(int(state) & (2**63 - 1))


def normal(shape: tuple[int, ...], generator: Generator | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers on the CPU, from a generator on any device."""
    device = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=dtype, device=device).cpu()
