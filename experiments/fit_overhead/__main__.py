"""What fitting costs beside the network calls that it needs.

    python -m experiments.fit_overhead

Hooks time every network call within `bayesdiff.fit`, for the shipped model and for a U-Net of the size of Stable Diffusion 1.5
(random weights cost the same time). The overhead is what the pass over the data takes beyond its network calls, in their time;
what follows the pass (eigenvalues, Cholesky factors) is spent once and listed apart.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

import bayesdiff
from bayesdiff.laplace.posterior import LaplacePosterior
from experiments.common import command, record, results_folder, table

SETTINGS = (("full", "sandwich"), ("diag", "ggn"))


def sd15_unet() -> UNet2DConditionModel:
    """The U-Net of Stable Diffusion 1.5 by its configuration, weights random."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
    ).eval()


@dataclass
class Clock:
    """Seconds within the network, in the pass over the data, and in all."""

    network: float = 0.0
    whole_pass: float = 0.0
    total: float = 0.0


def timed_fit(network: Any, scheduler: Any, data: dict[str, Tensor], batch: int, **settings: Any) -> Clock:
    """Fit, with the network's calls timed by hooks."""
    clock = Clock()
    started = entered = 0.0

    def enter(*_: object) -> None:
        nonlocal entered
        entered = time.perf_counter()

    def leave(*_: object) -> None:
        clock.network += time.perf_counter() - entered

    from_statistics = LaplacePosterior.from_statistics

    def cut(*args: Any, **kwargs: Any) -> LaplacePosterior:
        clock.whole_pass = time.perf_counter() - started
        return from_statistics(*args, **kwargs)

    handles = [network.register_forward_pre_hook(enter), network.register_forward_hook(leave)]
    try:
        with mock.patch.object(LaplacePosterior, "from_statistics", cut):
            started = time.perf_counter()
            bayesdiff.fit(
                network, data, scheduler=scheduler, batch_size=batch, generator=torch.Generator().manual_seed(0),
                progress=False, **settings,
            )  # fmt: skip
            clock.total = time.perf_counter() - started
    finally:
        for handle in handles:
            handle.remove()
    return clock


def main(
    repeats: Annotated[int, typer.Option(help="Repetitions; the least overhead counts.")] = 3,
    images: Annotated[int, typer.Option(help="Images for the shipped model.")] = 1024,
    large_images: Annotated[int, typer.Option(help="Images for the large U-Net; 0 leaves it out.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Time fits and bare network calls."""
    folder = results_folder("fit_overhead", out)
    rows: list[dict[str, Any]] = []

    def measure(name: str, network: Any, scheduler: Any, data: dict[str, Tensor], batch: int) -> None:
        head = bayesdiff.find_head(network)
        for structure, covariance in SETTINGS:
            clocks = [
                timed_fit(network, scheduler, data, batch, structure=structure, covariance=covariance)
                for _ in range(repeats)
            ]
            best = min(clocks, key=lambda c: c.whole_pass / c.network)
            images = len(data["images"])
            rows.append(
                {
                    "network": name, "D": head.in_features, "C": head.out_channels, "structure": structure,
                    "covariance": covariance, "images": images, "call_seconds": best.network / images,
                    "overhead": best.whole_pass / best.network - 1, "once_seconds": best.total - best.whole_pass,
                }
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
        "network": "", "D": "d", "C": "d", "structure": "", "covariance": "", "images": "d", "call_seconds": ".4f",
        "overhead": "+.1%", "once_seconds": ".2f",
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
