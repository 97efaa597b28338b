"""Where, how often, and along how many directions the denoiser's response must be measured.

    python -m experiments.refresh_check

Tangents with the response measured at every step along every draw are exact but for the linearisation. The same
draws with fewer measurements are compared with them, so that no Monte Carlo noise is in the way: number of measurements
R, directions p in each, how much denser late; with and without Nyström's extension, and what measurements know of each
other; for samplers with many steps and with few.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from tqdm import tqdm

import bayesdiff
from bayesdiff.propagation import plan as planning
from bayesdiff.propagation import response, tangents
from bayesdiff.propagation.plan import Plan
from experiments.common import agreement, command, fitted, record, results_folder, table

#: Scheduler and steps: (R, p) pairs.
PLANS = {
    ("ddim", 50): ((7, 8), (10, 6), (7, 16), (11, 11), (18, 7), (25, 5)),
    ("dpm++", 25): ((6, 5), (10, 3), (6, 10), (8, 7), (12, 5)),
    ("ddim", 10): ((3, 8), (5, 5), (9, 2)),
}
DENSITIES = (1.0, 1.25, 1.5, 2.0)


def main(
    samples: Annotated[int, typer.Option(help="Images, over all classes in turn.")] = 4,
    draws: Annotated[int, typer.Option(help="K.")] = 48,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Compare sparse measurements of the response with exact ones."""
    folder = results_folder("refresh_check", out)
    rows: list[dict[str, Any]] = []
    for (scheduler, steps), pairs in PLANS.items():
        pipe, data = bayesdiff.zoo.load("fashion-ddpm", scheduler=scheduler)
        posterior = fitted(seed)
        classes = [data.class_names[3 * i % 10] for i in range(samples)]
        settings_of = bayesdiff.Tangents(draws=draws, generator=torch.Generator().manual_seed(seed + 1000))
        up = bayesdiff.UncertaintyPipeline(pipe, posterior, propagation=settings_of)

        def run(plan: tuple[list[int], int], up: Any, classes: list[str], steps: int) -> bayesdiff.UncertaintyOutput:
            generators = [torch.Generator().manual_seed(seed + i) for i in range(samples)]
            fixed = Plan(tuple(plan[0]), plan[1], tuple(map(float, range(steps))))
            with mock.patch.object(tangents, "plan", return_value=fixed):
                return up(classes, num_inference_steps=steps, generator=generators, output_type="pt")

        exact = run((list(range(1, steps)), draws), up, classes, steps).std
        chosen = planning.plan(list(range(steps)), 2.5)
        default = (len(chosen.nodes), chosen.num_directions)
        everything = (planning.DENSITY, True, True)
        settings = [(r, p, *everything) for r, p in {*pairs, default}]
        settings += [(*default, density, True, True) for density in DENSITIES if density != planning.DENSITY]
        settings += [(*default, planning.DENSITY, True, False), (*default, planning.DENSITY, False, False)]
        for number, p, density, nystrom, shared in tqdm(sorted(settings), desc=f"{scheduler}, {steps} steps"):
            nodes = planning.spread(list(range(1, steps)), number, density)
            with ExitStack() as changes:
                if not nystrom:
                    changes.enter_context(mock.patch.object(response, "EIGENVALUE_FLOOR", float("inf")))
                if not shared:
                    changes.enter_context(mock.patch.object(response, "_no_larger", lambda known, *_: 0 * known))
                output = run((nodes, p), up, classes, steps)
            each = [agreement(output.std[i], exact[i]) for i in range(samples)]
            rows.append(
                {
                    "scheduler": scheduler, "steps": steps, "R": len(nodes), "p": p, "density": density,
                    "nystrom": nystrom, "shared": shared,
                    "default": (number, p, density, nystrom, shared) == (*default, *everything),
                    "calls_ratio": output.calls / output.plain_calls, **agreement(output.std, exact),
                    "least_correlation": min(e["correlation"] for e in each),
                    "least_ratio": min(e["ratio"] for e in each), "largest_ratio": max(e["ratio"] for e in each),
                }
            )  # fmt: skip
    columns = {
        "scheduler": "", "steps": "d", "R": "d", "p": "d", "density": ".2f", "nystrom": "", "shared": "", "default": "",
        "calls_ratio": ".2f", "correlation": ".3f", "ratio": ".2f", "relative_l2": ".2f", "least_correlation": ".3f",
        "least_ratio": ".2f", "largest_ratio": ".2f",
    }  # fmt: skip
    print(table(rows, columns))
    record(
        folder,
        {
            "samples": samples,
            "draws": draws,
            "seed": seed,
            "model": "fashion-ddpm",
            "command": command("refresh_check"),
        },
        rows,
    )
    print(f"Written to {folder}")


if __name__ == "__main__":
    typer.run(main)
