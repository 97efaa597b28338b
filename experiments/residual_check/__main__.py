"""Does the residual tell good runs from bad ones?

    python -m experiments.residual_check

``out.residual`` is what a run of tangents believes the relative error of its map to be, from how well each measurement of the
network's response is predicted by the others. Here it is set against the true error: relative L2 distance, sample by sample, from
the map with exact responses and the same weight draws, so that neither the noise of draws nor the linearisation counts. Small
networks are trained for the experiment, for a short and a very short time, and sampled with and without clipping, guided and not;
beside them the shipped model. Three budgets each, of which the smallest is meant to be too small.

Another question of the same runs: is the default, at its own number of calls, ever worse than an ensemble of as many
trajectories? Both are set against an ensemble of many members with weight draws of its own.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import bayesdiff
from bayesdiff.checks import BayesdiffWarning, UnsupportedPipelineError
from bayesdiff.propagation.tangents import LARGE
from experiments.common import command, fitted, record, results_folder, seeded, table

BUDGETS = (0.6, 1.2, 2.5)
#: What is a bad map.
BAD = 0.3


def trained(width: int, iterations: list[int], batch: int, seed: int) -> dict[int, diffusers.UNet2DModel]:
    """Class-conditional networks, after so many iterations of one training."""
    torch.manual_seed(seed)
    _, data = bayesdiff.zoo.load("fashion-ddpm")
    unet = diffusers.UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, block_out_channels=(width, 2 * width), layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=11,
    )  # fmt: skip
    schedule, found = diffusers.DDPMScheduler(), {}
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3)
    for i in tqdm(range(max(iterations)), desc=f"training, seed {seed}"):
        chosen = torch.randint(len(data.images), (batch,))
        x, labels = data.images[chosen], torch.where(torch.rand(batch) < 0.15, 10, data.labels[chosen])
        t, noise = torch.randint(1000, (batch,)), torch.randn(x.shape)
        loss = (unet(schedule.add_noise(x, noise, t), t, labels).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i + 1 in iterations:
            found[i + 1] = diffusers.UNet2DModel(**{k: v for k, v in unet.config.items() if not k.startswith("_")})
            found[i + 1].load_state_dict(unet.state_dict())
            found[i + 1].eval()
    return found


def errors(pipe: Any, posterior: Any, draws: int, seed: int, members: int, **call: Any) -> list[dict[str, Any]]:
    """True errors and residuals at each budget, and the default beside an ensemble; a refusal has neither."""

    def run(**settings: Any) -> Any:
        try:
            return made(bayesdiff.Tangents(generator=seeded(seed + 1000), **settings))
        except UnsupportedPipelineError as error:
            print(f"refused: {error}")
            return None

    def made(propagation: Any) -> Any:
        generators = [seeded(seed + i) for i in range(len(call["classes"]))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BayesdiffWarning)
            return bayesdiff.UncertaintyPipeline(pipe, posterior, propagation=propagation)(
                generator=generators, output_type="pt", **call
            )

    def distance(std: Tensor, exact: Tensor) -> list[float]:
        return ((std - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).tolist()

    exact, rows = run(draws=draws, refresh=1, num_directions=draws), []
    for budget in BUDGETS:
        o = run(draws=draws, extra_calls=budget)
        row: dict[str, Any] = {"extra_calls": budget, "refused": o is None or exact is None}
        if o is not None and exact is not None:
            row |= {
                "error": distance(o.std, exact.std),
                "residual": None if o.residual is None else o.residual.tolist(),
            }
        rows.append(row)
    default = run()
    if default is None:
        return [*rows, {"extra_calls": None, "refused": True}]
    reference = made(bayesdiff.Ensemble(members=members, generator=seeded(seed + 2000))).std
    few = max(2, round(default.calls / default.plain_calls) - 1)
    ensemble = made(bayesdiff.Ensemble(members=few, generator=seeded(seed + 3000)))
    against = {
        "calls_ratio": default.calls / default.plain_calls, "default": distance(default.std, reference),
        "warned": [float(r) > LARGE for r in default.residual] if default.residual is not None else None,
        "members": few, "ensemble": distance(ensemble.std, reference),
    }  # fmt: skip
    return [*rows, {"extra_calls": None, "refused": False, **against}]


def main(
    samples: Annotated[int, typer.Option(help="Images of each run.")] = 2,
    draws: Annotated[int, typer.Option(help="K.")] = 24,
    steps: Annotated[int, typer.Option(help="DDIM steps.")] = 25,
    width: Annotated[int, typer.Option(help="Channels of the networks that are trained.")] = 16,
    iterations: Annotated[list[int] | None, typer.Option(help="May be given again; by default 150 and 400.")] = None,
    networks: Annotated[int, typer.Option(help="Trainings.")] = 2,
    batch: Annotated[int, typer.Option(help="Of the trainings.")] = 16,
    images: Annotated[int, typer.Option(help="That posteriors are fitted on.")] = 300,
    members: Annotated[int, typer.Option(help="Of the ensemble that the default is judged by.")] = 64,
    seed: Annotated[int, typer.Option()] = 100,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Compare residuals with true errors."""
    folder = results_folder("residual_check", out)
    lengths = list(iterations or (150, 400))
    shipped, data = bayesdiff.zoo.load("fashion-ddpm")
    subset = {"images": data.images[:images], "class_labels": data.labels[:images]}
    cases: list[tuple[str, Any, Any, bool, float]] = []
    for i in range(networks):
        for length, unet in trained(width, lengths, batch, seed + i).items():
            pipe = bayesdiff.zoo.ClassConditionalPipeline(unet, diffusers.DDIMScheduler())
            generator = torch.Generator().manual_seed(seed)
            posterior = bayesdiff.fit(pipe, subset, dataset_size=data.dataset_size, generator=generator, progress=False)
            name = f"seed {seed + i}, {length} iterations"
            cases += [(name, pipe, posterior, c, s) for c in (False, True) for s in (1.0, 2.0)]
    cases += [("shipped", shipped, fitted(0), c, s) for c, s in ((False, 1.0), (False, 2.0), (True, 1.0))]
    rows: list[dict[str, Any]] = []
    for name, pipe, posterior, clip, scale in tqdm(cases, desc="runs"):
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=clip)
        pipe.set_progress_bar_config(disable=True)
        found = errors(
            pipe, posterior, draws, seed, members, classes=[3 * i % 10 for i in range(samples)], num_inference_steps=steps,
            guidance_scale=scale,
        )  # fmt: skip
        rows += [{"network": name, "clip": clip, "guidance_scale": scale, **row} for row in found]
    known = [r for r in rows if r.get("residual") is not None]
    residual, error = (torch.tensor([v for r in known for v in r[k]]) for k in ("residual", "error"))
    ranks = torch.stack([residual.argsort().argsort(), error.argsort().argsort()]).double()
    bad, warned = error > BAD, residual > LARGE
    summary = {
        "runs": len(known), "refused": sum(r["refused"] for r in rows), "samples": len(error),
        "rank_correlation": float(torch.corrcoef(ranks)[0, 1]), "bad": BAD, "threshold": LARGE,
        "bad_warned": int((bad & warned).sum()), "bad_silent": int((bad & ~warned).sum()),
        "good_warned": int((~bad & warned).sum()), "good_silent": int((~bad & ~warned).sum()),
        "largest_error_without_warning": float(error[~warned].max()),
    }  # fmt: skip
    pairs = [p for r in rows if "default" in r for p in zip(r["default"], r["ensemble"], r["warned"], strict=True)]
    summary |= {
        "default_against_members": sum(d for d, *_ in pairs) / len(pairs),
        "ensemble_against_members": sum(e for _, e, _ in pairs) / len(pairs), "pairs": len(pairs),
        "default_worse": sum(d > e for d, e, _ in pairs), "default_worse_silent": sum(d > e and not w for d, e, w in pairs),
    }  # fmt: skip
    flat = [{**r, "clip": str(r["clip"]), "error": max(r["error"]), "residual": max(r["residual"])} for r in known]
    columns = {
        "network": "",
        "clip": "",
        "guidance_scale": ".1f",
        "extra_calls": ".1f",
        "residual": ".2f",
        "error": ".3f",
    }
    print(table(flat, columns), summary, sep="\n")
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for marker, clip in (("o", False), ("^", True)):
        for colour, trained_long in (("tab:orange", False), ("tab:blue", True)):
            chosen = [r for r in known if r["clip"] == clip and (r["network"] == "shipped") == trained_long]
            label = f"{'trained long' if trained_long else 'under-trained'}{', clipped' if clip else ''}"
            x, y = ([v for r in chosen for v in r[k]] for k in ("residual", "error"))
            axes.scatter(x, y, s=14, marker=marker, color=colour, label=label, alpha=0.8)
    axes.axvline(LARGE, color="grey", linestyle="--", linewidth=1)
    axes.axhline(BAD, color="grey", linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="residual", ylabel="relative L2 distance from exact responses")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "residual_check.png", dpi=150)
    settings = {
        "samples": samples, "draws": draws, "steps": steps, "width": width, "iterations": lengths, "networks": networks,
        "batch": batch, "images": images, "members": members, "budgets": list(BUDGETS), "seed": seed,
        "command": command("residual_check"),
    }  # fmt: skip
    record(folder, settings, {"summary": summary, "runs": rows})
    print(f"Written to {folder}")


if __name__ == "__main__":
    typer.run(main)
