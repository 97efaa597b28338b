"""Other images than the model was trained on: does the variance of a training step tell them?

For each image, the predictive variance of its noisy version at a timestep (mean over pixels), under three posteriors; beside
it the loss at the same timestep and noise, the density of edges and the brightness, which cost no posterior.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

import bayesdiff
from bayesdiff.diffusion.noising import noised
from experiments.common import seeded
from experiments.usefulness.common import (
    Folders,
    Size,
    animals,
    digits,
    earth,
    edges,
    fashion,
    per_image,
    posteriors,
)

TIMESTEPS = (100, 300, 600)
BOOTSTRAPS = 200


def run(folders: Folders, size: Size) -> list[dict[str, Any]]:
    """AUROC of every score for every other set against held-out images of the model's own."""
    return [*of_fashion(folders, size), *of_earth(size)]


def auroc(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """That a score is larger outside, with its standard error over images (bootstrap)."""

    def value(a: Tensor, b: Tensor) -> float:
        target = torch.cat([torch.zeros(len(a)), torch.ones(len(b))]).long()
        scores = torch.cat([a, b]).double()
        ranks = scores.argsort().argsort().double() / len(scores)  # AUROC asks for the order; torchmetrics for [0, 1]
        return float(binary_auroc(ranks, target))

    generator = seeded(0)
    found = []
    for _ in range(BOOTSTRAPS):
        a, b = (x[torch.randint(len(x), (len(x),), generator=generator)] for x in (inside, outside))
        found.append(value(a, b))
    return {"auroc": value(inside, outside), "auroc_se": float(torch.tensor(found).std())}


def rows_of(model: str, scores: dict[str, dict[str, Tensor]], inside: str) -> list[dict[str, Any]]:
    """One row for each other set and score; ``scores[set][score]``."""
    return [
        {"model": model, "set": name, "score": score, **auroc(scores[inside][score], values)}
        for name, found in scores.items() if name != inside
        for score, values in found.items()
    ]  # fmt: skip


def of_fashion(folders: Folders, size: Size) -> list[dict[str, Any]]:
    """The class-conditional model, told no class."""
    pipe, data, posterior = fashion(size.fit)
    held = data.heldout.subset(slice(None, None, max(1, data.heldout.num_images // size.images)))
    sets: dict[str, Tensor] = {"held-out": held.images, "upside down": held.images.flip(2), "negative": -held.images}
    if folders.digits is not None:
        sets["digits (MNIST)"] = digits(folders.digits, size.images)
    if folders.animals is not None:
        sets["animals (animal-mnist)"] = animals(folders.animals, size.images)
    judged = posteriors(posterior)
    scores = {name: scores_of_images(pipe, images, judged) for name, images in sets.items()}
    return rows_of("fashion-ddpm", scores, "held-out")


def scores_of_images(pipe: Any, images: Tensor, judged: dict[str, bayesdiff.LaplacePosterior]) -> dict[str, Tensor]:
    """By score, one number for each image."""
    pixels = (images + 1) / 2
    out = {"edge density": per_image(edges(pixels)), "brightness": per_image(pixels)}
    for t in TIMESTEPS:
        noise = torch.randn(images.shape, generator=seeded(t))
        found: dict[str, list[Tensor]] = {}
        for rows in torch.arange(len(images)).split(50):
            inputs: list[Tensor] = []
            handle = pipe.unet.conv_out.register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0]))
            times = torch.full((len(rows),), t)
            x, wanted = noised(pipe.scheduler, images[rows], noise[rows], times)
            try:
                with torch.no_grad():
                    null = torch.full((len(rows),), pipe.num_classes)
                    output = pipe.unet(x.float(), times, class_labels=null, return_dict=False)[0]
            finally:
                handle.remove()
            found.setdefault(f"loss, t = {t}", []).append(per_image((output - wanted).square()))
            for name, posterior in judged.items():
                found.setdefault(f"{name}, t = {t}", []).append(per_image(posterior.variance(inputs[0])))
        out |= {k: torch.cat(v) for k, v in found.items()}
    return out


def of_earth(size: Size) -> list[dict[str, Any]]:
    """Regions that the text model has not seen, and captions that belong to other images."""
    pipe, data, posterior = earth(max(64, size.fit // 2))
    count = max(8, size.images // 2)
    own = data.subset(slice(1, None, max(1, data.num_images // count)))
    held = data.heldout.subset(slice(None, None, max(1, data.heldout.num_images // count)))
    shifted = held.prompts[len(held.prompts) // 2 :] + held.prompts[: len(held.prompts) // 2]
    judged = posteriors(posterior)
    sets = {
        "trained regions": (own.images, own.prompts),
        "held-out regions": (held.images, held.prompts),
        "held-out regions, others' captions": (held.images, shifted),
        "held-out regions, blue and red exchanged": (held.images.flip(1), held.prompts),
    }
    scores = {}
    for name, (images, prompts) in sets.items():
        pixels = (images + 1) / 2
        out = {"edge density": per_image(edges(pixels)), "brightness": per_image(pixels)}
        for t in TIMESTEPS:
            found: dict[str, list[Tensor]] = {}
            for rows in torch.arange(len(images)).split(25):
                step = bayesdiff.features(
                    pipe, images[rows], [prompts[i] for i in rows.tolist()], timesteps=[t] * len(rows), encode="mean",
                    generator=seeded(t + int(rows[0])),
                )  # fmt: skip
                found.setdefault(f"loss, t = {t}", []).append(per_image(step.residual.square()))
                for key, p in judged.items():
                    found.setdefault(f"{key}, t = {t}", []).append(per_image(p.variance(step.inputs)))
            out |= {k: torch.cat(v) for k, v in found.items()}
        scores[name] = out
    return rows_of("earth-sd", scores, "trained regions")
