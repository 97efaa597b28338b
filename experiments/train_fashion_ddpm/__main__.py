"""Train the shipped model and export it: ``python -m experiments.train_fashion_ddpm``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.train_fashion_ddpm.export import export, read_checkpoint
from experiments.train_fashion_ddpm.train import Run, Settings, fashion_mnist


def main(
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST's four .gz files.")] = Path(
        "/usr/share/datasets/fashion-mnist"
    ),
    work: Annotated[Path, typer.Option(help="Checkpoints; a run found there goes on.")] = Path(
        "build/train_fashion_ddpm"
    ),
    out: Annotated[Path, typer.Option(help="The folder that ships; replaced as a whole.")] = Path(
        "bayesdiff/zoo/fashion_ddpm"
    ),
    results: Annotated[Path, typer.Option(help="Folder for results.json and samples.png.")] = Path(
        "experiments/train_fashion_ddpm"
    ),
    device: Annotated[str, typer.Option(help="Where to train and check: cpu, cuda, …")] = "cpu",
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = Settings.steps,
    seed: Annotated[int, typer.Option(help="Of the training and of the checks.")] = Settings.seed,
    export_only: Annotated[bool, typer.Option("--export-only", help="Export the checkpoint as it is.")] = False,
    max_images: Annotated[int | None, typer.Option(help="Check on the first so many test images only.", min=2)] = None,
) -> None:
    """Train a small class-conditional diffusion model on Fashion-MNIST, and export it into the package."""
    if not (data / "train-images-idx3-ubyte.gz").exists():
        raise typer.BadParameter(
            f"no Fashion-MNIST in {data}: install the Debian package dataset-fashion-mnist, or put the four .gz "
            "files of https://github.com/zalandoresearch/fashion-mnist into a folder and name it",
            param_hint="--data",
        )
    if export_only:
        if not (work / "state.json").exists():
            raise typer.BadParameter(f"no checkpoint in {work}: train first", param_hint="--work")
    else:
        images, labels = fashion_mnist(data, "train")
        Run(Settings(steps=steps, seed=seed), work, device).train(images, labels)
    record = export(read_checkpoint(work), data, out, results, device=device, seed=seed, max_images=max_images)
    for decile, row in enumerate(record["heldout_loss"]):
        typer.echo(f"t decile {decile}: held-out loss {row['loss']:.4f} ± {row['standard_error']:.4f}")


if __name__ == "__main__":
    typer.run(main)
