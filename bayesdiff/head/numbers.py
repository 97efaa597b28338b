"""Where a layer's output goes: its elements are replaced by their numbers, and the numbers are looked for in what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import ArgumentError

#: Float32 has these integers exactly, and bfloat16 has those.
FLOAT, HALF = 2**24, 2**8


@dataclass(frozen=True)
class Numbers:
    """Which element of a layer's output each element of a network's output is.

    Args:
        index: Shaped as the network's output, int64: the number of the element among all that the layer returned; −1 for none.
        sign: ±1, what became of it; 0 for none.
        output: The network's output in the last call that was made.
        sizes: How many elements the layer returned at each of its passes in the call.
    """

    index: Tensor
    sign: Tensor
    output: Tensor
    sizes: tuple[int, ...]

    @property
    def distinct(self) -> bool:
        """Whether some numbers came out, and none twice."""
        found = self.index[self.index >= 0]
        return bool(len(found)) and found.unique().numel() == found.numel()

    @property
    def complete(self) -> bool:
        """Whether nothing but numbers came out, each at most once."""
        return bool((self.index >= 0).all()) and self.distinct


def send_numbers(layer: nn.Module, call: Callable[[], Any], base: int = 0) -> Numbers:
    """Run a network with numbers instead of what one of its layers returns.

    Number n is sent as ±(digit + 1), digit by digit, one network call for each; negative if n is odd, so that what is cut
    off below zero does not look as if it came through.

    Args:
        layer: The layer.
        call: Runs the network and returns its output.
        base: Of the digits; 0: as large as the dtypes of the layer and of the network allow.
    """
    index = sign = torch.zeros(())
    place = 0
    while True:
        sizes: list[int] = []

        def send(_: nn.Module, __: Any, output: Tensor, place: int = place, sizes: list[int] = sizes) -> Tensor:
            nonlocal base
            base = base or _base_for(output)
            first = sum(sizes)
            sizes.append(output.numel())
            number = torch.arange(first, first + sizes[-1], device=output.device)
            digit = (number // base**place % base + 1) * (1 - 2 * (number % 2))
            return torch.empty_like(output).copy_(digit.view(output.shape))

        handle = layer.register_forward_hook(send)
        try:
            output = tensor_of(call())
        finally:
            handle.remove()
        if _base_for(output) < base:
            return send_numbers(layer, call, HALF)
        result = output.double()
        digit = result.abs()
        found = (digit >= 1) & (digit <= base) & (digit == digit.round())
        digit = torch.where(found, digit - 1, 0).long()
        if place == 0:
            odd = digit % 2
            index, sign = digit, torch.where(found, result.sign().long() * (1 - 2 * odd), 0)
        else:
            found &= (index >= 0) & (result.sign().long() * (1 - 2 * (index % 2)) == sign)
            index = index + digit * base**place
        index, sign = torch.where(found, index, -1), torch.where(found, sign, 0)
        place += 1
        if base**place >= sum(sizes) or not bool(found.any()):
            found = index < sum(sizes)
            return Numbers(torch.where(found, index, -1), torch.where(found, sign, 0), output, tuple(sizes))


def _base_for(output: Tensor) -> int:
    """How large a number may be that passes unrounded through where such outputs come from."""
    half = torch.is_autocast_enabled(output.device.type) or output.dtype in (torch.float16, torch.bfloat16)
    return HALF if half else FLOAT


def tensor_of(output: Any) -> Tensor:
    """The tensor in whatever a network returns; a list of tensors, one for each sample, as one.

    Raises:
        ArgumentError: There is none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list) and output and all(isinstance(o, Tensor) for o in output):
        same = all(o.shape == output[0].shape for o in output)
        return torch.stack(output) if same else torch.cat([o.flatten() for o in output])
    if isinstance(output, Mapping) and output:
        return tensor_of(next(iter(output.values())))
    if isinstance(output, (tuple, list)) and output:
        return tensor_of(output[0])
    raise ArgumentError(f"expected the network to return a tensor, got {type(output).__name__}")
