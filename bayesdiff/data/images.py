"""Any of the forms in which images come, opened: :func:`open_images`, and batches from it: :class:`ImageData`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from bayesdiff.checks import ArgumentError, check_int
from bayesdiff.data.folder import Entry, read_folder_of_images
from bayesdiff.data.framing import Framing
from bayesdiff.data.items import IMAGE_KEYS, LABELS, PROMPTS, image_key, is_array, is_picture, parts, texts
from bayesdiff.data.labels import in_order, numbered
from bayesdiff.data.sources import Batch, Files, Items, Source, Stream, Whole


class ImageData:
    """Images with what belongs to them, in batches for a network; made by :func:`open_images`.

    Args:
        source: Where they come from.
        prompts: Given apart, one for each image or one for all: instead of those that the source has.
        labels: Given apart.

    Raises:
        ArgumentError: There are not as many prompts or labels as images.
    """

    def __init__(
        self, source: Source, prompts: str | Sequence[str] | None = None, labels: Tensor | None = None
    ) -> None:
        self.source, self.prompts, self.labels = source, prompts, labels
        for name, apart in (("prompts", prompts), ("labels", labels)):
            if (
                apart is not None
                and not isinstance(apart, str)
                and source.length is not None
                and len(apart) != source.length
            ):
                raise ArgumentError(f"expected {source.length} {name}, one for each image, got {len(apart)}")

    @property
    def length(self) -> int | None:
        """The number of images; None for a stream, which does not say."""
        return self.source.length

    def __len__(self) -> int:
        if self.source.length is None:
            raise TypeError("a stream of images has no length")
        return self.source.length

    def batches(self, size: int, first: int = 0) -> Iterator[Batch]:
        """Batches of ``size`` images, from number ``first`` on.

        Yields:
            Images, floating-point ``(n, C, H, W)`` on the CPU in the network's range; and a mapping, which may have ``"prompts"``
            (a list of n texts), ``"class_labels"`` (int64, ``(n,)``), and further tensors of n rows by their names.

        Raises:
            ArgumentError, ShapeError, NonFiniteError: An image cannot be used, or prompts end before images do.
        """
        check_int("size", size, least=1)
        for images, rest in self.source.batches(size, check_int("first", first, least=0)):
            last = first + len(images)
            for name, apart in ((PROMPTS, self.prompts), (LABELS, self.labels)):
                if isinstance(apart, str):
                    rest = {**rest, name: [apart] * len(images)}
                elif apart is not None:
                    if len(apart) < last:
                        raise ArgumentError(
                            f"expected one of the {name} for each image, got {len(apart)} for at least {last} images"
                        )
                    rest = {**rest, name: apart[first:last]}
            yield images, rest
            first = last
        for name, apart in ((PROMPTS, self.prompts), (LABELS, self.labels)):
            if apart is not None and not isinstance(apart, str) and len(apart) > first:
                raise ArgumentError(f"expected one of the {name} for each image, got {len(apart)} for {first} images")

    def digest(self) -> str:
        """What tells these data from others, without reading all of them."""
        labels = None if self.labels is None else self.labels.tolist()
        return f"{self.source.digest()}:{self.prompts!r}:{labels!r}" if self.prompts or labels else self.source.digest()

    def __repr__(self) -> str:
        """One line."""
        return f"ImageData({type(self.source).__name__.lower()}, {self.length if self.length is not None else 'unknown'} images)"


def open_images(
    images: Any,
    prompts: Any = None,
    framing: Framing | None = None,
    *,
    names: Mapping[str, int] | None = None,
) -> ImageData:
    """Open images in any of their forms.

    Args:
        images: A folder in Hugging Face's ``imagefolder`` form (:mod:`bayesdiff.data.folder`); a list of files; a
            ``datasets.Dataset``; a torch ``Dataset`` of images, of (image, caption or label) or of mappings; a list of PIL
            images, arrays or such items; one array or tensor ``(n, C, H, W)``, an array also ``(n, H, W, C)``; a mapping
            with ``"images"`` and what belongs to them; an iterable of batches; or what this function returned.
        prompts: A caption for each image, or one for all (or a label for each, if they are integers; a list, an array or a
            tensor), instead of those that the data have.
        framing: Size, channels and range of what the network takes.
        names: The model's classes, for data whose labels are names.

    Raises:
        ArgumentError: The images have none of these forms, a range that cannot be right, or not as many prompts.
        EmptyDataError: A folder has no images.
        BadImagesError: Some cannot be used; all are listed.
        UnknownNameError: A label is not among ``names``.
        ShapeError, NonFiniteError: Arrays don't fit, or are NaN or infinite.
    """
    source = images.source if isinstance(images, ImageData) else _source(images, framing or Framing(), names)
    if prompts is None:
        return images if isinstance(images, ImageData) else ImageData(source)
    if isinstance(prompts, np.ndarray) and prompts.dtype.kind not in "biuf":
        prompts = prompts.tolist()
    whole = (int, np.integer)
    if is_array(prompts) or (isinstance(prompts, (list, tuple, range)) and prompts and isinstance(prompts[0], whole)):
        labels = torch.as_tensor(prompts) if is_array(prompts) else numbered(list(prompts))
        if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ArgumentError(f"expected labels as integers (n,), got {labels.dtype} {tuple(labels.shape)}")
        return ImageData(source, labels=labels.long())
    return ImageData(source, prompts=prompts if isinstance(prompts, str) else texts(prompts))


def _source(images: Any, framing: Framing, names: Mapping[str, int] | None) -> Source:
    if isinstance(images, (str, os.PathLike)):
        return Files(repr(os.fspath(images)), read_folder_of_images(images), framing, names)
    if is_array(images):
        return Whole(images, {}, framing, names)
    if isinstance(images, Mapping):
        if (
            not any(key in images for key in IMAGE_KEYS)
            and images
            and all(hasattr(v, "column_names") for v in images.values())
        ):
            raise ArgumentError(f"expected one split of a data set, got {', '.join(map(str, images))}: give one")
        key = image_key(images)
        value, rest = parts(images)
        if isinstance(value, (list, tuple)) and len(value) and not isinstance(value[0], (int, float, list)):
            return _with(_source(value, framing, names), rest, names, key)
        return Whole(value, rest, framing, names)
    if hasattr(images, "column_names") and hasattr(images, "features"):  # datasets.Dataset and its iterable sister
        return _table(images, framing, names)
    if isinstance(images, IterableDataset):
        return Stream(images, framing, names, single=True)
    if isinstance(images, Dataset):
        if not hasattr(images, "__len__"):
            raise ArgumentError(f"expected a Dataset with a length, got {type(images).__name__}, which has none")
        return Items("the data set", images, framing, names, scan=False)
    if isinstance(images, Image.Image):
        raise ArgumentError("expected several images, got one PIL image: put it into a list")
    if isinstance(images, (list, tuple)) and images:
        return _list(images, framing, names)
    if isinstance(images, Iterable):
        return Stream(images, framing, names, single=False)
    raise ArgumentError(
        "expected images as a folder, a Dataset, a list of images, an array or tensor, a mapping with 'images', or "
        f"an iterable of batches, got {type(images).__name__}"
    )


def _list(images: Sequence[Any], framing: Framing, names: Mapping[str, int] | None) -> Source:
    """Files, single images, or batches: told by the first."""
    if isinstance(images[0], (str, os.PathLike)):
        return Files("the list of files", [Entry(str(path), Path(path)) for path in images], framing, names)
    several = isinstance(images[0], list) and all(isinstance(image, Image.Image) for image in images[0])
    first: Any = None if several else parts(images[0])[0]
    if is_picture(first) or (is_array(first) and (first.ndim == 3 or _is_grey(first))):
        return Items("the list of images", images, framing, names, scan=True)
    return Stream(images, framing, names, single=False)


def _is_grey(image: Any) -> bool:
    return image.ndim == 2 and str(image.dtype).endswith("uint8")


def _table(table: Any, framing: Framing, names: Mapping[str, int] | None) -> Source:
    """A ``datasets.Dataset``: its image, caption and label columns. A column of arrays goes to the network by its name."""
    features = dict(table.features or {})
    if not hasattr(table, "__len__"):
        return Stream((_row(row, features, names) for row in table), framing, names, single=True)
    image_key(features)
    return Items("the data set", _Rows(table, features, names), framing, names, scan=True)


class _Rows:
    def __init__(self, table: Any, features: Mapping[str, Any], names: Mapping[str, int] | None) -> None:
        self.table, self.features, self.names = table, features, names

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return _row(self.table[number], self.features, self.names)


def _row(row: Mapping[str, Any], features: Mapping[str, Any], names: Mapping[str, int] | None) -> dict[str, Any]:
    """One row without columns that are neither image, caption, label nor tensor; labels by the model's number of their name."""
    key = image_key(row)
    out = {key: row[key]}
    _, rest = parts({"image": None, **{k: v for k, v in row.items() if k != key}})
    for name, value in rest.items():
        if name == LABELS:
            feature = next(
                (features[k] for k in features if k in ("label", "labels", "class_label", "class_labels")), None
            )
            called = getattr(feature, "names", None)
            if names and called and isinstance(value, int):  # both sides name their classes: names count, not numbers
                value = int(numbered([called[value]], names))
            out[name] = value
        elif name == PROMPTS or is_array(value):
            out[name] = value
    return out


def _with(source: Source, rest: Mapping[str, Any], names: Mapping[str, int] | None, key: str) -> Source:
    """Single images from a mapping's list, with what the mapping has beside it."""
    if isinstance(source, Files):
        source = Items("the list of files", [e.path for e in source.entries], source.framing, names, scan=False)
    if not isinstance(source, Items):
        raise ArgumentError(f"expected {key!r} as an array, a tensor or a list of images, got a list of something else")
    lengths = {name: len(value) for name, value in rest.items()}
    if any(length != source.length for length in lengths.values()):
        raise ArgumentError(f"expected {source.length} of each beside the images, got {lengths}")
    rows = [
        {"image": image, **{name: value[i] for name, value in rest.items()}} for i, image in enumerate(source.sequence)
    ]
    if not names and any(isinstance(label, str) for label in rest.get(LABELS, ())):
        names = in_order([label for label in rest[LABELS] if isinstance(label, str)])
    return Items("the list of images", rows, source.framing, names, scan=False)
