"""One item of a data set — an image alone, (image, caption or label), or a mapping — as its image and what belongs to it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bayesdiff.checks import ArgumentError, ShapeError
from bayesdiff.data.folder import LABEL_KEYS, PROMPT_KEYS
from bayesdiff.data.framing import UNREADABLE, Framing
from bayesdiff.data.labels import numbered

IMAGE_KEYS = ("images", "image", "pixel_values", "img")
#: Under these names a batch's prompts and labels reach the fit.
PROMPTS, LABELS = "prompts", "class_labels"


def is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def is_picture(value: Any) -> bool:
    """Whether this is one image: of PIL, or a file's name."""
    return isinstance(value, (Image.Image, str, os.PathLike))


def image_key(item: Mapping[str, Any]) -> str:
    """Under which name the image is.

    Raises:
        ArgumentError: There is none, or several.
    """
    found = [key for key in IMAGE_KEYS if key in item]
    if len(found) != 1 and "images" not in found:  # beside "images", "image" is something else that a pipeline takes
        raise ArgumentError(f"expected a mapping with the key 'images', got {list(item)}")
    return found[0]


def parts(item: Any) -> tuple[Any, dict[str, Any]]:
    """The image (or a batch of them), and what belongs to it: ``prompts``, ``class_labels``, other tensors by their names.

    Raises:
        ArgumentError: It has another form.
    """
    if is_picture(item) or is_array(item):
        return item, {}
    if isinstance(item, Mapping):
        key = image_key(item)
        rest: dict[str, Any] = {}
        for name, value in item.items():
            if name == key:
                continue
            wanted = PROMPTS if name in PROMPT_KEYS else LABELS if name in LABEL_KEYS else name
            if wanted in rest:
                raise ArgumentError(
                    f"expected one of {', '.join(map(repr, PROMPT_KEYS + LABEL_KEYS))} of a kind, got {list(item)}"
                )
            rest[wanted] = value
        return item[key], rest
    if (
        isinstance(item, (tuple, list))
        and 1 <= len(item) <= 2
        and (is_array(item[0]) or isinstance(item[0], Image.Image) or (isinstance(item, tuple) and is_picture(item[0])))
    ):
        return item[0], {} if len(item) == 1 else _second(item[1])
    raise ArgumentError(
        "expected an image (PIL, array or tensor), (image, caption or label), or a mapping with the key 'images', got "
        f"{type(item).__name__}"
    )


def _second(value: Any) -> dict[str, Any]:
    if isinstance(value, str) or (isinstance(value, (list, tuple)) and value and isinstance(value[0], str)):
        return {PROMPTS: value}
    if isinstance(value, Mapping):
        return parts({"images": None, **value})[1]
    if isinstance(value, Image.Image):
        raise ArgumentError("expected a caption or an integer label beside an image, got another image")
    array = value if is_array(value) else np.asarray(value)
    if (
        array.dtype in (torch.int64, torch.int32, torch.uint8)
        if isinstance(array, Tensor)
        else array.dtype.kind in "iu"
    ):
        return {LABELS: value}
    raise ArgumentError(
        f"expected a caption or an integer label beside an image, got {type(value).__name__}: give a mapping with names"
    )


def checked(
    images: Tensor, rest: Mapping[str, Any], names: Mapping[str, int] | None = None, *, whole: bool = False
) -> dict[str, Any]:
    """What belongs to a batch of images: a list of prompts, tensors of as many rows, lists of what is no number.

    Args:
        images: The batch.
        rest: Beside it.
        names: The model's classes.
        whole: Whether the batch is all of the data: then classes that the model does not name can be numbered.

    Raises:
        ArgumentError: Prompts are no text, or something is no tensor, array or number; or labels are names which nobody numbers.
        ShapeError: There are not as many rows as images.
    """
    out: dict[str, Any] = {}
    for name, value in rest.items():
        if name == PROMPTS:
            out[name] = texts(value)
        elif name == LABELS and (isinstance(value, (list, tuple)) or _are_texts(value)):
            labels = list(value)
            if not names and not whole and any(isinstance(v, str) for v in labels):
                raise ArgumentError(
                    f"expected labels that are numbers where the model names no classes, got {labels[0]!r}: names can be "
                    "numbered where all of them are at hand, in a folder, a list or a mapping"
                )
            out[name] = numbered(labels, names)
        elif isinstance(value, (list, tuple)) and not all(isinstance(v, (int, float, np.number)) for v in value):
            out[name] = list(value)
        else:
            try:
                out[name] = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ArgumentError(
                    f"expected tensors, arrays or numbers for {name!r}, got {type(value).__name__} ({error})"
                ) from error
        rows = len(out[name]) if isinstance(out[name], list) or out[name].ndim else None
        if rows != len(images):
            shape = rows if isinstance(out[name], list) else tuple(out[name].shape)
            raise ShapeError(f"expected {len(images)} rows of {name!r}, one for each image, got {shape}")
    return out


def _are_texts(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "UO"


def texts(value: Any) -> list[str]:
    """A list of prompts.

    Raises:
        ArgumentError: It is one text for all, or something in it is no text.
    """
    if _are_texts(value):
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ArgumentError(f"expected a list of prompts, one for each image, got {type(value).__name__}")
    for number, text in enumerate(value):
        if not isinstance(text, str):
            raise ArgumentError(f"expected prompts that are text, got {type(text).__name__} as number {number}")
    return [str(text) for text in value]


def opened(image: Any) -> Any:
    """An image, read from its file if it is a file's name."""
    return Image.open(image) if isinstance(image, (str, os.PathLike)) else image


def framed(number: int | str, image: Any, framing: Framing) -> Tensor:
    """One image as a tensor.

    Raises:
        ArgumentError: A PIL image cannot be used, or it is no image at all.
        ShapeError, NonFiniteError: As :meth:`Framing.array`.
    """
    if is_picture(image):
        try:
            picture = opened(image)
            why = framing.problem(picture)
            if why is None:
                return framing.picture(picture)
        except UNREADABLE as error:
            why = f"cannot be read ({type(error).__name__}: {error})"
        raise ArgumentError(f"expected images that can be used, got number {number}: {why}")
    if is_array(image):
        return framing.array(f"images (number {number})", image)
    raise ArgumentError(f"expected a PIL image, an array or a tensor as image {number}, got {type(image).__name__}")


def collated(
    items: Sequence[tuple[Tensor, dict[str, Any]]], names: Mapping[str, int] | None
) -> tuple[Tensor, dict[str, Any]]:
    """Single items as a batch.

    Raises:
        ShapeError: Images, or what belongs to them, are of several sizes.
        ArgumentError: Some items have what others do not.
    """
    sizes = {tuple(image.shape) for image, _ in items}
    if len(sizes) > 1:
        raise ShapeError(
            f"expected images of one size, got {', '.join(map(str, sorted(sizes)))}: say size=(height, width)"
        )
    keys = {tuple(sorted(rest)) for _, rest in items}
    if len(keys) > 1:
        raise ArgumentError(f"expected the same beside every image, got {' and '.join(map(str, sorted(keys)))}")
    rest: dict[str, Any] = {}
    for name in items[0][1]:
        values = [one[name] for _, one in items]
        try:
            rest[name] = torch.stack([torch.as_tensor(v) for v in values]) if is_array(values[0]) else values
        except RuntimeError as error:
            raise ShapeError(f"expected {name!r} of one shape for all images, got {error}") from error
    images = torch.stack([image for image, _ in items])
    return images, checked(images, rest, names)
