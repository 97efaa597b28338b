"""Networks trained anew against posteriors of one of them: ``python -m experiments.retraining --problem sines``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.retraining.problems import FASHION, Fashion, Problem, Sines
from experiments.retraining.train import train


def main(
    problem: Annotated[str, typer.Option(help="sines or fashion.")] = "sines",
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST's four .gz files.")] = FASHION,
    work: Annotated[Path | None, typer.Option(help="Trained networks; those found there are not trained again.")] = None,
    most: Annotated[int | None, typer.Option("--train", help="Train so many that are missing, and stop.")] = None,
) -> None:
    """Train the networks that are missing, then judge."""
    chosen: Problem = Sines() if problem == "sines" else Fashion(folder=data)
    work = work or Path("build/retraining") / chosen.name
    left = train(chosen, work, most)
    if most is not None:
        print(f"{left} networks are still to be trained")
        return


if __name__ == "__main__":
    typer.run(main)
