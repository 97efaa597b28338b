"""Elements as they are, in another place: copies, fills, joins, repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayesdiff.tracing.derivatives.beside import dim_of, fit, lift, zeros
from bayesdiff.tracing.derivatives.call import Call, Rule, Tangents


def _copy(c: Call) -> Tangents:
    """The elements of the first argument in their order."""
    t = c.of(c.get(0, "self", "input", "data", "obj"))
    if t is None or t.shape[1:] == c.out.shape:
        return t
    return t.reshape(t.shape[0], *c.out.shape)


def second(c: Call) -> Tangents:
    """The elements of the second argument, spread over the output: copy_, fill_."""
    t = c.of(c.get(1, "src", "other", "value", "fill_value"))
    return None if t is None else fit(t, c.out.shape)


def _third(c: Call) -> Tangents:
    t = c.of(c.get(2, "fill_value"))
    return None if t is None else fit(t, c.out.shape)


def _nested(c: Call, at: int = 0) -> Tangents:
    """A tensor made of another, or of nested lists of scalars."""
    data = c.get(at, "data", "obj")
    if isinstance(data, Tensor):
        return c.of(data)

    def build(v: Any) -> Tensor:
        if isinstance(v, (list, tuple)):
            return torch.stack([build(w) for w in v], 1)
        t = c.of(v)
        return torch.zeros(c.length, *getattr(v, "shape", ()), device=c.out.device) if t is None else t.to(c.out.device)

    return build(data)


def _new_tensor(c: Call) -> Tangents:
    return _nested(c, 1)


def _cat(c: Call) -> Tangents:
    tensors, dim = c.get(0, "tensors"), c.get(1, "dim", "axis", default=0)
    parts = _all_tangents(c, tensors)
    n = c.out.ndim
    kept = [t for t in parts if t.ndim == n + 1]  # an empty vector may stand among others
    return torch.cat(kept, dim_of(dim, n))


def _stack(c: Call) -> Tangents:
    tensors, dim = c.get(0, "tensors"), c.get(1, "dim", default=0)
    return torch.stack(_all_tangents(c, tensors), dim_of(dim, c.out.ndim))


def _all_tangents(c: Call, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [zeros(x, c.length) if (t := c.of(x)) is None else t for x in tensors]


def _repeat(c: Call) -> Tangents:
    sizes = c.args[1:] if len(c.args) > 1 else (c.kwargs.get("repeats"),)
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list, torch.Size)):
        sizes = tuple(sizes[0])
    t = c.of(c.args[0])
    return NotImplemented if t is None or None in sizes else lift(t, len(sizes)).repeat(1, *sizes)


def _flip(c: Call) -> Tangents:
    x = c.first
    dims = c.args[1:] if len(c.args) > 1 else (c.kwargs.get("dims"),)
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = tuple(dims[0])
    t = c.of(x)
    return NotImplemented if t is None or None in dims else t.flip([dim_of(d, x.ndim) for d in dims])


def _roll(c: Call) -> Tangents:
    x, shifts, dims = c.first, c.get(1, "shifts"), c.get(2, "dims")
    t = c.of(x)
    if t is None or dims is None or dims == ():
        return NotImplemented
    return t.roll(shifts, [dim_of(d, x.ndim) for d in ((dims,) if isinstance(dims, int) else dims)])


RULES: list[tuple[Rule, str]] = [
    (_cat, "cat concat concatenate"),
    (_stack, "stack"),
    (_repeat, "repeat"),
    (_flip, "flip"),
    (_roll, "roll"),
    (second, "full full_like fill"),
    (_third, "new_full"),
    (_new_tensor, "new_tensor"),
    (_nested, "tensor as_tensor asarray"),
    (
        _copy,
        """
        clone contiguous reshape reshape_as flatten unflatten ravel view_as type_as to type float half double bfloat16
        cfloat cdouble cpu cuda __deepcopy__ detach_copy view_copy resolve_conj resolve_neg pin_memory squeeze_copy
        unsqueeze_copy lift_fresh_copy""",
    ),
]
#: These take tangents past a clamp along.
CARRYING: tuple[Rule, ...] = (_cat, _stack, _repeat, _flip, _roll, _copy, second, _nested)
