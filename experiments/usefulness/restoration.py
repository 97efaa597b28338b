"""Inpainting and super-resolution of held-out images: is the error where the standard deviation is?

Both are done by replacement, with the model as it is: after every step what is known of the image, noised to the next level,
takes its place (the lower half of the image hidden: Lugmayr et al. 2022 without resampling; means of 4 × 4 pixels known: Choi
et al. 2021). Behind a VAE it is the latents that are known: those of the upper half, or means of 2 × 2 of them; the truth is
the image itself, so errors have the VAE's own in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import bayesdiff
from bayesdiff.calibration import RiskCoverage, Sparsification, Spearman
from bayesdiff.diffusion.parametrization import alpha_sigma
from experiments.common import seeded
from experiments.usefulness.common import Folders, Size, Subject, edges, standard_error

TASKS = ("inpainting", "super-resolution")
#: Seeds whose spread is the control.
SPREAD = 8


def known_part(task: str, size: int, block: int) -> Callable[[Tensor, Tensor], Tensor]:
    """``put(x, k)``: x with what is known of k in its place; ``size`` numbers a side, means of ``block`` a side."""
    if task == "inpainting":
        mask = torch.ones(size, size)
        mask[size // 2 :] = 0
        return lambda x, k: mask * k + (1 - mask) * x

    def coarse(x: Tensor) -> Tensor:
        return F.interpolate(F.avg_pool2d(x, block), scale_factor=block, mode="nearest")

    return lambda x, k: x + coarse(k) - coarse(x)


def keeper(subject: Subject, task: str, truth: Tensor, seed: int) -> Callable[..., dict[str, Tensor]]:
    """A pipeline's callback that keeps what is known of ``truth``, in the network's space."""
    put = known_part(task, truth.shape[-1], 2 if hasattr(subject.pipe, "vae") else 4)
    noise = torch.randn(truth.shape, generator=seeded(seed))

    def keep(pipe: Any, step: int, _: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        times = pipe.scheduler.timesteps
        alpha, sigma = (1.0, 0.0)
        if step + 1 < len(times):
            alpha, sigma = map(float, alpha_sigma(pipe.scheduler, times[step + 1].double().cpu()))
        return {"latents": put(given["latents"], alpha * truth + sigma * noise)}

    return keep


def sampler(
    subject: Subject, task: str, truth: Tensor, told: list[Any], steps: int, seed: int
) -> Callable[[Tensor], Tensor]:
    """The pipeline with its callback, as a function of the noise."""
    return subject.sampler(told, steps, callback_on_step_end=keeper(subject, task, truth, seed))


def run(subject: Subject, folders: Folders, size: Size) -> list[dict[str, Any]]:
    """AUSE, AURG, risk–coverage and rank correlation of every map, mean over images, with standard errors over images."""
    heldout, steps = subject.data.heldout, subject.steps(size.steps)
    rows = torch.arange(3, heldout.num_images, max(1, heldout.num_images // max(4, size.images // 6)))
    images, told = heldout.subset(rows).images, subject.told(heldout, rows)
    pixels, truth = (images + 1) / 2, subject.clean(images)
    out: list[dict[str, Any]] = []
    for task in TASKS:
        with torch.no_grad():
            samples = torch.stack(
                [
                    sampler(subject, task, truth, told, steps, 2000 + s)(subject.noise(len(truth), 1000 + s))
                    for s in range(SPREAD)
                ]
            )
        output = bayesdiff.propagate(
            sampler(subject, task, truth, told, steps, 2000), subject.network, subject.posterior,
            subject.noise(len(truth), 1000),
            propagation=bayesdiff.Tangents(draws=size.draws, schedule=subject.pipe.scheduler),
        )  # fmt: skip
        assert torch.equal(output.output, samples[0])
        error = (samples[0] - pixels).abs()
        seeds = samples[1:].std(0)  # the judged sample is not among them
        maps = {
            "weights (std)": output.std,
            "seed spread": seeds,
            "weights and seeds": (output.variance + seeds.square()).sqrt(),
            "edges": edges(samples[0]),
            "brightness": samples[0],
            "chance": torch.rand(error.shape, generator=seeded(5)),
        }
        if truth.shape == pixels.shape:  # the network's space is that of the pixels
            assert output.denoising_std is not None
            maps["denoising spread, half way"] = output.denoising_std[steps // 2]
        hidden = torch.ones(pixels.shape[-2:], dtype=torch.bool)
        if task == "inpainting":
            hidden[: len(hidden) // 2] = False
        for name, values in maps.items():
            found: dict[str, list[float]] = {}
            for m, e in zip(values, error, strict=True):
                for key, value in judged(m[:, hidden], e[:, hidden]).items():
                    found.setdefault(key, []).append(value)
            row: dict[str, Any] = {"model": subject.name, "task": task, "map": name}
            for key, numbers in found.items():
                tensor = torch.tensor(numbers, dtype=torch.float64)
                tensor = tensor[tensor.isfinite()]
                row |= {key: float(tensor.mean()), f"{key}_se": standard_error(tensor)}
            # Over images: is an image's mean error larger where its score is?
            score, total = (v[..., hidden].double().flatten(1).mean(1) for v in (values, error))
            whole = Spearman()
            whole.update(score, total)
            row["images_spearman"] = float(whole.compute())
            rms = [v[..., hidden].square().mean().sqrt() for v in (values, error)]
            row["ratio_rms"] = float(rms[0] / rms[1])
            out.append(row)
    return out


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
