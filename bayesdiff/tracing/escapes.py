"""What leaves PyTorch with tangents: arrays of NumPy, which share its memory, and single numbers."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdiff.tracing.derivatives.beside import real_dtype
from bayesdiff.tracing.derivatives.call import Call
from bayesdiff.tracing.derivatives.registry import Op
from bayesdiff.tracing.modes import Quiet
from bayesdiff.tracing.shadows import Found, Shadows

#: Escapes that are no arrays are kept up to this number.
KEPT_ESCAPES = 256
_ARRAYS = ("numpy", "__array__", "__dlpack__")
_HIDDEN = tuple(str(Path(file or "").parent) + os.sep for file in (torch.__file__, np.__file__, __file__))


@dataclass(frozen=True)
class Escape:
    """What left PyTorch with tangents.

    Args:
        how: The method: ``numpy``, ``__array__``, ``item``, ``tolist``, ``__bool__``, …
        value: The tensor; a copy of it, unless an array was handed out.
        array: What was handed out.
        tangents: ``(L, *shape)`` at that moment; ``(0, *shape)`` where several numbers left that are no array.
        unclamped: As :meth:`~bayesdiff.tracing.dual.DualNumbers.unclamped`.
        where: ``file.py:123 in function``, the innermost frame outside torch, numpy and this folder.
    """

    how: str
    value: Tensor
    array: Any
    tangents: Tensor
    unclamped: Tensor
    where: str


class Escapes(list[Escape]):
    """All that has left, the last of the numbers only."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0  # those that are no arrays

    def add(self, shadows: Shadows, op: Op, call: Call, found: Found) -> Any:
        """The operation, and a note of what leaves by it."""
        out = call.func(*call.args, **call.kwargs)
        where = _where()
        x, entry = next(iter(found.values()))
        with Quiet():
            if op.name in _ARRAYS:
                entry.shadow.shared = True
                self.append(Escape(op.name, x.detach(), out, entry.data(x), entry.free(x), where))
                if x.device.type == "cpu":
                    shadows.hand_out(x, entry)
                return out
            if x.numel() == 1:
                t, free = entry.data(x).clone(), entry.free(x).clone()
            else:
                t = free = torch.empty(0, *x.shape, dtype=real_dtype(x.dtype), device=x.device)
            self.append(Escape(op.name, x.detach().clone(), out, t, free, where))
        self.numbers += 1
        if self.numbers > KEPT_ESCAPES:
            del self[next(n for n, e in enumerate(self) if e.how not in _ARRAYS)]
            self.numbers -= 1
        return out


def _where() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HIDDEN):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
