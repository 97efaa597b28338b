r"""What a network does after its head: from the head's output h to the network's output f.

Most networks return h itself; transformers fold its tokens into an image, drop some, change the sign; others scale it by the
noise level. In all of these every number of f depends on one number of h: :math:`\partial f_i/\partial h_{j(i)} = s_i`,
nothing else.
So j and s can be read off with three tangents of h while the network runs: ones give s, and numbers times ones, the two halves of
j written to the base 4096, give j.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UnsupportedHeadError
from bayesdiff.head.find import Head
from bayesdiff.tracing.dual import DualNumbers
from bayesdiff.tracing.rerun import tensors

BASE = 4096


@dataclass(frozen=True)
class Part:
    """One output tensor of the network.

    Args:
        shape: Its shape.
        index: j of each of its numbers, −1 where h has no part in it, ``(numel,)``; None: it is h itself.
        scale: s, one number or as many as j.
        head_size: The numbers of h.
    """

    shape: torch.Size
    index: Tensor | None
    scale: Tensor
    head_size: int

    def __call__(self, shift: Tensor) -> Tensor:
        """δh ``(K, *h.shape)`` to δf ``(K, *shape)``."""
        if self.index is None:
            return shift
        out = shift.flatten(1)[:, self.index.clamp(min=0)] * self.scale.to(shift)
        return out.reshape(len(shift), *self.shape)


@dataclass(frozen=True)
class Tail:
    """All output tensors of a network call, in their order; None: the head has no part in it."""

    parts: tuple[Part | None, ...]

    def __call__(self, shift: Tensor) -> list[Tensor | None]:
        """δh ``(K, *h.shape)`` to δf of every output tensor."""
        return [None if part is None else part(shift) for part in self.parts]

    def sharing(self, other: Tail) -> Tail:
        """The same, on the tensors of an earlier call's tail where they are equal: a run has a thousand of them."""

        def shared(part: Part | None, old: Part | None) -> Part | None:
            if part is None or old is None or part.index is None or old.index is None or part.shape != old.shape:
                return part
            index = old.index if torch.equal(part.index, old.index) else part.index
            same = part.scale.shape == old.scale.shape and torch.equal(part.scale, old.scale)
            return Part(part.shape, index, old.scale if same else part.scale, part.head_size)

        if len(self.parts) != len(other.parts):
            return self
        return Tail(tuple(shared(a, b) for a, b in zip(self.parts, other.parts, strict=True)))

    def main(self) -> int:
        """Which output tensor is the first that the head has a part in."""
        return next(i for i, part in enumerate(self.parts) if part is not None)


class Reading:
    """What was seen of the head in one call of its network.

    Args:
        head: The head.
        passes: How many passes through it are expected: as many as rows, where the network is evaluated row by row.
        checked: Whether to ask whether the layer computes Wφ.
    """

    def __init__(self, head: Head, passes: int = 1, checked: bool = True) -> None:
        self.head, self.passes, self.checked = head, passes, checked
        self.trace = DualNumbers()
        self.inputs: list[Tensor] = []
        self.sizes: list[torch.Size] = []  # of what came out
        self.numbers: list[Tensor] = []
        self.rounding = 0.0
        self.traced = ExitStack()

    def seen(self, _: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        """The forward hook of the head: keep what entered, number what came out, trace what follows."""
        x = args[0]
        self.inputs.append(x.detach())
        coarsest = {x.dtype, output.dtype}
        if torch.is_autocast_enabled(x.device.type):
            coarsest.add(torch.get_autocast_dtype(x.device.type))
        self.rounding = max(self.rounding, *(torch.finfo(d).eps for d in coarsest))
        if len(self.inputs) > self.passes:
            return
        if self.checked:
            self.head.check_linear(x, output)  # at once: what follows may write into it
        n = torch.arange(output.numel(), device=output.device).view(output.shape) + self.size
        dtype = torch.promote_types(output.dtype, torch.float32)
        self.numbers.append(torch.stack([torch.ones_like(n), n % BASE, n // BASE]).to(dtype))
        self.sizes.append(output.shape)
        self.trace.attach(output, self.numbers[-1].clone())
        self.traced.enter_context(self.trace.resumed())

    @property
    def size(self) -> int:
        """The numbers of h, so far."""
        return sum(s.numel() for s in self.sizes)

    def result(self, output: Any) -> tuple[Tensor, Tail, float]:
        """φ, the tail and the rounding, from what the network returned.

        Raises:
            UnsupportedHeadError: The head was passed more or less often than expected, or is not followed by a permutation.
        """
        if len(self.inputs) != self.passes or not self.sizes:
            wanted = "one pass" if self.passes == 1 else f"{self.passes} passes"
            raise UnsupportedHeadError(
                f"expected {wanted} through {self.head.path!r} in a network call, got {len(self.inputs)}: name the output "
                'layer with head="path.to.layer"'
            )
        parts = tuple(self.part(f) for f in tensors(output))
        if not any(parts):
            raise UnsupportedHeadError(
                f"expected the network's output to depend on {self.head.path!r}, got none of its numbers in the output"
            )
        features = self.inputs[0] if self.passes == 1 else torch.cat(self.inputs)
        return features.clone() if features._is_view() else features, Tail(parts), self.rounding

    def part(self, f: Tensor) -> Part | None:
        t = self.trace.tangents(f)
        if t is not None and torch.equal(t, torch.cat(self.numbers, dim=1)):
            return Part(f.shape, None, torch.ones(1), self.size)
        if t is None or f.numel() == 0:
            return None
        ones, low, high = t.detach().flatten(1).double()
        reached = ones != 0
        if not bool(reached.any()):
            return None
        safe = torch.where(reached, ones, 1.0)
        low, high = low / safe, high / safe
        index = (low.round() + BASE * high.round()).long()
        exact = (low - low.round()).abs().le(0.02) & (high - high.round()).abs().le(0.02)
        exact &= (low.round() >= 0) & (low.round() < BASE) & (index >= 0) & (index < self.size)
        wrong = reached & ~exact
        if bool(wrong.any()) or int(torch.bincount(index[reached]).max()) > 1:
            raise UnsupportedHeadError(
                f"expected each number of the network's output to come from one of {self.head.path!r}'s, got "
                f"{int(wrong.sum()) or 'repeated ones'} of {f.numel()} that do not: what follows this layer is more than a "
                "permutation and a scale"
            )
        index = torch.where(reached, index, -1)
        scale = torch.where(reached, ones, 0.0)
        if bool((scale == scale[0]).all()):
            scale = scale[:1]
        return Part(f.shape, index, scale, self.size)


@contextmanager
def reading(head: Head, passes: int = 1, *, checked: bool = True) -> Iterator[Reading]:
    """See what enters the head and what follows it, in one call of the network inside this context."""
    seen = Reading(head, passes, checked)
    handle = head.layer.register_forward_hook(seen.seen)
    try:
        with seen.trace, seen.trace.paused():
            try:
                yield seen
            finally:
                seen.traced.close()
    finally:
        handle.remove()
