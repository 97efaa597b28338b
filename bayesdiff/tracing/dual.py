r"""Forward-mode dual numbers through any PyTorch code, op by op.

Every tensor may have L tangents beside it, ``(L, *shape)``. They are not kept on the tensor but for its *storage*, as a shadow
``(L, n)`` in the order of the storage's n elements. The tangents of any tensor are its shadow, seen with its own strides. So
views, aliases, ``x.copy_(y)``, ``buffer[i] = y``, ``x.numpy()``, ``detach`` and ``.data`` need no rule. Values are computed by
the operation itself, to the last bit; no object is changed, and none has another type.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from bayesdiff.checks import ArgumentError, ShapeError, UnequalTangentsError, UnsupportedPipelineError, check_int
from bayesdiff.tracing.derivatives import (
    Call,
    Op,
    Quiet,
    carries,
    fit,
    generic,
    inexact,
    leaves,
    operation,
    place,
    real_dtype,
    unsupported,
)

#: Escapes that are no arrays are kept up to this number.
KEPT_ESCAPES = 256
_ARRAYS = ("numpy", "__array__", "__dlpack__")
_HIDDEN = tuple(str(Path(file or "").parent) + os.sep for file in (torch.__file__, np.__file__, __file__))
Pair = tuple[Tensor | None, Tensor | None]  # tangents, and those past a clamp


@dataclass(frozen=True)
class Escape:
    """What left PyTorch with tangents.

    Args:
        how: The method: ``numpy``, ``__array__``, ``item``, ``tolist``, ``__bool__``, …
        value: The tensor; a copy of it, unless an array was handed out.
        array: What was handed out.
        tangents: ``(L, *shape)`` at that moment; ``(0, *shape)`` where several numbers left that are no array.
        unclamped: As :meth:`DualNumbers.unclamped`.
        where: ``file.py:123 in function``, the innermost frame outside torch, numpy and this folder.
    """

    how: str
    value: Tensor
    array: Any
    tangents: Tensor
    unclamped: Tensor
    where: str


class _Shadow:
    """Tangents of one storage.

    Args:
        data: ``(L, n)``, each row contiguous.
        free: The same as if the last clamp had not been there.
        dtype: What the n elements are.
        shared: Whether others may hold the same memory: copy before a write.
    """

    __slots__ = ("data", "dtype", "free", "seen", "shared")

    def __init__(self, data: Tensor, free: Tensor | None, dtype: torch.dtype, shared: bool = False):
        self.data, self.free, self.dtype, self.shared = data, free, dtype, shared
        self.seen: Tensor | None = None  # the storage's bytes when it was handed out as an array

    def memory(self) -> list[int]:
        return [t.untyped_storage()._cdata for t in (self.data, self.free) if t is not None]


class _Entry:
    """A storage and its shadow; it begins at ``offset``, in bytes of values."""

    __slots__ = ("offset", "ref", "shadow")

    def __init__(self, ref: StorageWeakRef, shadow: _Shadow, offset: int):
        self.ref, self.shadow, self.offset = ref, shadow, offset

    def data(self, x: Tensor) -> Tensor:
        """Tangents of a tensor in this storage."""
        return self._seen(self.shadow.data, x)

    def free(self, x: Tensor) -> Tensor:
        """Those past a clamp, or the tangents."""
        return self._seen(self.shadow.data if self.shadow.free is None else self.shadow.free, x)

    def _seen(self, data: Tensor, x: Tensor) -> Tensor:
        dtype = self.shadow.dtype
        if x.dtype != dtype:
            if dtype.is_complex and x.dtype == dtype.to_real():
                data = torch.view_as_real(data).flatten(1)
            elif x.dtype.is_complex and dtype == x.dtype.to_real():
                data = torch.view_as_complex(data.unflatten(1, (-1, 2)))
            else:
                raise UnsupportedPipelineError(
                    f"cannot follow memory with tangents that is read as {x.dtype} and was written as {dtype}; "
                    "use propagation='ensemble', which needs no derivatives"
                )
        offset = data.storage_offset() + x.storage_offset() + self.offset // x.element_size()
        out = data.as_strided((data.shape[0], *x.shape), (data.stride(0), *x.stride()), offset)
        if x.is_conj():
            out = out.conj()
        return torch._neg_view(out) if x.is_neg() else out


Found = dict[int, tuple[Tensor, _Entry]]


class DualNumbers(TorchFunctionMode):
    """Within ``with DualNumbers() as dual:`` PyTorch's functions carry tangents along.

    Only in the thread that entered it. What numpy, another thread or a compiled function does is not seen. Operations on plain
    tensors cost a look-up for each of them.

    Args:
        chunk: Derivatives that have no rule of their own are computed for so many tangents at a time, which bounds memory.
    """

    escapes: list[Escape]

    def __init__(self, chunk: int = 16):
        super().__init__()
        self.chunk = check_int("chunk", chunk, least=1)
        self.escapes = []
        self._entries: dict[int, _Entry] = {}
        self._handed: list[tuple[int, int, _Entry]] = []  # sorted: first byte, number of bytes
        self._numbers = 0  # escapes that are no arrays
        self._due = 0
        self._failure: UnsupportedPipelineError | None = None
        # glibc returns each freed shadow to the kernel, and clearing new pages costs more than the arithmetic. Once a block of
        # this size was freed (it is never touched), glibc keeps up to twice as much.
        torch.empty(31 << 20, dtype=torch.uint8)

    # ------------------------------------------------------------------------------------------------ for the caller

    def tangents(self, x: Tensor) -> Tensor | None:
        """``(L, *x.shape)``, a view of the shadow, or None where ``x`` has none."""
        with torch._C.DisableTorchFunction():
            entry = self._entry(x)
            return None if entry is None or not inexact(x) else entry.data(x)

    def unclamped(self, x: Tensor) -> Tensor | None:
        """The tangents as if the last clamp on the way had not been there, where that is known; else the tangents.

        They get past copies, casts, shapes, and sums and products with plain tensors.
        """
        with torch._C.DisableTorchFunction():
            entry = self._entry(x)
            return None if entry is None or not inexact(x) else entry.free(x)

    def attach(self, x: Tensor, tangents: Tensor) -> None:
        """Give ``x`` these tangents, ``(L, *x.shape)``, whatever it had.

        Raises:
            ArgumentError: ``x`` is not real floating point, or its elements share memory.
            ShapeError: The tangents have another shape, or another L than the rest of the memory that ``x`` is a part of.
        """
        with Quiet():
            if not x.is_floating_point():
                raise ArgumentError(f"expected a tensor of real floating point, got {x.dtype}")
            if any(step == 0 and n > 1 for step, n in zip(x.stride(), x.shape, strict=True)):
                raise ArgumentError("expected a tensor whose elements have memory of their own, got an expanded one")
            if tangents.ndim != x.ndim + 1 or tangents.shape[1:] != x.shape:
                raise ShapeError(f"expected tangents (L, *{tuple(x.shape)}), got {tuple(tangents.shape)}")
            if _whole(x):
                self.drop(x)
            self._write(x, tangents.detach(), None)
            entry = self._entry(x)
            assert entry is not None
            entry.shadow.shared = True

    def drop(self, x: Tensor) -> None:
        """The memory of ``x`` has no tangents any more."""
        with torch._C.DisableTorchFunction():
            entry = self._entries.pop(x.untyped_storage()._cdata, None)
            if entry is not None:
                self._handed = [h for h in self._handed if h[2] is not entry]

    def purge(self) -> None:
        """Forget storages that are gone."""
        gone = [key for key, entry in self._entries.items() if entry.ref.expired()]
        for key in gone:
            del self._entries[key]
        if gone and self._handed:
            self._handed = [h for h in self._handed if not h[2].ref.expired()]
        self._due = len(self._entries) // 64  # registrations until the next time: a look at each costs

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, operations run plainly and are not seen: for a neural network."""
        above = self._lift_off()
        try:
            yield
        finally:
            if above is not None:
                self._put_back(above)

    @contextlib.contextmanager
    def resumed(self) -> Iterator[None]:
        """Inside ``paused``, operations are seen again."""
        if any(mode is self for mode in _get_current_function_mode_stack()):
            yield
            return
        _push_mode(self)
        try:
            yield
        finally:
            self._lift_off()

    def _lift_off(self) -> list[TorchFunctionMode] | None:
        """Take this mode off the thread's stack: the modes that were above it, or None if it was not there."""
        stack = _get_current_function_mode_stack()
        if all(mode is not self for mode in stack):
            return None
        above: list[TorchFunctionMode] = []
        while (mode := _pop_mode()) is not self:
            above.insert(0, mode)
        for mode in above:
            _push_mode(mode)
        return above

    def _put_back(self, above: list[TorchFunctionMode]) -> None:
        """Under those of the modes that are still the topmost."""
        popped: list[TorchFunctionMode] = []
        while above and (stack := _get_current_function_mode_stack()) and stack[-1] is above[-1]:
            popped.insert(0, _pop_mode())
            above = above[:-1]
        for mode in (self, *popped):
            _push_mode(mode)

    def __enter__(self) -> DualNumbers:
        self._failure = None
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, TypeError) and error is not self._failure is not None:
            raise self._failure from error  # operators of torch turn a TypeError into "unsupported operand type(s)"

    # --------------------------------------------------------------------------------------------------- operations

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return self._operate(func, args, kwargs or {})
        except UnsupportedPipelineError as error:
            self._failure = error
            raise

    def _operate(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op = operation(func)
        if op.kind == "pass" or not self._entries:
            return func(*args, **kwargs)
        found: Found = {}
        keys: set[int] = set()
        self._scan(args, found, keys)
        if kwargs:
            self._scan(kwargs.values(), found, keys)
        if not found:
            return func(*args, **kwargs)
        call = Call(func, args, kwargs, self.chunk)
        call.values = {k: x for k, (x, _) in found.items()}
        if op.kind == "derive":
            return self._run(op, call, found, keys)
        return getattr(self, f"_on_{op.kind}")(op, call, found)

    def _scan(self, args: Any, found: Found, keys: set[int]) -> None:
        """Dual arguments by their id, and the storages of all."""
        for a in args:
            if isinstance(a, Tensor):
                try:
                    storage = a.untyped_storage()
                except (RuntimeError, NotImplementedError):
                    self._check_wrapped(a)
                    continue
                keys.add(storage._cdata)
                entry = self._entries.get(storage._cdata)
                if entry is None and self._handed:
                    entry = self._returned(a, storage)
                if entry is not None and inexact(a):
                    found[id(a)] = (a, entry)
            elif isinstance(a, (list, tuple)):
                self._scan(a, found, keys)
            elif isinstance(a, dict):
                self._scan(a.values(), found, keys)

    def _run(self, op: Op, call: Call, found: Found, keys: set[int]) -> Any:
        """Any function that is not special; views need nothing."""
        kwargs = call.kwargs
        if kwargs.get("out") is not None:
            return self._into(op, call, found)
        if op.inplace is not None and call.get(op.inplace, "inplace"):
            return self._on_inplace(op, call, found)
        before = None if op.rule else _versions(call.args, kwargs)
        call.out = out = call.func(*call.args, **kwargs)
        if before is not None and before != _versions(call.args, kwargs):
            raise unsupported(call, "it changes an argument in a way that is not known")
        tensors = list(leaves(out))
        picked = [n for n, x in enumerate(tensors) if inexact(x) and _key(x) not in keys]
        if picked:
            with Quiet():
                for n, pair in zip(picked, self._derive(op, call, found, picked), strict=True):
                    if pair[0] is not None:
                        self._write(tensors[n], *pair, found)
        return out

    def _derive(self, op: Op, call: Call, found: Found, picked: Sequence[int]) -> list[Pair]:
        """Tangents of the picked outputs, and those past a clamp."""
        if self._due <= 0:
            self.purge()  # before new memory is asked for
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

    def _on_inplace(self, op: Op, call: Call, found: Found) -> Any:
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
                    pair = self._derive(op, twin, sources, [0])[0]
        others = [x for x in leaves((args, kwargs)) if _key(x) != _key(target)]
        before = _versions(others)
        out = func(*args, **kwargs)
        if before != _versions(others):
            raise unsupported(call, "it changes an argument in a way that is not known")
        if inexact(target):
            with Quiet():
                self._write(target, *pair, found)
        return out

    def _into(self, op: Op, call: Call, found: Found) -> Any:
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
                    for n, pair in zip(picked, self._derive(op, rest, sources, picked), strict=True):
                        pairs[n] = pair
        out = call.func(*call.args, **call.kwargs)
        with Quiet():
            for x, pair in zip(targets, pairs, strict=True):
                if inexact(x):
                    self._write(x, *pair, found)
        return out

    def _on_flat(self, op: Op, call: Call, found: Found) -> Any:
        if call.kwargs.get("out") is not None:
            return self._into(op, call, found)
        return call.func(*call.args, **call.kwargs)

    def _on_clear(self, op: Op, call: Call, found: Found) -> Any:
        out = call.func(*call.args, **call.kwargs)
        if inexact(call.first):
            with Quiet():
                self._write(call.first, None, None)
        return out

    def _on_refuse(self, op: Op, call: Call, found: Found) -> Any:
        raise unsupported(call, op.why)

    def _on_setitem(self, op: Op, call: Call, found: Found) -> Any:
        """``x[index] = value``."""
        x, index, value = call.args
        out = call.func(x, index, value)
        if not inexact(x):
            return out
        with Quiet():
            v, source = found.get(id(value), (x, None))
            region = x[index]
            if _key(region) == _key(x):
                t = None if source is None else fit(source.data(v), region.shape)
                past = None if source is None or source.shadow.free is None else fit(source.free(v), region.shape)
                self._write(region, t, past, found)
                return out
            if source is None and id(x) not in found:
                return out
            known = place(index)
            if known is None:
                raise unsupported(call, "an index of nested lists is not known")
            index, last = known
            length = (source or found[id(x)][1]).shadow.data.shape[0]
            entry = self._ensure(x, length, source is not None and source.shadow.free is not None)
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

    # ------------------------------------------------------------------------------------------------------- shadows

    def _entry(self, x: Tensor) -> _Entry | None:
        try:
            storage = x.untyped_storage()
        except (RuntimeError, NotImplementedError):
            return None
        entry = self._entries.get(storage._cdata)
        return self._returned(x, storage) if entry is None and self._handed else entry

    def _check_wrapped(self, x: Tensor) -> None:
        """A tensor inside ``torch.func``'s transformations: refused if there is a dual within."""
        functorch = torch._C._functorch
        while functorch.is_functorch_wrapped_tensor(x):
            x = functorch.get_unwrapped(x)
        if self._entry(x) is not None:
            raise UnsupportedPipelineError(
                f"cannot follow torch.func's transformations of a tensor {list(x.shape)} with tangents; "
                "use propagation='ensemble', which needs no derivatives"
            )

    def _write(self, x: Tensor, t: Tensor | None, free: Tensor | None, found: Found | None = None) -> None:
        """New tangents of ``x``; None for none."""
        storage = x.untyped_storage()
        entry = self._entries.get(storage._cdata)
        if t is None:
            if entry is None:
                return
            if _whole(x) and all(h[2].shadow is not entry.shadow for h in self._handed):
                del self._entries[storage._cdata]
                return
            self._ensure(x, entry.shadow.data.shape[0], False)
            entry.data(x).zero_()
            entry.free(x).zero_()
            return
        t, free = _converted(t, x), None if free is None else _converted(free, x)
        if _whole(x) and (entry is None or entry.shadow.data.shape[1] == x.numel()):
            shadow = _Shadow(_flat(t, x), None if free is None else _flat(free, x), x.dtype)
            memory = shadow.memory()
            for _, source in (found or {}).values():
                if source is not entry and any(m in memory for m in source.shadow.memory()):
                    shadow.shared = source.shadow.shared = True
            if entry is None:
                self._register(storage, shadow)
            else:
                s = entry.shadow
                kept = s.shared and any(m in memory for m in s.memory())
                s.data, s.free, s.dtype, s.shared, s.seen = (
                    shadow.data,
                    shadow.free,
                    x.dtype,
                    kept or shadow.shared,
                    None,
                )
            return
        entry = self._ensure(x, t.shape[0], free is not None)
        entry.data(x).copy_(t)
        if entry.shadow.free is not None:
            entry.free(x).copy_(t if free is None else free)

    def _ensure(self, x: Tensor, length: int, free: bool) -> _Entry:
        """A shadow for the storage of ``x`` that may be written to."""
        entry = self._entry(x)
        if entry is None:
            storage = x.untyped_storage()
            data = torch.zeros(length, storage.nbytes() // x.element_size(), dtype=real_dtype(x.dtype), device=x.device)
            entry = self._register(storage, _Shadow(data, None, x.dtype))
        s = entry.shadow
        if s.data.shape[0] != length:
            raise UnequalTangentsError(
                f"expected {s.data.shape[0]} tangents, as the memory that is written to has, got {length}"
            )
        if s.shared:
            s.data, s.free, s.shared = s.data.clone(), None if s.free is None else s.free.clone(), False
        if free and s.free is None:
            s.free = s.data.clone()
        s.seen = None
        return entry

    def _register(self, storage: torch.UntypedStorage, shadow: _Shadow, offset: int = 0) -> _Entry:
        self._due -= 1
        if self._due <= 0:
            self.purge()
        entry = self._entries[storage._cdata] = _Entry(StorageWeakRef(storage), shadow, offset)
        return entry

    # ------------------------------------------------------------------------------------------------------- escapes

    def _on_escape(self, op: Op, call: Call, found: Found) -> Any:
        out = call.func(*call.args, **call.kwargs)
        where = _where()
        x, entry = next(iter(found.values()))
        with Quiet():
            if op.name in _ARRAYS:
                entry.shadow.shared = True
                self.escapes.append(Escape(op.name, x.detach(), out, entry.data(x), entry.free(x), where))
                if x.device.type == "cpu":
                    storage = x.untyped_storage()
                    entry.shadow.seen = _bytes(storage)
                    if all(h[2] is not entry for h in self._handed):
                        bisect.insort(self._handed, (storage.data_ptr(), storage.nbytes(), entry), key=lambda h: h[0])
                return out
            if x.numel() == 1:
                t, free = entry.data(x).clone(), entry.free(x).clone()
            else:
                t = free = torch.empty(0, *x.shape, dtype=real_dtype(x.dtype), device=x.device)
            self.escapes.append(Escape(op.name, x.detach().clone(), out, t, free, where))
        self._numbers += 1
        if self._numbers > KEPT_ESCAPES:
            del self.escapes[next(n for n, e in enumerate(self.escapes) if e.how not in _ARRAYS)]
            self._numbers -= 1
        return out

    def _returned(self, x: Tensor, storage: torch.UntypedStorage) -> _Entry | None:
        """The entry of a storage that is in the memory of another: come back from numpy."""
        pointer, size = storage.data_ptr(), storage.nbytes()
        n = bisect.bisect_right(self._handed, pointer, key=lambda h: h[0]) - 1
        if n < 0 or not size or x.device.type != "cpu":
            return None
        first, length, entry = self._handed[n]
        offset = pointer - first
        if offset + size > length or entry.ref.expired():
            return None
        with Quiet():
            seen = entry.shadow.seen
            if seen is not None and not torch.equal(seen[offset : offset + size], _bytes(storage)):
                raise UnsupportedPipelineError(
                    f"a numpy array that shares memory with a tensor {list(x.shape)} with tangents was changed in place; "
                    "use propagation='ensemble', which needs no derivatives"
                )
        return self._register(storage, entry.shadow, entry.offset + offset)


def _key(x: Tensor) -> int:
    """The storage; 0 if there is none."""
    try:
        return int(x.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return 0


def _whole(x: Tensor) -> bool:
    """Whether ``x`` is all of its storage."""
    return x.numel() * x.element_size() == x.untyped_storage().nbytes()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage).clone()


def _versions(*values: Any) -> list[int]:
    return [x._version for x in leaves(values) if not x.is_inference()]


def _converted(t: Tensor, x: Tensor) -> Tensor:
    """To the dtype, device and shape of the tangents of ``x``."""
    dtype = real_dtype(x.dtype)
    if t.is_complex() and not dtype.is_complex:
        t = t.real
    if t.dtype != dtype or t.device != x.device:
        t = t.to(device=x.device, dtype=dtype)
    return fit(t, x.shape) if t.shape[1:] != x.shape else t


def _flat(t: Tensor, x: Tensor) -> Tensor:
    """``(L, n)`` in the order of the storage, all of which is ``x``; without a copy where that is possible."""
    length, n, stride = t.shape[0], x.numel(), t.stride()
    if stride[1:] == x.stride() or (x.is_contiguous() and t.is_contiguous()):
        own = t.untyped_storage().nbytes() <= 2 * t.numel() * t.element_size()
        if own and (length == 1 or stride[0] >= n) and not (t.is_conj() or t.is_neg() or t.is_inference()):
            return t.as_strided((length, n), (max(stride[0], n), 1))
    flat = torch.empty(length, n, dtype=t.dtype, device=t.device)
    flat.as_strided(t.shape, (n, *x.stride())).copy_(t)
    return flat


def _where() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HIDDEN):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
