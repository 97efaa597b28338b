"""What a pipeline hands to its network, compared between runs: where x is, and whether rows keep to themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Numbers of rows that are run together and alone may differ by this, relative to the largest.
ALIKE = 1e-3


def encoder_of(pipe: Any, network: nn.Module) -> nn.Module | None:
    """The pipeline's component that encodes and decodes."""
    for value in vars(pipe).values():
        if (
            isinstance(value, nn.Module)
            and value is not network
            and hasattr(value, "encode")
            and hasattr(value, "decode")
        ):
            return value
    return None


def occurrences(leaves: list[Any], x: Tensor) -> float:
    """How often every number of x is among the tensors that a network is given; less than 1: the share of those that are."""
    times = torch.zeros(x.numel(), dtype=torch.float64, device=x.device)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 1:
            values, which, own = x.to(leaf.device, leaf.dtype).flatten().unique(return_inverse=True, return_counts=True)
            flat = leaf.flatten()
            hits = torch.searchsorted(values, flat[torch.isin(flat, values)])
            times += (torch.bincount(hits, minlength=len(values)) / own)[which].to(times)
    # Rounded numbers may be met elsewhere by chance, but not all of them.
    return float(times.min().floor()) if bool((times >= 1).all()) else float((times >= 1).double().mean())


def unlike_others(shape: tuple[int, ...]) -> Tensor:
    """Numbers of 64 to 128, and as many negative ones: not what embeddings are made of, also where all are rounded."""
    generator = torch.Generator().manual_seed(1)
    return (64 + 64 * torch.rand(shape, generator=generator)) * (1 - 2 * torch.randint(2, shape, generator=generator))


def rows_alike(together: list[Any], first: list[Any], second: list[Any]) -> bool:
    """Whether row 0 is given what it is given with the first timestep for all rows, and row 1 with the second."""
    if not len(together) == len(first) == len(second):
        return False
    for v, a, b in zip(together, first, second, strict=True):
        if not isinstance(v, Tensor):
            if isinstance(a, Tensor) or isinstance(b, Tensor) or v != a or v != b:
                return False
        elif not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return False
        elif v.shape == a.shape == b.shape and v.ndim and len(v) == 2:
            if not (_near(v[0], a[0]) and _near(v[1], b[1])):
                return False
        elif v.shape == a.shape == b.shape:  # a list's entry, or the same for all
            if not (_near(v, a) or _near(v, b)) or (v.numel() == 1 and not (_near(v, a) and _near(v, b))):
                return False
        elif not (
            v.numel() == 2 and a.numel() == b.numel() == 1
            and _near(v.flatten()[:1], a.flatten()) and _near(v.flatten()[1:], b.flatten())
        ):  # fmt: skip
            return False
    return True


def same_arguments(first: list[Any], second: list[Any]) -> bool:
    """Whether a network is given the same in two calls."""
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return False
        if isinstance(a, Tensor):
            if a.shape != b.shape or not torch.allclose(a, b, equal_nan=True):
                return False
        elif a is not b and a != b:
            return False
    return True


def _near(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = float(b.abs().max()) if b.numel() else 0.0
    return bool((a.double() - b.double()).abs().le(ALIKE * scale).all())
