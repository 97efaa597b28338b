"""Where images come from: a folder, a sequence of items, whole arrays, or a stream. Each yields batches from any image on."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bayesdiff.checks import ArgumentError, BayesdiffError, ShapeError
from bayesdiff.data.folder import Entry, listed
from bayesdiff.data.framing import UNREADABLE, Framing
from bayesdiff.data.items import LABELS, PROMPTS, checked, collated, framed, is_array, is_picture, opened, parts
from bayesdiff.data.labels import in_order, numbered

Batch = tuple[Tensor, dict[str, Any]]
_PEEK = 64  # images that are looked at to see what their range is


class Source(Protocol):
    """Batches of images and what belongs to them, in an order that does not change."""

    #: The number of images, where it is known before they are read.
    length: int | None

    def batches(self, size: int, first: int) -> Iterator[Batch]:
        """Batches of ``size`` images from number ``first`` on."""

    def digest(self) -> str:
        """What tells these data from others: names and sizes of files, some of the numbers."""


class Files:
    """Image files, each of which is read through once before anything else is done.

    Raises:
        BadImagesError: Some cannot be used; all are listed.
    """

    def __init__(self, name: str, entries: Sequence[Entry], framing: Framing, names: Mapping[str, int] | None) -> None:
        self.entries, self.framing = entries, framing
        self.length: int | None = len(entries)
        labels = [e.label for e in entries if e.label is not None]
        self.labels = numbered(labels, names) if labels else None
        if self.labels is not None and len(labels) < len(entries):
            raise ArgumentError(f"expected a label for each of the {len(entries)} images, got {len(labels)}")
        problems = [(e.name, why) for e in entries if (why := self._problem(e)) is not None]
        if problems:
            raise listed(name, problems, len(entries))

    def _problem(self, entry: Entry) -> str | None:
        try:
            with Image.open(entry.path) as image:
                why = self.framing.problem(image)
                if why is None:
                    image.load()
                return why
        except UNREADABLE as error:
            return (
                f"cannot be read ({type(error).__name__}: {str(error).split(str(entry.path))[0].strip() or 'damaged'})"
            )

    def batches(self, size: int, first: int) -> Iterator[Batch]:
        for start in range(first, len(self.entries), size):
            chosen = self.entries[start : start + size]
            images = []
            for entry in chosen:
                with Image.open(entry.path) as image:
                    images.append((self.framing.picture(image), {} if entry.text is None else {PROMPTS: entry.text}))
            batch, rest = collated(images, None)
            if self.labels is not None:
                rest[LABELS] = self.labels[start : start + size]
            yield batch, rest

    def digest(self) -> str:
        return _hash([(e.name, e.path.stat().st_size, e.text, e.label) for e in self.entries])


class Items:
    """A sequence that gives item i when it is asked for: a list, a torch ``Dataset``, a ``datasets.Dataset``.

    Args:
        name: What to call it in errors.
        sequence: Of items.
        framing: What the network takes.
        names: The model's classes.
        scan: Look at every image first, and list what cannot be used. Not for a torch ``Dataset``, which may be dear to read.
    """

    def __init__(
        self, name: str, sequence: Any, framing: Framing, names: Mapping[str, int] | None, *, scan: bool
    ) -> None:
        self.sequence, self.framing, self.names = sequence, framing, names
        self.length: int | None = len(sequence)
        self._labels: list[Any] = []
        if scan:
            problems = [(f"image {i}", why) for i in range(self.length) if (why := self._problem(i)) is not None]
            if problems:
                raise listed(name, problems, self.length)
            if not names and any(isinstance(label, str) for label in self._labels):
                self.names = in_order([label for label in self._labels if isinstance(label, str)])
        with torch.random.fork_rng(devices=[]):  # data that are drawn at random are looked at, not used up
            few = [parts(sequence[i])[0] for i in range(min(self.length, _PEEK))]
        _check_few(few, framing)

    def _problem(self, number: int) -> str | None:
        try:
            image, rest = parts(self.sequence[number])
            self._labels.append(rest.get(LABELS))
            if is_picture(image):
                image = opened(image)
                why = self.framing.problem(image)
                if why is None:
                    image.load()
                return why
        except BayesdiffError:
            raise
        except UNREADABLE as error:
            return f"cannot be read ({type(error).__name__}: {error})"
        return None

    def _item(self, number: int) -> tuple[Tensor, dict[str, Any]]:
        image, rest = parts(self.sequence[number])
        return framed(number, image, self.framing), rest

    def batches(self, size: int, first: int) -> Iterator[Batch]:
        assert self.length is not None
        for start in range(first, self.length, size):
            yield collated([self._item(i) for i in range(start, min(start + size, self.length))], self.names)

    def digest(self) -> str:
        assert self.length is not None
        with torch.random.fork_rng(devices=[]):
            ends = [self._item(i) for i in sorted({0, self.length // 2, self.length - 1}) if self.length]
        return _hash([self.length, [(_numbers(image), _rest(rest)) for image, rest in ends]])


class Whole:
    """All images in one tensor or array; or, not ``whole``, some of them."""

    def __init__(
        self, images: Any, rest: Mapping[str, Any], framing: Framing, names: Mapping[str, int] | None, *, whole: bool = True
    ) -> None:  # fmt: skip
        images = _as_array(images)
        if images.ndim == 0:
            raise ShapeError("expected images (n, channels, height, width), got a scalar")
        self.images, self.framing = images, framing
        self.rest = checked(images, rest, names, whole=whole)
        self.length: int | None = len(images)
        framing.check_range("images", images)

    def batches(self, size: int, first: int) -> Iterator[Batch]:
        for i in range(first, len(self.images), size):
            images = self.framing.arrays("images", self.images[i : i + size])
            yield images, {name: value[i : i + size] for name, value in self.rest.items()}

    def digest(self) -> str:
        return _hash([_numbers(self.images), _rest(self.rest)])


class Stream:
    """An iterable: of batches, or (``single``) of items. It is read once, from its beginning."""

    length: int | None = None

    def __init__(
        self, iterable: Iterable[Any], framing: Framing, names: Mapping[str, int] | None, *, single: bool
    ) -> None:
        self.iterable, self.framing, self.names, self.single = iterable, framing, names, single

    def batches(self, size: int, first: int) -> Iterator[Batch]:
        seen = 0
        for whole in self._whole(size):
            length = len(whole.images)
            skipped = min(length, max(0, first - seen))
            yield from whole.batches(size, skipped)
            seen += length

    def _whole(self, size: int) -> Iterator[Whole]:
        """Each batch, however large it came."""
        batches = iter(self.iterable)
        ahead = list(itertools.islice(batches, 1))
        whole, given = itertools.chain(ahead, batches), self.single or not ahead
        if not given and isinstance(ahead[0], list) and all(isinstance(image, Image.Image) for image in ahead[0]):
            whole, given = itertools.chain.from_iterable(whole), True  # lists of PIL images
        if not given and not is_picture(parts(ahead[0])[0]):
            for number, batch in enumerate(whole):
                images, rest = parts(batch)
                images = _as_array(images)
                if images.ndim == 0 or len(images):
                    # Only the first is asked whether a negative number is there: a small one may have none.
                    first = not number
                    yield (
                        Whole(images, rest, self.framing, self.names, whole=False)
                        if first
                        else _Later(images, rest, self)
                    )
            return
        items: list[tuple[Any, dict[str, Any]]] = []
        count = 0
        for item in whole:
            items.append(parts(item))
            if len(items) == size:
                yield self._joined(items, count)
                count += len(items)
                items = []
        if items:
            yield self._joined(items, count)

    def _joined(self, items: list[tuple[Any, dict[str, Any]]], count: int) -> Whole:
        if not count:
            _check_few([image for image, _ in items], self.framing)
        few = [(framed(count + i, image, self.framing), rest) for i, (image, rest) in enumerate(items)]
        images, rest = collated(few, self.names)
        return _Later(images, rest, self, Framing(value_range="as-is"))

    def digest(self) -> str:
        return "a stream"


class _Later(Whole):
    """A batch of a stream behind the first."""

    def __init__(self, images: Any, rest: Mapping[str, Any], stream: Stream, framing: Framing | None = None) -> None:
        self.images, self.framing = images, framing or stream.framing
        self.rest = checked(images, rest, stream.names)
        self.length = len(images)


def _as_array(images: Any) -> Any:
    """A tensor or array of images, also from nested lists.

    Raises:
        ArgumentError: It is something else.
    """
    if is_array(images):
        return images
    try:
        return torch.as_tensor(images)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"expected images as an array or tensor, a list of images or of files, got {type(images).__name__} ({error})"
        ) from error


def _check_few(images: Sequence[Any], framing: Framing) -> None:
    """The range of floating-point images, by some of them."""
    arrays = [image for image in images if is_array(image) and image.ndim]
    if not arrays or len({tuple(a.shape) for a in arrays}) > 1:
        return
    if isinstance(arrays[0], Tensor):
        framing.check_range("images", torch.stack([torch.as_tensor(a) for a in arrays]))
    else:
        framing.check_range("images", np.stack(arrays))


def _numbers(value: Any, most: int = 4096) -> Any:
    """Shape, type and some of the numbers of a tensor or array, evenly spread."""
    flat = torch.as_tensor(value).detach().cpu().flatten()
    step = max(1, len(flat) // most)
    some = flat[::step].contiguous().view(torch.uint8).numpy().tobytes()
    return [list(value.shape), str(flat.dtype), hashlib.sha256(some).hexdigest()]


def _rest(rest: Mapping[str, Any]) -> list[Any]:
    return [(k, _numbers(v) if is_array(v) else repr(v)) for k, v in sorted(rest.items())]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()
