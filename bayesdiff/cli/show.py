"""What the commands share: messages, tables, errors in one line."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Generator

from bayesdiff.checks import ArgumentError, BayesdiffError, BayesdiffWarning, check_int
from bayesdiff.fitting import fit
from bayesdiff.laplace.posterior import LaplacePosterior


def fit_shipped(pipe: Any, data: Any, seed: int, **kwargs: Any) -> LaplacePosterior:
    say(f"fitting the posterior to {data.num_images} of {data.dataset_size} training images")
    generator = Generator().manual_seed(seed)
    known = {"dataset_size": data.dataset_size, "training_draws": data.training_draws}
    return fit(pipe, data, generator=generator, progress=has_terminal(), **known, **kwargs)


def describe(posterior: LaplacePosterior) -> dict[str, Any]:
    return {
        "structure": posterior.structure,
        "covariance": posterior.covariance,
        "num_images": posterior.num_images,
        "dataset_size": posterior.dataset_size,
        "prior_precision": posterior.prior_precision,
    }


def check_seed(seed: int, samples: int = 1) -> None:
    """That all seeds from this one on are ones that torch takes.

    Raises:
        ArgumentError: They are not.
    """
    check_int("--seed", seed, least=0)
    if seed + samples > 2**63:
        raise ArgumentError(f"expected --seed below 2**63, got {seed}")


def name_of(model: str) -> str:
    """A model's name without the folders that it lies in."""
    return Path(model).resolve().name if Path(model).exists() else model


def has_terminal() -> bool:
    return sys.stderr.isatty()


def seeded(seed: int, count: int) -> list[Generator]:
    return [Generator().manual_seed(seed + i) for i in range(count)]


def chosen_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        float(torch.zeros(1, device=device))  # which "meta" cannot do
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
    """Errors and the package's warnings as one line each: exit code 2 for what was asked wrongly, 1 for all else."""
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
        except Exception as error:  # of the model's own code: told, too, and not in a traceback
            if debug:
                raise
            what = one_line(error)
            typer.echo(f"error: {type(error).__name__}{': ' + what if what else ''} (--debug shows where)", err=True)
            raise typer.Exit(1) from None


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
