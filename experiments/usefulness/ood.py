"""Other images than the model was trained on: does the variance of a training step tell them?

For each image, the predictive variance of its noisy version at a timestep (mean over pixels), under three posteriors; beside
it the loss at the same timestep and noise, the density of edges and the brightness, which cost no posterior.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc

import bayesdiff
from bayesdiff.diffusion.noising import noised
from experiments.common import seeded
from experiments.usefulness.common import Folders, Size, Subject, animals, digits, edges, per_image, posteriors

BOOTSTRAPS = 200


def run(subject: Subject, folders: Folders, size: Size) -> list[dict[str, Any]]:
    """AUROC of every score for every other set against images of the model's own."""
    of = of_prompts if "prompts" in subject.data else of_classes
    return of(subject, folders, size)


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


def others(folders: Folders, count: int) -> dict[str, Tensor]:
    """Images of other data sets, 28 × 28 in [−1, 1]."""
    sets: dict[str, Tensor] = {}
    if folders.digits is not None:
        sets["digits (MNIST)"] = digits(folders.digits, count)
    if folders.animals is not None:
        sets["animals (animal-mnist)"] = animals(folders.animals, count)
    return sets


def of_classes(subject: Subject, folders: Folders, size: Size) -> list[dict[str, Any]]:
    """A class-conditional model, told no class."""
    data = subject.data
    held = data.heldout.subset(slice(None, None, max(1, data.heldout.num_images // size.images)))
    sets = {"held-out": held.images, "upside down": held.images.flip(2), "negative": -held.images}
    sets |= others(folders, size.images)
    pipe, head, judged = subject.pipe, bayesdiff.find_head(subject.pipe), posteriors(subject.posterior)
    scores = {}
    for name, images in sets.items():
        out = controls(images)
        for t in subject.timesteps:
            noise = torch.randn(images.shape, generator=seeded(t))
            found: dict[str, list[Tensor]] = {}
            for rows in torch.arange(len(images)).split(50):
                times = torch.full((len(rows),), t)
                x, wanted = noised(pipe.scheduler, images[rows], noise[rows], times)
                with torch.no_grad(), head.capture() as inputs:
                    null = torch.full((len(rows),), pipe.num_classes)
                    output = pipe.unet(x.float(), times, class_labels=null, return_dict=False)[0]
                add(found, t, output - wanted, inputs[0], judged)
            out |= {k: torch.cat(v) for k, v in found.items()}
        scores[name] = out
    return rows_of(subject.name, scores, "held-out")


def of_prompts(subject: Subject, folders: Folders, size: Size) -> list[dict[str, Any]]:
    """Regions that a text model has not seen, captions that belong to other images, and other images."""
    data, judged = subject.data, posteriors(subject.posterior)
    count = max(8, size.images // 2)
    own = data.subset(slice(1, None, max(1, data.num_images // count)))
    held = data.heldout.subset(slice(None, None, max(1, data.heldout.num_images // count)))
    shifted = held.prompts[len(held.prompts) // 2 :] + held.prompts[: len(held.prompts) // 2]
    sets = {
        "trained regions": (own.images, own.prompts),
        "held-out regions": (held.images, held.prompts),
        "held-out regions, others' captions": (held.images, shifted),
        "held-out regions, blue and red exchanged": (held.images.flip(1), held.prompts),
    }
    for name, images in others(folders, count).items():
        large = F.interpolate(images, size=own.images.shape[-1], mode="bilinear").expand(-1, 3, -1, -1)
        sets[f"{name}, no caption"] = (large, [""] * len(images))
    scores = {}
    for name, (images, prompts) in sets.items():
        out = controls(images)
        for t in subject.timesteps:
            found: dict[str, list[Tensor]] = {}
            for rows in torch.arange(len(images)).split(25):
                step = bayesdiff.features(
                    subject.pipe, images[rows], [prompts[i] for i in rows.tolist()], timesteps=[t] * len(rows), encode="mean",
                    pipe_kwargs=subject.trained.given, generator=seeded(t + int(rows[0])),
                )  # fmt: skip
                add(found, t, step.residual, step.inputs, judged)
            out |= {k: torch.cat(v) for k, v in found.items()}
        scores[name] = out
    return rows_of(subject.name, scores, "trained regions")


def controls(images: Tensor) -> dict[str, Tensor]:
    """Scores that know of no model."""
    pixels = (images + 1) / 2
    return {"edge density": per_image(edges(pixels)), "brightness": per_image(pixels)}


def add(
    found: dict[str, list[Tensor]], t: int, residual: Tensor, inputs: Tensor, judged: dict[str, bayesdiff.LaplacePosterior]
) -> None:  # fmt: skip
    """The loss and the variances of some images."""
    found.setdefault(f"loss, t = {t}", []).append(per_image(residual.square()))
    for name, posterior in judged.items():
        found.setdefault(f"{name}, t = {t}", []).append(per_image(posterior.variance(inputs)))
