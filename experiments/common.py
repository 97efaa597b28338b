"""What the experiments share: how a result is recorded, and how two maps are compared."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

import bayesdiff
from bayesdiff.checks import check_output_folder
from bayesdiff.io import environment, write_json

RESULTS = Path("experiments/results")


def results_folder(name: str, out: Path | None) -> Path:
    """Where an experiment writes; made and proved writable before it runs."""
    return check_output_folder(out or RESULTS / name)


def command(name: str) -> str:
    """The command that this run was started with."""
    return shlex.join(["python", "-m", f"experiments.{name}", *sys.argv[1:]])


def record(folder: Path, settings: dict[str, Any], results: Any, device: str = "cpu") -> None:
    """Write ``results.json``: what came out, with what, and from which settings."""
    write_json(folder / "results.json", {"settings": settings, "environment": environment(device), "results": results})


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Only:
    """The density of a few timesteps, each as often: what a distilled network was trained on.

    Args:
        timesteps: Whole numbers.
        total: T.
    """

    timesteps: tuple[int, ...]
    total: int

    def __call__(self, generator: Generator, n: int) -> Tensor:
        which = torch.randint(len(self.timesteps), (n,), generator=generator)
        return (torch.tensor(self.timesteps, dtype=torch.float64)[which] + 0.5) / self.total  # rounded down again


@dataclass(frozen=True)
class Trained:
    """How a model of the zoo was trained, beyond the defaults of :func:`bayesdiff.fit`.

    Args:
        given: Keywords of every call of the pipeline.
        density: Of t.
        timesteps: The few that it knows; none where it knows all.
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    density: Any = "uniform"
    timesteps: tuple[int, ...] = ()

    @classmethod
    def on(cls, *timesteps: int) -> Trained:
        """On a few timesteps."""
        return cls(density=Only(timesteps, 1000), timesteps=timesteps)


#: The transformer takes any number of empty T5 tokens; of the student's four steps see its card.
TRAINED = {
    "fashion-ddpm": Trained(), "fashion-4step": Trained.on(249, 499, 749, 999), "earth-sd": Trained(),
    "earth-sd3": Trained({"max_sequence_length": 24}, "logit-normal"),
}  # fmt: skip


@functools.cache
def fitted(seed: int) -> bayesdiff.LaplacePosterior:
    """A posterior of the shipped model, which does not depend on the scheduler.

    It is told that each image had one draw in the training, not the ``data.training_draws`` it had: a spread 2.5 times the
    network's own, and so a harder one for whatever is linearised.
    """
    pipe, data = bayesdiff.zoo.load("fashion-ddpm")
    return bayesdiff.fit(
        pipe, data, dataset_size=data.dataset_size, training_draws=1, draws_per_image=4,
        generator=torch.Generator().manual_seed(seed), progress=False,
    )  # fmt: skip


def agreement(value: Tensor, reference: Tensor) -> dict[str, float]:
    """How well positive maps agree: Pearson correlation, of the logarithms too, ratio of means, relative L2.

    Args:
        value: Any shape; all elements are taken together.
        reference: The same shape and units.
    """
    v, r = value.double().flatten(), reference.double().flatten()
    out = {
        "correlation": float(torch.corrcoef(torch.stack([v, r]))[0, 1]),
        "ratio": float(v.mean() / r.mean()),
        "relative_l2": float((v - r).norm() / r.norm()),
    }
    if bool((v > 0).all()) and bool((r > 0).all()):
        out["log_correlation"] = float(torch.corrcoef(torch.stack([v.log(), r.log()]))[0, 1])
    return out


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows as an aligned text table; ``columns`` maps a key to its format specification."""
    cells = [
        [format(row[key], spec) if row.get(key) is not None else "" for key, spec in columns.items()] for row in rows
    ]
    widths = [max(len(c) for c in column) for column in zip(list(columns), *cells, strict=True)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in [list(columns), *cells]]
    return "\n".join(lines)
