"""Inpainting and 4× super-resolution of held-out images: is the error where the standard deviation is?

Both are done by replacement, with the model as it is: after every step what is known of the image, noised to the next level,
takes its place (the lower half of the image hidden: Lugmayr et al. 2022 without resampling; means of 4 × 4 pixels known: Choi
et al. 2021). The sampler is a plain function; the map is that of :func:`bayesdiff.propagate`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import bayesdiff
from bayesdiff.calibration import RiskCoverage, Sparsification, Spearman
from experiments.common import seeded
from experiments.usefulness.common import Folders, Size, edges, fashion, standard_error

TASKS = ("inpainting", "super-resolution")
#: Seeds whose spread is the control.
SPREAD = 8


def known_part(task: str) -> Callable[[Tensor, Tensor], Tensor]:
    """``put(x, k)``: x with what is known of k in its place."""
    if task == "inpainting":
        mask = torch.ones(28, 28)
        mask[14:] = 0
        return lambda x, k: mask * k + (1 - mask) * x

    def coarse(x: Tensor) -> Tensor:
        return F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode="nearest")

    return lambda x, k: x + coarse(k) - coarse(x)


def sampler(pipe: Any, task: str, truth: Tensor, labels: Tensor, steps: int, seed: int) -> Callable[[Tensor], Tensor]:
    """A DDIM loop that keeps what is known."""
    put = known_part(task)
    noise = torch.randn(truth.shape, generator=seeded(seed))

    def run(x: Tensor) -> Tensor:
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps.tolist()
        for t, after in zip(times, [*times[1:], -1], strict=True):
            f = pipe.unet(x, t, class_labels=labels, return_dict=False)[0]
            x = scheduler.step(f, t, x, return_dict=False)[0]
            a = scheduler.alphas_cumprod[after] if after >= 0 else torch.ones(())
            x = put(x, a.sqrt() * truth + (1 - a).sqrt() * noise)
        return (x + 1) / 2

    return run


def run(folders: Folders, size: Size) -> list[dict[str, Any]]:
    """AUSE, AURG, risk–coverage and rank correlation of every map, mean over images, with standard errors over images."""
    pipe, data, posterior = fashion(size.fit)
    count = max(4, size.images // 6)
    held = data.heldout.subset(slice(3, None, max(1, data.heldout.num_images // count)))
    rows: list[dict[str, Any]] = []
    for task in TASKS:
        truth, pixels = held.images, (held.images + 1) / 2
        made = []
        for s in range(SPREAD):
            x = torch.randn(truth.shape, generator=seeded(1000 + s))
            with torch.no_grad():
                made.append(sampler(pipe, task, truth, held.labels, size.steps, 2000 + s)(x))
        samples = torch.stack(made)
        x = torch.randn(truth.shape, generator=seeded(1000))
        output = bayesdiff.propagate(
            sampler(pipe, task, truth, held.labels, size.steps, 2000), pipe.unet, posterior, x,
            propagation=bayesdiff.Tangents(draws=size.draws, schedule=pipe.scheduler),
        )  # fmt: skip
        assert torch.equal(output.output, samples[0])
        error = (samples[0] - pixels).abs()
        seeds = samples[1:].std(0)  # the judged sample is not among them
        assert output.denoising_std is not None
        maps = {
            "weights (std)": output.std,
            "seed spread": seeds,
            "weights and seeds": (output.variance + seeds.square()).sqrt(),
            "denoising spread, half way": output.denoising_std[size.steps // 2],
            "edges": edges(samples[0]),
            "brightness": samples[0],
            "chance": torch.rand(error.shape, generator=seeded(5)),
        }
        hidden = torch.ones(28, 28, dtype=torch.bool)
        if task == "inpainting":
            hidden[:14] = False
        for name, values in maps.items():
            found: dict[str, list[float]] = {}
            for m, e in zip(values, error, strict=True):
                for key, value in judged(m[:, hidden], e[:, hidden]).items():
                    found.setdefault(key, []).append(value)
            row: dict[str, Any] = {"task": task, "map": name}
            for key, numbers in found.items():
                tensor = torch.tensor(numbers, dtype=torch.float64)
                tensor = tensor[tensor.isfinite()]
                row |= {key: float(tensor.mean()), f"{key}_se": standard_error(tensor)}
            rows.append(row)
        # Over images: is an image's mean error larger where its score is?
        for row, values in zip(rows[-len(maps) :], maps.values(), strict=True):
            score, total = (v[..., hidden].double().flatten(1).mean(1) for v in (values, error))
            whole = Spearman()
            whole.update(score, total)
            row["images_spearman"] = float(whole.compute())
            row["ratio_rms"] = float(
                values[..., hidden].square().mean().sqrt() / error[..., hidden].square().mean().sqrt()
            )
    return rows


def judged(uncertainty: Tensor, error: Tensor) -> dict[str, float]:
    """Of one image."""
    sparsification, coverage, rank = Sparsification(), RiskCoverage(), Spearman()
    for metric in (sparsification, coverage, rank):
        metric.update(uncertainty, error)
    parts, risk = sparsification.compute(), coverage.compute()
    return {
        "ause": float(parts["ause"]), "aurg": float(parts["aurg"]), "aurc_of_chance": float(risk["aurc"] / risk["chance"]),
        "spearman": float(rank.compute()),
    }  # fmt: skip
