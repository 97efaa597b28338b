r"""The head in one network call: what enters it, and where its numbers arrive in what is compared with the target.

A training loss compares the target with an output g that the network, and maybe the pipeline behind it, made of the head's
numbers h: folded, negated, unpacked, the learned variance cut off. All of these are :math:`g_i = s\,h_{j(i)} + b_i`. The map is
read once for each shape, with tangents of h (:mod:`bayesdiff.tracing.tail`), and takes the residual of g back to the head.
Where a call has one row, so that s cannot be seen to differ between timesteps, the first few calls are read.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bayesdiff.checks import (
    AmbiguousHeadError,
    HeadNotFoundError,
    UnsupportedHeadError,
    check_finite,
)
from bayesdiff.head.find import find_head, find_head_by_call
from bayesdiff.head.fold import Fold
from bayesdiff.head.layer import Head
from bayesdiff.tracing.rerun import tensors
from bayesdiff.tracing.tail import Part, Reading, reading

#: Scales of one call may differ by this, relative.
SAME = 1e-5
#: Calls of one shape that are read, where they have one row.
READ_ALONE = 3


@dataclass(frozen=True)
class Seen:
    """One network call.

    Args:
        inputs: What entered the head.
        output: g, what is compared with the target.
        fold: From residuals of g to those of the head.
    """

    inputs: Tensor
    output: Tensor
    fold: Fold


class Observer:
    """Sees the head in the calls of its network.

    Args:
        model: The network, or a pipeline that has it.
        network: The network.
        path: Of the head, where it is named.

    Raises:
        HeadNotFoundError, AmbiguousHeadError, UnsupportedHeadError: There is no such layer at the named path.
    """

    def __init__(self, model: Any, network: nn.Module, path: str | None) -> None:
        self.network = network
        self.known: Head | None
        try:
            self.known = find_head(model, path)
        except (HeadNotFoundError, AmbiguousHeadError, UnsupportedHeadError):
            if path is not None:
                raise
            self.known = None
        self._folds: dict[Any, Fold] = {}
        self._read: dict[Any, list[float]] = {}  # the scales that were read
        self._key: Any = None
        self._open = ExitStack()
        self._captured: list[Tensor] = []
        self._reading: Reading | None = None

    @property
    def head(self) -> Head:
        """The head, once it is found."""
        assert self.known is not None
        return self.known

    def find(self, call: Callable[[], Any]) -> Head:
        """The head: by its name, or by running the network."""
        if self.known is None:
            self.known = find_head_by_call(self.network, call)
        return self.known

    def begin(self, key: Any) -> None:
        """A network call follows; calls with one key are alike."""
        self.close()
        self._key = key
        if len(self._read.get(key, ())) >= READ_ALONE:
            self._captured = self._open.enter_context(self.head.capture())
        else:
            self._reading = self._open.enter_context(reading(self.head))

    def arrived(self, output: Tensor) -> Seen:
        """Its output, or what was made of it, has come where it is compared with the target.

        Raises:
            UnsupportedHeadError: The head is passed more or less often than once, or is not followed by a permutation.
            NonFiniteError: What entered the head is not finite.
        """
        read = self._reading
        inputs = self._captured if read is None else read.inputs
        if len(inputs) != 1:
            raise UnsupportedHeadError(
                f"expected one pass through {self.head.path!r} in a network call, got {len(inputs)}"
            )
        if read is not None:
            read.traced.close()
            check_finite("features", inputs[0], "the network overflows in this dtype: use bfloat16 or float32")
            fold = _fold(self.head, read.part(output), output)
            scale = 1.0 if fold.sign is None else float(fold.sign.flatten()[0].abs())
            before = self._read.setdefault(self._key, [])
            self._folds.setdefault(self._key, fold)
            if before:
                _check_scales(self.head.path, [*before, scale])
            before += [scale] if len(output) == 1 else [scale] * READ_ALONE
        seen = Seen(inputs[0], output.detach(), self._folds[self._key])
        self.close()
        return seen

    def close(self) -> None:
        """Take all hooks off."""
        self._open.close()
        self._captured, self._reading = [], None


def _fold(head: Head, part: Part | None, output: Tensor) -> Fold:
    """The map from the head's output to ``output``, as its inverse is applied to residuals."""
    if part is None:
        raise UnsupportedHeadError(
            f"expected the output that is trained to depend on {head.path!r}, got none of its numbers in it"
        )
    if part.index is None:
        return Fold(None)
    reached = part.index >= 0
    if not bool(reached.all()):
        raise UnsupportedHeadError(
            f"expected all numbers of the network's output to come from {head.path!r}, got {int((~reached).sum())} of "
            f"{reached.numel()} that do not"
        )
    size = part.scale.abs()
    _check_scales(head.path, [float(size.min()), float(size.max())])
    return Fold(part.index.view(output.shape), (1 / part.scale).expand(part.index.shape).view(output.shape))


def _check_scales(path: str, factors: list[float]) -> None:
    least, largest = min(factors), max(factors)
    if largest - least > SAME * largest:
        raise UnsupportedHeadError(
            f"expected what follows {path!r} to scale all its numbers alike, got factors from {least:.3g} to "
            f"{largest:.3g}: that weighs timesteps or places against each other"
        )


def alike(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """What calls of a network have in common that have inputs of one shape."""
    return tuple((x.shape, x.dtype) for x in tensors((args, kwargs)) if x.ndim > 1)
