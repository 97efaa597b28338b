"""What fitting costs beside the network calls that it needs.

    python -m experiments.fit_overhead

`bayesdiff.fit` against the bare network calls on the same noised inputs, in turns, for the shipped model and for a U-Net of
the size of Stable Diffusion 1.5 (random weights cost the same time), with the structures and covariances that there are. Each
time is the least of several.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

import bayesdiff
from bayesdiff.noising import draw, noised
from experiments.common import command, record, results_folder, table


def sd15_unet() -> UNet2DConditionModel:
    """The U-Net of Stable Diffusion 1.5 by its configuration, weights random."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
    ).eval()


def bare(network: Any, scheduler: Any, data: dict[str, Tensor], batch: int) -> float:
    """Seconds for the network calls alone."""
    images = data["images"]
    others = {k: v for k, v in data.items() if k != "images"}
    t, noise = draw(scheduler, tuple(images.shape[1:]), 0, 0, len(images), 1)
    x = noised(scheduler, images, noise, t)[0].float()
    started = time.perf_counter()
    with torch.no_grad():
        for i in range(0, len(images), batch):
            part = slice(i, i + batch)
            network(x[part], timestep=t[part], **{k: v[part] for k, v in others.items()})
    return time.perf_counter() - started


def main(
    repeats: Annotated[int, typer.Option(help="Repetitions; the least time counts.")] = 3,
    images: Annotated[int, typer.Option(help="Images for the shipped model.")] = 1024,
    large_images: Annotated[int, typer.Option(help="Images for the large U-Net; 0 leaves it out.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Time fits and bare network calls."""
    folder = results_folder("fit_overhead", out)
    rows: list[dict[str, Any]] = []

    def measure(name: str, network: Any, scheduler: Any, data: dict[str, Tensor], batch: int) -> None:
        settings = [(s, c) for s in ("full", "diag") for c in ("sandwich", "ggn")]
        calls, fits = [], {s: [] for s in settings}  # type: ignore[var-annotated]
        bare(network, scheduler, {k: v[:batch] for k, v in data.items()}, batch)
        for _ in range(repeats):
            calls.append(bare(network, scheduler, data, batch))
            for structure, covariance in settings:
                started = time.perf_counter()
                bayesdiff.fit(
                    network, data, scheduler=scheduler, structure=structure, covariance=covariance, batch_size=batch,
                    generator=torch.Generator().manual_seed(0), progress=False,
                )  # fmt: skip
                fits[structure, covariance].append(time.perf_counter() - started)
        head = bayesdiff.find_head(network)
        rows.extend(
            {
                "network": name, "D": head.in_features, "C": head.out_channels, "images": len(data["images"]),
                "structure": s, "covariance": c, "calls_seconds": min(calls), "fit_seconds": min(fits[s, c]),
                "overhead": min(fits[s, c]) / min(calls) - 1,
            }
            for s, c in settings
        )  # fmt: skip

    pipe, shard = bayesdiff.zoo.load("fashion-ddpm")
    measure("fashion-ddpm", pipe.unet, pipe.scheduler, shard.subset(slice(images)).as_dict(), 64)
    if large_images:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(large_images, 4, 64, 64, generator=generator)
        context = torch.randn(large_images, 77, 768, generator=generator)
        schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        measure("SD 1.5 size", sd15_unet(), schedule, {"images": latents, "encoder_hidden_states": context}, 1)
    columns = {
        "network": "", "D": "d", "C": "d", "images": "d", "structure": "", "covariance": "", "calls_seconds": ".2f",
        "fit_seconds": ".2f", "overhead": "+.1%",
    }  # fmt: skip
    print(table(rows, columns))
    record(
        folder,
        {"repeats": repeats, "threads": torch.get_num_threads(), "command": command("fit_overhead")},
        rows,
    )
    print(f"Written to {folder}")


if __name__ == "__main__":
    typer.run(main)
