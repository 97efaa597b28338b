"""One stage: a process measures its own peak memory, so each runs in a fresh one."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.head.find import Head
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics

#: Draws (t, ε) of an image, timestep bins, images that are made at once.
DRAWS, BINS, AT_ONCE = 2, 10, 200


def head(channels: int, features: int) -> Head:
    """A linear head with a bias, of ``features`` features in all."""
    torch.manual_seed(0)
    layer = nn.Linear(features - 1, channels)
    return Head("head", layer, HeadGeometry.of(layer))


def made(images: int, channels: int, features: int, tokens: int) -> Iterator[tuple[Tensor, ...]]:
    """Synthetic tokens: correlated features, residuals whose size depends on them, and a part of each that an image shares."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(features - 1, features - 1, generator=generator) / (features - 1) ** 0.5
    mix *= torch.logspace(0, -1.5, features - 1)[:, None]  # eigenvalues over three decades
    for first in range(0, images, AT_ONCE):
        n = min(AT_ONCE, images - first)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        own = normal(n, 1, 1, features - 1)
        x = ((own + normal(n, DRAWS, tokens, features - 1)) @ mix).relu().flatten(0, 1)
        r = normal(n, 1, 1, channels) + normal(n, DRAWS, tokens, channels)
        r = r.flatten(0, 1) * (0.1 + x.mean(2, keepdim=True))
        bins = torch.randint(BINS, (n * DRAWS,), generator=generator)
        yield x, r, bins, (first + torch.arange(n)).repeat_interleave(DRAWS)


def statistics(shape: tuple[int, ...], sketch: int | None) -> Statistics:
    """Of the synthetic tokens."""
    images, channels, features, tokens = shape
    out = Statistics(head(channels, features).geometry, BINS, sketch=sketch)
    for batch in made(images, channels, features, tokens):
        out.update(*batch)
        out.settle()
    return out


def fit(folder: Path, shape: tuple[int, ...], rows: int) -> dict[str, Any]:
    """The sums of all images, saved."""
    clock = time.perf_counter()
    found = statistics(shape, rows)
    seconds = time.perf_counter() - clock
    found.save(folder / "statistics")
    return {"seconds": seconds, "file_mb": size_of(folder / "statistics")}


def build(folder: Path, shape: tuple[int, ...], settings: dict[str, Any], name: str) -> dict[str, Any]:
    """A posterior from the sums, saved."""
    sums = Statistics.load(folder / "statistics")
    clock = time.perf_counter()
    found = LaplacePosterior.from_statistics(sums, head(*shape[1:3]), dataset_size=10**6, **settings)
    seconds = time.perf_counter() - clock
    found.save(folder / name)
    return {"seconds": seconds, "file_mb": size_of(folder / name), "approximation_error": found.approximation_error}


def load(folder: Path, name: str) -> dict[str, Any]:
    """Reading it again, and a prediction."""
    clock = time.perf_counter()
    found = LaplacePosterior.load(folder / name)
    seconds = time.perf_counter() - clock
    x = torch.randn(64, found.geometry.in_channels, generator=torch.Generator().manual_seed(2))
    clock = time.perf_counter()
    found.variance(x)
    return {"seconds": seconds, "first_variance_seconds": time.perf_counter() - clock}


def compare(shape: tuple[int, ...], rows: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Predictive variances from sketched gradients against those from all of them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, shape[2] - 1, generator=generator).relu()
    exact, sketched = (
        LaplacePosterior.from_statistics(
            statistics(shape, r), head(*shape[1:3]), dataset_size=10**6, **settings
        ).variance(x)
        for r in (None, rows)
    )
    ratio = sketched.double() / exact.double()
    return {
        "stated": (2 / rows) ** 0.5, "error": float((ratio - 1).square().mean().sqrt()), "mean_ratio": float(ratio.mean()),
        "worst": float((ratio - 1).abs().max()),
    }  # fmt: skip


def size_of(folder: Path) -> float:
    """Of its files, in MB."""
    return sum(f.stat().st_size for f in folder.iterdir()) / 1e6


def run(task: dict[str, Any]) -> dict[str, Any]:
    """A stage by its name."""
    stage, folder, shape = task.pop("stage"), Path(task.pop("folder")), tuple(task.pop("shape"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if stage == "fit":
        found = fit(folder, shape, **task)
    elif stage == "build":
        found = build(folder, shape, **task)
    elif stage == "load":
        found = load(folder, **task)
    else:
        found = compare(shape, **task)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**found, "peak_gb": after * 1024 / 1e9, "imports_gb": before * 1024 / 1e9}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
