"""The labelled images that ship with a model: the shard of its training set that a posterior is fitted on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bayesdiff.checks import ArgumentError, ShapeError

KEYS = ("images", "class_labels")


@dataclass(frozen=True, eq=False)
class ClassImages(Mapping[str, Tensor]):
    """Images with class labels, as a mapping with the keys ``"images"`` and ``"class_labels"``.

    A mapping is what :func:`bayesdiff.fit` takes: its images, and beside them the network's other
    arguments by name. As of every mapping, ``len`` is the number of keys; ``num_images`` is N.

    Args:
        images: float32 ``(N, C, H, W)`` in [−1, 1], the network's space.
        labels: int64 ``(N,)``.
        class_names: The name of each class.
        dataset_size: The number of images that the network was trained on, of which these may be a few.
        heldout: Images that the network never saw, if there are any.
        training_draws: M, how often each of them was drawn in training, on average; None if that is not known.

    Raises:
        ShapeError: Images and labels don't fit.
        ArgumentError: A label has no name.
    """

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    class_names: tuple[str, ...]
    dataset_size: int
    heldout: ClassImages | None = field(default=None, repr=False)
    training_draws: float | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.labels.shape != self.images.shape[:1]:
            raise ShapeError(
                "expected images (N, C, H, W) and labels (N,), got "
                f"{tuple(self.images.shape)} and {tuple(self.labels.shape)}"
            )
        if self.labels.numel() and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.class_names):
            raise ArgumentError(
                f"expected labels from 0 to {len(self.class_names) - 1}, got {int(self.labels.min())} to "
                f"{int(self.labels.max())}"
            )

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.images)

    def __getitem__(self, key: str) -> Tensor:
        if key == "images":
            return self.images
        if key == "class_labels":
            return self.labels
        raise KeyError(f"expected one of {KEYS}, got {key!r}; .subset(index) selects images")

    def __iter__(self) -> Iterator[str]:
        return iter(KEYS)

    def __len__(self) -> int:
        return len(KEYS)

    def as_dict(self) -> dict[str, Tensor]:
        """``{"images": …, "class_labels": …}``."""
        return dict(self)

    def subset(self, index: slice | Tensor | list[int]) -> ClassImages:
        """The images that ``index`` selects (a slice, or a tensor of indices or of bools); ``heldout`` is kept."""
        return replace(self, images=self.images[index], labels=self.labels[index])


def read_class_images(
    path: str | os.PathLike[str],
    class_names: tuple[str, ...],
    *,
    dataset_size: int | None = None,
    training_draws: float | None = None,
) -> ClassImages:
    """Read a shard as ``experiments/train_fashion_ddpm`` writes it.

    The file is an ``.npz`` without pickles: ``train_images``, ``heldout_images`` uint8 ``(N, H, W)``;
    ``train_labels``, ``heldout_labels`` uint8 ``(N,)``; ``dataset_size`` int64, which holds if none is given here.
    """
    with np.load(Path(path), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    size = int(arrays["dataset_size"]) if dataset_size is None else dataset_size

    def part(name: str, heldout: ClassImages | None) -> ClassImages:
        images = torch.from_numpy(arrays[f"{name}_images"]).unsqueeze(1).float() / 127.5 - 1.0
        labels = torch.from_numpy(arrays[f"{name}_labels"].astype(np.int64))
        return ClassImages(images, labels, class_names, size, heldout, training_draws)

    return part("train", part("heldout", None))
