"""Clamps and masks: each element comes from one tensor or from another."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesdiff.tracing.derivatives.beside import lift, zeros
from bayesdiff.tracing.derivatives.call import Call, Rule, Tangents, base_name


def clamp(c: Call) -> Tangents:
    """The tangents of the bound, where it was met."""
    name, x, n = base_name(c.func), c.first, c.out.ndim
    low, high = c.get(1, "min"), c.get(2, "max")
    if name == "clamp_max":
        low, high = None, c.get(1, "max")
    elif name == "hardtanh":
        low, high = c.get(1, "min_val", default=-1.0), c.get(2, "max_val", default=1.0)
    t = c.of(x)
    t = lift(zeros(x, c.length) if t is None else t, n)
    if c.of(low) is None and c.of(high) is None and low is not None and high is not None:
        return _masked(t, (x >= low) & (x <= high))
    if low is not None:
        t, x = _choose(x >= low, t, c.of(low), n), torch.clamp(x, min=low)
    return t if high is None else _choose(x <= high, t, c.of(high), n)


def _where(c: Call) -> Tangents:
    if len(c.args) != 3:
        return NotImplemented
    condition, a, b = c.args
    if c.func == torch.Tensor.where:
        condition, a = a, condition
    return _choose(condition, c.of(a), c.of(b), c.out.ndim)


def _masked_fill(c: Call) -> Tangents:
    if len(c.args) != 3:
        return NotImplemented
    x, mask, value = c.args
    return _choose(mask, c.of(value), c.of(x), c.out.ndim)


def _choose(mask: Tensor, left: Tensor | None, right: Tensor | None, ndim: int) -> Tensor:
    if left is None and right is not None:
        return _masked(lift(right, ndim), ~mask)
    assert left is not None
    if right is None:
        return _masked(lift(left, ndim), mask)
    return torch.where(mask, lift(left, ndim), lift(right, ndim))


def _masked(t: Tensor, mask: Tensor) -> Tensor:
    """``t`` where the mask is true, else 0. A product is the fastest, if nothing is infinite."""
    if t.device.type == "cpu":
        product = t * mask
        if bool(product.sum().isfinite()):
            return product
    return torch.where(mask, t, torch.zeros((), dtype=t.dtype, device=t.device))


RULES: list[tuple[Rule, str]] = [
    (clamp, "clamp clip clamp_min clamp_max hardtanh"),
    (_where, "where"),
    (_masked_fill, "masked_fill"),
]
