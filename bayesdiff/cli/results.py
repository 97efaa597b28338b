"""What a command leaves behind: pictures, ``std.npz``, a figure, a record of what was run. Each file is whole or not there.

The record is written last and has the SHA-256 of each other file: so a folder in which a run was killed half-way, over the files
of another, can be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bayesdiff.io import atomic_path, digest_of, environment, write_json
from bayesdiff.output import UncertaintyOutput
from bayesdiff.plotting import plot_maps

Pictures = list[list[Image.Image]]


def pictures_of(output: UncertaintyOutput) -> Pictures | None:
    """The frames of each sample, one for images; None for what is no picture, such as sound."""
    images = output.images
    if isinstance(images, (Tensor, np.ndarray)):
        array = images.detach().float().cpu().numpy() if isinstance(images, Tensor) else images
        if isinstance(images, Tensor) and array.ndim in (4, 5):
            array = np.moveaxis(array, -3, -1)
        if array.ndim == 4:
            array = array[:, None]
        if array.ndim != 5 or array.shape[-1] not in (1, 3):
            return None
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
        return [
            [Image.fromarray(frame.squeeze(-1) if frame.shape[-1] == 1 else frame) for frame in one] for one in array
        ]
    if isinstance(images, (list, tuple)) and images and isinstance(images[0], Image.Image):
        return [[image] for image in images]
    if isinstance(images, (list, tuple)) and images and all(isinstance(one, (list, tuple)) and one for one in images):
        return [list(one) for one in images] if isinstance(images[0][0], Image.Image) else None
    return None


def write_samples(out: Path, output: UncertaintyOutput) -> tuple[list[str], list[str]]:
    """Pictures as PNG and ``std.npz``; returns the name of each sample's first picture, and all names."""
    pictures = pictures_of(output)
    arrays = {"std": output.std.float().cpu().numpy()}
    if output.latents is not None:
        arrays["latent_variance"] = output.latents.variance.float().cpu().numpy()
    files, written = [], ["std.npz"]
    if pictures is None:
        images = output.images
        arrays["output"] = images.detach().float().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
        files = ["std.npz"] * len(arrays["std"])
    for i, frames in enumerate(pictures or []):
        digits = max(2, len(str(len(pictures or []) - 1)))
        names = [
            f"sample-{i:0{digits}d}" + (f"-frame-{k:03d}" if len(frames) > 1 else "") + ".png"
            for k in range(len(frames))
        ]
        for name, image in zip(names, frames, strict=True):
            with atomic_path(out / name) as temporary:
                image.save(temporary)
        files.append(names[0])
        written += names
    with atomic_path(out / "std.npz") as temporary:
        np.savez_compressed(temporary, allow_pickle=False, **arrays)
    return files, written


def write_figure_of(
    out: Path, output: UncertaintyOutput, titles: Sequence[str], *, reference: UncertaintyOutput | None = None,
    names: tuple[str, str] = ("std", "reference"),
) -> bool:  # fmt: skip
    """``figure.png``: all samples, or of videos the frames of the first one; False for what is no picture."""
    pictures = pictures_of(output)
    if pictures is None:
        return False
    std, shown, labels = output.std, [frames[0] for frames in pictures], list(titles)
    if std.ndim == 5:
        std, shown, labels = std[0], pictures[0], [f"frame {k}" for k in range(len(pictures[0]))]
    plot_maps(
        shown, std, titles=labels, reference=None if reference is None else reference.std, names=names, path=out / "figure.png",
    )  # fmt: skip
    return True


def write_record(out: Path, command: str, device: torch.device, files: Sequence[str] = (), **entries: Any) -> None:
    """``settings.json``: what was run, on what, and what came out.

    Args:
        out: The folder.
        command: Its name.
        device: Where it was run.
        files: The other files of the run, which lie there already.
        entries: What else is told.
    """
    digests = {name: digest_of(out / name) for name in sorted(files)}
    write_json(
        out / "settings.json", {"command": command, **entries, "sha256": digests, "environment": environment(device)}
    )
