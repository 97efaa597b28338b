"""A head of Flux's size (64 outputs, 3,073 features) and many images: memory, time, files, and what the sketch costs in accuracy.

    python -m experiments.large_head

Features are synthetic, since this is about size; the sums, the posteriors and their files are the package's. Every stage is a
process of its own, whose peak memory is told, what the imports alone take included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.common import record, results_folder, table

#: Posteriors that are cut from the sums of two draws of each image.
CUTS: dict[str, dict[str, Any]] = {
    "full, M = m": {"training_draws": 2}, "full, M = 100": {"training_draws": 100}, "full, ggn": {"covariance": "ggn"},
    "kron, M = m": {"training_draws": 2, "structure": "kron"}, "diag, M = m": {"training_draws": 2, "structure": "diag"},
}  # fmt: skip


def main(
    images: Annotated[int, typer.Option(help="Images of the fit.")] = 10_000,
    channels: Annotated[int, typer.Option(help="C.")] = 64,
    features: Annotated[int, typer.Option(help="D, the constant one included.")] = 3073,
    tokens: Annotated[int, typer.Option(help="Tokens of a draw.")] = 8,
    rows: Annotated[int, typer.Option(help="R, rows of the sketch.")] = 256,
    compared: Annotated[int, typer.Option(help="Images where sketched and exact variances are compared.")] = 500,
    only: Annotated[str | None, typer.Option(help="fit, build or compare; what else is recorded stays.")] = None,
    scratch: Annotated[Path | None, typer.Option(help="Folder for the sums, where they stay.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Measure all stages, one after the other."""
    folder = results_folder("large_head", out)
    path = folder / "results.json"
    results: dict[str, Any] = json.loads(path.read_text())["results"] if only and path.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        where = str(scratch or temporary)

        def stage(row: str, /, **task: Any) -> None:
            task = {"folder": where, "shape": (images, channels, features, tokens), **task}
            line = [sys.executable, "-W", "ignore", "-m", "experiments.large_head.measure", json.dumps(task)]
            done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
            results[row] = json.loads(done.stdout.splitlines()[-1])
            print(row, results[row], flush=True)
            settings = {"command": "python -m experiments.large_head", "images": images, "channels": channels,
                        "features": features, "tokens": tokens, "rows": rows, "compared": compared}  # fmt: skip
            record(folder, settings, results)

        if only in (None, "fit"):
            stage("fit", stage="fit", rows=rows)
        if only in (None, "build"):
            for n, (name, settings) in enumerate(CUTS.items()):
                stage(f"build {name}", stage="build", settings=settings, name=str(n))
                stage(f"load {name}", stage="load", name=str(n))
        if only in (None, "compare"):
            for name in ("full, M = m", "kron, M = m"):
                stage(f"compare {name}", stage="compare", shape=(compared, channels, features, tokens), rows=rows,
                      settings=CUTS[name])  # fmt: skip
    columns = {
        "stage": "",
        "seconds": ".1f",
        "peak_gb": ".2f",
        "file_mb": ".0f",
        "stated": ".3f",
        "error": ".3f",
        "mean_ratio": ".3f",
    }
    print(table([{"stage": name, **row} for name, row in results.items()], columns))
    print(f"Written to {folder}")


if __name__ == "__main__":
    typer.run(main)
