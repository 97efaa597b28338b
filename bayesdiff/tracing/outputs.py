"""Tangents of what an operation returns: by its rule, or the general way."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bayesdiff.checks import UnequalTangentsError
from bayesdiff.tracing.derivatives.call import Call, leaves
from bayesdiff.tracing.derivatives.general import generic
from bayesdiff.tracing.derivatives.registry import Op, carries
from bayesdiff.tracing.shadows import Found, Shadows

Pair = tuple[Tensor | None, Tensor | None]  # tangents, and those past a clamp


def derive(shadows: Shadows, op: Op, call: Call, found: Found, picked: Sequence[int]) -> list[Pair]:
    """Tangents of the picked outputs, and those past a clamp."""
    if shadows.due <= 0:
        shadows.purge()  # before new memory is asked for
    call.tangents = {k: e.data(x) for k, (x, e) in found.items()}
    lengths = {t.shape[0] for t in call.tangents.values()}
    if len(lengths) > 1:
        name = getattr(call.func, "__name__", repr(call.func))
        raise UnequalTangentsError(
            f"expected the same number of tangents for all arguments of {name}, got {sorted(lengths)}"
        )
    result: Any = NotImplemented
    if op.rule is not None:
        with contextlib.suppress(RuntimeError, NotImplementedError, IndexError):  # the general way will say why
            result = op.rule(call)
    if result is not NotImplemented and not isinstance(result, list):
        result = [result]
    elif result is not NotImplemented and len(result) == len(list(leaves(call.out))):
        result = [result[n] for n in picked]
    if op.rule is None or result is NotImplemented or len(result) != len(picked):
        return [(t, None) for t in generic(call, picked)]
    if op.clamp and id(call.first) in found:
        x, entry = found[id(call.first)]
        return [(result[0], entry.free(x))]
    if carries(op, call) and any(e.shadow.free is not None for _, e in found.values()):
        return [(result[0], op.rule(call.replaced(tangents={k: e.free(x) for k, (x, e) in found.items()})))]
    return [(t, None) for t in result]


def versions(*values: Any) -> list[int]:
    """How often each tensor was written to."""
    return [x._version for x in leaves(values) if not x.is_inference()]
