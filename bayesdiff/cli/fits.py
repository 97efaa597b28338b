"""``bayesdiff fit``: a posterior of any saved pipeline, from a folder of images, which goes on where it was killed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bayesdiff.checks import ArgumentError, check_choice, check_int, check_output_folder
from bayesdiff.cli import main as options
from bayesdiff.cli import show
from bayesdiff.cli.models import load_model
from bayesdiff.cli.results import write_record
from bayesdiff.data import images_for
from bayesdiff.fitting import fit
from bayesdiff.head.find import denoiser
from bayesdiff.laplace.checkpoint import Checkpoint, remove


@dataclass(frozen=True)
class FitOptions:
    """The options of the command."""

    model: str
    data: Path
    out: Path
    prompt: str | None
    dataset_size: int | None
    training_draws: float | None
    draws_per_image: int | None
    size: int | None
    convert: bool
    structure: str
    covariance: str
    batch_size: int
    checkpoint_every: float
    overwrite: bool
    seed: int
    dtype: str
    device: str | None


def run_fit(o: FitOptions) -> None:
    """Run the command. Everything that can be wrong is looked at before the first network call."""
    for name in ("draws_per_image", "batch_size", "dataset_size", "size"):
        if getattr(o, name) is not None:
            check_int(f"--{name.replace('_', '-')}", getattr(o, name), least=1)
    show.check_seed(o.seed)
    check_choice("--structure", o.structure, options.STRUCTURES)
    check_choice("--covariance", o.covariance, options.COVARIANCES)
    check_choice("--dtype", o.dtype, options.DTYPES)
    checkpoint = Checkpoint(o.out / "checkpoint", o.checkpoint_every)
    begun = (o.out / "checkpoint" / "checkpoint.json").is_file()
    if (o.out / "posterior.json").exists() and not o.overwrite and not begun:
        raise ArgumentError(
            f"expected a folder without a posterior for --out, got {str(o.out)!r}, which has one: choose another, or replace it "
            "with --overwrite"
        )
    where = show.chosen_device(o.device)
    pipe, _ = load_model(o.model, None, getattr(torch, o.dtype))
    data = images_for(pipe, denoiser(pipe), o.data, o.prompt, size=o.size, convert=o.convert)
    show.say(f"fitting a posterior of {show.name_of(o.model)} to {len(data)} images")
    check_output_folder(o.out)
    pipe.to(where)
    if begun:
        show.say("going on where an earlier fit was stopped")
    seconds: dict[str, float] = {}
    settings: dict[str, Any] = {"structure": o.structure, "covariance": o.covariance, "dataset_size": o.dataset_size,
                                "training_draws": o.training_draws}  # fmt: skip
    with show.timed(seconds, "fit"):
        posterior = fit(
            pipe, data, draws_per_image=o.draws_per_image, batch_size=o.batch_size, checkpoint=checkpoint,
            generator=torch.Generator().manual_seed(o.seed), progress=show.has_terminal(), **settings,
        )  # fmt: skip
    posterior.save(o.out)
    written = {k: v for k, v in asdict(o).items() if k not in ("out", "device", "checkpoint_every", "overwrite")}
    written |= {"model": show.name_of(o.model), "data": o.data.resolve().name}
    write_record(
        o.out, "fit", where, settings=written, posterior=show.describe(posterior), seconds=seconds, resumed=begun
    )
    remove(o.out / "checkpoint")
    show.say(f"{posterior.num_images} images in {seconds['fit']:.1f} s")
    show.say(f"written to {o.out}: the posterior, settings.json")
