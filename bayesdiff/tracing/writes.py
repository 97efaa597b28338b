"""Operations that write into tensors: in place, ``out=``, ``x[index] = value``, and those that leave nothing of tangents."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bayesdiff.tracing.derivatives.beside import fit, inexact
from bayesdiff.tracing.derivatives.call import Call, leaves, unsupported
from bayesdiff.tracing.derivatives.indexing import place
from bayesdiff.tracing.derivatives.registry import Op
from bayesdiff.tracing.modes import Quiet
from bayesdiff.tracing.outputs import Pair, derive, versions
from bayesdiff.tracing.shadows import Found, Shadows, key


def in_place(shadows: Shadows, op: Op, call: Call, found: Found) -> Any:
    """``target.op_(…)`` or ``op(target, …, inplace=True)``: tangents from the values before it."""
    target, func, args, kwargs = call.first, call.func, call.args, call.kwargs
    if not isinstance(target, Tensor):
        raise unsupported(call, "it changes more than one tensor in place")
    pair: Pair = (None, None)
    if inexact(target):
        twin = call.replaced(func=op.twin or func, out=target)
        if op.inplace is not None and len(args) > op.inplace:
            twin.args = (*args[: op.inplace], False, *args[op.inplace + 1 :])
        elif op.inplace is not None:
            twin.kwargs = {**kwargs, "inplace": False}
        sources = found
        if op.kind == "inplace" and op.twin is None:  # copy_ and fill_: the target's own tangents do not matter
            sources = {k: v for k, v in found.items() if k == id(call.get(1, "other", "src", "value"))}
        if sources:
            with Quiet():
                pair = derive(shadows, op, twin, sources, [0])[0]
    others = [x for x in leaves((args, kwargs)) if key(x) != key(target)]
    before = versions(others)
    out = func(*args, **kwargs)
    if before != versions(others):
        raise unsupported(call, "it changes an argument in a way that is not known")
    if inexact(target):
        with Quiet():
            shadows.write(target, *pair, found)
    return out


def into(shadows: Shadows, op: Op, call: Call, found: Found) -> Any:
    """``op(…, out=target)``."""
    targets = list(leaves(call.kwargs["out"]))
    rest = call.replaced(kwargs={k: v for k, v in call.kwargs.items() if k != "out"})
    inside = {id(x) for x in leaves((rest.args, rest.kwargs))}
    sources = {k: v for k, v in found.items() if k in inside}
    pairs: list[Pair] = [(None, None)] * len(targets)
    if op.name == "normal":
        raise unsupported(call, "random numbers with out= would be drawn twice")
    if sources and op.kind == "derive":
        rest.values = {k: x for k, (x, _) in sources.items()}
        rest.out = rest.func(*rest.args, **rest.kwargs)
        picked = [n for n, x in enumerate(leaves(rest.out)) if inexact(x)]
        if picked:
            with Quiet():
                for n, pair in zip(picked, derive(shadows, op, rest, sources, picked), strict=True):
                    pairs[n] = pair
    out = call.func(*call.args, **call.kwargs)
    with Quiet():
        for x, pair in zip(targets, pairs, strict=True):
            if inexact(x):
                shadows.write(x, *pair, found)
    return out


def set_item(shadows: Shadows, op: Op, call: Call, found: Found) -> Any:
    """``x[index] = value``."""
    x, index, value = call.args
    out = call.func(x, index, value)
    if not inexact(x):
        return out
    with Quiet():
        v, source = found.get(id(value), (x, None))
        region = x[index]
        if key(region) == key(x):
            t = None if source is None else fit(source.data(v), region.shape)
            past = None if source is None or source.shadow.free is None else fit(source.free(v), region.shape)
            shadows.write(region, t, past, found)
            return out
        if source is None and id(x) not in found:
            return out
        known = place(index)
        if known is None:
            raise unsupported(call, "an index of nested lists is not known")
        index, last = known
        length = (source or found[id(x)][1]).shadow.data.shape[0]
        entry = shadows.ensure(x, length, source is not None and source.shadow.free is not None)
        parts = [(entry.data(x), None if source is None else source.data(v))]
        if entry.shadow.free is not None:
            parts.append((entry.free(x), None if source is None else source.free(v)))
        for there, t in parts:
            there = there.movedim(0, -1) if last else there
            if t is None:
                there[index] = 0
            else:
                t = fit(t, region.shape).to(there.dtype)
                there[index] = t.movedim(0, -1) if last else t
    return out


def flat(shadows: Shadows, op: Op, call: Call, found: Found) -> Any:
    """An operation whose derivative is 0: only what ``out=`` had is lost."""
    if call.kwargs.get("out") is not None:
        return into(shadows, op, call, found)
    return call.func(*call.args, **call.kwargs)


def clear(shadows: Shadows, op: Op, call: Call, found: Found) -> Any:
    """``target.zero_()`` and random numbers in place: the target has no tangents any more."""
    out = call.func(*call.args, **call.kwargs)
    if inexact(call.first):
        with Quiet():
            shadows.write(call.first, None, None)
    return out
