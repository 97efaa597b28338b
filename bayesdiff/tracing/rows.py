"""The rows of a network call: which numbers of its tensors belong to which sample.

A network takes a batch and gives each row what it would give that row alone. Its tensors have the rows first, ``(R, …)``; some
networks take and return lists instead, one tensor a row. What is of neither form is one row. Whether rows act on each other is
seen by moving the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from bayesdiff.checks import UnsupportedPipelineError
from bayesdiff.tracing.rerun import tensors


@dataclass(frozen=True)
class Rows:
    """How a list of tensors is cut into R rows.

    Args:
        shapes: Of the tensors.
        number: R.
        listed: Whether each tensor is a row.
    """

    shapes: tuple[torch.Size, ...]
    number: int
    listed: bool = False

    @classmethod
    def of(cls, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, joined: bool = False) -> tuple[Rows, Rows]:
        """The rows of what enters a network with tangents, and of what it returns; one if they are ``joined``."""
        given, returned = tuple(x.shape for x in inputs), tuple(x.shape for x in outputs)
        if joined:
            return cls(given, 1), cls(returned, 1)
        if len(given) == len(returned) > 1 and len(set(given)) == len(set(returned)) == 1:
            return cls(given, len(given), True), cls(returned, len(returned), True)
        lengths = {s[0] if len(s) else 1 for s in (*given, *returned)}
        if len(lengths) == 1 and all(len(s) > 1 for s in (*given, *returned)):
            (number,) = lengths
            return cls(given, number), cls(returned, number)
        return cls(given, 1), cls(returned, 1)

    def row_shape(self, i: int) -> torch.Size:
        """What a row has of tensor i."""
        shape = self.shapes[i]
        return shape[1:] if not self.listed and len(shape) > 1 and shape[0] == self.number else shape

    def pack(self, parts: Sequence[Tensor], lead: int = 0) -> Tensor:
        """Tensors to ``(R, *lead, P)``; with ``lead`` = 1 each has a dimension of tangents in front."""
        if self.listed:
            return torch.stack([p.flatten(lead) for p in parts])
        flat = [p.reshape(*p.shape[:lead], self.number, -1) for p in parts]
        joined = flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)
        return joined if lead == 0 else joined.transpose(0, 1)

    def unpack(self, rows: Tensor) -> list[Tensor]:
        """``(R, P)``, or ``(R, L, P)``, back to tensors: ``(…)``, or ``(L, …)``."""
        lead = rows.shape[1:-1]
        if self.listed:
            return [row.reshape((*lead, *shape)) for row, shape in zip(rows, self.shapes, strict=True)]
        sizes = [shape.numel() // self.number for shape in self.shapes]
        pieces = rows.movedim(0, -2).split(sizes, dim=-1)
        return [piece.reshape((*lead, *shape)) for piece, shape in zip(pieces, self.shapes, strict=True)]


def repeated(value: Any, rows: int, times: int) -> Any:
    """A tensor with a row for each sample, ``times`` times one after the other; anything else as it is."""
    if isinstance(value, Tensor) and value.ndim and len(value) == rows:
        return value.repeat(times, *(1,) * (value.ndim - 1))
    return value


def in_rows(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A network's ``forward``, evaluated one row at a time.

    A network evaluated on a batch of eight and on one of them alone gives the same numbers only to rounding: libraries
    choose their
    algorithms by the size of the batch. One row at a time, they have no choice. Every tensor among the arguments whose
    first dimension is as long as the first tensor's is taken to have a row for each; :func:`check_rows` makes sure.
    """

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        rows = number_of_rows(args, kwargs)
        outputs = []
        for i in range(rows):
            own = [x[i : i + 1] if isinstance(x, Tensor) and x.ndim and len(x) == rows else x for x in leaves]
            row_args, row_kwargs = tree_unflatten(own, spec)
            outputs.append(forward(*row_args, **row_kwargs))
        return _join(outputs)

    return wrapper


def number_of_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many rows the first tensor of a call has; 1 where there is none."""
    return next((len(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim > 1), 1)


def _join(outputs: list[Any]) -> Any:
    """Rows of whatever a diffusers network returns, as one."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, dict):  # diffusers' outputs are dicts, too
        return type(first)(**{k: _join([o[k] for o in outputs]) for k in first})
    if isinstance(first, (list, tuple)):
        return type(first)(_join(list(values)) for values in zip(*outputs, strict=True))
    return first


def first_tensor(output: Any) -> Tensor:
    """The tensor in whatever a diffusers network returns."""
    return output if isinstance(output, Tensor) else output[0]


def check_rows(by_row: Any, together: Any, network: nn.Module) -> None:
    """Make sure that rows of a batch are those of single calls.

    Args:
        by_row: What the network returned row by row.
        together: What it returns for the whole batch.
        network: For the message.

    Raises:
        UnsupportedPipelineError: They are not.
    """
    rows, batch = first_tensor(by_row), first_tensor(together)
    apart, size = float((rows - batch).abs().max()), float(batch.abs().max())
    allowed = torch.finfo(batch.dtype).eps ** 0.5 * size
    if not apart <= allowed:
        raise UnsupportedPipelineError(
            f"expected {type(network).__name__} to give each row of a batch what it gives the row alone, got a difference "
            f"of {apart:.3g} (allowed: {allowed:.3g}): its rows depend on each other, or an argument that is not by row has "
            f"as many elements as there are rows; use batch_invariant=False"
        )


def first_row_moved(args: Any, kwargs: Any, output: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments with the first row of the first tensor moved; None where there are no rows."""
    leaves, spec = tree_flatten((args, kwargs))
    found = [f for f in tensors(output) if f.is_floating_point()]
    i = next((i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.ndim > 1 and x.is_floating_point()), None)
    if i is None or not found:
        return None
    leaves[i] = leaves[i].clone()
    row = leaves[i]
    if not in_lists(args, kwargs, output):
        if any(f.ndim < 2 or len(f) != len(leaves[i]) for f in found) or len(found[0]) < 2:
            return None
        row = row[0]
    row += 0.1 * row.abs().mean() + 0.01
    moved: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(leaves, spec)
    return moved


def other_rows(output: Any, listed: bool) -> list[Tensor]:
    """All but the first."""
    found = [f for f in tensors(output) if f.is_floating_point()]
    return found[1:] if listed else [f[1:] for f in found]


def in_lists(args: Any, kwargs: Any, output: Any) -> bool:
    """Whether rows are tensors of their own, in lists."""
    found = [f for f in tensors(output) if f.is_floating_point()]
    given = [x for x in tensors((args, kwargs)) if x.ndim > 1 and x.is_floating_point()][: len(found)]
    return len(given) == len(found) > 1 and len({x.shape for x in given}) == len({f.shape for f in found}) == 1
