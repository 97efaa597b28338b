"""The judge of the posterior: refits of the head on resampled images and fresh draws, against its closed-form variance.

    python -m experiments.posterior_check --model fashion-ddpm

A refit trains the head anew: on images resampled from those that the posterior was fitted on, each with M draws (t, ε) that the
posterior has not seen. For squares it is one Cholesky solve, for other losses an iteration that knows nothing of the posterior.
The variance of the refitted heads' predictions on held-out samples, at six timesteps, is what a posterior over the head should
say. The ridge is the posterior's, and so are loss, weights and density of t. Beside the posterior that is told M stand what
other settings make of the same sums.

Under another loss or density than the model's own (``--settle``) the head is first refitted under them, on draws of its own: a
posterior is that of a minimum. A network that was trained on a few timesteps only, as a distilled one, is judged there:
``--density 249,499,749,999``.
"""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor

import bayesdiff
from bayesdiff.checks import BayesdiffWarning
from bayesdiff.diffusion.density import Density, as_density
from bayesdiff.diffusion.weighting import Weighting, as_weighting
from bayesdiff.io import write_figure
from bayesdiff.laplace.loss import Loss, Squares, as_loss
from bayesdiff.laplace.training import choose_draws
from experiments.common import Only, agreement, command, record, results_folder, table
from experiments.posterior_check.refits import least_squares, m_estimates, resample
from experiments.posterior_check.subject import Subject, put

TIMESTEPS = (20, 100, 250, 500, 750, 950)
SHOWN = "M is told"
#: Draws of each image, and ridge, with which the head is settled.
SETTLING, RIDGE = 4, 1e-6


def posteriors(fitted: bayesdiff.LaplacePosterior) -> dict[str, bayesdiff.LaplacePosterior]:
    """What is judged, by name."""
    tau = fitted.prior_precision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BayesdiffWarning)  # the same projection again
        out = {
            SHOWN: fitted,
            "M = m assumed": fitted.recut(training_draws=None),
            "lowrank": fitted.recut(structure="lowrank"),
            "kron": fitted.recut(structure="kron") if isinstance(tau, float) else fitted,
            "diag": fitted.recut(structure="diag"),
            "ggn": fitted.recut(covariance="ggn"),
        }
    return out


@dataclass(frozen=True)
class Training:
    """What the refits minimise."""

    loss: Loss
    density: Density | None
    weighting: Weighting | None


def settled(subject: Subject, training: Training, seed: int, iterations: int) -> float:
    """Put the head at the minimum of the loss over fresh draws; returns the last step, as :func:`m_estimates` does."""
    weight = subject.head.weight().cpu()
    stream = subject.draws(seed, SETTLING, training.density, training.weighting, torch.ones(10, dtype=torch.float64))
    counts = torch.ones(1, len(subject) * SETTLING, dtype=torch.float64)
    geometry = subject.head.geometry
    if isinstance(training.loss, Squares):
        away, moved = least_squares(geometry, stream, counts, weight, RIDGE)
    else:
        away, moved = m_estimates(geometry, stream, counts, weight, RIDGE, training.loss, iterations)
    put(subject.head, weight + away[0])
    return moved


def plot(
    rows: list[dict[str, Any]], points: tuple[Tensor, Tensor], shares: list[dict[str, float]], refits: int
) -> Figure:
    """Scatter of predicted against refitted std, the ratio by timestep, and where the variance comes from."""
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    predicted, reference = points
    pick = torch.randperm(predicted.numel(), generator=torch.Generator().manual_seed(0))[:6000]
    left.plot(
        reference.flatten()[pick].sqrt(), predicted.flatten()[pick].sqrt(), ".", ms=2, alpha=0.35, color="#c1440e",
        rasterized=True,
    )  # fmt: skip
    ends = [max(left.get_xlim()[0], float(reference.min().sqrt())), left.get_xlim()[1]]
    left.plot(ends, ends, "k-", lw=0.8)
    left.set(
        xscale="log", yscale="log", xlabel=f"std over {refits} refits of the head", ylabel="std by the posterior",
        title="Held-out predictions",
    )  # fmt: skip
    for name, color in ((SHOWN, "#c1440e"), ("M = m assumed", "#2b6777"), ("diag", "#c9a227"), ("ggn", "#8a8a8a")):
        chosen = [r for r in rows if r["posterior"] == name]
        middle.plot([r["t"] for r in chosen], [r["ratio"] for r in chosen], "o-", color=color, label=name)
    middle.axhspan(0.9, 1.1, color="#e8e2d5", zorder=0)
    middle.axhline(1, color="k", lw=0.8)
    middle.set(
        xlabel="timestep t", ylabel="mean variance: posterior / refits", yscale="log", title="Ratio to the refits"
    )
    middle.legend(frameon=False)
    centers = [(s["t_low"] + s["t_high"]) / 2 for s in shares]
    low = [s["share_between"] for s in shares]
    width = 0.9 * (shares[0]["t_high"] - shares[0]["t_low"])
    right.bar(centers, low, width, color="#2b6777", label="which images (A)")
    right.bar(centers, [1 - v for v in low], width, bottom=low, color="#d9c7a0", label="their draws (B/M)")
    right.set(xlabel="timestep t", ylabel="share of the variance", ylim=(0, 1), title="Where the variance comes from")
    right.legend(frameon=False, loc="upper right")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def folder_name(
    model: str, loss: str = "squares", loss_weights: str = "uniform", density: str = "uniform", *, settle: bool = False,
    draws: int = 0,
) -> str:  # fmt: skip
    """Where a run's results go: one for each model (of its own density), each other loss, weighting, density, and so on.

    Args:
        model: In the zoo.
        loss: Its name.
        loss_weights: Their name.
        density: Of t.
        settle: Whether the head is put at the minimum first; under another loss than the model's own it always is.
        draws: m, where it is not the default.
    """
    density = "uniform" if model != "fashion-ddpm" else density
    usual = ("fashion-ddpm", "squares", "uniform", "uniform")
    parts = [v for v, u in zip((model, loss, loss_weights, density), usual, strict=True) if v != u]
    parts += ["settled"] if settle and (loss, loss_weights, density) == usual[1:] else []
    parts += [f"{draws} draws"] if draws else []
    return "_".join(["posterior_check", *parts]).replace("-", "_").replace(" ", "_")


def main(
    model: Annotated[str, typer.Option(help="A model of the zoo.")] = "fashion-ddpm",
    refits_number: Annotated[int, typer.Option("--refits", help="Refits of the head.")] = 300,
    images: Annotated[int, typer.Option(help="Training images fitted to; 0: all that ship.")] = 1000,
    test_images: Annotated[int, typer.Option(help="Held-out images predicted on.")] = 100,
    training_draws: Annotated[int, typer.Option(help="M, of every image in a refit; 0: the model's own, rounded.")] = 0,
    draws: Annotated[int, typer.Option(help="m, of every image in the fit; 0: the default.")] = 0,
    pool: Annotated[int, typer.Option(help="Draws of every image that a refit takes its M from; 0: 2 M.")] = 0,
    loss: Annotated[str, typer.Option(help='"squares", "l1", "huber" or "pseudo-huber".')] = "squares",
    loss_weights: Annotated[str, typer.Option(help='"uniform", "noise", "min-snr" or "p2".')] = "uniform",
    density: Annotated[
        str, typer.Option(help='"uniform", "logit-normal", "gaussian", or timesteps: "249,499".')
    ] = "uniform",
    settle: Annotated[bool, typer.Option(help="Refit the head under this loss and density first.")] = False,
    iterations: Annotated[int, typer.Option(help="Of a refit under another loss than squares.")] = 12,
    encode: Annotated[str, typer.Option(help='"sample" of the encoder, drawn anew, or its "mean".')] = "sample",
    given: Annotated[str, typer.Option(help="Keywords of every call of the pipeline, as JSON.")] = "{}",
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Compare the posterior's predictive variance with refits of the head."""
    started = time.perf_counter()
    pipe, data = bayesdiff.zoo.load(model)
    heldout = data.heldout
    if heldout is None:
        raise RuntimeError("expected a model with held-out data")
    training_draws = training_draws or round(data.training_draws or 1)
    usual = max(2, choose_draws(None, training_draws))  # one does not tell A from B
    other = 0 if draws in (0, usual) else draws
    folder = results_folder(folder_name(model, loss, loss_weights, density, settle=settle, draws=other), out)
    draws = draws or usual
    number = images or data.num_images
    index = torch.randperm(data.num_images, generator=torch.Generator().manual_seed(seed))[:number].sort().values
    data = data.subset(index)
    pipe = copy.deepcopy(pipe)
    keywords = json.loads(given)
    subject = Subject(pipe, data, keywords, encode)
    only = tuple(int(t) for t in density.split(",")) if "," in density else ()
    density_of = as_density(Only(only, subject.num_timesteps) if only else density)
    training = Training(as_loss(loss), density_of, as_weighting(loss_weights))
    if settle:
        moved = settled(subject, training, seed + 1000, 2 * iterations)
        subject = Subject(pipe, data, keywords, encode)  # of another network now
        print(f"The head was put at the minimum of the loss; the last step was {moved:.1e} of the way.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BayesdiffWarning)
        fitted = bayesdiff.fit(
            pipe, data, draws_per_image=draws, training_draws=training_draws, loss=loss, loss_weights=loss_weights,
            timestep_density=density_of or "uniform", pipe_kwargs=keywords, encode=encode,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
    notes = [str(w.message) for w in caught if issubclass(w.category, BayesdiffWarning)]
    print(*notes, sep="\n")
    pool = pool or 2 * training_draws
    counts = resample(number, pool, training_draws, refits_number, torch.Generator().manual_seed(seed + 1))
    geometry, weight = subject.head.geometry, subject.head.weight().cpu()
    stream = subject.draws(seed + 2000, pool, training.density, training.weighting, fitted.weights)
    if isinstance(training.loss, Squares):
        heads, moved = least_squares(geometry, stream, counts, weight, float(fitted.prior_precision))
    else:
        heads, moved = m_estimates(
            geometry, stream, counts, weight, float(fitted.prior_precision), training.loss, iterations
        )
    test = heldout.subset(slice(None, None, max(1, heldout.num_images // test_images)))
    judged = Subject(pipe, test, keywords, encode)
    noise = torch.randn((len(judged), *judged.shape), generator=torch.Generator().manual_seed(seed + 2))
    rows: list[dict[str, Any]] = []
    points: list[tuple[Tensor, Tensor]] = []
    halves: list[dict[str, Any]] = []
    candidates = posteriors(fitted)
    timesteps = only or TIMESTEPS
    for t in timesteps:
        phi, _ = judged.observe(torch.arange(test.num_images), torch.full((test.num_images,), t), noise)
        refitted = geometry.apply(phi, heads.float()).double()
        reference = refitted.var(0)
        halves.append({"t": t, **agreement(refitted[::2].var(0), refitted[1::2].var(0))})
        for name, posterior in candidates.items():
            predicted = posterior.variance(phi)
            rows.append({"t": t, "posterior": name} | agreement(predicted, reference))
            if name == SHOWN:
                points.append((predicted, reference))
    columns = {"t": "d", "posterior": "", "ratio": ".3f", "log_correlation": ".3f", "correlation": ".3f"}
    print(table(rows, columns))
    print(
        "Half of the refits against the other half:",
        table(halves, {k: columns[k] for k in columns if k != "posterior"}),
        sep="\n",
    )
    print(f"The reference has a relative standard error of {math.sqrt(2 / (refits_number - 1)):.1%} in each variance.")
    shares = fitted.shares()
    print(table(shares, {"t_low": ".0f", "t_high": ".0f", "share_between": ".3f", "share_within": ".3f"}))
    stacked = (torch.stack([p for p, _ in points]), torch.stack([r for _, r in points]))
    write_figure(folder / "posterior_check.png", plot(rows, stacked, shares, refits_number))
    settings = {
        "model": model, "refits": refits_number, "images": number, "test_images": test.num_images,
        "training_draws": training_draws, "draws_of_fit": fitted.draws_per_image, "draws_of_judge": pool,
        "loss": loss, "loss_weights": loss_weights, "density": density, "encode": encode, "given": keywords, "settled": settle,
        "last_step": moved, "seed": seed, "timesteps": timesteps, "prior_precision": fitted.prior_precision,
        "cut_share": fitted.cut_share, "warnings": notes, "noise_variance": fitted.noise_variance.tolist(),
        "seconds": round(time.perf_counter() - started, 1), "command": command("posterior_check"),
    }  # fmt: skip
    record(folder, settings, {"agreement": rows, "halves": halves, "shares": shares})
    print(f"Written to {folder}")


if __name__ == "__main__":
    typer.run(main)
