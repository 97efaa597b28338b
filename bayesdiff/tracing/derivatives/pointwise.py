"""Operations on elements, each on its own: sums, products, powers, functions of one number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesdiff.tracing.derivatives.beside import lift, total, up
from bayesdiff.tracing.derivatives.call import Call, Rule, Tangents
from bayesdiff.tracing.derivatives.general import LOCK, swapped


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
    a, b = up(a), up(b)
    right = lift(tb, n) * ((b * b).reciprocal() * a)
    return -right if left is None else left - right


def _div(c: Call) -> Tangents:
    return _divide(c, c.first, c.get(1, "other"))


def _rdiv(c: Call) -> Tangents:
    return _divide(c, c.args[1], c.args[0])


def _neg(c: Call) -> Tangents:
    t = c.of(c.first)
    return None if t is None else -t


def _times(t: Tensor | None, factor: Any, ndim: int) -> Tensor | None:
    return None if t is None else lift(t, ndim) * factor


def _addcmul(c: Call) -> Tangents:
    if len(c.args) != 3:
        return NotImplemented
    x, a, b = c.args
    value, n, t = c.kwargs.get("value", 1), c.out.ndim, c.of(x)
    parts = [_times(c.of(a), up(b) * value, n), _times(c.of(b), up(a) * value, n)]
    return total([None if t is None else lift(t, n), *parts])


def _addcdiv(c: Call) -> Tangents:
    if len(c.args) != 3:
        return NotImplemented
    x, a, b = c.args[0], up(c.args[1]), up(c.args[2])
    value, n, t = c.kwargs.get("value", 1), c.out.ndim, c.of(x)
    parts = [_times(c.of(c.args[1]), value / b, n), _times(c.of(c.args[2]), -value * a / (b * b), n)]
    return total([None if t is None else lift(t, n), *parts])


def _lerp(c: Call) -> Tangents:
    start, end, weight = c.first, c.get(1, "end"), c.get(2, "weight")
    n, w = c.out.ndim, up(weight)
    parts = [_times(c.of(start), 1 - w, n), _times(c.of(end), w, n)]
    t = c.of(weight)
    return total([*parts, None if t is None else lift(t, n) * (up(end) - up(start))])


def _pow(c: Call) -> Tangents:
    x, p = c.first, c.get(1, "exponent")
    t = c.of(x)
    if t is None or isinstance(p, (Tensor, complex)) or not isinstance(x, Tensor):
        return _pointwise(c)
    if p == 0:
        return None
    return t if p == 1 else t * (up(x) ** (p - 1) * p)


def _unary(derivative: Callable[[Tensor], Tensor]) -> Rule:
    def rule(c: Call) -> Tangents:
        x = c.first
        t = c.of(x)
        return None if t is None else t * derivative(up(x))

    return rule


def _abs(c: Call) -> Tangents:
    x = c.first
    t = c.of(x)
    return NotImplemented if x.is_complex() else None if t is None else t * x.sgn()


def _normal(c: Call) -> Tangents:
    mean, std = c.get(0, "mean"), c.get(1, "std", default=1.0)
    tm, ts, n = c.of(mean), c.of(std), c.out.ndim
    return total([None if tm is None else lift(tm, n), _times(ts, (up(c.out) - mean) / std, n)])


def _pointwise(c: Call) -> Tangents:
    """Each element of the output depends on one element of each argument: t · ∂f."""
    if any(x.is_complex() for x in c.values.values()):
        return NotImplemented
    ids, terms = list(c.values), []
    primals = [up(c.values[k].detach()) for k in ids]

    def apply(*parts: Tensor) -> Any:
        new = dict(zip(ids, parts, strict=True))
        return c.func(*swapped(c.args, new), **swapped(c.kwargs, new))

    with LOCK:
        for n, k in enumerate(ids):
            ones = [torch.ones_like(p) if m == n else torch.zeros_like(p) for m, p in enumerate(primals)]
            slope = torch.func.jvp(apply, tuple(primals), tuple(ones))[1]
            terms.append(lift(c.tangents[k], c.out.ndim) * slope)
    return total(terms)


RULES: list[tuple[Rule, str]] = [
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
    (_normal, "normal"),
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
#: These take tangents past a clamp along.
CARRYING: tuple[Rule, ...] = (_add, _sub, _rsub, _mul, _div, _neg)
