"""Network calls row by row, so that a sample's numbers do not depend on the batch it is in.

A network evaluated on a batch of eight and on one of them alone gives the same numbers only to rounding: libraries choose
their algorithms by the size of the batch. One row at a time, they have no choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import UnsupportedPipelineError


@contextmanager
def in_rows(
    network: nn.Module,
    count: Callable[[tuple[Any, ...], dict[str, Any]], int],
    aside: Callable[[], AbstractContextManager[None]],
) -> Iterator[None]:
    """Evaluate ``network`` one row at a time while the context is open.

    Args:
        network: Its ``forward`` is wrapped on the instance, and restored.
        count: From the arguments of a call, its number of rows. Every tensor among them, in lists and dicts too, whose first
            dimension has that length is taken to have a row for each.
        aside: A context for the one call of the whole batch that rows are checked against, at the first.

    Raises:
        UnsupportedPipelineError: The first call shows that rows of the batch are not those of single calls.
    """
    forward = network.forward
    before = network.__dict__.get("forward")
    checked = False

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        rows = count(args, kwargs)
        outputs = [forward(*row_of(args, rows, i), **row_of(kwargs, rows, i)) for i in range(rows)]
        joined = _join(outputs)
        if not checked and rows > 1:
            checked = True
            with aside():
                whole = first_tensor(forward(*args, **kwargs))
            _check(first_tensor(joined), whole, network)
        return joined

    network.forward = wrapper
    try:
        yield
    finally:
        del network.__dict__["forward"]
        if before is not None:
            network.__dict__["forward"] = before


def row_of(value: Any, rows: int, i: int) -> Any:
    if isinstance(value, Tensor):
        return value[i : i + 1] if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {k: row_of(v, rows, i) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(row_of(v, rows, i) for v in value)
    return value


def repeated(value: Any, rows: int, times: int) -> Any:
    """Arguments of a call with every row ``times`` times, one whole batch after the other."""
    if isinstance(value, Tensor):
        return value.repeat(times, *(1,) * (value.ndim - 1)) if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {k: repeated(v, rows, times) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(repeated(v, rows, times) for v in value)
    return value


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


def _check(rows: Tensor, batch: Tensor, network: nn.Module) -> None:
    apart, size = float((rows - batch).abs().max()), float(batch.abs().max())
    allowed = torch.finfo(batch.dtype).eps ** 0.5 * size
    if not apart <= allowed:
        raise UnsupportedPipelineError(
            f"expected {type(network).__name__} to give each row of a batch what it gives the row alone, got a difference "
            f"of {apart:.3g} (allowed: {allowed:.3g}): its rows depend on each other, or an argument that is not by row has "
            f"as many elements as there are rows; use batch_invariant=False"
        )
