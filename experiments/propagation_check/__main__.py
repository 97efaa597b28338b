"""The judge of the tangents: whole trajectories with other weights in the head.

    python -m experiments.propagation_check

The reference draws its own weights and runs the pipeline again for each. Tangents with several numbers of draws K,
measurements of the response (every r steps) and directions in each (p), and small ensembles, are compared with it:
correlation of the per-pixel standard deviation over all pixels of all samples, and within each sample; ratio of means;
relative L2; against the network calls they cost. Each setting is run with several sets of weight draws; the table has
their means and standard deviations.
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
from bayesdiff.io import write_figure
from experiments.common import agreement, command, record, results_folder, table

COLORS = {"tangents": "#c1440e", "tangents, exact response": "#1f4e79", "ensemble": "#8a8a8a"}
#: (r, p): measurements every r steps, along p directions; (4, None) is the default.
MEASUREMENTS = ((5, 6), (4, 4), (4, 8), (4, None), (3, 12), (2, 16))
DRAWS = (8, 16, 32, 128)


def generators(number: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(number)]


def summary(maps: list[Tensor], reference: Tensor) -> dict[str, float]:
    """Mean and standard deviation of the agreement over several sets of draws."""
    runs = [agreement(m, reference) for m in maps]
    within = [sum(agreement(m[i], reference[i])["correlation"] for i in range(len(m))) / len(m) for m in maps]
    out = {"correlation_within": sum(within) / len(within)}
    for key in ("correlation", "ratio", "relative_l2"):
        values = torch.tensor([r[key] for r in runs], dtype=torch.float64)
        out[key] = float(values.mean())
        out[f"{key}_sd"] = float(values.std()) if len(values) > 1 else 0.0
        if key != "relative_l2":
            out[f"{key}_worst"] = float(values.min() if key == "correlation" else (values - 1).abs().max())
    out["negative"] = max(float((m < 0).double().mean()) for m in maps)
    return out


def plot(rows: list[dict[str, Any]], size: int) -> Figure:
    """Accuracy against network calls."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, color in COLORS.items():
        chosen = sorted((r for r in rows if r["group"] == name), key=lambda r: r["calls_ratio"])
        x = [r["calls_ratio"] for r in chosen]
        left.errorbar(
            x,
            [r["correlation"] for r in chosen],
            [r["correlation_sd"] for r in chosen],
            fmt="o-",
            color=color,
            label=name,
        )
        right.errorbar(x, [r["ratio"] for r in chosen], [r["ratio_sd"] for r in chosen], fmt="o-", color=color)
        for n, r in enumerate(chosen):
            label = f"K = {r['K']}" if r["group"] != "tangents" else f"r={r['r']}, p={r['p'] or 'default'}"
            below = n % 2 == (name == "ensemble")
            left.annotate(
                label, (r["calls_ratio"], r["correlation"]), (4, -9 if below else 5), textcoords="offset points",
                fontsize=7, color=color,
            )  # fmt: skip
    for axis in (left, right):
        axis.set(xscale="log", xlabel="network calls, in those of the plain pipeline")
        axis.set_xticks([2, 3, 4, 5, 8, 16, 32], ["2", "3", "4", "5", "8", "16", "32"])
        axis.set_xticks([], minor=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.axvline(4, color="#bbbbbb", lw=0.8, ls=":")
    left.axhline(0.93, color="#bbbbbb", lw=0.8, ls=":")
    left.set(ylabel="correlation of per-pixel std", title=f"Against {size} trajectories with shared weights")
    right.axhspan(0.85, 1.15, color="#e8e2d5", zorder=0)
    right.axhline(1, color="k", lw=0.8)
    right.set(ylabel="mean std: method / reference", title="Scale")
    left.legend(frameon=False)
    return figure


def main(
    trajectories: Annotated[int, typer.Option(help="Trajectories of the reference.")] = 512,
    samples: Annotated[int, typer.Option(help="Images, over all classes in turn.")] = 10,
    steps: Annotated[int, typer.Option(help="DDIM steps.")] = 50,
    guidance_scale: Annotated[float, typer.Option()] = 1.0,
    eta: Annotated[float, typer.Option()] = 0.0,
    repeats: Annotated[int, typer.Option(help="Sets of weight draws for each setting.")] = 4,
    dataset_size: Annotated[int | None, typer.Option(help="N of the posterior; by default the model's own.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Compare tangents and small ensembles with a large ensemble."""
    folder = results_folder("propagation_check", out)
    started = time.perf_counter()
    pipe, data = bayesdiff.zoo.load("fashion-ddpm")
    posterior = bayesdiff.fit(
        pipe, data, dataset_size=dataset_size or data.dataset_size, generator=torch.Generator().manual_seed(seed)
    )
    classes = [data.class_names[i % 10] for i in range(samples)]
    settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "eta": eta, "output_type": "pt"}

    def run(propagation: str, k: int, r: int, p: int | None, draw_seed: int) -> bayesdiff.UncertaintyOutput:
        up = bayesdiff.UncertaintyPipeline(
            pipe, posterior, propagation=propagation, num_tangents=k, refresh=r, num_directions=p,
            generator=torch.Generator().manual_seed(draw_seed),
        )  # fmt: skip
        return up(classes, generator=generators(samples, seed), **settings)

    clock = time.perf_counter()
    reference = run("ensemble", trajectories, 1, 1, seed + 1_000_003)
    reference_seconds = time.perf_counter() - clock
    plans = [("tangents", "tangents", 64, r, p) for r, p in MEASUREMENTS]
    plans += [("tangents, other K", "tangents", k, 4, None) for k in DRAWS]
    plans += [("tangents, exact response", "tangents", k, 1, k) for k in (4, 8, 16)]
    plans += [("ensemble", "ensemble", k, 1, 1) for k in (4, 8, 16)]
    rows: list[dict[str, Any]] = []
    for group, propagation, k, r, p in tqdm(plans, desc="settings"):
        clock = time.perf_counter()
        outputs = [run(propagation, k, r, p, seed + 7 * k + 100_000 * (i + 1)) for i in range(repeats)]
        seconds = (time.perf_counter() - clock) / repeats
        tangents = propagation == "tangents"
        rows.append(
            {
                "group": group, "K": k, "r": r if tangents else None, "p": p if tangents else None,
                "calls_ratio": outputs[0].calls / outputs[0].plain_calls,
                "seconds": seconds, **summary([o.std for o in outputs], reference.std),
            }
        )  # fmt: skip
    columns = {
        "group": "", "K": "d", "r": "", "p": "", "calls_ratio": ".2f", "correlation": ".3f", "correlation_sd": ".3f",
        "correlation_within": ".3f", "ratio": ".3f", "ratio_sd": ".3f", "relative_l2": ".3f", "negative": ".1%",
        "seconds": ".1f",
    }  # fmt: skip
    print(table(rows, columns))
    print(
        f"The reference: {trajectories} trajectories of {samples} samples, {reference.calls} network calls, "
        f"{reference_seconds:.0f} s; its own relative standard error is {math.sqrt(0.5 / (trajectories - 1)):.1%} in a std."
    )
    write_figure(folder / "propagation_check.png", plot(rows, trajectories))
    record(
        folder,
        {
            "trajectories": trajectories, "samples": samples, "steps": steps, "guidance_scale": guidance_scale, "eta": eta,
            "repeats": repeats, "seed": seed, "scheduler": type(pipe.scheduler).__name__, "model": "fashion-ddpm",
            "dataset_size": posterior.dataset_size, "mean_std": float(reference.std.mean()),
            "seconds": round(time.perf_counter() - started, 1), "command": command("propagation_check"),
        },
        rows,
    )  # fmt: skip
    print(f"Written to {folder}")


if __name__ == "__main__":
    typer.run(main)
