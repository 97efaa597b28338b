"""From a head's output to the network's: a permutation, read off with numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import (
    UnsupportedPipelineError,
)
from bayesdiff.head.find import Head


class Fold:
    """The permutation from the head's output to the network's, read off by sending numbers through it.

    A transformer's head writes patches, token by token, which the network then folds into an image.
    The fold is linear and the same for all inputs, so it need not be written for each model: with the
    head's output replaced by 0 … n−1, the network's output *is* the permutation.

    Args:
        index: ``(C', H, W)`` int64: which element of a sample's head output each output element is;
            None when the two are the same (every U-Net).
    """

    def __init__(self, index: Tensor | None) -> None:
        self.index = index

    @classmethod
    def read(cls, head: Head, call: Any) -> Fold:
        """Read the fold with one network call.

        Args:
            head: The head.
            call: Runs the network and returns its output ``(B, C', H, W)``.

        Raises:
            UnsupportedPipelineError: What comes out are not the numbers that went in.
        """
        sizes: list[int] = []

        def number(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            sizes.append(output[0].numel())
            numbers = torch.arange(sizes[-1], dtype=torch.float32, device=output.device)
            return numbers.view_as(output[0]).expand_as(output).clone()

        handle = head.layer.register_forward_hook(number)
        try:
            result = call()[0].float()
        finally:
            handle.remove()
        index = result.round().long()
        distinct = index.unique().numel()
        exact = bool((result == index).all()) and int(index.min()) >= 0 and int(index.max()) < sizes[0] <= 2**24
        if len(sizes) != 1 or not exact or distinct != index.numel():
            raise UnsupportedPipelineError(
                f"expected the network's output to be its head's output ({sizes} numbers), permuted, got {distinct} "
                f"distinct values in {index.numel()} places: what follows the layer {head.path!r} is more than a fold"
            )
        return cls(index)

    def __call__(self, output: Tensor, lead: int = 1) -> Tensor:
        """Fold the head's output; ``lead`` dimensions in front are kept: ``(..., C', H, W)``."""
        if self.index is None:
            return output
        return output.flatten(lead)[..., self.index]
