"""Maps of the zoo's text and few-step models, through their decoders, against whole trajectories with other weights.

    python -m experiments.zoo_maps --model earth-sd

The map is that of default tangents, and of half as many draws at the same calls; the reference is an ensemble whose
weight draws are independent of theirs. Both are std maps of what the pipeline returns, in 0–1. Error bars are over sets of draws
of the tangents; the ensemble's two halves, compared with each other, say what a reference of this size can show.
"""

from __future__ import annotations

import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor

import bayesdiff
from bayesdiff.io import write_figure
from experiments.common import TRAINED, agreement, command, record, results_folder, seeded, table

PROMPTS = {
    "earth-sd": (
        "open sea in the tropics", "an island in the sea", "sea and coast, desert", "desert in the subtropics",
        "forest in the tropics", "grassland in the temperate north", "forest with mountains", "ice and snow, polar",
    ),
    "fashion-4step": ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Bag", "Ankle boot"),
}  # fmt: skip
PROMPTS["earth-sd3"] = PROMPTS["earth-sd"]


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(PROMPTS)}.")] = "earth-sd",
    steps: Annotated[int | None, typer.Option(help="By default 25; four of the model of four steps.")] = None,
    guidance: Annotated[float, typer.Option(help="Of the text models.")] = 3.0,
    members: Annotated[int, typer.Option(help="Trajectories of the reference.")] = 256,
    images: Annotated[int, typer.Option(help="That the posterior is fitted to.")] = 512,
    repeats: Annotated[int, typer.Option(help="Sets of weight draws of the tangents.")] = 3,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Judge one model's maps."""
    folder = results_folder(f"zoo_maps/{model}", out)
    pipe, data = bayesdiff.zoo.load(model)
    text = model.startswith("earth")
    trained, prompts = TRAINED[model], list(PROMPTS[model])
    steps = steps or len(trained.timesteps) or 25
    chosen = data.subset(slice(images))
    posterior = bayesdiff.fit(
        pipe, chosen, dataset_size=data.dataset_size, training_draws=data.training_draws, encode="mean",
        pipe_kwargs=trained.given, timestep_density=trained.density, generator=seeded(seed),
    )  # fmt: skip
    print(posterior, flush=True)

    def made(propagation: Any) -> tuple[bayesdiff.UncertaintyOutput, float]:
        clock = time.perf_counter()
        keywords = {"guidance_scale": guidance, **trained.given} if text else {}
        output = bayesdiff.UncertaintyPipeline(pipe, posterior, propagation=propagation)(
            prompts, num_inference_steps=steps, output_type="pt",
            generator=[seeded(1000 + seed + i) for i in range(len(prompts))], **keywords,
        )  # fmt: skip
        return output, time.perf_counter() - clock

    reference, seconds = made(bayesdiff.Ensemble(members=members, factors=True, generator=seeded(seed + 77)))
    assert reference.factors is not None
    first, second = (half.double().std(0) for half in reference.factors.chunk(2))
    rows = [{"method": "half of the reference against the other", **judged([first], second), "seconds": seconds}]
    shown, default = None, bayesdiff.Tangents()
    for name, setting in (
        (f"tangents, K = {default.draws}, default", default),
        ("tangents, K = 64", replace(default, draws=64)),
    ):
        runs = [made(replace(setting, generator=seeded(seed + 1 + i))) for i in range(repeats)]
        outputs = [o for o, _ in runs]
        shown = shown or outputs[0]
        rows.append(
            {
                "method": name, **judged([o.std for o in outputs], reference.std),
                "calls_ratio": outputs[0].calls / outputs[0].plain_calls, "decoder_calls": outputs[0].other_calls,
                "decoder_residual": max((o.decoder_residual for o in outputs if o.other_calls), default=None),
                "seconds": sum(s for _, s in runs) / repeats,
            }
        )  # fmt: skip
    columns = {
        "method": "", "calls_ratio": ".2f", "decoder_calls": "d", "decoder_residual": ".3f",
        "correlation": ".3f", "correlation_sd": ".3f",
        "worst": ".3f", "ratio": ".3f", "ratio_sd": ".3f", "seconds": ".0f",
    }  # fmt: skip
    print(table(rows, columns))
    assert shown is not None
    write_figure(folder / "zoo_maps.png", plot(prompts, shown, reference.std))
    settings = {
        "model": model, "steps": steps, "guidance": guidance if text else None, "members": members, "prompts": prompts,
        "images": data.num_images if images > data.num_images else images, "seed": seed, "repeats": repeats,
        "dataset_size": data.dataset_size, "training_draws": data.training_draws, "command": command("zoo_maps"),
    }  # fmt: skip
    record(folder, settings, rows)
    print(f"Written to {folder}")


def judged(maps: list[Tensor], against: Tensor) -> dict[str, float]:
    """Mean over samples, then mean and standard deviation over sets of draws; and the worst sample of the first set."""
    found = [[agreement(m, a) for m, a in zip(some, against, strict=True)] for some in maps]
    out = {"worst": min(f["correlation"] for f in found[0])}
    for key in ("correlation", "ratio"):
        means = torch.tensor([[f[key] for f in some] for some in found], dtype=torch.float64).mean(1)
        out[key] = float(means.mean())
        out[f"{key}_sd"] = float(means.std()) if len(means) > 1 else 0.0
    return out


def plot(prompts: list[str], output: bayesdiff.UncertaintyOutput, reference: Tensor) -> Figure:
    """Images, their std, and the reference's, on one scale for each prompt."""
    figure = Figure(figsize=(1.35 * len(prompts), 4.5), layout="constrained")
    axes = figure.subplots(3, len(prompts), squeeze=False)
    images = torch.as_tensor(np.asarray(output.images)).float()
    for column, prompt in enumerate(prompts):
        maps = [x[column].float().square().mean(0).sqrt() for x in (output.std, reference)]
        top = float(torch.stack(maps).max())
        picture = images[column].movedim(0, -1).clamp(0, 1)
        axes[0, column].imshow(picture if picture.shape[-1] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=1)
        for row, m in enumerate(maps, 1):
            axes[row, column].imshow(m, cmap="inferno", vmin=0, vmax=top)
        axes[0, column].set_title("\n".join(textwrap.wrap(prompt, 17)), fontsize=8)
        axes[2, column].set_xlabel(f"0 – {top:.2g}", fontsize=7)
        for axis in axes[:, column]:
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], ("image", "std, tangents", "std, ensemble"), strict=True):
        axis.set_ylabel(name, fontsize=8)
    return figure


if __name__ == "__main__":
    typer.run(main)
