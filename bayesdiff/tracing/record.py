"""What is kept of one call of a module, and whether another call has the same inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from bayesdiff.checks import NotRepeatableError
from bayesdiff.tracing.rerun import tensors
from bayesdiff.tracing.tail import Tail

#: A tensor among the arguments with no more numbers than this may be a timestep or a noise level.
SMALL = 64


@dataclass
class Call:
    """What is kept of one call of a module.

    Args:
        output: What it returned, tensors copied.
        sums: Two sums over every tensor among its arguments, to recognise them by.
        scalars: Small numeric arguments by their place, ``(1,)`` or ``(R,)`` float64 on the CPU.
        kept: φ, what entered the head, divided by a scale where it is kept in half precision.
        scale: That scale; 0 where φ is kept as it was.
        tail: From the head's output to the network's.
        rounding: ε of the coarsest arithmetic that was seen in the call.
        agreement: ⟨x, f⟩ of the first tensor that entered and the first that came out, where they have one shape.
    """

    output: Any
    sums: list[float]
    scalars: dict[str, Tensor]
    kept: Tensor | None = None
    scale: float = 0.0
    tail: Tail | None = None
    rounding: float = 0.0
    agreement: float = 0.0

    @property
    def features(self) -> Tensor:
        """φ, in the dtype that it had, or float32."""
        assert self.kept is not None
        return self.kept if self.scale == 0 else self.kept.float() * self.scale

    def shrink(self) -> None:
        """Keep φ in half precision from now on."""
        if self.kept is not None and self.kept.dtype == torch.float32:
            self.scale = 2.0 ** math.ceil(math.log2(float(self.kept.abs().amax()) or 1.0))
            self.kept = (self.kept / self.scale).half()


def sums_of(args: Any, kwargs: Any) -> list[float]:
    """Two sums over every tensor: of its numbers, and of their squares."""
    with torch.no_grad():
        values = [x.detach() for x in tensors((args, kwargs)) if not x.is_complex() and x.numel() and not x.is_meta]
        return [v for x in values for v in (float(x.double().sum()), float(x.double().square().sum()))]


def scalars_of(args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Numbers and small tensors among the arguments."""
    found: dict[str, Tensor] = {}
    for path, leaf in tree_flatten_with_path((args, kwargs))[0]:
        if isinstance(leaf, bool) or not isinstance(leaf, int | float | Tensor):
            continue
        value = torch.as_tensor(leaf).detach()
        if value.is_complex() or value.numel() == 0 or value.is_meta:
            continue
        flat = value.flatten().double().cpu() if value.numel() <= SMALL else value.flatten()
        if value.numel() > SMALL:
            if value.ndim > 2 or not bool((flat == flat[0]).all()):
                continue
            flat = flat[:1].double().cpu()
        found[str(path)] = flat[:1] if bool((flat == flat[0]).all()) else flat
    return found


def check_same(name: str, n: int, call: Call, args: Any, kwargs: Any) -> None:
    """Make sure that a call has the inputs of the one that was kept.

    Raises:
        NotRepeatableError: It has others.
    """
    given = sums_of(args, kwargs)
    if given != call.sums and not _both_nan(given, call.sums):
        one, other = next(pair for pair in zip_longest(given, call.sums) if pair[0] != pair[1])
        raise NotRepeatableError(
            f"expected call {n} of {name} to have the inputs of the first run, got others (a sum of {one} instead of "
            f"{other}): the sampler draws noise from a source of its own, or remembers something between runs; give it "
            "its noise through generator= or a noise sampler with a seed"
        )


def _both_nan(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and all(a == b or (a != a and b != b) for a, b in zip(one, other, strict=True))
