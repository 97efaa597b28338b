"""What a map takes beyond the images alone: memory and time at larger sizes, and along many steps.

    python -m experiments.memory

Each row is a process of its own: a U-Net with random weights makes one image in colour, then the same image with its map. The
growth is that of the process's peak memory from the one to the other; the overhead is the ratio of their times over that of
their network calls.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.common import command, record, results_folder, table

#: Pixels a side, sampler, steps, K, channels of the U-Net's first level.
RUNS = (
    (128, "DDIM", 50, 64, 32),
    (256, "DDIM", 50, 64, 32),
    (32, "DDPM", 250, 64, 16),
    (32, "DDPM", 500, 64, 16),
    (32, "DDPM", 1000, 64, 16),
)


def main(
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
    only: Annotated[int | None, typer.Option(help="The number of one row, from 0; the others are kept.")] = None,
) -> None:
    """Measure all rows, one after the other."""
    folder = results_folder("memory", out)
    path = folder / "results.json"
    before = json.loads(path.read_text())["results"] if only is not None and path.exists() else []
    rows = {key(row): row for row in before}
    for run in RUNS if only is None else RUNS[only : only + 1]:
        line = [sys.executable, "-m", "experiments.memory.measure", *map(str, run)]
        found = json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        rows[key(found)] = found
        print(found, flush=True)
    columns = {"size": "d", "sampler": "", "steps": "d", "draws": "d", "plain": ".1f", "seconds": ".1f"}
    columns |= {"calls_ratio": ".2f", "overhead": ".2f", "growth_mb": ".0f", "numbers": ".1f"}
    print(table(list(rows.values()), columns))
    record(folder, {"command": command("memory")}, list(rows.values()))
    print(f"Written to {folder}")


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row measures."""
    return tuple(row[k] for k in ("size", "sampler", "steps", "draws", "width"))


if __name__ == "__main__":
    typer.run(main)
