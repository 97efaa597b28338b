"""The judge of the posterior: bootstrap refits of the head, against its closed-form variance.

    python -m experiments.posterior_check

The head is linear regression, so refitting it on a bootstrap resample of the training images is exact and
cheap: each image keeps its Gram matrix and cross moments, a resample is a weighted sum of them, the refit one
Cholesky solve. The variance of the refitted heads' predictions on held-out images, at six timesteps, is what a
posterior over the head should say. The weights of the regression over t (those of the training loss: equal ones) and
the ridge are the posterior's. ``--loss-weights noise`` weighs by 1/σ_t² instead, both the refits and the sandwich.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import bayesdiff
from bayesdiff.diffusion.noising import draw, noised
from bayesdiff.io import write_figure
from bayesdiff.laplace.posterior import LaplacePosterior
from experiments.common import agreement, command, record, results_folder, table

TIMESTEPS = (20, 100, 250, 500, 750, 950)


def features_and_targets(pipe: Any, images: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the head, and the target, for noised images."""
    x_t, wanted = noised(pipe.scheduler, images, noise, t)
    with torch.no_grad(), bayesdiff.find_head(pipe).capture() as captured:
        pipe.unet(x_t.float(), t, class_labels=labels)
    return captured[0], wanted


def image_moments(pipe: Any, data: Any, bin_weights: Tensor, seed: int, draws: int) -> tuple[Tensor, Tensor]:
    """Each image's Gram matrix (upper triangle) and cross moments: ``(n, D(D+1)/2)`` and ``(n, C, D)``."""
    head = bayesdiff.find_head(pipe)
    d, bins = head.in_features, len(bin_weights)
    upper = torch.triu_indices(d, d)
    n = data.num_images
    grams = torch.zeros(n, upper.shape[1], dtype=torch.float64)
    crosses = torch.zeros(n, head.out_channels, d, dtype=torch.float64)
    shape = tuple(data.images.shape[1:])
    for first in tqdm(range(0, n, 50), desc="image moments"):
        count = min(50, n - first)
        t, noise = draw(pipe.scheduler, shape, seed, first, count, draws)
        rows = torch.arange(first, first + count).repeat_interleave(draws)
        phi, wanted = features_and_targets(pipe, data.images[rows], data.labels[rows], t, noise)
        weights = bin_weights[(t * bins / 1000).long()]
        for i, row in enumerate(rows.tolist()):
            x = phi[i : i + 1].double()
            grams[row] += weights[i] * head.geometry.gram(x)[upper[0], upper[1]]
            crosses[row] += weights[i] * head.geometry.outer(x, wanted[i : i + 1])[0]
    return grams, crosses


def refits(grams: Tensor, crosses: Tensor, ridge: float, number: int, generator: torch.Generator) -> Tensor:
    """Heads refitted on ``number`` bootstrap resamples: ``(number, C, D)``."""
    n, c, d = crosses.shape
    upper = torch.triu_indices(d, d)
    heads = []
    for _ in tqdm(range(number), desc="bootstrap refits"):
        counts = torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).double()
        gram = torch.zeros(d, d, dtype=torch.float64)
        gram[upper[0], upper[1]] = counts @ grams
        gram = gram + gram.triu(1).T + ridge * torch.eye(d, dtype=torch.float64)
        cross = (counts @ crosses.flatten(1)).view(c, d)
        heads.append(torch.cholesky_solve(cross.T, torch.linalg.cholesky(gram)).T)
    return torch.stack(heads)


def plot(rows: list[dict[str, Any]], points: dict[str, tuple[Tensor, Tensor]], refits_number: int) -> Figure:
    """Scatter of predicted against refitted standard deviation, and the ratio by timestep."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = {"ggn": "#8a8a8a", "sandwich": "#c1440e"}
    for name, (predicted, reference) in points.items():
        pick = torch.randperm(predicted.numel(), generator=torch.Generator().manual_seed(0))[:4000]
        left.plot(
            reference.flatten()[pick].sqrt(), predicted.flatten()[pick].sqrt(), ".", ms=2, alpha=0.35, color=colors[name],
            rasterized=True,
        )  # fmt: skip
    low, high = left.get_xlim()
    low = max(low, 1e-5)
    left.plot([low, high], [low, high], "k-", lw=0.8)
    left.set(
        xscale="log", yscale="log", xlabel=f"std over {refits_number} bootstrap refits of the head (ε units)",
        ylabel="std by the posterior (ε units)", title="Predictive standard deviation, held-out pixels",
    )  # fmt: skip
    for name, color in colors.items():
        chosen = [r for r in rows if r["covariance"] == name and r["structure"] == "full"]
        right.plot([r["t"] for r in chosen], [r["ratio"] for r in chosen], "o-", color=color, label=name)
    right.axhspan(0.9, 1.1, color="#e8e2d5", zorder=0)
    right.axhline(1, color="k", lw=0.8)
    right.set(xlabel="timestep t", ylabel="mean variance: posterior / bootstrap", ylim=(0, 1.3))
    right.set_title("Ratio to the bootstrap")
    right.legend(frameon=False, title="covariance")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main(
    refits_number: Annotated[int, typer.Option("--refits", help="Bootstrap refits of the head.")] = 300,
    images: Annotated[int, typer.Option(help="Training images fitted to.")] = 2000,
    test_images: Annotated[int, typer.Option(help="Held-out images predicted on.")] = 100,
    draws: Annotated[int, typer.Option(help="(t, noise) draws for each image.")] = 1,
    loss_weights: Annotated[str, typer.Option(help='"uniform" or "noise".')] = "uniform",
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Compare the posterior's predictive variance with bootstrap refits of the head."""
    folder = results_folder("posterior_check", out)
    started = time.perf_counter()
    pipe, data = bayesdiff.zoo.load("fashion-ddpm")
    index = torch.randperm(data.num_images, generator=torch.Generator().manual_seed(seed))[:images].sort().values
    data = data.subset(index)
    base = torch.Generator().manual_seed(seed)
    fitted = bayesdiff.fit(pipe, data, draws_per_image=draws, loss_weights=loss_weights, generator=base)
    # The very draws that the posterior was fitted on.
    draw_seed = bayesdiff.rng.base_seed(torch.Generator().manual_seed(seed))
    grams, crosses = image_moments(pipe, data, fitted.weights, draw_seed, draws)
    heads = refits(
        grams, crosses, float(fitted.prior_precision), refits_number, torch.Generator().manual_seed(seed + 1)
    )
    head = bayesdiff.find_head(pipe)
    if fitted.statistics is None or data.heldout is None:
        raise RuntimeError("expected a fresh fit and held-out data")
    posteriors = {
        (structure, covariance): LaplacePosterior.from_statistics(
            fitted.statistics,
            head,
            structure=structure,
            covariance=covariance,
            loss_weights=loss_weights,
            prior_precision=fitted.prior_precision,
        )
        for structure in ("full", "diag")
        for covariance in ("ggn", "sandwich")
    }
    test = data.heldout.subset(slice(None, None, max(1, data.heldout.num_images // test_images)))
    noise = torch.randn(test.images.shape, generator=torch.Generator().manual_seed(seed + 2))
    rows: list[dict[str, Any]] = []
    points: dict[str, list[tuple[Tensor, Tensor]]] = {"ggn": [], "sandwich": []}
    for t in TIMESTEPS:
        phi, _ = features_and_targets(pipe, test.images, test.labels, torch.full((test.num_images,), t), noise)
        reference = head.geometry.apply(phi, heads.float()).double().var(0)
        for (structure, covariance), posterior in posteriors.items():
            predicted = posterior.variance(phi)
            rows.append({"t": t, "structure": structure, "covariance": covariance} | agreement(predicted, reference))
            if structure == "full":
                points[covariance].append((predicted, reference))
    columns = {
        "t": "d",
        "structure": "",
        "covariance": "",
        "ratio": ".3f",
        "log_correlation": ".3f",
        "correlation": ".3f",
    }
    print(table(rows, columns))
    noise_of_reference = math.sqrt(2 / (refits_number - 1))
    print(f"The reference has a relative standard error of {noise_of_reference:.1%} in each variance.")
    stacked = {k: (torch.stack([p for p, _ in v]), torch.stack([r for _, r in v])) for k, v in points.items()}
    write_figure(folder / "posterior_check.png", plot(rows, stacked, refits_number))
    settings = {
        "refits": refits_number, "images": images, "test_images": test.num_images, "draws_per_image": draws,
        "loss_weights": loss_weights, "seed": seed,
        "timesteps": TIMESTEPS, "model": "fashion-ddpm", "prior_precision": fitted.prior_precision,
        "noise_variance": fitted.noise_variance.tolist(), "seconds": round(time.perf_counter() - started, 1),
        "command": command("posterior_check"),
    }  # fmt: skip
    record(folder, settings, rows)
    print(f"Written to {folder}")


if __name__ == "__main__":
    typer.run(main)
