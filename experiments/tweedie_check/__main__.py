"""What the data leave open at x_t: Tweedie's identity against the spread of clean samples drawn from the same x_t.

    python -m experiments.tweedie_check --model fashion-ddpm

A few trajectories are drawn by the pipeline, with a map. At some of their calls the variance of x_0 given x_t is had in three
ways:

    samples    over S clean samples, each drawn by an ancestral sampler of its own noise from that x_t
    identity   (σ²/α) ∂D_i/∂x_i, every number's own response by a difference of two network calls
    map        the same from the responses that the map measured anyway (``out.denoising``)

The ancestral step from t to s is that of x_s given x_t and x_0 = D (Kingma et al. 2021), for any α and σ. Two halves of the
samples, compared with each other, say how well any map could agree with S of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor

import bayesdiff
from bayesdiff.diffusion.parametrization import alpha_sigma, clean_coefficients, is_flow, is_reversed, prediction_type
from bayesdiff.diffusion.tweedie import clean_variance
from bayesdiff.fitting.source import source_of
from bayesdiff.io import write_figure
from bayesdiff.rng import item_generator
from experiments.common import agreement, command, record, results_folder, table

#: Rows in a network call.
ROWS = 128


class Denoises(Protocol):
    """E[x_0 | x_t] of rows x, all with what belongs to one image; and the schedule."""

    continuous: bool

    def noise(self, t: float) -> tuple[float, float]:
        """α and σ."""

    def __call__(self, x: Tensor, t: float, of: int) -> Tensor:
        """D, float64."""


class Denoiser:
    """E[x_0 | x_t] by a pipeline's network, unguided.

    Args:
        pipe: The pipeline.
        data: A mapping with ``"images"`` and what the network is told of each.
        given: Keywords of every call.
    """

    def __init__(self, pipe: Any, data: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        self.source = source_of(
            pipe, head=None, scheduler=None, call=None, pipe_kwargs=given, space=None, encode="mean"
        )
        self.conditioning = {k: v for k, v in data.items() if k != "images"}
        self.clean = self.source.clean(data["images"], self.conditioning).mean
        self.continuous = is_flow(self.source.scheduler)

    def noise(self, t: float) -> tuple[float, float]:
        """α and σ."""
        alpha, sigma = alpha_sigma(self.source.scheduler, torch.tensor(t, dtype=torch.float64))
        return float(alpha), float(sigma)

    def __call__(self, x: Tensor, t: float, of: int) -> Tensor:
        """D of rows x, all with what belongs to image ``of``."""
        scheduler = self.source.scheduler
        a, b = clean_coefficients(prediction_type(scheduler), *self.noise(t))
        b = -b if is_reversed(scheduler) else b
        out = []
        for part in x.split(ROWS):
            times = self.source.timesteps(torch.full((len(part),), t, dtype=torch.float64))
            found: list[tuple[list[int], Tensor]] = []
            self.source.run(
                self.conditioning, [of] * len(part), 0, lambda _, part=part: part, [times],  # type: ignore[misc]
                lambda _, which, seen, found=found: found.append((which, seen.output)),  # type: ignore[misc]
            )  # fmt: skip
            order = [r for which, _ in found for r in which]
            output = torch.cat([o for _, o in found])[torch.tensor(order).argsort()]
            out.append(a * part.double() + b * output.double())
        return torch.cat(out)


def clean_samples(d: Denoises, x: Tensor, t: float, of: int, number: int, steps: int, seed: int) -> Tensor:
    """``number`` clean samples from one x_t."""
    x = x.expand(number, *x.shape[1:]).double()
    times = torch.linspace(t, 0, steps + 1, dtype=torch.float64)
    times = (times if d.continuous else times.round()).unique().flip(0)
    generator = item_generator(seed, of, round(t))
    denoised = d(x, float(times[0]), of)
    for now, then in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        (alpha, sigma), (alpha_s, sigma_s) = d.noise(now), d.noise(then)
        ratio = alpha / alpha_s
        left = sigma**2 - ratio**2 * sigma_s**2
        mean = ratio * sigma_s**2 / sigma**2 * x + alpha_s * left / sigma**2 * denoised
        std = (left * sigma_s**2 / sigma**2) ** 0.5
        x = mean + std * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if sigma_s == 0:
            return x
        denoised = d(x, then, of)
    return denoised


def identity(d: Denoises, x: Tensor, t: float, of: int) -> Tensor:
    """(σ²/α) ∂D_i/∂x_i at one x_t, shaped as a sample."""
    number = x[0].numel()
    step = float(torch.finfo(torch.float32).eps ** 0.5 * x.norm())
    base = d(x, t, of).flatten()
    slopes = []
    for places in torch.arange(number).split(ROWS):
        moved = x.flatten(1).double().repeat(len(places), 1)
        moved[torch.arange(len(places)), places] += step
        ends = d(moved.view(-1, *x.shape[1:]), t, of).flatten(1)
        slopes.append((ends[torch.arange(len(places)), places] - base[places]) / step)
    alpha, sigma = (torch.tensor(v, dtype=torch.float64) for v in d.noise(t))
    return clean_variance(alpha, sigma, torch.cat(slopes)).view(x.shape[1:])


def main(
    model: Annotated[str, typer.Option(help="A model of the zoo.")] = "fashion-ddpm",
    trajectories: Annotated[int, typer.Option()] = 3,
    samples: Annotated[int, typer.Option(help="S, of each x_t.")] = 64,
    steps: Annotated[int, typer.Option(help="Of the pipeline.")] = 50,
    ancestral: Annotated[int, typer.Option(help="Steps of the ancestral sampler, from each x_t.")] = 25,
    shares: Annotated[
        str, typer.Option(help="Calls that are looked at, as shares of the run.")
    ] = "0.1,0.3,0.5,0.7,0.9",
    given: Annotated[str, typer.Option(help="Keywords of every call of the pipeline, as JSON.")] = "{}",
    unguided: Annotated[str, typer.Option(help="Keywords that turn guidance off, as JSON.")] = "{}",
    images: Annotated[int, typer.Option(help="That the posterior of the map is fitted to.")] = 100,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Compare the three."""
    folder = results_folder(f"tweedie_check/{model}", out)
    started = time.perf_counter()
    pipe, data = bayesdiff.zoo.load(model)
    keywords = json.loads(given)
    posterior = bayesdiff.fit(
        pipe, data.subset(slice(images)), dataset_size=data.dataset_size, training_draws=data.training_draws, encode="mean",
        pipe_kwargs=keywords, generator=torch.Generator().manual_seed(seed), progress=False,
    )  # fmt: skip
    assert data.heldout is not None
    chosen = data.heldout.subset(
        torch.randperm(data.heldout.num_images, generator=torch.Generator().manual_seed(seed))[:trajectories]
    )
    denoiser = Denoiser(pipe, chosen, keywords)
    (told,) = denoiser.conditioning.values()
    propagation = bayesdiff.Tangents(trajectory=True)
    run = bayesdiff.UncertaintyPipeline(pipe, posterior, propagation=propagation)(
        told.tolist() if isinstance(told, Tensor) else list(told), num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(trajectories)], **keywords, **json.loads(unguided),
    )  # fmt: skip
    assert run.denoising is not None
    assert run.trajectory is not None
    print(run, flush=True)
    times = [float(t) for t in pipe.scheduler.timesteps]
    rows: list[dict[str, Any]] = []
    shown: list[tuple[float, list[Tensor]]] = []
    for n in (round(float(s) * (steps - 1)) for s in shares.split(",")):
        t = times[n]
        for i in range(trajectories):
            x = run.trajectory[n - 1].mean[i : i + 1]  # after the step before: what call n is given
            drawn = clean_samples(denoiser, x, t, i, samples, ancestral, seed + 1)
            spread = drawn.var(0)
            halves = [h.var(0) for h in drawn.chunk(2)]
            half = agreement(halves[0].clamp(min=1e-12).sqrt(), halves[1].clamp(min=1e-12).sqrt())["log_correlation"]
            ways = {"identity": identity(denoiser, x, t, i), "map": run.denoising[n][i].double()}
            for name, variance in ways.items():
                used = (variance > 0) & (spread > 0)
                found = agreement(variance[used].sqrt(), spread[used].sqrt())
                rows.append({
                    "t": t, "trajectory": i, "way": name, "log_correlation": found["log_correlation"],
                    "correlation": found["correlation"], "ratio": float(variance.mean() / spread.mean()),
                    "negative": float((variance <= 0).double().mean()), "ceiling": (2 * half / (1 + half)) ** 0.5,
                    "std": float(spread.mean().sqrt()),
                })  # fmt: skip
            if i == 0:
                shown.append((t, [drawn[0].float(), *(v.clamp(min=0).sqrt() for v in (spread, *ways.values()))]))
        print(
            table(rows[-2 * trajectories :], {"t": ".0f", "way": "", "log_correlation": ".3f", "ratio": ".3f"}),
            flush=True,
        )
    summary = summarised(rows)
    columns = {
        "t": ".0f", "way": "", "ratio": ".3f", "ratio_error": ".3f", "log_correlation": ".3f", "log_correlation_error": ".3f",
        "ceiling": ".3f", "negative": ".3f", "std": ".3f",
    }  # fmt: skip
    print(table(summary, columns))
    write_figure(folder / "tweedie_check.png", plot(shown))
    settings = {
        "model": model, "trajectories": trajectories, "samples": samples, "steps": steps, "ancestral": ancestral,
        "shares": shares, "given": keywords, "unguided": json.loads(unguided), "images": images, "seed": seed,
        "seconds": round(time.perf_counter() - started, 1), "command": command("tweedie_check"),
    }  # fmt: skip
    record(folder, settings, {"summary": summary, "rows": rows})
    print(f"Written to {folder}")


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over trajectories, and their standard errors."""
    out = []
    for t, way in dict.fromkeys((r["t"], r["way"]) for r in rows):
        chosen = [r for r in rows if (r["t"], r["way"]) == (t, way)]
        row: dict[str, Any] = {"t": t, "way": way}
        for key in ("ratio", "log_correlation", "correlation", "ceiling", "negative", "std"):
            values = torch.tensor([r[key] for r in chosen], dtype=torch.float64)
            row[key] = float(values.mean())
            if len(values) > 1 and key in ("ratio", "log_correlation"):
                row[f"{key}_error"] = float(values.std() / len(values) ** 0.5)
        out.append(row)
    return out


def plot(shown: list[tuple[float, list[Tensor]]]) -> Figure:
    """Of the first trajectory, by t: one clean sample, and the three standard deviations on one scale."""
    figure = Figure(figsize=(1.7 * len(shown), 6.8), layout="constrained")
    axes = figure.subplots(4, len(shown), squeeze=False)
    for column, (t, maps) in enumerate(shown):
        top = float(max(m.square().mean(0).sqrt().max() for m in maps[1:]))
        for row, m in enumerate(maps):
            axis = axes[row, column]
            shade = m.mean(0) if row == 0 else m.square().mean(0).sqrt()
            axis.imshow(shade, cmap="gray" if row == 0 else "inferno", **({} if row == 0 else {"vmin": 0, "vmax": top}))
            axis.set(xticks=[], yticks=[])
        axes[0, column].set_title(f"t = {t:.0f}", fontsize=9)
        axes[3, column].set_xlabel(f"0 – {top:.2g}", fontsize=8)
    for axis, name in zip(axes[:, 0], ("a sample from x_t", "std of samples", "identity", "map"), strict=True):
        axis.set_ylabel(name, fontsize=9)
    return figure


if __name__ == "__main__":
    typer.run(main)
