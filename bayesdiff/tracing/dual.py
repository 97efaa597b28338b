r"""Forward-mode dual numbers through any PyTorch code, op by op.

Every tensor may have L tangents beside it, ``(L, *shape)``. They are not kept on the tensor but for its *storage*, as a shadow
``(L, n)`` in the order of the storage's n elements. The tangents of any tensor are its shadow, seen with its own strides. So
views, aliases, ``x.copy_(y)``, ``buffer[i] = y``, ``x.numpy()``, ``detach`` and ``.data`` need no rule. Values are computed by
the operation itself, to the last bit; no object is changed, and none has another type.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _push_mode

from bayesdiff.checks import ArgumentError, ShapeError, UnsupportedPipelineError, check_int
from bayesdiff.tracing.derivatives.beside import inexact
from bayesdiff.tracing.derivatives.call import Call, leaves, unsupported
from bayesdiff.tracing.derivatives.registry import Op, operation
from bayesdiff.tracing.escapes import Escapes
from bayesdiff.tracing.modes import Quiet, lift_off, put_back
from bayesdiff.tracing.outputs import derive, versions
from bayesdiff.tracing.shadows import Found, Shadows, key, whole
from bayesdiff.tracing.writes import clear, flat, in_place, into, set_item

_WRITES = {"inplace": in_place, "setitem": set_item, "flat": flat, "clear": clear}


class DualNumbers(TorchFunctionMode):
    """Within ``with DualNumbers() as dual:`` PyTorch's functions carry tangents along.

    Only in the thread that entered it. What numpy, another thread or a compiled function does is not seen. Operations on plain
    tensors cost a look-up for each of them.

    Args:
        chunk: Derivatives that have no rule of their own are computed for so many tangents at a time, which bounds memory.
    """

    def __init__(self, chunk: int = 16):
        super().__init__()
        self.chunk = check_int("chunk", chunk, least=1)
        self.escapes = Escapes()
        self.shadows = Shadows()
        self._failure: UnsupportedPipelineError | None = None
        # glibc returns each freed shadow to the kernel, and clearing new pages costs more than the arithmetic. Once a block of
        # this size was freed (it is never touched), glibc keeps up to twice as much.
        torch.empty(31 << 20, dtype=torch.uint8)

    # ------------------------------------------------------------------------------------------------ for the caller

    def tangents(self, x: Tensor) -> Tensor | None:
        """``(L, *x.shape)``, a view of the shadow, or None where ``x`` has none."""
        with torch._C.DisableTorchFunction():
            entry = self.shadows.entry(x)
            return None if entry is None or not inexact(x) else entry.data(x)

    def unclamped(self, x: Tensor) -> Tensor | None:
        """The tangents as if the last clamp on the way had not been there, where that is known; else the tangents.

        They get past copies, casts, shapes, and sums and products with plain tensors.
        """
        with torch._C.DisableTorchFunction():
            entry = self.shadows.entry(x)
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
            if whole(x):
                self.shadows.drop(x)
            self.shadows.write(x, tangents.detach(), None)
            entry = self.shadows.entry(x)
            assert entry is not None
            entry.shadow.shared = True

    def drop(self, x: Tensor) -> None:
        """The memory of ``x`` has no tangents any more."""
        with torch._C.DisableTorchFunction():
            self.shadows.drop(x)

    def purge(self) -> None:
        """Forget storages that are gone."""
        self.shadows.purge()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, operations run plainly and are not seen: for a neural network."""
        above = lift_off(self)
        try:
            yield
        finally:
            if above is not None:
                put_back(self, above)

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
            lift_off(self)

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
        if op.kind == "pass" or not self.shadows.entries:
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
        if op.kind == "refuse":
            raise unsupported(call, op.why)
        if op.kind == "escape":
            return self.escapes.add(self.shadows, op, call, found)
        return _WRITES[op.kind](self.shadows, op, call, found)

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
                entry = self.shadows.entries.get(storage._cdata)
                if entry is None and self.shadows.handed:
                    entry = self.shadows.returned(a, storage)
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
            return into(self.shadows, op, call, found)
        if op.inplace is not None and call.get(op.inplace, "inplace"):
            return in_place(self.shadows, op, call, found)
        before = None if op.rule else versions(call.args, kwargs)
        call.out = out = call.func(*call.args, **kwargs)
        if before is not None and before != versions(call.args, kwargs):
            raise unsupported(call, "it changes an argument in a way that is not known")
        tensors = list(leaves(out))
        picked = [n for n, x in enumerate(tensors) if inexact(x) and key(x) not in keys]
        if picked:
            with Quiet():
                for n, pair in zip(picked, derive(self.shadows, op, call, found, picked), strict=True):
                    if pair[0] is not None:
                        self.shadows.write(tensors[n], *pair, found)
        return out

    def _check_wrapped(self, x: Tensor) -> None:
        """A tensor inside ``torch.func``'s transformations: refused if there is a dual within."""
        functorch = torch._C._functorch
        while functorch.is_functorch_wrapped_tensor(x):
            x = functorch.get_unwrapped(x)
        if self.shadows.entry(x) is not None:
            raise UnsupportedPipelineError(
                f"cannot follow torch.func's transformations of a tensor {list(x.shape)} with tangents; "
                "use propagation='ensemble', which needs no derivatives"
            )
