"""What tangents cost beyond their network calls.

    python -m experiments.cost

Wall time of a map over that of the images alone, divided by the ratio of network calls: 1 would be no work but the calls'. Both
are timed in turn, some times; medians count.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import bayesdiff
from experiments.common import command, fitted, record, results_folder, table


def main(
    samples: Annotated[int, typer.Option(help="Images in one batch, over the classes in turn.")] = 8,
    steps: Annotated[int, typer.Option(help="DDIM steps.")] = 50,
    draws: Annotated[list[int] | None, typer.Option(help="K; may be given again. By default 64, 256.")] = None,
    repeats: Annotated[int, typer.Option(help="Times that each is timed.")] = 5,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Time the shipped model with and without a map."""
    folder = results_folder("cost", out)
    pipe, data = bayesdiff.zoo.load("fashion-ddpm")
    posterior = fitted(seed)

    def timed(call: Any) -> tuple[Any, float]:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(samples)]
        clock = time.perf_counter()
        output = call(
            [data.class_names[i % 10] for i in range(samples)], num_inference_steps=steps, generator=generators,
            output_type="pt",
        )  # fmt: skip
        return output, time.perf_counter() - clock

    timed(pipe)  # what a first run sets up is not timed
    rows = []
    for number in draws or (64, 256):
        up = bayesdiff.UncertaintyPipeline(pipe, posterior, propagation=bayesdiff.Tangents(draws=number))
        pairs = [(timed(pipe), timed(up)) for _ in range(repeats)]
        plain, seconds = (statistics.median(times) for times in zip(*((p[1], m[1]) for p, m in pairs), strict=True))
        output = pairs[0][1][0]
        ratio = output.calls / output.plain_calls
        rows.append(
            {
                "draws": number, "calls_ratio": ratio, "plain": plain, "seconds": seconds,
                "overhead": seconds / plain / ratio, "each": [m[1] / p[1] / ratio for p, m in pairs],
            }
        )  # fmt: skip
    print(table(rows, {"draws": "d", "calls_ratio": ".2f", "plain": ".2f", "seconds": ".2f", "overhead": ".2f"}))
    settings = {
        "samples": samples,
        "steps": steps,
        "repeats": repeats,
        "seed": seed,
        "model": "fashion-ddpm",
        "command": command("cost"),
    }
    record(folder, settings, rows)
    print(f"Written to {folder}")


if __name__ == "__main__":
    typer.run(main)
