"""One call of an operation: what it was called with, and the error that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from bayesdiff.checks import UnsupportedPipelineError


class Call:
    """One operation: what it was called with, what came out, and its dual arguments.

    Args:
        func: The function; the functional twin of an in-place one.
        args: Its arguments.
        kwargs: Those with names.
        chunk: Tangents at a time, for :func:`~bayesdiff.tracing.derivatives.general.generic`.
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


def unsupported(c: Call, why: str) -> UnsupportedPipelineError:
    """An error that names the operation."""
    shapes = ", ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in c.values.values())
    return UnsupportedPipelineError(
        f"cannot follow {_full_name(c.func)} of {shapes}: {why.strip().splitlines()[0]}; "
        "use propagation='ensemble', which needs no derivatives"
    )


def base_name(func: Any) -> str:
    """``clamp``, of ``torch.Tensor.clamp`` and ``aten.clamp.default`` alike."""
    name = getattr(func, "__name__", "")
    return str(name).split(".")[0]


def _full_name(func: Any) -> str:
    owner = getattr(func, "__objclass__", None)
    module = "torch.Tensor" if owner is not None else getattr(func, "__module__", None) or "torch"
    return f"{module}.{getattr(func, '__name__', repr(func))}"
