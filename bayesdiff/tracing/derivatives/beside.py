"""What stands beside a value: the dtype of its tangents, and their shape, which has L in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor's tangents."""
    return torch.promote_types(dtype, torch.float32)


def inexact(x: Tensor) -> bool:
    """Whether a tensor of this dtype can have tangents."""
    return x.dtype.is_floating_point or x.dtype.is_complex


def up(x: Any) -> Any:
    """A value in float32 or better."""
    return x.float() if isinstance(x, Tensor) and x.dtype in HALF else x


def lift(t: Tensor, ndim: int) -> Tensor:
    """``(L, *shape)`` with ones in front of the shape, for a value of ``ndim`` dimensions."""
    missing = ndim + 1 - t.ndim
    return t[(slice(None),) + (None,) * missing] if missing > 0 else t


def fit(t: Tensor, shape: Sequence[int]) -> Tensor:
    """Tangents of a value that is broadcast to ``shape``; ones in front that it lacks fall away."""
    while t.ndim - 1 > len(shape):
        t = t.squeeze(1)
    return lift(t, len(shape)).expand(t.shape[0], *shape)


def dim_of(dim: int, ndim: int) -> int:
    """A dimension of the value, as one of the tangents."""
    return dim % max(ndim, 1) + 1


def zeros(x: Tensor, length: int) -> Tensor:
    """Tangents that are 0, without memory."""
    return torch.zeros((), dtype=real_dtype(x.dtype), device=x.device).expand(length, *x.shape)


def total(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of those that are there."""
    found: Tensor | None = None
    for part in parts:
        if part is not None:
            found = part if found is None else found + part
    return found
