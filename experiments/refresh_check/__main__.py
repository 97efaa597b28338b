"""Where, how often, and along how many directions the denoiser's response must be measured.

    python -m experiments.refresh_check

Tangents with the response measured at every step along every draw are exact but for the linearisation. The same
draws with fewer measurements are compared with them, so that no Monte Carlo noise is in the way: number of measurements
R (evenly spaced or denser late), directions p, and Nyström's extension on or off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from tqdm import tqdm

import bayesdiff
from bayesdiff import propagate, response
from experiments.common import agreement, command, record, results_folder, table

#: steps: (R, p) pairs.
PLANS = {20: ((6, 8), (10, 5), (10, 8), (16, 3)), 50: ((7, 14), (10, 10), (13, 10), (13, 8), (20, 5), (25, 4))}
DENSITIES = (0.8, 1.0, 1.25, 1.5, 2.0)


def main(
    samples: Annotated[int, typer.Option(help="Images, over all classes in turn.")] = 8,
    draws: Annotated[int, typer.Option(help="K.")] = 24,
    repeats: Annotated[int, typer.Option(help="Sets of weight draws.")] = 2,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Compare sparse measurements of the response with exact ones."""
    folder = results_folder("refresh_check", out)
    pipe, data = bayesdiff.zoo.load("fashion-ddpm")
    posterior = bayesdiff.fit(
        pipe, data, dataset_size=data.dataset_size, generator=torch.Generator().manual_seed(seed), progress=False
    )
    classes = [data.class_names[i % 10] for i in range(samples)]

    def run(steps: int, draw_seed: int, **kwargs: Any) -> bayesdiff.UncertaintyOutput:
        up = bayesdiff.UncertaintyPipeline(
            pipe, posterior, num_tangents=draws, generator=torch.Generator().manual_seed(draw_seed), **kwargs
        )
        generators = [torch.Generator().manual_seed(seed + i) for i in range(samples)]
        return up(classes, num_inference_steps=steps, generator=generators, output_type="pt")

    rows: list[dict[str, Any]] = []
    for steps, plans in PLANS.items():
        seeds = [seed + 1000 * (i + 1) for i in range(repeats)]
        exact = [run(steps, s, refresh=1, num_directions=draws).std for s in tqdm(seeds, desc=f"{steps} steps, exact")]
        default = plans[2]
        settings = [(r, p, propagate.DENSITY, True) for r, p in plans]
        settings += [(*default, density, True) for density in DENSITIES if density != propagate.DENSITY]
        settings += [(*default, propagate.DENSITY, False)]
        for number, p, density, nystrom in tqdm(settings, desc=f"{steps} steps"):
            floor = response.EIGENVALUE_FLOOR if nystrom else float("inf")
            with (
                mock.patch.object(propagate, "DENSITY", density),
                mock.patch.object(propagate, "LEAST_REFRESHES", number),
                mock.patch.object(response, "EIGENVALUE_FLOOR", floor),
            ):
                outputs = [run(steps, s, refresh=steps, num_directions=p) for s in seeds]
            found = [agreement(o.std, e) for o, e in zip(outputs, exact, strict=True)]
            each = [agreement(o.std[i], e[i]) for o, e in zip(outputs, exact, strict=True) for i in range(samples)]
            rows.append(
                {
                    "steps": steps, "R": number, "p": p, "density": density, "nystrom": nystrom,
                    "calls_ratio": outputs[0].calls / outputs[0].plain_calls,
                    **{k: sum(f[k] for f in found) / repeats for k in ("correlation", "ratio", "relative_l2")},
                    "least_ratio": min(e["ratio"] for e in each), "largest_ratio": max(e["ratio"] for e in each),
                    "least_correlation": min(e["correlation"] for e in each),
                }
            )  # fmt: skip
    columns = {
        "steps": "d", "R": "d", "p": "d", "density": "g", "nystrom": "", "calls_ratio": ".2f", "correlation": ".3f",
        "ratio": ".3f", "relative_l2": ".3f", "least_correlation": ".3f", "least_ratio": ".2f", "largest_ratio": ".2f",
    }  # fmt: skip
    print(table(rows, columns))
    record(
        folder,
        {
            "samples": samples, "draws": draws, "repeats": repeats, "seed": seed, "model": "fashion-ddpm",
            "command": command("refresh_check"),
        },
        rows,
    )  # fmt: skip
    print(f"Written to {folder}")


if __name__ == "__main__":
    typer.run(main)
