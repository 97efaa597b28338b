"""The captioned images that ship with a text-to-image model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bayesdiff.checks import ShapeError
from bayesdiff.io import atomic_path, write_text

KEYS = ("images", "prompts")


@dataclass(frozen=True, eq=False)
class PromptImages(Mapping[str, Any]):
    """Images with prompts, as a mapping with the keys ``"images"`` and ``"prompts"``.

    As of every mapping, ``len`` is the number of keys; ``num_images`` is n.

    Args:
        images: float32 ``(n, 3, H, W)`` in [−1, 1], before the VAE.
        prompts: n captions.
        places: int ``(n, 2)``, the row and the column of each image's upper left corner in the picture it is cut from.
        dataset_size: N, the number of images that the network was trained on, of which these may be a few.
        training_draws: M, how often each of the N was drawn in training, on average.
        heldout: Images that the network never saw, if there are any.

    Raises:
        ShapeError: Images, prompts and places don't fit.
    """

    images: Tensor = field(repr=False)
    prompts: list[str] = field(repr=False)
    places: Tensor = field(repr=False)
    dataset_size: int
    training_draws: float | None = None
    heldout: PromptImages | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        n = len(self.prompts)
        if self.images.ndim != 4 or len(self.images) != n or self.places.shape != (n, 2):
            raise ShapeError(
                "expected images (n, 3, H, W), n prompts and places (n, 2), got "
                f"{tuple(self.images.shape)}, {n} and {tuple(self.places.shape)}"
            )

    @property
    def num_images(self) -> int:
        """n."""
        return len(self.images)

    def __getitem__(self, key: str) -> Any:
        if key == "images":
            return self.images
        if key == "prompts":
            return self.prompts
        raise KeyError(f"expected one of {KEYS}, got {key!r}; .subset(index) selects images")

    def __iter__(self) -> Iterator[str]:
        return iter(KEYS)

    def __len__(self) -> int:
        return len(KEYS)

    def subset(self, index: slice | Tensor | list[int]) -> PromptImages:
        """The images that ``index`` selects (a slice, or a tensor of indices or of bools); ``heldout`` is kept."""
        prompts = [self.prompts[i] for i in torch.arange(self.num_images)[index].tolist()]
        return replace(self, images=self.images[index], prompts=prompts, places=self.places[index])

    def write_folder(self, folder: str | os.PathLike[str]) -> None:
        """Write the images as a folder in Hugging Face's ``imagefolder`` form: PNG files and ``metadata.jsonl``.

        Args:
            folder: Made if need be; files of the same names are replaced.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        pixels = ((self.images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for i, (image, prompt) in enumerate(zip(pixels, self.prompts, strict=True)):
            name = f"{i:05}.png"
            with atomic_path(folder / name) as temporary:
                Image.fromarray(image).save(temporary, "PNG")
            lines.append(json.dumps({"file_name": name, "text": prompt}, ensure_ascii=False))
        write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")


def read_prompt_images(
    folder: str | os.PathLike[str], dataset_size: int, training_draws: float | None = None
) -> PromptImages:
    """Read a shard as ``experiments/train_earth`` writes it.

    ``train.webp`` and ``heldout.webp`` are lossless sheets of square tiles, row by row; ``captions.json`` has for each
    of the two a list of ``{"text": …, "row": …, "column": …}`` in the same order, and ``"tile"``, a tile's side.
    """
    folder = Path(folder)
    record = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    side = record["tile"]

    def part(split: str, heldout: PromptImages | None) -> PromptImages:
        rows = record[split]
        with Image.open(folder / f"{split}.webp") as file:
            sheet = np.array(file.convert("RGB"))
        tiles = sheet.reshape(sheet.shape[0] // side, side, -1, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        images = torch.from_numpy(tiles[: len(rows)]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        places = torch.tensor([[row["row"], row["column"]] for row in rows])
        return PromptImages(
            images.contiguous(), [row["text"] for row in rows], places, dataset_size, training_draws, heldout
        )

    return part("train", part("heldout", None))
