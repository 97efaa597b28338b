"""Compiled networks: run as they were written.

``torch.compile`` leaves a module's layers and hooks out of the code that it makes, so neither features nor responses can be taken
from it. While a posterior is fitted or carried along, compiled functions therefore run uncompiled; afterwards they are what they
were, with nothing to compile again. Their values differ from those of the compiled code by its rounding.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def original(network: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given."""
    inner = network.__dict__.get("_modules", {}).get("_orig_mod")
    return original(inner) if isinstance(inner, nn.Module) else network


def modules_by_path(network: nn.Module) -> dict[str, nn.Module]:
    """All submodules by the path that they have uncompiled."""
    found = network.named_modules(remove_duplicate=False)
    return {".".join(p for p in name.split(".") if p != "_orig_mod"): original(module) for name, module in found}


@contextmanager
def uncompiled() -> Iterator[None]:
    """A context, or a decorator, in which compiled functions run as they were written."""
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled
        yield
        return
    _stance.enter()
    try:
        yield
    finally:
        _stance.leave()


class _Stance:
    """PyTorch's stance is one for all threads: the first that comes changes it, the last that goes puts it back."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.context: AbstractContextManager[Any] = nullcontext()

    def enter(self) -> None:
        with self.lock:
            if not self.inside:
                self.context = torch.compiler.set_stance("force_eager")
                self.context.__enter__()
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.context.__exit__(None, None, None)


_stance = _Stance()
