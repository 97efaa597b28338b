"""PyTorch's modes of a thread: one taken off its stack and put back under others; all of them off for a while."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode


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


def lift_off(mode: TorchFunctionMode) -> list[TorchFunctionMode] | None:
    """Take a mode off the thread's stack: the modes that were above it, or None if it was not there."""
    stack = _get_current_function_mode_stack()
    if all(other is not mode for other in stack):
        return None
    above: list[TorchFunctionMode] = []
    while (other := _pop_mode()) is not mode:
        above.insert(0, other)
    for other in above:
        _push_mode(other)
    return above


def put_back(mode: TorchFunctionMode, above: list[TorchFunctionMode]) -> None:
    """Put it back, under those of the modes that are still the topmost."""
    popped: list[TorchFunctionMode] = []
    while above and (stack := _get_current_function_mode_stack()) and stack[-1] is above[-1]:
        popped.insert(0, _pop_mode())
        above = above[:-1]
    for other in (mode, *popped):
        _push_mode(other)
