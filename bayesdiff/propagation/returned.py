"""What a function returned, as one tensor with its tangents: ``(B, C, H, W)``, or whatever shape it has.

Results leave PyTorch in many ways: as tensors in a nest, as NumPy arrays with the channels last, as PIL images. Arrays
and images are
matched with what was handed out by ``.numpy()``, value by value; what matches nothing has no tangents, and is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bayesdiff.checks import UnsupportedPipelineError
from bayesdiff.tracing.dual import DualNumbers


@dataclass(frozen=True)
class Returned:
    """The main result.

    Args:
        value: As it was returned, in PyTorch's order of dimensions.
        tangents: ``(L, *shape)``, before the last clamp.
    """

    value: Tensor
    tangents: Tensor


def main_result(output: Any) -> Any:
    """The first thing in what a function returned: ``.images``, ``[0]``, the first attribute that holds numbers, or itself."""
    if isinstance(output, Tensor | np.ndarray | Image.Image | list):
        return output
    if isinstance(output, dict):  # diffusers' outputs are dictionaries, too
        values = list(output.values())
    elif isinstance(output, tuple):
        values = list(output)
    else:
        values = list(getattr(output, "__dict__", {}).values())
    return next((v for v in values if _holds_numbers(v)), values[0] if isinstance(output, tuple) and values else output)


def _holds_numbers(value: Any) -> bool:
    return any(isinstance(leaf, Tensor | np.ndarray | Image.Image) for leaf in tree_leaves(value))


def returned(output: Any, trace: DualNumbers) -> Returned:
    """The main result and its tangents.

    Raises:
        UnsupportedPipelineError: It has none.
    """
    result = main_result(output)
    for leaf in tree_leaves(result) + tree_leaves(output):
        if isinstance(leaf, Tensor):
            tangents = trace.unclamped(leaf)
            if tangents is not None and tangents.is_complex():
                raise UnsupportedPipelineError(
                    f"expected a result of real numbers, got {leaf.dtype}: return torch.view_as_real of it"
                )
            if tangents is not None:
                return _listed(result, leaf, trace) or Returned(leaf.detach(), tangents)
    found = _array(result, trace) or _pictures(result, trace)
    if found is not None:
        return found
    left = "; ".join(dict.fromkeys(f"{e.how} at {e.where}" for e in trace.escapes)) or "none"
    raise UnsupportedPipelineError(
        f"expected a result that depends on the network's output through PyTorch, got {type(result).__name__} that does not "
        f'(values left PyTorch: {left}); return tensors (output_type="pt"), or use propagation="ensemble"'
    )


def values(output: Any, trace: DualNumbers | None) -> Tensor:
    """The main result's values, float64, in PyTorch's order of dimensions; before the last clamp where a trace knows it."""
    result = main_result(output)
    leaves = tree_leaves(result)
    if leaves and all(isinstance(x, Tensor) for x in leaves):
        known = [None if trace is None else trace.unclamped(x) for x in leaves]
        every = [x if before is None else before[0] for x, before in zip(leaves, known, strict=True)]
        return every[0].double() if len(every) == 1 else torch.stack(every).double()
    if trace is not None:
        handed = _array(result, trace) or _pictures(result, trace)
        if handed is not None:
            return handed.tangents[0].double()
    if all(isinstance(x, Image.Image) for x in leaves):
        pictures = np.stack([np.asarray(x, dtype=np.float64) for x in leaves]) / 255
        pictures = pictures[..., None] if pictures.ndim == 3 else pictures
        found = torch.from_numpy(pictures).movedim(-1, -3)
        nested = isinstance(result, list) and isinstance(result[0], list)
        return found.unflatten(0, (len(result), len(result[0]))) if nested else found
    if all(isinstance(x, np.ndarray | float | int) for x in leaves):
        array = np.asarray(result if isinstance(result, np.ndarray) else leaves)
        return _placed(torch.from_numpy(np.ascontiguousarray(array)).double(), _channels_last(np.asarray(leaves[0])))
    raise UnsupportedPipelineError(
        f"expected the function to return tensors, arrays or PIL images, got {type(result).__name__}"
    )


def _listed(result: Any, leaf: Tensor, trace: DualNumbers) -> Returned | None:
    """A list of equal tensors, one for each sample."""
    leaves = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    tangents = [trace.unclamped(x) for x in leaves]
    if len(leaves) < 2 or any(t is None or x.shape != leaf.shape for x, t in zip(leaves, tangents, strict=True)):
        return None
    return Returned(torch.stack(leaves), torch.stack([t for t in tangents if t is not None], dim=1))


def _escaped(trace: DualNumbers) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Arrays that were handed out, the last first, with their tangents."""
    for e in reversed(trace.escapes):
        if isinstance(e.array, np.ndarray) and e.tangents.shape[0]:
            yield e.array, e.unclamped


def _channels_last(array: np.ndarray) -> bool:
    """Whether an array has its channels last: moved there, so that they lie farther apart than their neighbours, or as pixels."""
    if array.ndim < 3:
        return False
    return abs(array.strides[-1]) > abs(array.strides[-2]) or (
        array.shape[-1] in (1, 3, 4) and array.shape[-3] not in (1, 3, 4)
    )


def _placed(tangents: Tensor, moved: bool) -> Tensor:
    return tangents.movedim(-1, -3) if moved else tangents


def _array(result: Any, trace: DualNumbers) -> Returned | None:
    """A NumPy array: one that was handed out, or several of them stacked or joined."""
    if isinstance(result, list) and result and all(isinstance(a, np.ndarray) for a in result):
        result = np.stack(result)
    if not isinstance(result, np.ndarray):
        return None
    parts: list[tuple[np.ndarray, Tensor]] = []
    for array, tangents in _escaped(trace):
        parts.insert(0, (array, tangents))
        for join, torch_join in ((np.concatenate, torch.cat), (np.stack, torch.stack)):
            arrays = [a for a, _ in parts]
            if len({a.shape for a in arrays}) > 1 or (join is np.concatenate and array.ndim == 0):
                continue
            whole = join(arrays)
            if whole.shape == result.shape and np.array_equal(whole, result):
                moved = _channels_last(array)
                t = torch_join([t for _, t in parts], 1)
                value = torch.from_numpy(np.ascontiguousarray(result))
                return Returned(_placed(value, moved), _placed(t, moved))
    return None


def _pictures(result: Any, trace: DualNumbers) -> Returned | None:
    """PIL images, maybe in lists of lists: arrays that were handed out, rounded to 8 bits."""
    pictures = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Image.Image)]
    if not pictures:
        return None
    shown = np.stack([np.asarray(p, dtype=np.float64) for p in pictures])
    shown = shown[..., None] if shown.ndim == 3 else shown
    parts: list[tuple[np.ndarray, Tensor]] = []
    for array, tangents in _escaped(trace):
        if array.ndim < 3:
            continue
        frames = array.reshape(-1, *array.shape[-3:])
        parts.insert(0, (frames, tangents.reshape(len(tangents), -1, *array.shape[-3:])))
        if sum(len(f) for f, _ in parts) < len(pictures):
            continue
        whole = np.concatenate([f for f, _ in parts])
        if whole.shape == shown.shape and float(np.abs(whole * 255 - shown).max()) <= 1:
            t = torch.cat([t for _, t in parts], dim=1).movedim(-1, -3)
            value = torch.from_numpy(whole).movedim(-1, -3)
            if isinstance(result, list) and isinstance(result[0], list):
                size = (len(result), len(result[0]))
                value, t = value.unflatten(0, size), t.unflatten(1, size)
            return Returned(value, t)
        if len(whole) >= len(pictures):
            return None
    return None
