r"""Images and maps between two noises.

    python -m experiments.interpolation

DDIM without noise is a map from x_T to an image, so images can be interpolated through their noises (Song et al. 2021,
section 5.3): along the great circle between them (Shoemake 1985)

    x_T(α) = sin((1 − α)θ)/sin θ · x_T(0) + sin(αθ)/sin θ · x_T(1),      cos θ = ⟨x_T(0), x_T(1)⟩ / (‖x_T(0)‖ ‖x_T(1)‖).

Three questions. Is the map as smooth along the path as the images are? Is it bright where the image is changing: does |x(α + h) −
x(α − h)| correlate, over pixels, with the std at α, more than with the image's own edges or with the std at the farther end?
And is it brighter in the middle, which is nobody's draw? The last has an answer before any run: two independent noises are
almost orthogonal, so the squared coefficients add up to 1 and x_T(α) is standard normal at every α; the ratio is 1 on average.

The network is called row by row (``batch_invariant``), and all maps share their weight draws. So no map depends on the others
along its path, what changes between two of them is not Monte Carlo noise, and the ends are the plain samples to the last bit.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import typer
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

import bayesdiff
from bayesdiff.checks import ArgumentError, ShapeError, check_int
from bayesdiff.io import write_figure
from bayesdiff.plotting import COLOUR_MAP
from experiments.common import command, record, results_folder, table

CLASSES = ("sneaker", "bag", "coat")
COLUMNS = {
    "class": "", "pair": "d", "alpha": ".3f", "mean_std": ".5f", "total_variance": ".2e", "image_distance": ".3f",
    "image_change": ".2f", "map_change": ".2f", "image_correlation": ".3f", "map_correlation": ".3f",
    "at_change": ".2f", "edges_at_change": ".2f", "end_at_change": ".2f",
}  # fmt: skip
INK, FAINT, LINE = "#1a1a1a", "#595959", "#c1440e"


def slerp(start: Tensor, end: Tensor, points: int) -> Tensor:
    """Points on the great circle, evenly spaced in angle, the ends among them as they are.

    Args:
        start: x_T(0), any shape.
        end: x_T(1), the same shape.
        points: At least 2.

    Returns:
        ``(points, *shape)``, in the precision of ``start``.

    Raises:
        ShapeError: The ends differ in shape.
        ArgumentError: They are parallel: no great circle is defined; or there are fewer than two points.
    """
    check_int("points", points, least=2)
    if start.shape != end.shape:
        raise ShapeError(f"expected ends of one shape, got {tuple(start.shape)} and {tuple(end.shape)}")
    a, b = start.double(), end.double()
    cosine = (a * b).sum() / (a.norm() * b.norm())
    if not cosine.abs() < 1 - 1e-12:
        raise ArgumentError(f"expected noises that are not parallel, got a cosine of {float(cosine):g}: draw others")
    angle = torch.arccos(cosine)
    alpha = torch.linspace(0, 1, points, dtype=torch.float64).view(-1, *(1,) * a.ndim)
    first, second = (torch.sin(x * angle) / torch.sin(angle) for x in (1 - alpha, alpha))
    return (first * a + second * b).to(start)


def noise(pipe: Any, seed: int) -> Tensor:
    """What the pipe itself starts from with a generator of this seed, ``(C, H, W)``."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (1, pipe.unet.config.in_channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))[0]


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1])


def change(a: Tensor, b: Tensor) -> float:
    """‖b − a‖ in the mean of their norms."""
    return float((b - a).double().norm() / (0.5 * (a.double().norm() + b.double().norm())))


def measures(images: Tensor, std: Tensor) -> list[dict[str, float | None]]:
    """What is told of each point of one path, of the step that led to it, and of the change around it.

    Args:
        images: ``(points, C, H, W)``, pixels in 0–1.
        std: The same shape and units.
    """
    rows: list[dict[str, float | None]] = []
    for i, (x, s) in enumerate(zip(images, std, strict=True)):
        row: dict[str, float | None] = {
            "alpha": i / (len(images) - 1),
            "mean_std": float(s.double().mean()),
            "total_variance": float(s.double().square().sum()),
        }
        if i:
            row["image_distance"] = float((x - images[i - 1]).double().square().mean().sqrt())
            row["image_change"] = change(images[i - 1], x)
            row["map_change"] = change(std[i - 1], s)
            row["image_correlation"] = correlation(images[i - 1], x)
            row["map_correlation"] = correlation(std[i - 1], s)
        if 0 < i < len(images) - 1:
            moved = (images[i + 1] - images[i - 1]).abs()
            row["at_change"] = correlation(moved, s)
            row["edges_at_change"] = correlation(moved, torch.hypot(*torch.gradient(x, dim=(-2, -1))))
            row["end_at_change"] = correlation(moved, std[-1 if 2 * i < len(images) else 0])
        rows.append(row)
    return rows


def summary(paths: list[list[dict[str, Any]]]) -> dict[str, float | None]:
    """Means over all paths; the rank correlation of changes; the middle's mean std in the ends', with its standard error."""
    rows = [row for path in paths for row in path]
    out: dict[str, float | None] = {
        key: statistics.fmean(row[key] for row in rows if key in row)
        for key in (
            "image_distance", "image_change", "map_change", "image_correlation", "map_correlation", "at_change",
            "edges_at_change", "end_at_change",
        )
    }  # fmt: skip
    steps = [row for row in rows if "map_change" in row]
    ranks = spearmanr([row["image_change"] for row in steps], [row["map_change"] for row in steps])
    out["change_rank_correlation"] = float(ranks.statistic)
    middles = [p[len(p) // 2]["mean_std"] / (0.5 * (p[0]["mean_std"] + p[-1]["mean_std"])) for p in paths]
    out["middle_to_ends"] = statistics.fmean(middles)
    out["middle_to_ends_se"] = statistics.stdev(middles) / len(middles) ** 0.5 if len(middles) > 1 else None
    return out


def plot(paths: list[tuple[str, Tensor, Tensor]]) -> Figure:
    """For each path its images, its maps on one colour scale for all, and the mean of each map.

    Args:
        paths: A title, images and std, ``(points, C, H, W)`` each.
    """
    points = len(paths[0][1])
    cell, gap, left, right, top, bottom = 0.92, 0.05, 0.8, 1.1, 0.36, 0.5
    curve, above_curve, between = 0.8, 0.1, 0.65
    width = points * cell + (points - 1) * gap
    block = 2 * cell + gap + above_curve + curve
    total_w, total_h = left + width + right, top + len(paths) * block + (len(paths) - 1) * between + bottom
    figure = Figure(figsize=(total_w, total_h), facecolor="white")

    def place(x: float, y: float, w: float, h: float) -> Any:
        """Axes by their upper left corner, in inches from the figure's."""
        return figure.add_axes((x / total_w, 1 - (y + h) / total_h, w / total_w, h / total_h))

    maps = [std.double().square().mean(1).sqrt().numpy() for _, _, std in paths]
    every = np.concatenate(maps)
    highest = float(np.quantile(every, 0.99)) or 1.0
    norm = Normalize(0, highest, clip=True)
    means = [m.mean((1, 2)) for m in maps]
    limit = 1.15 * 1e3 * max(float(m.max()) for m in means)
    pitch = cell + gap
    for k, (title, images, _) in enumerate(paths):
        y = top + k * (block + between)
        for i in range(points):
            for row, (name, picture) in enumerate(
                (("image", images[i].movedim(0, -1).squeeze(-1).numpy()), ("std", maps[k][i]))
            ):
                axes = place(left + i * pitch, y + row * pitch, cell, cell)
                settings = {"cmap": "gray", "vmin": 0, "vmax": 1} if row == 0 else {"cmap": COLOUR_MAP, "norm": norm}
                axes.imshow(picture, interpolation="nearest", **settings)
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
                if i == 0:
                    axes.set_ylabel(name, fontsize=9, color=FAINT, labelpad=5)
                if i == 0 and row == 0:
                    axes.set_title(title, fontsize=10, color=INK, loc="left", pad=5)
        axes = place(left, y + 2 * cell + gap + above_curve, width, curve)
        axes.plot(range(points), 1e3 * means[k], "o-", color=LINE, ms=4, lw=1.3)
        axes.set_xlim(-0.5 * cell / pitch, points - 1 + 0.5 * cell / pitch)  # each point below its map
        axes.set_ylim(0, limit)
        axes.set_xticks(range(points), [f"{i / (points - 1):.3g}" for i in range(points)])
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.set_ylabel("mean std\n× 1000", fontsize=8, color=FAINT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, length=2.5, width=0.6, color=FAINT, labelcolor=INK)
        if k == len(paths) - 1:
            axes.set_xlabel("α, from one noise (0) to the other (1)", fontsize=9, color=INK)
    bar_axes = place(left + width + 0.14, top + pitch, 0.11, cell)
    extend = "max" if float(every.max()) > highest else "neither"
    bar = figure.colorbar(ScalarMappable(norm, matplotlib.colormaps[COLOUR_MAP]), cax=bar_axes, extend=extend)
    bar.set_label("std, pixel units\n(all maps)", fontsize=8, color=FAINT, labelpad=5)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(3)
    bar.update_ticks()
    bar.ax.tick_params(labelsize=8, length=2.5, width=0.6, color=FAINT, labelcolor=INK)
    return figure


def main(
    classes: Annotated[list[str] | None, typer.Option("--class", help="A class; may be given again.")] = None,
    pairs: Annotated[int, typer.Option(help="Pairs of noises for each class; the first is drawn.")] = 2,
    points: Annotated[int, typer.Option(help="Points on each path, the ends among them.")] = 9,
    steps: Annotated[int, typer.Option(help="DDIM steps.")] = 50,
    draws: Annotated[int, typer.Option(help="K, weight draws.")] = 64,
    images: Annotated[int | None, typer.Option(help="Images to fit to; by default all that are shipped.")] = None,
    seed: Annotated[int, typer.Option(help="Path n has the noises of seed + 2n and seed + 2n + 1 at its ends.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Follow images and maps from one noise to another."""
    check_int("--pairs", pairs, least=1)
    check_int("--points", points, least=3)
    folder = results_folder("interpolation", out)
    started = time.perf_counter()
    names = list(classes or CLASSES)
    pipe, data = bayesdiff.zoo.load("fashion-ddpm")
    pipe.set_progress_bar_config(disable=True)
    posterior = bayesdiff.fit(
        pipe, data.subset(slice(images)), dataset_size=data.dataset_size, generator=torch.Generator().manual_seed(seed),
        progress=False,
    )  # fmt: skip
    settings = bayesdiff.Tangents(draws=draws, batch_invariant=True, generator=torch.Generator().manual_seed(seed))
    up = bayesdiff.UncertaintyPipeline(pipe, posterior, propagation=settings)
    paths, rows, drawn = [], [], []
    for n, (name, j) in enumerate(tqdm([(name, j) for name in names for j in range(pairs)], desc="paths")):
        seeds = seed + 2 * n, seed + 2 * n + 1  # no noise in two paths, so that they are independent
        latents = slerp(noise(pipe, seeds[0]), noise(pipe, seeds[1]), points)
        output = up([name] * points, num_inference_steps=steps, latents=latents, output_type="pt")
        found = measures(output.images, output.std)
        paths.append(found)
        rows += [{"class": name, "pair": j, "seeds": seeds, **row} for row in found]
        if j == 0:
            drawn.append((f"{name}, noises {seeds[0]} and {seeds[1]}", output.images, output.std))
    overall = summary(paths)
    print(table(rows, COLUMNS))
    error = "" if overall["middle_to_ends_se"] is None else f" ± {overall['middle_to_ends_se']:.2f}"
    print(
        f"Neighbours correlate by {overall['image_correlation']:.3f} (images) and {overall['map_correlation']:.3f} (maps); "
        f"their changes are {overall['image_change']:.2f} and {overall['map_change']:.2f} of their size, with a rank correlation "
        f"of {overall['change_rank_correlation']:.2f}.\n"
        f"Where the image is changing: correlation with the map {overall['at_change']:.2f}, with the image's edges "
        f"{overall['edges_at_change']:.2f}, with the map of the farther end {overall['end_at_change']:.2f}.\n"
        f"Mean std in the middle: {overall['middle_to_ends']:.2f}{error} of that at the ends, over {len(paths)} paths."
    )
    write_figure(folder / "interpolation.png", plot(drawn))
    record(
        folder,
        {
            "classes": names, "pairs": pairs, "points": points, "steps": steps, "draws": draws, "seed": seed,
            "images": images or data.num_images, "dataset_size": posterior.dataset_size, "model": "fashion-ddpm",
            "scheduler": type(pipe.scheduler).__name__, "seconds": round(time.perf_counter() - started, 1),
            "command": command("interpolation"),
        },
        {"summary": overall, "points": rows},
    )  # fmt: skip
    print(f"Written to {folder}")


if __name__ == "__main__":
    typer.run(main)
