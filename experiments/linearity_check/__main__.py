"""How linear is a sampling trajectory in the weights?

    python -m experiments.linearity_check

Tangents with the network's response measured at every step along every draw: nothing is left but the linearisation and the
noise of the draws. Judged by the references of :mod:`experiments.propagation`, image by image. What it shows, fewer calls
cannot exceed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

import bayesdiff
from experiments.common import RESULTS, agreement, command, record, results_folder, table
from experiments.propagation.references import SAMPLINGS, Setting, reference

NAMES = ("dpm++-25", "euler-a-25", "heun-13")


def main(
    trajectories: Annotated[int, typer.Option(help="Trajectories of each reference.")] = 512,
    samples: Annotated[int, typer.Option(help="Images, over the classes in turn.")] = 6,
    draws: Annotated[int, typer.Option(help="K.")] = 64,
    only: Annotated[list[str] | None, typer.Option(help="Names of the ways to sample; by default three.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    references: Annotated[Path, typer.Option(help="Folder in which references are kept.")] = RESULTS / "propagation",
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Compare exact tangents with whole trajectories."""
    folder = results_folder("linearity_check", out)
    setting = Setting(samples, trajectories, seed)
    rows: list[dict[str, Any]] = []
    for sampling in tqdm([s for s in SAMPLINGS if s.name in (only or NAMES)], desc="ways to sample"):
        against = reference(references, setting, sampling)
        pipe, posterior = setting.pipe(sampling)
        exact = bayesdiff.Tangents(
            draws=draws, refresh=1, num_directions=draws, generator=torch.Generator().manual_seed(seed + 1000)
        )
        output = setting.run(pipe, posterior, sampling, exact)
        rows.append({"sampling": sampling.name, "image": "all", **agreement(output.std, against)})
        rows += [
            {
                "sampling": sampling.name,
                "image": str(i),
                "mean_std": float(against[i].mean()),
                **agreement(std, against[i]),
            }
            for i, std in enumerate(output.std)
        ]
    columns = {
        "sampling": "", "image": "", "mean_std": ".4f", "correlation": ".3f", "ratio": ".2f", "relative_l2": ".2f",
    }  # fmt: skip
    print(table(rows, columns))
    record(
        folder,
        {
            "trajectories": trajectories, "samples": samples, "draws": draws, "seed": seed, "model": "fashion-ddpm",
            "command": command("linearity_check"),
        },
        rows,
    )  # fmt: skip
    print(f"Written to {folder}")


if __name__ == "__main__":
    typer.run(main)
