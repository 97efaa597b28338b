r"""Three variances side by side, and numbers that add up: ``python -m experiments.uncertainty_maps --model earth-sd``.

The gallery shows, along one run of a model and at its end: what the weights leave open (tangents), what the data leave open
at each x_t (Tweedie, from the same tangents), and how samples of other seeds spread. The conditional task is inpainting, the
lower half of held-out images hidden (behind a VAE: of their latents). S seeds are crossed with K draws of the head's weights,
whole trajectories each, and

.. math:: \operatorname{Var}[x] = \mathrm E_s\operatorname{Var}_w[x] + \operatorname{Var}_s \mathrm E_w[x]

holds to the last digit for population variances over the grid. :math:`E_s Var_w` is what tangents estimate without the
grid.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor

import bayesdiff
from bayesdiff.io import write_figure
from experiments.common import agreement, command, record, results_folder, seeded, table
from experiments.posterior_check.subject import put
from experiments.usefulness.common import Subject, subject
from experiments.usefulness.restoration import sampler

SHOWN = ("Trouser", "Dress", "Sandal", "Bag")


def main(
    model: Annotated[str, typer.Option(help="A model of the zoo.")] = "fashion-ddpm",
    steps: Annotated[int, typer.Option(help="Of the sampler, but for a model of few.")] = 20,
    seeds: Annotated[int, typer.Option(help="S, of the spread over seeds and of the grid.", min=3)] = 8,
    draws: Annotated[int, typer.Option(help="K, weight draws of the grid.", min=2)] = 8,
    images: Annotated[int, typer.Option(help="Held-out images of the conditional task.")] = 6,
    fit: Annotated[int, typer.Option(help="Images that the posterior is fitted to.")] = 500,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Draw the gallery, and add up the variances."""
    started = time.perf_counter()
    folder = results_folder(f"uncertainty_maps/{model}", out)
    of = subject(model, fit)
    steps = of.steps(steps)
    along = gallery(of, steps, seeds)
    print(table(along["rows"], {"step": "d", "weights": ".4f", "denoising": ".4f", "seeds": ".4f"}))
    total = total_variance(of, steps, seeds, draws, images)
    print(table(total["rows"], {"part": "", "variance": ".3e", "share": ".4f"}))
    print({k: round(v, 4) for k, v in total["tangents"].items()})
    write_figure(folder / "uncertainty_maps.png", plot(along, total))
    settings = {
        "model": model, "steps": steps, "seeds": seeds, "draws": draws, "images": images, "fit": fit,
        "seconds": round(time.perf_counter() - started, 1), "command": command("uncertainty_maps"),
    }  # fmt: skip
    record(folder, settings, {"along": along["rows"], "total_variance": total["rows"], "tangents": total["tangents"]})
    print(f"Written to {folder}")


def gallery(of: Subject, steps: int, seeds: int) -> dict[str, Any]:
    """Std maps of the three kinds after each step, in the network's units (pixels from −1 to 1, or latents)."""
    text = "prompts" in of.data
    told = list(dict.fromkeys(of.data.heldout.prompts))[: len(SHOWN)] if text else of.pipe.class_indices(SHOWN)
    keywords = {"num_inference_steps": steps, "guidance_scale": 1.0, **of.trained.given}
    run = bayesdiff.UncertaintyPipeline(of.pipe, of.posterior, propagation=bayesdiff.Tangents(trajectory=True))
    output = run(told, generator=[seeded(i) for i in range(len(told))], output_type="pt", **keywords)
    assert output.trajectory is not None
    assert output.denoising_std is not None
    others: list[list[Tensor]] = [[] for _ in range(steps)]

    def seen(_: Any, step: int, __: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        others[step].append(given["latents"])
        return given

    for s in range(seeds):
        of.sampler(told, steps, callback_on_step_end=seen)(of.noise(len(told), 500 + s))
    spread = torch.stack([torch.stack(o).std(0) for o in others])
    weights = torch.stack([g.variance.clamp(min=0).sqrt() for g in output.trajectory])
    # Of pure noise a flow's denoising spread is not known.
    known = [m if bool(m.isfinite().all()) else None for m in output.denoising_std]
    rows = [
        {
            "step": n + 1, "weights": float(weights[n].mean()), "denoising": None if m is None else float(m.mean()),
            "seeds": float(spread[n].mean()),
        }
        for n, m in enumerate(known)
    ]  # fmt: skip
    return {
        "rows": rows,
        "images": output.images,
        "weights": weights,
        "denoising": [torch.zeros_like(weights[0]) if m is None else m for m in known],
        "seeds": spread,
    }


def total_variance(of: Subject, steps: int, seeds: int, draws: int, count: int) -> dict[str, Any]:
    """Variances over the grid of seeds and weights, means over the hidden pixels and the images, in units of pixels 0–1."""
    heldout = of.data.heldout
    rows_of = torch.arange(5, heldout.num_images, max(1, heldout.num_images // count))[:count]
    held, told = heldout.subset(rows_of), of.told(heldout, rows_of)
    pixels, truth = (held.images + 1) / 2, of.clean(held.images)
    head = bayesdiff.find_head(of.pipe)
    own, heads = head.weight(), of.posterior.sample(draws, seeded(9))
    grid = torch.zeros(seeds, draws, *pixels.shape, dtype=torch.float64)
    tangents = torch.zeros(pixels.shape, dtype=torch.float64)
    for s in range(seeds):
        x = of.noise(count, 3000 + s)
        function = sampler(of, "inpainting", truth, told, steps, 4000 + s)
        schedule = bayesdiff.Tangents(schedule=of.pipe.scheduler)
        tangents += bayesdiff.propagate(function, of.network, of.posterior, x, propagation=schedule).variance / seeds
        try:
            for k, w in enumerate(heads):
                put(head, w)
                with torch.no_grad():
                    grid[s, k] = function(x)
        finally:
            put(head, own)
    half = pixels.shape[-2] // 2
    hidden = grid[..., half:, :]
    within = hidden.var(1, correction=0).mean(0)
    between = hidden.mean(1).var(0, correction=0)
    total = hidden.flatten(0, 1).var(0, correction=0)
    parts = {
        "weights, mean over seeds": within, "seeds, of the mean over weights": between, "their sum": within + between,
        "total, over the grid": total,
    }  # fmt: skip
    whole = float(total.mean())
    rows = [{"part": k, "variance": float(v.mean()), "share": float(v.mean()) / whole} for k, v in parts.items()]
    unbiased = within * draws / (draws - 1)
    found = agreement(tangents[..., half:, :].sqrt(), unbiased.sqrt())
    error = (grid.mean((0, 1)) - pixels.double())[..., half:, :].square()
    sizes = {"mean squared error of the mean": float(error.mean()), "mean total variance": whole}
    return {"rows": rows, "tangents": {**found, **sizes}, "maps": (grid.mean((0, 1)), within, between), "held": held}


def plot(along: dict[str, Any], total: dict[str, Any]) -> Figure:
    """Left: one image's three std along the steps; right: the conditional task."""
    steps = len(along["rows"])
    shown = sorted({round(i * (steps - 1) / 4) for i in range(5)})
    figure = Figure(figsize=(13, 7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1), squeeze=False)[0]
    axes = left.subplots(4, len(shown) + 1)
    first = axes[0]
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    names = ("weights", "denoising", "seeds")
    for column, n in enumerate(shown):
        for row, name in enumerate(names, 1):
            m = along[name][n][0].square().mean(0).sqrt()
            axes[row, column].imshow(m, cmap="inferno", vmin=0, vmax=float(m.max()))
            axes[row, column].set_xlabel(f"0 – {float(m.max()):.2g}", fontsize=7)
        first[column].set_axis_off()
        axes[1, column].set_title(f"after step {n + 1}", fontsize=8)
    for row, name in enumerate(names, 1):
        axes[row, 0].set_ylabel(f"{name} (std)", fontsize=8)
        told = [(r["step"], r[name]) for r in along["rows"] if r[name] is not None]
        axes[row, -1].plot(*zip(*told, strict=True))
        axes[row, -1].set(yscale="log")
        axes[row, -1].set_title("mean along the steps" if row == 1 else "", fontsize=8)
        axes[row, -1].tick_params(labelsize=6, which="both")
    first[-1].imshow(picture_of(along["images"][0]), cmap="gray", vmin=0, vmax=1)
    first[-1].set_title("the image", fontsize=8)
    mean, within, between = total["maps"]
    held = total["held"].images
    count = min(4, len(held))
    grid = right.subplots(count, 4, squeeze=False)
    for i in range(count):
        std = (v[i].mean(0).sqrt() for v in (within, between))
        pictures = (picture_of((held[i] + 1) / 2), picture_of(mean[i]), *std)
        for axis, picture, title in zip(
            grid[i], pictures, ("truth", "mean", "weights, lower half", "seeds, lower half"), strict=True
        ):
            is_std = "half" in title
            axis.imshow(
                picture, cmap="inferno" if is_std else "gray", vmin=0, vmax=float(picture.max()) if is_std else 1
            )
            axis.set(xticks=[], yticks=[])
            if i == 0:
                axis.set_title(title, fontsize=8)
            if is_std:
                axis.set_xlabel(f"0 – {float(picture.max()):.2g}", fontsize=7)
    return figure


def picture_of(image: Tensor) -> Tensor:
    """As matplotlib shows it."""
    image = image.clamp(0, 1)
    return image[0] if len(image) == 1 else image.movedim(0, -1)


if __name__ == "__main__":
    typer.run(main)
