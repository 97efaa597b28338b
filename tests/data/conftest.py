"""Pictures with a known content, as PIL images and as files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image


def pixels(n=5, height=12, width=16, channels=3, seed=0):
    """Bytes ``(n, H, W, C)``."""
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def pictures(**kwargs):
    return [Image.fromarray(array.squeeze()) for array in pixels(**kwargs)]


def write(folder, images, rows=None, kind="jsonl"):
    """PNG files ``0.png`` …, and metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    if rows is not None:
        rows = [{"file_name": f"{i}.png", **row} for i, row in enumerate(rows)]
        if kind == "jsonl":
            (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            lines = [",".join(rows[0])] + [",".join(f'"{v}"' for v in row.values()) for row in rows]
            (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "images"
