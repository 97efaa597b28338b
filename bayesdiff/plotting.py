"""Figures: samples beside their pixel-wise standard deviation.

Standard deviations have no natural scale across models, so one colour bar, in pixel units (0 black to
1 white), is shared by every map in a figure: brighter means less sure, here and in the next column.
Figures are built without pyplot; nothing global is touched, and no display is needed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bayesdiff.checks import ArgumentError, ShapeError, check_finite
from bayesdiff.io import write_figure

COLOUR_MAP = "inferno"  # perceptually uniform, black where the network is sure
MAX_COLUMNS = 8

# In inches: the frame of the figure and the gaps between its panels.
_LEFT, _RIGHT, _BOTTOM, _TOP, _GAP, _BLOCK_GAP = 0.34, 0.96, 0.12, 0.34, 0.05, 0.42
_BAR_GAP, _BAR_WIDTH = 0.12, 0.11
_INK, _FAINT = "#1a1a1a", "#595959"

Array = NDArray[np.float64]


def plot_maps(
    images: Any,
    std: Tensor,
    *,
    titles: Sequence[str] | None = None,
    reference: Tensor | None = None,
    names: tuple[str, str] = ("std", "reference"),
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw samples, their standard deviation, and the one over the other.

    One column for each sample, :data:`MAX_COLUMNS` in a row of columns; below the sample its standard deviation
    and, as "overlay", the sample in grey under the map, the more opaque the less sure.

    Args:
        images: A list of PIL images, or an array or tensor ``(B, H, W)``, ``(B, H, W, C)`` or
            ``(B, C, H, W)`` in [0, 1] (or uint8), C = 1 or 3.
        std: Standard deviations ``(B, C, H, W)`` in the same pixel units; of several channels the root
            mean square is shown.
        titles: One for each sample, such as its class.
        reference: A second standard deviation like ``std``, drawn below it on the same scale.
        names: What to call ``std`` and ``reference``.
        path: Where to write the figure, in the format of its suffix.

    Returns:
        The figure; ``figure.savefig(...)`` works as usual.

    Raises:
        ShapeError: Images, standard deviations or titles don't fit one another.
        NonFiniteError: A standard deviation is NaN or infinite.
        ArgumentError: A standard deviation is negative.
    """
    maps = [_magnitude(std, names[0])]
    if reference is not None:
        maps.append(_magnitude(reference, names[1]))
        if maps[1].shape != maps[0].shape:
            raise ShapeError(
                f"expected {names[1]} shaped as {names[0]} {tuple(std.shape)}, got {tuple(reference.shape)}"
            )
    pixels = _pixels(images, tuple(std.shape))
    if titles is not None and len(titles) != len(pixels):
        raise ShapeError(f"expected a title for each of the {len(pixels)} samples, got {len(titles)}")

    # The brightest hundredth would leave the rest in the dark; the bar's arrow says that there is more.
    top = max(float(np.quantile(m, 0.99)) for m in maps) or 1.0
    norm = Normalize(0, top, clip=True)
    colours = matplotlib.colormaps[COLOUR_MAP]
    rows: list[tuple[str, Array]] = [("sample", pixels)]
    rows += [(name, colours(norm(m))[..., :3]) for name, m in zip(names, maps, strict=False)]
    rows.append(("overlay", _overlay(pixels, np.asarray(norm(maps[0])), colours)))
    beyond = max(float(m.max()) for m in maps) > top
    figure = _draw(rows, titles, ScalarMappable(norm, colours), "max" if beyond else "neither")
    if path is not None:
        write_figure(path, figure)
    return figure


def _magnitude(std: Tensor, name: str) -> Array:
    """``(B, H, W)``: root mean square over channels."""
    if not isinstance(std, Tensor) or std.ndim != 4 or 0 in std.shape:
        got = tuple(std.shape) if isinstance(std, Tensor) else type(std).__name__
        raise ShapeError(f"expected {name} as a tensor (B, C, H, W), got {got}")
    check_finite(name, std)
    if bool((std < 0).any()):
        raise ArgumentError(f"expected {name} >= 0, got {std.min().item():.3g}")
    result: Array = std.detach().double().square().mean(1).sqrt().cpu().numpy()
    return result


def _pixels(images: Any, shape: tuple[int, ...]) -> Array:
    """``(B, H, W, 3)`` in [0, 1], whatever form the images come in."""
    batch, _, height, width = shape
    if isinstance(images, (list, tuple)):
        if not images or not all(isinstance(image, Image.Image) for image in images):
            raise ShapeError(
                "expected a list of PIL images, an array or a tensor of images, got a list of other things"
            )
        sizes = {image.size for image in images}
        if len(sizes) > 1:
            raise ShapeError(f"expected images of one size, got {sorted(sizes)}")
        array = np.stack([np.asarray(image.convert("RGB")) for image in images])
    else:
        array = images.detach().cpu().float().numpy() if _is_float(images) else np.asarray(images)
        if array.ndim == 3:
            array = array[..., None]
        elif array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[2:] == (height, width):
            array = np.moveaxis(array, 1, -1)
    fits = array.ndim == 4 and array.shape[:3] == (batch, height, width) and array.shape[3] in (1, 3)
    if not fits:
        raise ShapeError(
            f"expected {batch} images of {height} × {width} pixels and 1 or 3 channels, as the standard deviation "
            f"{shape}, got {tuple(array.shape)}"
        )
    if array.dtype == np.uint8:
        array = array / 255.0
    clipped: Array = np.clip(array.astype(np.float64), 0, 1)
    return np.broadcast_to(clipped, (batch, height, width, 3))


def _is_float(images: Any) -> bool:
    return isinstance(images, Tensor) and images.dtype != torch.uint8


def _overlay(pixels: Array, level: Array, colours: Any) -> Array:
    """The sample in grey, dimmed, under the map; ``level`` is its standard deviation in [0, 1] of the scale."""
    grey = (pixels @ np.array([0.299, 0.587, 0.114]))[..., None]
    opacity = 0.9 * level[..., None]
    result: Array = (1 - opacity) * 0.85 * grey + opacity * colours(0.35 + 0.65 * level)[..., :3]
    return result


def _draw(rows: list[tuple[str, Array]], titles: Sequence[str] | None, scale: ScalarMappable, extend: str) -> Figure:
    """Lay out the panels by hand: every gap is the same, whatever the number of columns and the aspect ratio."""
    count, height, width = rows[0][1].shape[:3]
    columns = min(count, MAX_COLUMNS)
    blocks = -(-count // columns)
    cell = 1.9 if columns == 1 else 1.5 if columns <= 4 else 1.15
    cell_w, cell_h = cell * min(1, width / height), cell * min(1, height / width)
    top = _TOP if titles is not None else _BOTTOM
    block = len(rows) * cell_h + (len(rows) - 1) * _GAP
    between = _BLOCK_GAP if titles is not None else 0.2
    total_w = _LEFT + columns * cell_w + (columns - 1) * _GAP + _RIGHT
    total_h = top + blocks * block + (blocks - 1) * between + _BOTTOM
    figure = Figure(figsize=(total_w, total_h), facecolor="white")

    def place(left: float, upper: float, w: float, h: float) -> Any:
        """Axes by their upper left corner, in inches from the figure's."""
        return figure.add_axes((left / total_w, 1 - (upper + h) / total_h, w / total_w, h / total_h))

    for k in range(count):
        left = _LEFT + (k % columns) * (cell_w + _GAP)
        upper = top + (k // columns) * (block + between)
        for r, (name, panels) in enumerate(rows):
            axes = place(left, upper + r * (cell_h + _GAP), cell_w, cell_h)
            axes.imshow(panels[k], interpolation="nearest" if width < 256 else "antialiased", aspect="auto")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if r == 0 and titles is not None:
                axes.set_title(titles[k], fontsize=10, color=_INK, pad=5)
            if k % columns == 0:
                axes.set_ylabel(name, fontsize=9, color=_FAINT, labelpad=5)
    # Beside the maps, below the samples, of the first block.
    upper = top + cell_h + _GAP
    left = total_w - _RIGHT + _BAR_GAP
    bar_axes = place(left, upper, _BAR_WIDTH, block - cell_h - _GAP)
    bar_axes.set_label("<colorbar>")  # as matplotlib calls those that it places itself
    bar = figure.colorbar(scale, cax=bar_axes, extend=extend, extendfrac=0.04)
    bar.set_label("std in pixel units (0–1)", fontsize=8, color=_FAINT, labelpad=5)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2.5, width=0.6, color=_FAINT, labelcolor=_INK)
    bar.locator = matplotlib.ticker.MaxNLocator(5)
    bar.update_ticks()
    return figure
