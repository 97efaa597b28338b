"""What enters a module with tangents, what it returns, and how the one responds to the other.

A module may take the sample in any argument, nested or not, and return any nest of tensors. Here both are packed into rows,
``(R, …)``, one for each sample of its batch; moved, and unpacked again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from bayesdiff.checks import check_finite
from bayesdiff.tracing.boxes import Box
from bayesdiff.tracing.network import Session
from bayesdiff.tracing.rerun import tensors
from bayesdiff.tracing.rows import Rows, repeated


def floating(value: Any) -> list[Tensor]:
    """The floating-point tensors in a nest."""
    return [x for x in tensors(value) if x.is_floating_point()]


@dataclass(frozen=True)
class Match:
    """Which numbers of a row's input and output are the same place of the sample.

    Args:
        inputs: ``(P,)`` positions in the packed input, None: all.
        outputs: ``(P,)`` positions in the packed output, None: all.
    """

    inputs: Tensor | None
    outputs: Tensor | None

    def taken(self, rows: Tensor) -> Tensor:
        """The sample's numbers of packed inputs, ``(…, P)``."""
        return rows if self.inputs is None else rows[..., self.inputs]

    def placed(self, rows: Tensor, size: int) -> Tensor:
        """The inverse: ``(…, P)`` to packed inputs of some size, 0 elsewhere."""
        return _scattered(rows, self.inputs, size)

    def read(self, rows: Tensor) -> Tensor:
        """The sample's numbers of packed outputs, ``(…, P)``."""
        return rows if self.outputs is None else rows[..., self.outputs]

    def written(self, rows: Tensor, size: int) -> Tensor:
        """The inverse: ``(…, P)`` to packed outputs of some size, 0 elsewhere."""
        return _scattered(rows, self.outputs, size)


def _scattered(rows: Tensor, index: Tensor | None, size: int) -> Tensor:
    if index is None:
        return rows
    out = rows.new_zeros(*rows.shape[:-1], size)
    out[..., index] = rows
    return out


def _extent(moved: Tensor, dim: int) -> tuple[int, int]:
    """The first place along a dimension where something moves, and the one behind the last."""
    others = [d for d in range(moved.ndim) if d != dim]
    used = (moved.any(dim=others) if others else moved).nonzero().flatten()
    return (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)


class Entered:
    """One call of a module, as a function of the inputs that have tangents.

    Args:
        session: The run.
        box: The module.
        args: Of the call.
        kwargs: Of the call.
        output: What it returned.
    """

    def __init__(self, session: Session, box: Box, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.session, self.box = session, box
        self._leaves, self._spec = tree_flatten((args, kwargs))
        self.outputs = floating(output)
        found = {i: session.trace.tangents(x) for i, x in enumerate(self._leaves) if isinstance(x, Tensor)}
        self.tangents = {i: t for i, t in found.items() if t is not None}
        self.values = [self._leaves[i] for i in self.tangents]
        if self:
            joined = session.coupled(box, args, kwargs, output)
            self.given, self.returned = Rows.of(self.values, self.outputs, joined=joined)
            #: δ, ``(R, K, P_in)``, contiguous.
            self.rows = self.given.pack(list(self.tangents.values()), lead=1).contiguous()
            check_finite("deviations", self.rows, "use float32 or bfloat16, or more extra_calls")

    def __bool__(self) -> bool:
        return bool(self.tangents)

    @property
    def size(self) -> int:
        """Q, the numbers of a row of the output."""
        return sum(f.numel() for f in self.outputs) // self.returned.number

    def match(self) -> Match | None:
        """The places that input and output share: equal shapes, but for leading parts.

        What has tangents may be some channels of an input only (inpainting); the output may have more channels than the sample
        (a learned variance), or more tokens.
        """
        if len(self.outputs) != 1 and not self.returned.listed:
            return None
        wanted, offset = self.returned.row_shape(0), 0
        for place, (x, t) in enumerate(zip(self.values, self.tangents.values(), strict=True)):
            shape = self.given.row_shape(place)
            inputs, outputs = (torch.arange(s.numel(), device=x.device).view(s) for s in (shape, wanted))
            if len(shape) == len(wanted):
                moved = t.ne(0).any(0)
                moved = moved if moved.shape == shape else moved.any(0)
                for dim in range(len(shape)):
                    if shape[dim] != wanted[dim]:
                        first, last = _extent(moved, dim)
                        inputs = inputs.narrow(dim, first, last - first)
                    outputs = outputs.narrow(dim, 0, min(outputs.shape[dim], inputs.shape[dim]))
            if inputs.shape == outputs.shape and inputs.numel():
                whole = len(self.values) == 1 or self.given.listed
                return Match(
                    None if whole and inputs.numel() == shape.numel() else offset + inputs.flatten(),
                    None if outputs.numel() == wanted.numel() else outputs.flatten(),
                )
            if self.given.listed:
                return None
            offset += shape.numel()
        return None

    def derivatives(self, shifts: Tensor, length: Tensor, together: int = 1, *, central: bool = False) -> Tensor:
        """J along shifts, by differences.

        Args:
            shifts: ``(R, p, P_in)``.
            length: How far a typical deviation goes, ``(R, 1)``: a one-sided step is that long, or longer where rounding
                asks for it.
            together: How many share one call of the module.
            central: To both sides, with twice the calls: the derivative itself, not a difference along a deviation.

        Returns:
            ``(R, p, Q)`` float64.

        Raises:
            NonFiniteError: The module overflows there.
        """
        base = self.given.pack([x.double() for x in self.values])
        f = self.returned.pack([y.double() for y in self.outputs])
        call = self.session.network.calls[0]
        eps = max(call.rounding, *(torch.finfo(x.dtype).eps for x in (*self.values, *self.outputs)))
        moving = (shifts != 0).any(1)
        size = (base.square() * moving).sum(1, keepdim=True).sqrt()  # of what moves
        norm = shifts.double().square().sum(2).sqrt()
        step = eps**0.4 * size if central else torch.maximum(length, eps**0.5 * size)
        step = step / torch.where(norm > 0, norm, 1.0)
        images = []
        group = 1 if self.given.listed or self.given.number == 1 else together
        for first in range(0, shifts.shape[1], group):
            h = step[:, first : first + group]
            away = h.unsqueeze(2) * shifts[:, first : first + group].double()
            ends = self._evaluate((base.unsqueeze(1) + away).unbind(1))
            starts = self._evaluate((base.unsqueeze(1) - away).unbind(1)) if central else [f] * len(ends)
            images += [
                (g - s) / ((1 + central) * h[:, i, None]) for i, (g, s) in enumerate(zip(ends, starts, strict=True))
            ]
        found = torch.stack(images, dim=1)
        return check_finite(
            "responses", found, f"{self.box.name} overflows near the trajectory: use float32 or bfloat16"
        )

    def _evaluate(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The module at other inputs ``(R, P_in)``, packed outputs ``(R, Q)`` float64 of each."""
        leaves, number = list(self._leaves), len(inputs)
        if number > 1:
            leaves = [repeated(x, self.given.number, number) for x in leaves]
        parts = [self.given.unpack(x) for x in inputs]
        for place, (i, value) in enumerate(zip(self.tangents, self.values, strict=True)):
            pieces = [p[place] for p in parts]
            leaves[i] = (pieces[0] if number == 1 else torch.cat(pieces)).to(value.dtype)
        args, kwargs = tree_unflatten(leaves, self._spec)
        outputs = floating(self.session.evaluate(self.box, args, kwargs, number))
        if number == 1:
            return [self.returned.pack([y.double() for y in outputs])]
        split = [y.double().unflatten(0, (number, -1)).unbind(0) for y in outputs]
        return [self.returned.pack(list(pieces)) for pieces in zip(*split, strict=True)]
