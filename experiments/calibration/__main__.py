"""Calibration on held-out images: coverage, NLL, CRPS and ENCE by bins of t, for every noise model and BayesDiff's settings.

    python -m experiments.calibration --model fashion-ddpm

A posterior is fitted to the training images that ship with a model of the zoo, noise models to one random half of its held-out
images, and all of them are judged on the other half (:func:`bayesdiff.evaluate`). The bar: coverage of 80, 90 and 95 % intervals
within 2 points, of 50 % within 4, in every bin of t. Standard errors are over images. A network that is called at a few timesteps
only is judged at these: ``--timesteps 249,499,749,999``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import bayesdiff
from bayesdiff.calibration.report import DEFAULT, Report
from bayesdiff.diffusion.density import Density, as_density
from bayesdiff.io import write_figure
from experiments.common import Only, command, record, results_folder, table

#: Points of coverage that a level may be off.
BARS = {0.5: 4.0, 0.8: 2.0, 0.9: 2.0, 0.95: 2.0}


def within(report: Report, method: str) -> dict[str, Any]:
    """How far coverage is off in the worst bin, in points, and whether each level is within its bar in every bin."""
    rows = report.of(method)
    out: dict[str, Any] = {"method": method}
    for i, level in enumerate(report.levels):
        worst = max(rows, key=lambda r: abs(r["coverage"][i] - level))
        out[f"worst_{100 * level:.0f}"] = 100 * (worst["coverage"][i] - level)
        out[f"error_{100 * level:.0f}"] = 100 * worst["coverage_error"][i]
    out["within"] = all(abs(out[f"worst_{100 * p:.0f}"]) <= BARS[p] for p in report.levels)
    for key in ("nll", "crps", "ence"):
        out[key] = sum(r[key] for r in rows) / len(rows)
    return out


def main(
    model: Annotated[str, typer.Option(help="A model of the zoo.")] = "fashion-ddpm",
    images: Annotated[int, typer.Option(help="Training images that the posterior is fitted to.")] = 500,
    heldout: Annotated[int, typer.Option(help="Held-out images, half of them to fit noise models to; 0: all.")] = 0,
    probes: Annotated[int, typer.Option(help="Numbers of each sample at which Tweedie's variance is measured.")] = 8,
    draws: Annotated[int, typer.Option(help="(t, ε) of each image in each bin.")] = 1,
    timesteps: Annotated[str, typer.Option(help='Only these, instead of ten bins: "249,499".')] = "",
    density: Annotated[str, typer.Option(help='Of the fit: "uniform" or "logit-normal".')] = "uniform",
    encode: Annotated[str, typer.Option(help='"sample" of the encoder, or its "mean".')] = "sample",
    given: Annotated[str, typer.Option(help="Keywords of every call of the pipeline, as JSON.")] = "{}",
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Judge one model."""
    folder = results_folder(f"calibration/{model}", out)
    started = time.perf_counter()
    pipe, data = bayesdiff.zoo.load(model)
    assert data.heldout is not None
    few = tuple(int(t) for t in timesteps.split(",")) if timesteps else None
    total = int(pipe.scheduler.config.num_train_timesteps)
    fit_density: Density | str = as_density(density) or "uniform"
    posterior = bayesdiff.fit(
        pipe, data.subset(slice(images)), dataset_size=data.dataset_size, training_draws=data.training_draws, encode=encode,
        pipe_kwargs=json.loads(given), timestep_density=Only(few, total) if few else fit_density,
        generator=torch.Generator().manual_seed(seed), progress=False,
    )  # fmt: skip
    print(posterior, flush=True)
    order = torch.randperm(data.heldout.num_images, generator=torch.Generator().manual_seed(seed + 1))
    report = bayesdiff.evaluate(
        posterior, pipe, data.heldout.subset(order[: heldout or None]), encode=encode, pipe_kwargs=json.loads(given),
        settings=bayesdiff.Evaluation(timesteps=few, probes=probes, draws=draws),
        generator=torch.Generator().manual_seed(seed + 2), progress=False,
    )  # fmt: skip
    rows = [within(report, method) for method in report.methods()]
    columns = {"method": ""} | {f"worst_{100 * p:.0f}": "+.1f" for p in report.levels}
    print(table(rows, {**columns, "nll": ".3f", "crps": ".4f", "ence": ".3f", "within": "d"}))
    shipped = next(r for r in rows if r["method"] == DEFAULT)
    print(f"{DEFAULT}: {'within' if shipped['within'] else 'not within'} the bar in every bin")
    print(report.meaning, *report.notes, sep="\n")
    write_figure(folder / "calibration.png", report.figure())
    settings = {
        "model": model, "images": posterior.num_images, "heldout": report.fitted_on + report.judged_on, "probes": probes,
        "draws": draws, "timesteps": few, "density": density, "encode": encode, "given": json.loads(given), "seed": seed,
        "seconds": round(time.perf_counter() - started, 1), "command": command("calibration"),
    }  # fmt: skip
    record(folder, settings, {"bars": rows, **report.as_dict()})
    print(f"Written to {folder}")


if __name__ == "__main__":
    typer.run(main)
