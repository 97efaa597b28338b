"""What the commands share: messages, tables, errors in one line, and what is written for every sample."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from torch import Generator

from bayesdiff.checks import ArgumentError, BayesdiffError, BayesdiffWarning
from bayesdiff.fitting import fit
from bayesdiff.io import atomic_path
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.output import UncertaintyOutput


def fit_shipped(pipe: Any, data: Any, seed: int, **kwargs: Any) -> LaplacePosterior:
    say(f"fitting the posterior to {data.num_images} of {data.dataset_size} training images")
    generator = Generator().manual_seed(seed)
    bar = sys.stderr.isatty()
    return fit(pipe, data, dataset_size=data.dataset_size, generator=generator, progress=bar, **kwargs)


def describe(posterior: LaplacePosterior) -> dict[str, Any]:
    return {
        "structure": posterior.structure,
        "covariance": posterior.covariance,
        "num_images": posterior.num_images,
        "dataset_size": posterior.dataset_size,
        "prior_precision": posterior.prior_precision,
    }


def write_samples(out: Path, output: UncertaintyOutput) -> list[str]:
    """The images as PNG and ``std.npz``; returns the images' names."""
    digits = max(2, len(str(len(output.images) - 1)))
    files = [f"sample-{i:0{digits}d}.png" for i in range(len(output.images))]
    for file, image in zip(files, output.images, strict=True):
        with atomic_path(out / file) as temporary:
            image.save(temporary)
    arrays = {"std": output.std.float().cpu().numpy()}
    if output.latents is not None:
        arrays["latent_variance"] = output.latents.variance.float().cpu().numpy()
    with atomic_path(out / "std.npz") as temporary:
        np.savez_compressed(temporary, allow_pickle=False, **arrays)
    return files


def seeded(seed: int, count: int) -> list[Generator]:
    return [Generator().manual_seed(seed + i) for i in range(count)]


def chosen_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise ArgumentError(f"expected --device to be one that torch can use here, got {name!r}: {reason}") from error
    return device


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 3)


@contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """The package's errors and warnings as one line each."""
    plain = warnings.showwarning

    def show(message: Any, category: Any, *args: Any, **kwargs: Any) -> None:
        if issubclass(category, BayesdiffWarning):
            typer.echo(f"warning: {one_line(message)}", err=True)
        else:
            plain(message, category, *args, **kwargs)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
        except BayesdiffError as error:
            if debug:
                raise
            typer.echo(f"error: {one_line(error)}", err=True)
            raise typer.Exit(2) from None


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def say(message: str) -> None:
    typer.echo(message)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A small table; numbers, which is all but the first column, to the right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    rule = "  ".join("─" * w for w in widths)
    for row in [columns, None, *rows]:
        if row is None:
            say(rule)
        else:
            cells = [
                f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            say("  ".join(cells).rstrip())
