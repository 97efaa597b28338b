"""From a head's output to the network's: a permutation, read off with numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UnsupportedHeadError, UnsupportedPipelineError
from bayesdiff.head.layer import Head
from bayesdiff.head.numbers import send_numbers


class Fold:
    """The permutation from the head's output to the network's, of a whole batch, read off by sending numbers through it.

    A transformer's head writes patches, token by token, which the network then folds into an image; a video network may
    take frames for samples. The network may return a part of what the head does, and may negate it. The fold is the same
    for all inputs of one shape, so it need not be written for each model.

    Args:
        index: Which element of the head's output each element of the network's is, int64, shaped as the network's output; None
            when the two are the same (every U-Net).
        sign: ±1 for each, or the inverse of what the head's output is multiplied by.
    """

    def __init__(self, index: Tensor | None, sign: Tensor | None = None) -> None:
        self.index, self.sign = index, sign

    @classmethod
    def read(cls, head: Head, call: Callable[[], Any]) -> Fold:
        """Read the fold with one network call, or a few in half precision.

        Args:
            head: The head.
            call: Runs the network and returns its output.

        Raises:
            UnsupportedPipelineError: What comes out are not the numbers that went in.
        """
        numbers = send_numbers(head.layer, call)
        if len(numbers.sizes) != 1 or not numbers.complete:
            distinct = numbers.index[numbers.index >= 0].unique().numel()
            raise UnsupportedPipelineError(
                f"expected the network's output to be its head's output ({list(numbers.sizes)} numbers), permuted, got "
                f"{distinct} distinct numbers in {numbers.index.numel()} places: what follows the layer {head.path!r} is more "
                "than a fold"
            )
        return cls(numbers.index, numbers.sign)

    def observations(
        self, head: Head, inputs: Tensor, residual: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Residuals of the network's output as residuals of the head's, with the features that they belong to.

        Tokens and rows of the head's output that don't reach the network's output are left out; channels that don't have a
        residual of 0.

        Args:
            head: The head.
            inputs: What entered it.
            residual: Shaped as the network's output.

        Yields:
            inputs and residuals as the head has them; the samples (rows of ``residual``) that they belong to; and where a sample
            has several rows in the head, which of these samples each row belongs to, otherwise None.

        Raises:
            UnsupportedHeadError: Not the same channels of all positions reach the network's output.
        """
        if self.index is None or self.sign is None:
            yield inputs, residual, torch.arange(len(inputs)), None
            return
        shape, linear = head.geometry.output_shape(inputs), head.geometry.kind == "linear"
        rows = torch.arange(len(residual), device=residual.device)
        owner = torch.full((math.prod(shape),), -1, device=residual.device)
        owner[self.index] = rows.view(-1, *(1,) * (residual.ndim - 1)).expand_as(self.index)
        values = residual.new_zeros(len(owner)).index_put_((self.index,), residual * self.sign).view(shape)
        by_position = owner.view(shape).movedim(-1 if linear else 1, -1).flatten(0 if linear else 1, -2)
        if linear:
            whose = by_position.amax(1)
            places = by_position[whose >= 0] >= 0
            mixed = bool(((by_position >= 0) & (by_position != whose[:, None])).any())
        else:
            whose = by_position.flatten(1).amax(1)
            places = (by_position[whose >= 0] >= 0).flatten(0, 1)
            mixed = bool(((by_position >= 0) & (by_position != whose[:, None, None])).any())
        # Channels may be left out (a learned variance), but the same everywhere.
        if mixed or not bool((places == places[:1]).all()):
            raise UnsupportedHeadError(
                f"expected the network to return the same channels of {head.path!r} for each {'token' if linear else 'place'}, "
                f"got {residual.numel()} of {len(owner)} numbers in a pattern of their own"
            )
        if not linear:
            by_row = whose
            yield inputs[by_row >= 0], values[by_row >= 0], rows, by_row[by_row >= 0]
            return
        tokens, values, by_token = inputs.flatten(0, -2), values.flatten(0, -2), whose
        counts = by_token[by_token >= 0].bincount(minlength=len(rows))
        order = by_token.argsort(stable=True)[int((by_token < 0).sum()) :]
        first = counts.cumsum(0) - counts
        for count in counts.unique().tolist():  # samples with as many tokens together
            samples = (counts == count).nonzero().flatten()
            chosen = order[first[samples, None] + torch.arange(count, device=order.device)]
            yield tokens[chosen], values[chosen], samples, None
