"""Data as batches of (images, conditioning): one column of conditioning for each thing that a network is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from bayesdiff.checks import ArgumentError, ShapeError

Batch = tuple[Tensor, dict[str, Any]]


def length(data: Any) -> int | None:
    """The number of images, where the data tell it."""
    if isinstance(data, (Tensor, Mapping)):
        return len(split(data)[0])
    return len(data) if isinstance(data, Dataset) and hasattr(data, "__len__") else None


def batches(data: Any, prompts: Any, batch_size: int) -> Iterator[Batch]:
    """Cut any of the accepted forms of data into batches.

    Args:
        data: See :func:`bayesdiff.fit`.
        prompts: Beside it: one for each image, one for all, or None.
        batch_size: Images in each.

    Raises:
        ArgumentError: Data of another form; prompts fewer or more than images.
        ShapeError: Columns of another length than the images.
    """
    if prompts is None:
        yield from _batches(data, batch_size)
        return
    listed = None if isinstance(prompts, str) else list(prompts)
    if listed is not None and not all(isinstance(p, str) for p in listed):
        raise ArgumentError("expected prompts as strings, one for each image, got something else among them")
    known, first = length(data), 0
    if listed is not None and known is not None and len(listed) != known:
        raise ArgumentError(f"expected {known} prompts, one for each image, got {len(listed)}")
    for images, conditioning in _batches(data, batch_size):
        if "prompts" in conditioning:
            raise ArgumentError("expected prompts once, got them beside the data and among it")
        own = [prompts] * len(images) if listed is None else listed[first : first + len(images)]
        first += len(images)
        if len(own) < len(images):
            raise ArgumentError(
                f"expected a prompt for each image, got {len(listed or ())} for {first} images and more"
            )
        yield images, {"prompts": own, **conditioning}
    if listed is not None and first < len(listed):
        raise ArgumentError(f"expected {first} prompts, one for each image, got {len(listed)}")


def _batches(data: Any, batch_size: int) -> Iterator[Batch]:
    if isinstance(data, (Tensor, Mapping)):
        images, conditioning = split(data)
        for i in range(0, len(images), batch_size):
            yield images[i : i + batch_size], {k: v[i : i + batch_size] for k, v in conditioning.items()}
    elif isinstance(data, Dataset):
        # A generator of its own: a DataLoader draws a seed, also when nothing is shuffled.
        for batch in DataLoader(data, batch_size=batch_size, generator=Generator()):
            yield split(batch)
    elif isinstance(data, Iterable):
        for batch in data:
            images, _ = split(batch)
            if len(images):
                yield from _batches(batch, batch_size)
    else:
        raise ArgumentError(
            "expected data as a tensor, a mapping with 'images', a Dataset, or an iterable of batches, got "
            f"{type(data).__name__}"
        )


def split(batch: Any) -> Batch:
    """A batch as images and what is told of them: tensors, or lists of what is no number.

    Args:
        batch: A tensor, a mapping with ``"images"``, or a pair of images and a mapping.

    Raises:
        ArgumentError: Something else, or no tensor of images.
        ShapeError: Columns of another length than the images.
    """
    if isinstance(batch, Tensor):
        batch = {"images": batch}
    elif isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[1], Mapping):
        batch = {"images": batch[0], **batch[1]}
    if not isinstance(batch, Mapping) or "images" not in batch:
        keys = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ArgumentError(f"expected a tensor or a mapping with the key 'images', got {keys}")
    columns: dict[str, Any] = {}
    for name, value in batch.items():
        if (
            isinstance(value, (list, tuple))
            and name != "images"
            and not all(isinstance(v, (int, float)) for v in value)
        ):
            columns[name] = list(value)
            continue
        try:
            columns[name] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(
                f"expected tensors, arrays, numbers or lists for {name!r}, got {type(value).__name__} ({error})"
            ) from error
    images = columns.pop("images")
    if images.ndim == 0:
        raise ShapeError("expected images (n, channels, height, width), got a scalar")
    for name, column in columns.items():
        rows = len(column) if not isinstance(column, Tensor) or column.ndim else None
        if rows != len(images):
            shape = tuple(column.shape) if isinstance(column, Tensor) else rows
            raise ShapeError(f"expected {len(images)} rows of {name!r}, one for each image, got {shape}")
    return images, columns
