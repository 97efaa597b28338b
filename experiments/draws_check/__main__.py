"""How many weight draws do tangents need, and which: independent, or orthogonal?

    python -m experiments.draws_check

With the network's response measured at every step along every draw, nothing is left of the error of few network calls,
and orthogonal draws in the number of Σ's dimensions leave no noise either. Maps from fewer draws are compared with
that one: root mean square of the relative error of each pixel's variance, beside what theory says, √(2/K) for independent draws
and √(2(m − K)/(K(m + 2))) for orthogonal ones, m dimensions.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

import bayesdiff
from experiments.common import agreement, command, fitted, record, results_folder, table


def main(
    samples: Annotated[int, typer.Option(help="Images, over all classes in turn.")] = 2,
    steps: Annotated[int, typer.Option(help="DPM-Solver++ steps.")] = 6,
    draws: Annotated[list[int] | None, typer.Option(help="K; may be given again. By default 32, 64, 128.")] = None,
    repeats: Annotated[int, typer.Option(help="Sets of draws.")] = 2,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Compare maps from few draws with the one that has no Monte Carlo noise."""
    folder = results_folder("draws_check", out)
    numbers = list(draws or (32, 64, 128))
    pipe, data = bayesdiff.zoo.load("fashion-ddpm", scheduler="dpm++")
    posterior = fitted(seed)
    classes = [data.class_names[3 * i % 10] for i in range(samples)]
    dimensions = min(posterior.mean.numel(), posterior.num_images)  # the rank of Σ

    def run(number: int, draw_seed: int, orthogonal: bool) -> torch.Tensor:
        settings = bayesdiff.Tangents(draws=number, refresh=1, num_directions=number)
        up = bayesdiff.UncertaintyPipeline(pipe, posterior, propagation=settings)
        up.deviations = posterior.deviations(number, torch.Generator().manual_seed(draw_seed), orthogonal=orthogonal)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(samples)]
        return up(classes, num_inference_steps=steps, generator=generators, output_type="pt").std

    exact = run(dimensions, seed, True)
    rows: list[dict[str, Any]] = []
    for number, orthogonal in tqdm([(k, o) for k in numbers for o in (False, True)], desc="draws"):
        runs = [run(number, seed + 1 + i, orthogonal) for i in range(repeats)]
        found = [agreement(std, exact) for std in runs]
        errors = [(std.double().square() / exact.double().square() - 1).square().mean() for std in runs]
        left = (dimensions - number) / (dimensions + 2) if orthogonal else 1.0
        rows.append(
            {
                "draws": number, "orthogonal": orthogonal,
                **{k: sum(f[k] for f in found) / repeats for k in ("correlation", "relative_l2")},
                "ratio_least": min(f["ratio"] for f in found), "ratio_largest": max(f["ratio"] for f in found),
                "variance_error": math.sqrt(float(sum(errors)) / repeats), "theory": math.sqrt(2 / number * left),
            }
        )  # fmt: skip
    columns = {
        "draws": "d", "orthogonal": "", "correlation": ".4f", "relative_l2": ".3f", "ratio_least": ".3f",
        "ratio_largest": ".3f", "variance_error": ".3f", "theory": ".3f",
    }  # fmt: skip
    print(table(rows, columns))
    record(
        folder,
        {
            "samples": samples, "steps": steps, "scheduler": "dpm++", "repeats": repeats, "dimensions": dimensions,
            "seed": seed, "model": "fashion-ddpm", "command": command("draws_check"),
        },
        rows,
    )  # fmt: skip
    print(f"Written to {folder}")


if __name__ == "__main__":
    typer.run(main)
