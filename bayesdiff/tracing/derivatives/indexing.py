"""Elements that are picked by an index: one that is given, or one that is found (the largest, the median)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bayesdiff.tracing.derivatives.beside import dim_of
from bayesdiff.tracing.derivatives.call import Call, Rule, Tangents, base_name


def place(index: Any) -> tuple[tuple[Any, ...], bool] | None:
    """An index for the tangents, and whether L must be the last dimension for it; None for nested lists.

    Tensors in an index, with other things between them, bring their dimensions to the front, before L.
    """
    if isinstance(index, list) and not all(isinstance(v, int) for v in index):
        return None
    parts = index if isinstance(index, tuple) else (index,)
    tensors = sum(not (v is None or v is Ellipsis or isinstance(v, (int, slice))) for v in parts)
    scalars = sum(isinstance(v, bool) or (isinstance(v, Tensor) and v.ndim == 0) for v in parts)
    if tensors < 2 and not scalars:
        return (slice(None), *parts), False
    return ((*parts, slice(None)) if any(v is Ellipsis for v in parts) else parts), True


def _getitem(c: Call) -> Tangents:
    t, found = c.of(c.args[0]), place(c.args[1])
    if t is None or found is None:
        return NotImplemented
    index, last = found
    return t.movedim(0, -1)[index].movedim(-1, 0) if last else t[index]


def _index_select(c: Call) -> Tangents:
    x, dim, index = c.first, c.get(1, "dim"), c.get(2, "index")
    t = c.of(x)
    return NotImplemented if t is None or x.ndim == 0 else t.index_select(dim_of(dim, x.ndim), index)


def _gather(c: Call) -> Tangents:
    x, dim, index = c.first, c.get(1, "dim"), c.get(2, "index")
    t = c.of(x)
    if t is None or x.ndim == 0:
        return NotImplemented
    return t.gather(dim_of(dim, x.ndim), index.expand(t.shape[0], *index.shape))


#: Place of ``dim`` in what returns values and their indices.
_CHOSEN = {"sort": 1, "topk": 2, "max": 1, "min": 1, "median": 1, "nanmedian": 1, "kthvalue": 2, "mode": 1,
           "cummax": 1, "cummin": 1}  # fmt: skip


def _chosen(c: Call) -> Tangents:
    """The tangents of the elements that were chosen."""
    x = c.first
    t = c.of(x)
    if not isinstance(c.out, tuple):
        return NotImplemented
    if t is None or x.ndim == 0:
        return t
    dim = c.kwargs.get("dim", -1)
    at = _CHOSEN[base_name(c.func)]
    if len(c.args) > at and "dim" not in c.kwargs:
        dim = c.args[at]
        if isinstance(dim, bool):
            return NotImplemented
    indices = c.out[1]
    dropped = indices.ndim < x.ndim
    index = indices.unsqueeze(dim) if dropped else indices
    out = t.gather(dim_of(dim, x.ndim), index.expand(t.shape[0], *index.shape))
    return out.squeeze(dim_of(dim, x.ndim)) if dropped else out


RULES: list[tuple[Rule, str]] = [
    (_getitem, "__getitem__"),
    (_index_select, "index_select"),
    (_gather, "gather"),
    (_chosen, " ".join(_CHOSEN)),
]
#: These take tangents past a clamp along.
CARRYING: tuple[Rule, ...] = (_getitem, _index_select, _gather)
