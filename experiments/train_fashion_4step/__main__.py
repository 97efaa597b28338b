"""Distil ``fashion-ddpm`` and export the student: ``python -m experiments.train_fashion_4step``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayesdiff import zoo
from experiments.train_fashion_4step.distill import distill
from experiments.train_fashion_4step.export import export
from experiments.train_fashion_ddpm.train import fashion_mnist


def main(
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST's four .gz files.")] = Path(
        "/usr/share/datasets/fashion-mnist"
    ),
    work: Annotated[Path, typer.Option(help="Checkpoints; a run found there goes on.")] = Path(
        "build/train_fashion_4step"
    ),
    out: Annotated[Path, typer.Option(help="The folder that ships; replaced as a whole.")] = Path(
        "bayesdiff/zoo/fashion_4step"
    ),
    results: Annotated[Path, typer.Option(help="Folder for results.json and samples.png.")] = Path(
        "experiments/train_fashion_4step"
    ),
    updates: Annotated[int, typer.Option(help="Optimiser steps of all stages together.", min=10)] = 800,
    dataset_size: Annotated[int, typer.Option(help="Train on the first so many images.", min=1)] = 8192,
    seed: Annotated[int, typer.Option(help="Of the training and of the checks.")] = 0,
) -> None:
    """Distil fashion-ddpm to four steps, and export the student into the package."""
    if not (data / "train-images-idx3-ubyte.gz").exists():
        raise typer.BadParameter(
            f"no Fashion-MNIST in {data}: install the Debian package dataset-fashion-mnist, or name a folder with "
            "its four .gz files",
            param_hint="--data",
        )
    images, labels = fashion_mnist(data, "train")
    teacher, _ = zoo.load("fashion-ddpm")
    distill(teacher.unet, images[:dataset_size], labels[:dataset_size], work, updates=updates, seed=seed)
    record = export(work, out, results, dataset_size=dataset_size, seed=seed)
    for row in record["heldout_loss"]:
        typer.echo(f"t = {row['time']}: held-out loss {row['loss']:.4f} ± {row['standard_error']:.4f}")


if __name__ == "__main__":
    typer.run(main)
