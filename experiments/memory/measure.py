"""One row: a process measures its own peak memory, so each runs in a fresh one."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import diffusers
import torch

import bayesdiff
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics


def measure(size: int, sampler: str, steps: int, draws: int, width: int) -> dict[str, Any]:
    """One image without and with its map."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=size, in_channels=3, out_channels=3, block_out_channels=(width, 2 * width), layers_per_block=2,
        norm_num_groups=8, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).eval()  # fmt: skip
    pipe = getattr(diffusers, f"{sampler}Pipeline")(unet, getattr(diffusers, f"{sampler}Scheduler")())
    pipe.set_progress_bar_config(disable=True)
    head = bayesdiff.find_head(pipe)
    sums = Statistics(head.geometry, 1)
    sums.update(
        torch.randn(8, width, 8, 8), torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64), torch.arange(8)
    )
    posterior = LaplacePosterior.from_statistics(
        sums, head, num_timesteps=1000, covariance="ggn", prior_precision=100.0
    )
    up = bayesdiff.UncertaintyPipeline(pipe, posterior, propagation=bayesdiff.Tangents(draws=draws))

    def timed(call: Any) -> tuple[Any, float, float]:
        clock = time.perf_counter()
        made = call(
            batch_size=1, num_inference_steps=steps, output_type="np", generator=torch.Generator().manual_seed(0)
        )
        return made, time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    _, plain, before = timed(pipe)
    made, seconds, after = timed(up)
    ratio = made.calls / made.plain_calls
    return {
        "size": size, "sampler": sampler, "steps": steps, "draws": draws, "width": width, "plain": plain,
        "seconds": seconds, "calls_ratio": ratio, "overhead": seconds / plain / ratio, "peak_before_mb": before,
        "growth_mb": after - before, "numbers": (after - before) * 2**20 / 4 / (3 * size**2) / steps,
    }  # fmt: skip


if __name__ == "__main__":
    size, sampler, *rest = sys.argv[1:]
    print(json.dumps(measure(int(size), sampler, *map(int, rest))))
