r"""How L tangents go through one operation of PyTorch.

For each operation there is one of

- a rule: a handful of torch calls on the ``(L, *shape)`` tangents, for what samplers are made of;
- ``vmap(op)``, for an operation that is linear in its dual arguments;
- one derivative of each element, ``t · f'(x)``, for an operation that acts on elements;
- ``vmap(jvp(op))``, for everything else.

Which one, is looked up by the function once and remembered.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesdiff.checks import UnsupportedPipelineError

#: torch's forward-mode levels are counted for the process, not for the thread.
_LOCK = threading.RLock()
_HALF = (torch.float16, torch.bfloat16)
#: Operations are remembered up to this number; a closure may be a new function each time.
_REMEMBERED = 10_000


class Call:
    """One operation: what it was called with, what came out, and its dual arguments.

    Args:
        func: The function; the functional twin of an in-place one.
        args: Its arguments.
        kwargs: Those with names.
        chunk: Tangents at a time, for :func:`generic`.
        values: Its dual arguments by their id.
        tangents: Theirs, ``(L, *shape)``.
        out: What came out; before an in-place operation its target. Rules look at the shape only.
    """

    __slots__ = ("args", "chunk", "func", "kwargs", "out", "tangents", "values")

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], chunk: int = 16):
        self.func, self.args, self.kwargs, self.chunk = func, args, kwargs, chunk
        self.values: dict[int, Tensor] = {}
        self.tangents: dict[int, Tensor] = {}
        self.out: Any = None

    def of(self, x: Any) -> Tensor | None:
        """Tangents of an argument."""
        return self.tangents.get(id(x))

    def get(self, place: int, *names: str, default: Any = None) -> Any:
        """An argument by its place or one of its names."""
        if place < len(self.args):
            return self.args[place]
        for name in names:
            if name in self.kwargs:
                return self.kwargs[name]
        return default

    @property
    def first(self) -> Any:
        """The first argument."""
        return self.get(0, "self", "input")

    @property
    def length(self) -> int:
        """L."""
        return next(iter(self.tangents.values())).shape[0]

    def replaced(self, **new: Any) -> Call:
        """The same operation with something else in it."""
        call = Call(self.func, self.args, self.kwargs, self.chunk)
        for name in self.__slots__:
            setattr(call, name, new.get(name, getattr(self, name)))
        return call


Tangents = Tensor | list[Tensor] | None
Rule = Callable[[Call], Any]


@dataclass(frozen=True)
class Op:
    """What is known of a function.

    Args:
        name: Its name.
        kind: What :class:`~bayesdiff.tracing.dual.DualNumbers` does with it: ``pass``, ``escape``, ``derive``, ``flat`` (its
            derivative is 0), ``clear`` (the target loses its tangents), ``inplace``, ``setitem``, ``refuse``.
        rule: Tangents of the output; None for the general way.
        carry: Tangents that passed by a clamp go through the same rule.
        twin: The functional twin of an in-place operation.
        inplace: Place of an argument ``inplace``.
        why: Of ``refuse``.
    """

    name: str
    kind: str
    rule: Rule | None = None
    carry: bool = False
    twin: Callable[..., Any] | None = None
    inplace: int | None = None
    why: str = ""

    @property
    def clamp(self) -> bool:
        """Whether it is a clamp."""
        return self.rule is _clamp


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor's tangents."""
    return torch.promote_types(dtype, torch.float32)


def leaves(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from leaves(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from leaves(v)


def inexact(x: Tensor) -> bool:
    """Whether a tensor of this dtype can have tangents."""
    return x.dtype.is_floating_point or x.dtype.is_complex


class Quiet:
    """No graph, no inference mode, no autocast, no other modes: for tangents."""

    __slots__ = ("autocast", "functions", "grad", "inference")

    def __enter__(self) -> None:
        self.functions = torch._C.DisableTorchFunction()
        self.functions.__enter__()
        self.inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else None
        if self.inference is not None:
            self.inference.__enter__()
        self.grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        self.autocast = torch._C._DisableAutocast() if torch._C._is_any_autocast_enabled() else None
        if self.autocast is not None:
            self.autocast.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.autocast is not None:
            self.autocast.__exit__(*error)
        torch._C._set_grad_enabled(self.grad)
        if self.inference is not None:
            self.inference.__exit__(*error)
        self.functions.__exit__(*error)


def lift(t: Tensor, ndim: int) -> Tensor:
    """``(L, *shape)`` with ones in front of the shape, for a value of ``ndim`` dimensions."""
    missing = ndim + 1 - t.ndim
    return t[(slice(None),) + (None,) * missing] if missing > 0 else t


def _up(x: Any) -> Any:
    """A value in float32 or better."""
    return x.float() if isinstance(x, Tensor) and x.dtype in _HALF else x


def _dim(dim: int, ndim: int) -> int:
    """A dimension of the value, as one of the tangents."""
    return dim % max(ndim, 1) + 1


def zeros(x: Tensor, length: int) -> Tensor:
    """Tangents that are 0, without memory."""
    return torch.zeros((), dtype=real_dtype(x.dtype), device=x.device).expand(length, *x.shape)


# ---------------------------------------------------------------------------------------------------------------- rules


def _add(c: Call, sign: int = 1, swap: bool = False) -> Tangents:
    if len(c.args) > 2:
        return NotImplemented
    a, b, alpha = c.first, c.get(1, "other"), c.kwargs.get("alpha", 1)
    if isinstance(alpha, Tensor):
        return NotImplemented
    ta, tb, n = c.of(a), c.of(b), c.out.ndim
    fa, fb = (1, sign * alpha) if not swap else (-alpha, 1)
    ta = None if ta is None else lift(ta, n)
    tb = None if tb is None else lift(tb, n)
    if ta is None or tb is None:
        t, f = (tb, fb) if ta is None else (ta, fa)
        return t if f == 1 or t is None else t * f
    return torch.add(ta, tb, alpha=fb) if fa == 1 else torch.add(tb, ta, alpha=fa)


def _sub(c: Call) -> Tangents:
    return _add(c, -1)


def _rsub(c: Call) -> Tangents:
    return _add(c, swap=True)


def _mul(c: Call) -> Tangents:
    a, b = c.first, c.get(1, "other")
    ta, tb, n = c.of(a), c.of(b), c.out.ndim
    left = None if ta is None else lift(ta, n) * b
    right = None if tb is None else lift(tb, n) * a
    return left if right is None else right if left is None else left + right


def _divide(c: Call, a: Any, b: Any) -> Tangents:
    if c.kwargs.get("rounding_mode") is not None:
        return None
    ta, tb, n = c.of(a), c.of(b), c.out.ndim
    left = None if ta is None else lift(ta, n) / b
    if tb is None:
        return left
    a, b = _up(a), _up(b)
    right = lift(tb, n) * ((b * b).reciprocal() * a)
    return -right if left is None else left - right


def _div(c: Call) -> Tangents:
    return _divide(c, c.first, c.get(1, "other"))


def _rdiv(c: Call) -> Tangents:
    return _divide(c, c.args[1], c.args[0])


def _neg(c: Call) -> Tangents:
    t = c.of(c.first)
    return None if t is None else -t


def _total(parts: Sequence[Tensor | None]) -> Tangents:
    total: Tensor | None = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part
    return total


def _times(t: Tensor | None, factor: Any, ndim: int) -> Tensor | None:
    return None if t is None else lift(t, ndim) * factor


def _addcmul(c: Call) -> Tangents:
    if len(c.args) != 3:
        return NotImplemented
    x, a, b = c.args
    value, n, t = c.kwargs.get("value", 1), c.out.ndim, c.of(x)
    parts = [_times(c.of(a), _up(b) * value, n), _times(c.of(b), _up(a) * value, n)]
    return _total([None if t is None else lift(t, n), *parts])


def _addcdiv(c: Call) -> Tangents:
    if len(c.args) != 3:
        return NotImplemented
    x, a, b = c.args[0], _up(c.args[1]), _up(c.args[2])
    value, n, t = c.kwargs.get("value", 1), c.out.ndim, c.of(x)
    parts = [_times(c.of(c.args[1]), value / b, n), _times(c.of(c.args[2]), -value * a / (b * b), n)]
    return _total([None if t is None else lift(t, n), *parts])


def _lerp(c: Call) -> Tangents:
    start, end, weight = c.first, c.get(1, "end"), c.get(2, "weight")
    n, w = c.out.ndim, _up(weight)
    parts = [_times(c.of(start), 1 - w, n), _times(c.of(end), w, n)]
    t = c.of(weight)
    return _total([*parts, None if t is None else lift(t, n) * (_up(end) - _up(start))])


def _pow(c: Call) -> Tangents:
    x, p = c.first, c.get(1, "exponent")
    t = c.of(x)
    if t is None or isinstance(p, (Tensor, complex)) or not isinstance(x, Tensor):
        return _pointwise(c)
    if p == 0:
        return None
    return t if p == 1 else t * (_up(x) ** (p - 1) * p)


def _unary(derivative: Callable[[Tensor], Tensor]) -> Rule:
    def rule(c: Call) -> Tangents:
        x = c.first
        t = c.of(x)
        return None if t is None else t * derivative(_up(x))

    return rule


def _abs(c: Call) -> Tangents:
    x = c.first
    t = c.of(x)
    return NotImplemented if x.is_complex() else None if t is None else t * x.sgn()


def _masked(t: Tensor, mask: Tensor) -> Tensor:
    """``t`` where the mask is true, else 0. A product is the fastest, if nothing is infinite."""
    if t.device.type == "cpu":
        product = t * mask
        if bool(product.sum().isfinite()):
            return product
    return torch.where(mask, t, torch.zeros((), dtype=t.dtype, device=t.device))


def _choose(mask: Tensor, left: Tensor | None, right: Tensor | None, ndim: int) -> Tensor:
    if left is None and right is not None:
        return _masked(lift(right, ndim), ~mask)
    assert left is not None
    if right is None:
        return _masked(lift(left, ndim), mask)
    return torch.where(mask, lift(left, ndim), lift(right, ndim))


def _clamp(c: Call) -> Tangents:
    name, x, n = _base_name(c.func), c.first, c.out.ndim
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


def _all_tangents(c: Call, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [zeros(x, c.length) if (t := c.of(x)) is None else t for x in tensors]


def _cat(c: Call) -> Tangents:
    tensors, dim = c.get(0, "tensors"), c.get(1, "dim", "axis", default=0)
    parts = _all_tangents(c, tensors)
    n = c.out.ndim
    kept = [t for t in parts if t.ndim == n + 1]  # an empty vector may stand among others
    return torch.cat(kept, _dim(dim, n))


def _stack(c: Call) -> Tangents:
    tensors, dim = c.get(0, "tensors"), c.get(1, "dim", default=0)
    return torch.stack(_all_tangents(c, tensors), _dim(dim, c.out.ndim))


def _reduce(c: Call) -> Tangents:
    x = c.first
    t = c.of(x)
    if t is None or len(c.args) > 3:
        return NotImplemented
    dim, keep = c.get(1, "dim", "axis"), c.get(2, "keepdim", default=False)
    if isinstance(dim, torch.dtype):
        return NotImplemented
    n = x.ndim
    if n == 0:
        return t
    if dim is None or (isinstance(dim, (tuple, list)) and len(dim) == 0):
        dims = list(range(1, n + 1))
    else:
        dims = [_dim(d, n) for d in dim] if isinstance(dim, (tuple, list)) else [_dim(dim, n)]
    return (torch.mean if _base_name(c.func) == "mean" else torch.sum)(t, dims, keepdim=keep)


def _copy(c: Call) -> Tangents:
    """The elements of the first argument in their order."""
    t = c.of(c.get(0, "self", "input", "data", "obj"))
    if t is None or t.shape[1:] == c.out.shape:
        return t
    return t.reshape(t.shape[0], *c.out.shape)


def _second(c: Call) -> Tangents:
    """The elements of the second argument, spread over the output: copy_, fill_."""
    t = c.of(c.get(1, "src", "other", "value", "fill_value"))
    return None if t is None else fit(t, c.out.shape)


def _new_tensor(c: Call) -> Tangents:
    return _nested(c, 1)


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


def _repeat(c: Call) -> Tangents:
    sizes = c.args[1:] if len(c.args) > 1 else (c.kwargs.get("repeats"),)
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list, torch.Size)):
        sizes = tuple(sizes[0])
    t = c.of(c.args[0])
    return NotImplemented if t is None or None in sizes else lift(t, len(sizes)).repeat(1, *sizes)


def fit(t: Tensor, shape: Sequence[int]) -> Tensor:
    """Tangents of a value that is broadcast to ``shape``; ones in front that it lacks fall away."""
    while t.ndim - 1 > len(shape):
        t = t.squeeze(1)
    return lift(t, len(shape)).expand(t.shape[0], *shape)


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
    return NotImplemented if t is None or x.ndim == 0 else t.index_select(_dim(dim, x.ndim), index)


def _gather(c: Call) -> Tangents:
    x, dim, index = c.first, c.get(1, "dim"), c.get(2, "index")
    t = c.of(x)
    if t is None or x.ndim == 0:
        return NotImplemented
    return t.gather(_dim(dim, x.ndim), index.expand(t.shape[0], *index.shape))


def _flip(c: Call) -> Tangents:
    x = c.first
    dims = c.args[1:] if len(c.args) > 1 else (c.kwargs.get("dims"),)
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = tuple(dims[0])
    t = c.of(x)
    return NotImplemented if t is None or None in dims else t.flip([_dim(d, x.ndim) for d in dims])


def _roll(c: Call) -> Tangents:
    x, shifts, dims = c.first, c.get(1, "shifts"), c.get(2, "dims")
    t = c.of(x)
    if t is None or dims is None or dims == ():
        return NotImplemented
    return t.roll(shifts, [_dim(d, x.ndim) for d in ((dims,) if isinstance(dims, int) else dims)])


def _pad(c: Call) -> Tangents:
    x, pad = c.get(0, "input"), c.get(1, "pad")
    t = c.of(x)
    if t is None:
        return NotImplemented
    if c.get(2, "mode", default="constant") == "constant":
        return F.pad(t, pad)
    return _folded(c)


def _folded(c: Call) -> Tangents:
    """The operation with L and its batch as one batch; linear in its first argument."""
    x = c.first
    t = c.of(x)
    if t is None or len(c.tangents) > 1 or not c.out.ndim == x.ndim >= 3 or len(c.out) != len(x):
        return _product(c)
    dims = re.search(r"([123])d$", _base_name(c.func))
    if dims is not None and x.ndim != int(dims[1]) + 2:  # without a batch
        return _product(c)
    new = {id(x): t.flatten(0, 1)}
    out: Tensor = c.func(*_swap(c.args, new), **_swap(c.kwargs, new))
    return out.unflatten(0, (t.shape[0], -1))


def _conv(c: Call) -> Tangents:
    """A convolution or a linear layer: without its bias."""
    bias = c.get(2, "bias")
    if c.of(bias) is not None:
        return NotImplemented
    if bias is not None and len(c.args) > 2:
        c = c.replaced(args=(*c.args[:2], None, *c.args[3:]))
    elif bias is not None:
        c = c.replaced(kwargs={**c.kwargs, "bias": None})
    return _folded(c)


def _product(c: Call) -> Tangents:
    """Linear in each of its arguments, so where one of them is dual, and only once."""
    return _linear(c) if sum(id(x) in c.tangents for x in leaves((c.args, c.kwargs))) == 1 else NotImplemented


def _matmul(c: Call) -> Tangents:
    a, b = c.first, c.get(1, "other", "tensor2", "mat2")
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.ndim < 2 or b.ndim < 2:
        return _product(c)
    ta, tb, n = c.of(a), c.of(b), c.out.ndim
    left = None if ta is None else torch.matmul(lift(ta, n), b.to(ta.dtype) if not b.is_complex() else b)
    right = None if tb is None else torch.matmul(a.to(tb.dtype) if not a.is_complex() else a, lift(tb, n))
    return _total([left, right])


#: Place of ``dim`` in what returns values and their indices.
_CHOSEN = {"sort": 1, "topk": 2, "max": 1, "min": 1, "median": 1, "nanmedian": 1, "kthvalue": 2, "mode": 1}
_CHOSEN |= {"cummax": 1, "cummin": 1}


def _chosen(c: Call) -> Tangents:
    """The tangents of the elements that were chosen."""
    x = c.first
    t = c.of(x)
    if not isinstance(c.out, tuple):
        return NotImplemented
    if t is None or x.ndim == 0:
        return t
    dim = c.kwargs.get("dim", -1)
    at = _CHOSEN[_base_name(c.func)]
    if len(c.args) > at and "dim" not in c.kwargs:
        dim = c.args[at]
        if isinstance(dim, bool):
            return NotImplemented
    indices = c.out[1]
    dropped = indices.ndim < x.ndim
    index = indices.unsqueeze(dim) if dropped else indices
    out = t.gather(_dim(dim, x.ndim), index.expand(t.shape[0], *index.shape))
    return out.squeeze(_dim(dim, x.ndim)) if dropped else out


def _batch_norm(c: Call) -> Tangents:
    """Its own derivative would move the running averages a second time."""
    kept = c.get(1, "running_mean")
    if kept is not None and c.get(5, "training", "use_input_stats", default=False):
        raise unsupported(c, "it changes running averages")
    return NotImplemented


def _normal(c: Call) -> Tangents:
    mean, std = c.get(0, "mean"), c.get(1, "std", default=1.0)
    tm, ts, n = c.of(mean), c.of(std), c.out.ndim
    return _total([None if tm is None else lift(tm, n), _times(ts, (_up(c.out) - mean) / std, n)])


# ------------------------------------------------------------------------------------------------------- general rules


def _swap(value: Any, new: dict[int, Tensor]) -> Any:
    """Arguments with other tensors in the place of some, and in float32 instead of half precision."""
    if isinstance(value, Tensor):
        return new[id(value)] if id(value) in new else _up(value)
    if isinstance(value, (list, tuple)):
        parts = [_swap(v, new) for v in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, dict):
        return {k: _swap(v, new) for k, v in value.items()}
    return torch.float32 if isinstance(value, torch.dtype) and value in _HALF else value


def _linear(c: Call) -> Tangents:
    """``vmap(op)``; the other arguments are as they are."""
    ids, ts = list(c.tangents), list(c.tangents.values())

    def apply(*parts: Tensor) -> Any:
        new = dict(zip(ids, parts, strict=True))
        out = c.func(*_swap(c.args, new), **_swap(c.kwargs, new))
        return tuple(leaves(out))

    return list(_mapped(apply, ts, c.chunk))


def _jointly(c: Call) -> Tangents:
    """``vmap(op)`` where all tensors are linear together: those that are not dual count as 0."""
    values = {id(x): x for x in leaves((c.args, c.kwargs)) if x.is_floating_point() or x.is_complex()}
    tangents = {k: zeros(x, c.length) if (t := c.tangents.get(k)) is None else t for k, x in values.items()}
    return _linear(c.replaced(tangents=tangents))


def _mapped(f: Callable[..., Any], ts: list[Tensor], chunk: int) -> list[Tensor]:
    """``f`` of each tangent, at once if torch can, else one after the other."""
    warns = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
    warns(False)
    try:
        out = torch.vmap(f, chunk_size=chunk)(*ts)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        if "random" in str(error):
            raise
        out = tuple(torch.stack(parts) for parts in zip(*[f(*parts) for parts in zip(*ts, strict=True)], strict=True))
    finally:
        warns(True)
    return list(out)


def _pointwise(c: Call) -> Tangents:
    """Each element of the output depends on one element of each argument: t · ∂f."""
    if any(x.is_complex() for x in c.values.values()):
        return NotImplemented
    ids, total = list(c.values), []
    primals = [_up(c.values[k].detach()) for k in ids]

    def apply(*parts: Tensor) -> Any:
        new = dict(zip(ids, parts, strict=True))
        return c.func(*_swap(c.args, new), **_swap(c.kwargs, new))

    with _LOCK:
        for n, k in enumerate(ids):
            ones = [torch.ones_like(p) if m == n else torch.zeros_like(p) for m, p in enumerate(primals)]
            slope = torch.func.jvp(apply, tuple(primals), tuple(ones))[1]
            total.append(lift(c.tangents[k], c.out.ndim) * slope)
    return _total(total)


def generic(c: Call, picked: Sequence[int]) -> list[Tensor]:
    """``vmap(jvp(op))`` for some of its outputs, in chunks of the tangents.

    Raises:
        UnsupportedPipelineError: torch has no derivative of it.
    """
    ids = list(c.tangents)
    primals = tuple(_up(c.values[k].detach()) for k in ids)
    ts = [t.to(p.dtype) for t, p in zip(c.tangents.values(), primals, strict=True)]

    def apply(*parts: Tensor) -> tuple[Tensor, ...]:
        new = dict(zip(ids, parts, strict=True))
        tensors = list(leaves(c.func(*_swap(c.args, new), **_swap(c.kwargs, new))))
        return tuple(tensors[n] for n in picked)

    def push(*parts: Tensor) -> Any:
        return torch.func.jvp(apply, primals, parts)[1]

    if _opaque(c.func):
        raise unsupported(c, "PyTorch cannot see inside a custom operator")
    states = _random_states(primals)
    with _LOCK:
        try:
            out = _mapped(push, ts, c.chunk)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise unsupported(c, f"PyTorch has no forward derivative of it: {error}") from error
    if not all(torch.equal(a, b) for a, b in zip(states, _random_states(primals), strict=True)):
        raise unsupported(c, "it draws random numbers")
    return out


def _random_states(xs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(x.device) for x in xs if x.is_cuda)]


def _opaque(func: Any) -> bool:
    """Whether it is an operator that someone registered without saying what it is made of: its derivative would be 0."""
    packet = getattr(func, "_overloadpacket", func)
    name = getattr(packet, "_qualified_op_name", None)
    if name is None or name.split("::")[0] in ("aten", "prims"):
        return False
    names = [name if n == "default" else f"{name}.{n}" for n in packet.overloads()]
    return not any(torch._C._dispatch_has_kernel_for_dispatch_key(n, "CompositeImplicitAutograd") for n in names)


def unsupported(c: Call, why: str) -> UnsupportedPipelineError:
    """An error that names the operation."""
    shapes = ", ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in c.values.values())
    return UnsupportedPipelineError(
        f"cannot follow {_full_name(c.func)} of {shapes}: {why.strip().splitlines()[0]}; "
        "use propagation='ensemble', which needs no derivatives"
    )


# --------------------------------------------------------------------------------------------------------- the registry


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_AUGMENTED = {f"__i{k}__" for k in _words("add sub mul truediv div floordiv mod pow and or xor lshift rshift")}
_KINDS = {
    "pass": """
        size dim stride numel nelement element_size is_floating_point is_complex is_contiguous storage_offset data_ptr
        untyped_storage storage _typed_storage ndimension get_device is_signed is_conj is_neg is_inference is_pinned
        is_shared is_set_to is_same_size requires_grad_ retain_grad register_hook __repr__ __str__ __format__ __len__
        __hash__ __dir__ result_type can_cast is_tensor is_storage has_names __reduce_ex__ __setstate__ __getstate__
        set_ detach_ squeeze_ unsqueeze_ transpose_ t_ swapaxes_ swapdims_ as_strided_ rename_ share_memory_
        is_distributed is_coalesced __dlpack_device__ __cuda_array_interface__ _is_view""",
    "escape": """
        numpy item tolist __bool__ __float__ __int__ __index__ __complex__ __array__ __dlpack__ equal allclose is_nonzero
        __contains__""",
    "clear": "zero_ normal_ uniform_ random_ exponential_ cauchy_ log_normal_ geometric_ bernoulli_",
    "flat": """
        sign round floor ceil trunc fix floor_divide __floordiv__ __rfloordiv__ heaviside histc bernoulli poisson
        multinomial new __array_wrap__ zeros_like ones_like empty_like rand_like randn_like randint_like new_zeros
        new_ones new_empty new_empty_strided""",
    "setitem": "__setitem__",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in _words(names)}
_REFUSED = {
    "backward": "gradients of gradients are not followed",
    "apply_": "what it runs is not followed",
    "map_": "what it runs is not followed",
    "_make_dual": "torch.func's transformations are not followed",
    "resize_": "it changes the memory's size",
    "resize_as_": "it changes the memory's size",
}
_TABLE: list[tuple[Rule, str]] = [
    (_add, "add __add__ __radd__"),
    (_sub, "sub subtract __sub__"),
    (_rsub, "rsub __rsub__"),
    (_mul, "mul multiply __mul__ __rmul__"),
    (_div, "div divide true_divide __truediv__ __div__"),
    (_rdiv, "__rdiv__ __rtruediv__"),
    (_neg, "neg negative __neg__"),
    (_addcmul, "addcmul"),
    (_addcdiv, "addcdiv"),
    (_lerp, "lerp"),
    (_pow, "pow __pow__"),
    (_unary(lambda x: 0.5 / x.sqrt()), "sqrt"),
    (_unary(lambda x: 2 * x), "square"),
    (_unary(torch.exp), "exp"),
    (_unary(torch.reciprocal), "log"),
    (_abs, "abs absolute __abs__"),
    (_clamp, "clamp clip clamp_min clamp_max hardtanh"),
    (_where, "where"),
    (_masked_fill, "masked_fill"),
    (_cat, "cat concat concatenate"),
    (_stack, "stack"),
    (_reduce, "sum mean"),
    (_repeat, "repeat"),
    (_getitem, "__getitem__"),
    (_index_select, "index_select"),
    (_gather, "gather"),
    (_flip, "flip"),
    (_roll, "roll"),
    (_pad, "pad"),
    (_matmul, "matmul __matmul__ bmm mm"),
    (_normal, "normal"),
    (_batch_norm, "batch_norm instance_norm"),
    (_second, "full full_like fill"),
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
    (_chosen, " ".join(_CHOSEN)),
    (_folded, "interpolate upsample avg_pool1d avg_pool2d avg_pool3d"),
    (_conv, "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
    (
        _product,
        """
        mv dot inner outer ger tensordot kron einsum vdot vecdot multi_dot chain_matmul cumsum diff tril triu diag
        diag_embed diagflat trace rot90 fliplr flipud repeat_interleave tile take take_along_dim masked_select
        pixel_shuffle pixel_unshuffle channel_shuffle unfold fold adaptive_avg_pool1d adaptive_avg_pool2d
        adaptive_avg_pool3d fft ifft fft2 ifft2 fftn ifftn rfft irfft rfft2 irfft2 rfftn irfftn hfft ihfft fftshift
        ifftshift stft istft view_as_real_copy view_as_complex_copy affine_grid gradient trapezoid trapz grid_sample""",
    ),
    (
        _jointly,
        """
        hstack vstack dstack row_stack column_stack block_diag meshgrid broadcast_tensors complex index_add index_copy
        scatter_add select_scatter slice_scatter diagonal_scatter masked_scatter index_put cartesian_prod atleast_1d
        atleast_2d atleast_3d""",
    ),
    (
        _pointwise,
        """
        sin cos tan tanh sinh cosh asin acos atan asinh acosh atanh arcsin arccos arctan sigmoid silu mish gelu relu
        relu6 elu celu selu softplus softsign logsigmoid hardswish hardsigmoid leaky_relu tanhshrink erf erfc erfinv
        log1p log2 log10 expm1 exp2 rsqrt reciprocal logit nan_to_num sinc atan2 arctan2 hypot maximum minimum fmax
        fmin fmod remainder __mod__ __rpow__ float_power lgamma digamma xlogy logaddexp threshold frac deg2rad rad2deg
        positive copysign logaddexp2 i0 ldexp""",
    ),
]
_RULES = {name: rule for rule, names in _TABLE for name in _words(names)}
#: What takes tangents past a clamp along.
_CARRYING = (_add, _sub, _rsub, _mul, _div, _neg, _cat, _stack, _repeat, _getitem, _index_select, _gather, _flip, _roll)
_CARRY = {name for name, rule in _RULES.items() if rule in (*_CARRYING, _copy, _second, _nested)}
#: These may have several dual arguments and still carry.
_MANY = {"cat", "concat", "concatenate", "stack", "tensor", "as_tensor", "copy_", "fill_"}
_OWNERS = (torch, torch.Tensor, F, torch.linalg, torch.fft, torch.special, torch._C._nn)
#: Operators may have the name of a method: ``__pow__`` that of ``pow``.
_DUNDER = {getattr(torch.Tensor, n): n for n in dir(torch.Tensor) if n.startswith("__") and n.endswith("pow__")}
_OPS: dict[Any, Op] = {}


def _base_name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return str(name).split(".")[0]


def _full_name(func: Any) -> str:
    owner = getattr(func, "__objclass__", None)
    module = "torch.Tensor" if owner is not None else getattr(func, "__module__", None) or "torch"
    return f"{module}.{getattr(func, '__name__', repr(func))}"


def operation(func: Callable[..., Any]) -> Op:
    """What is known of a function that the mode was called with."""
    op = _OPS.get(func)
    if op is None:
        op = _resolve(func)
        if len(_OPS) < _REMEMBERED:
            _OPS[func] = op
    return op


def carries(op: Op, c: Call) -> bool:
    """Whether tangents that pass by a clamp go on through this operation."""
    return op.carry and (op.name in _MANY or sum(id(x) in c.values for x in leaves((c.args, c.kwargs))) == 1)


def _resolve(func: Any) -> Op:
    name = _DUNDER.get(func, _base_name(func))
    if name in ("__get__", "__set__", "__delete__"):
        return Op(name, "pass")
    if not _ours(func, name):
        return Op(name, "derive")
    if name in _KIND_OF:
        return Op(name, _KIND_OF[name])
    if name in _REFUSED:
        return Op(name, "refuse", why=_REFUSED[name])
    if name in ("copy_", "fill_"):
        return Op(name, "inplace", _second, carry=True)
    if (name.endswith("_") and not name.endswith("__")) or name in _AUGMENTED:
        twin = _twin(func, name)
        if twin is None:
            return Op(name, "refuse", why="it changes a tensor in a way that is not known")
        known = operation(twin)
        return Op(name, "clear" if known.kind == "flat" else "inplace", known.rule, known.carry, twin)
    return Op(name, "derive", _RULES.get(name), name in _CARRY, None, _inplace(func))


def _ours(func: Any, name: str) -> bool:
    """Whether the name means what torch means by it."""
    packet = getattr(func, "_overloadpacket", func)
    if str(getattr(packet, "_qualified_op_name", "")).startswith("aten::"):
        return True
    if name.startswith("__") and name.endswith("__"):
        return getattr(torch.Tensor, name, None) == func
    return any(getattr(owner, name, None) == func for owner in _OWNERS)


def _twin(func: Any, name: str) -> Callable[..., Any] | None:
    """``add`` for ``add_``, ``__add__`` for ``__iadd__``."""
    base = f"__{name[3:]}" if name in _AUGMENTED else name[:-1]
    owners = [owner for owner in _OWNERS if getattr(owner, name, None) == func]
    for owner in (*owners, torch.Tensor, torch, F):
        found: Callable[..., Any] | None = getattr(owner, base, None)
        if callable(found):
            return found
    return None


def _inplace(func: Any) -> int | None:
    """Place of an argument ``inplace``."""
    try:
        names = list(inspect.signature(func).parameters)
    except (ValueError, TypeError):
        return None
    return names.index("inplace") if "inplace" in names else None
