"""Modules as black boxes: something else is called in the place of a method, and the module itself is as before afterwards."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bayesdiff.checks import UnsupportedPipelineError
from bayesdiff.tracing.record import Call
from bayesdiff.tracing.rerun import Rerun, brought

_lock = threading.Lock()


class Box:
    """A module's method, whose calls are recorded and replayed.

    Args:
        name: For messages.
        module: The module.
        method: ``"forward"``, or another method that is called from outside.
    """

    def __init__(self, name: str, module: nn.Module, method: str = "forward") -> None:
        self.name, self.module, self.method = name, module, method
        self.original: Callable[..., Any] = getattr(module, method)
        self.calls: list[Call] = []
        self.position = 0


@contextmanager
def over(box: Box, call: Callable[[Box, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """``call`` in the place of a module's method, on the instance; what was there before comes back."""
    attributes = box.module.__dict__

    @functools.wraps(box.original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return call(box, args, kwargs)

    wrapper._bayesdiff = True  # type: ignore[attr-defined]
    with _lock:
        before = attributes.get(box.method)
        if getattr(before, "_bayesdiff", False):
            raise UnsupportedPipelineError(
                f"expected one run of {box.name} at a time, got another in this or another thread: give each thread a network of "
                "its own, or a lock"
            )
        attributes[box.method] = wrapper
    try:
        yield
    finally:
        with _lock:
            if before is None:
                del attributes[box.method]
            else:
                attributes[box.method] = before


def methods_of(module: nn.Module) -> list[str]:
    """``forward`` and the public methods that come with the class that defines it."""
    found = ["forward"]
    for cls in type(module).__mro__:
        for name, value in vars(cls).items():
            if callable(value) and not isinstance(value, type) and name[0] != "_" and name not in found:
                found.append(name)
        if "forward" in vars(cls):
            break
    return found


def modules_of(run: Rerun, args: tuple[Any, ...], kwargs: dict[str, Any], network: nn.Module) -> dict[str, nn.Module]:
    """The modules that a function is given or brings along, but for those that are, hold or belong to the network."""
    found: dict[str, nn.Module] = {}
    own = set(map(id, network.modules()))
    for value in brought(run.function, args, kwargs):
        if isinstance(value, nn.Module) and id(value) not in own and not own & set(map(id, value.modules())):
            found.setdefault(f"{type(value).__name__} ({len(found)})", value)
    unique = {id(m): name for name, m in reversed(found.items())}
    return {name: m for name, m in found.items() if unique[id(m)] == name}
