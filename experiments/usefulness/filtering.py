"""Make 1.2 times as many images, drop the worst by a score: is what is left better than what chance leaves?

The protocol of DIFF-UQ (De Vita & Belagiannis 2025) at a small size: Fréchet distance, precision and recall against held-out
images, in features of a classifier trained on the data (Fashion-MNIST) or of EfficientNet-Lite0 (the earth). Chance is the mean
over many random drops of the same number, so a row says how far a score is from chance, seed by seed. A second use of the same
scores: images that the classifier takes for another class than was asked for.

The semantic score is the variance of those features: the sampler and the classifier are one function, so it costs the same
run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

import bayesdiff
from experiments.common import seeded
from experiments.train_fashion_ddpm.train import fashion_mnist
from experiments.usefulness.common import Folders, Size, Subject, edges, posteriors, standard_error
from experiments.usefulness.spaces import EarthFeatures, Frechet, classifier, precision_recall

KEEP = 1 / 1.2
RANDOM_DROPS = 200
BATCH = 48
METHODS = ("tangents", "ggn", "ensemble", "bayesdiff")
#: Of one seed: features of the images, which of them are taken for another class than was asked for, and all scores.
Made = tuple[Tensor, Tensor | None, dict[str, Tensor]]


def run(subject: Subject, folders: Folders, size: Size, methods: tuple[str, ...] = METHODS) -> list[dict[str, Any]]:
    """A row for each score and measure."""
    model: nn.Module
    if "prompts" in subject.data:
        heldout = (subject.data.heldout.images + 1) / 2
        model = EarthFeatures(heldout)
        real = torch.cat([model(some) for some in heldout.split(64)])
    else:
        model = classifier(folders)
        test, _ = fashion_mnist(folders.fashion, "t10k")
        real = torch.cat([model(some) for some in (test[:, None].float() / 255).split(1000)])
    return judged(subject.name, real, [samples(subject, model, size, seed, methods) for seed in range(size.seeds)])


def judged(name: str, real: Tensor, made: list[Made]) -> list[dict[str, Any]]:
    """A row for each score and measure: mean over seeds, its standard error, and that of chance."""
    distance = Frechet(real)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for features, wrong, scores in made:
        keep = round(len(features) * KEEP)
        chance = [
            measures(features[torch.randperm(len(features), generator=seeded(s))[:keep]], real, distance)
            for s in range(RANDOM_DROPS if len(features) > 50 else 10)
        ]
        base = {k: sum(c[k] for c in chance) / len(chance) for k in chance[0]}
        for score, values in scores.items():
            least = measures(features[values.argsort()[:keep]], real, distance)
            for key, value in least.items():
                found.setdefault((score, key), []).append((value, base[key]))
            if wrong is not None and bool(wrong.any()) and not bool(wrong.all()):
                ranks = values.argsort().argsort().double() / len(values)
                auroc = float(binary_auroc(ranks, wrong.long()))
                found.setdefault((score, "AUROC of a wrong class"), []).append((auroc, 0.5))
    rows = []
    for (score, key), pairs in found.items():
        both = torch.tensor(pairs, dtype=torch.float64)
        difference = both[:, 0] - both[:, 1]
        rows.append(
            {
                "model": name, "score": score, "measure": key, "value": float(both[:, 0].mean()),
                "chance": float(both[:, 1].mean()), "difference": float(difference.mean()),
                "difference_se": standard_error(difference), "seeds": len(pairs),
            }
        )  # fmt: skip
    return rows


def measures(features: Tensor, real: Tensor, distance: Frechet) -> dict[str, float]:
    """Fréchet distance to all real images; precision and recall to as many of them as there are."""
    some = real[:: max(1, len(real) // len(features))]
    precision, recall = precision_recall(features.double(), some.double())
    return {"Fréchet distance": distance(features), "precision": precision, "recall": recall}


def scores_of(output: bayesdiff.UncertaintyOutput, images: Tensor) -> dict[str, Tensor]:
    """All scores of a run that returns the images' numbers and, behind them, their features."""
    variance, count = output.variance, images[0].numel()
    std = variance[:, :count].sqrt()
    return {
        "weights: total variance": variance[:, :count].sum(1),
        "weights: mean std": std.mean(1),
        "weights: largest std": std.amax(1),
        "weights: semantic": variance[:, count:].sum(1),
        "edge density": edges(images).flatten(1).mean(1),
        "brightness": images.flatten(1).mean(1),
    }


def together(parts: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Batches, one after the other."""
    scores = {k: torch.cat([p[k].double() for _, p in parts]) for k in parts[0][1]}
    return torch.cat([f for f, _ in parts]), scores


def samples(subject: Subject, model: nn.Module, size: Size, seed: int, methods: tuple[str, ...]) -> Made:
    """Images of the ten classes in turn, or of held-out captions at guidance 3."""
    text, steps = "prompts" in subject.data, subject.steps(size.steps)
    heldout = subject.data.heldout
    order = torch.randperm(heldout.num_images, generator=seeded(seed))[: size.images]
    told = subject.told(heldout, order) if text else [i % 10 for i in range(size.images)]
    network, posterior, shown = subject.network, subject.posterior, posteriors(subject.posterior)
    tangents = bayesdiff.Tangents(draws=size.draws, schedule=subject.pipe.scheduler)
    parts = []
    for first in range(0, len(told), BATCH):
        asked = told[first : first + BATCH]
        noise = subject.noise(len(asked), 10_000 * (seed + 1) + first)

        drawn = subject.sampler(asked, steps, 3.0 if text else 1.0)

        def sampler(x: Tensor, drawn: Callable[[Tensor], Tensor] = drawn) -> Tensor:
            images = drawn(x)
            return torch.cat([images.flatten(1), model(images)], 1)

        output = bayesdiff.propagate(sampler, network, posterior, noise, propagation=tangents)
        shape = heldout.images.shape[1:]
        count = shape.numel()
        scores = scores_of(output, output.output[:, :count].unflatten(1, shape).clamp(0, 1))
        if "ggn" in methods:
            ggn = bayesdiff.propagate(sampler, network, shown["GGN"], noise, propagation=tangents)
            scores["GGN: total variance"] = ggn.variance[:, :count].sum(1)
        if "ensemble" in methods:
            members = bayesdiff.propagate(sampler, network, posterior, noise, propagation=bayesdiff.Ensemble(members=4))
            scores["ensemble of 4: total variance"] = members.variance[:, :count].sum(1)
        if "bayesdiff" in methods:
            run = bayesdiff.UncertaintyPipeline(
                subject.pipe, shown["diagonal EF"], propagation=bayesdiff.BayesDiff(skip_interval=2)
            )
            theirs = run(
                asked, latents=noise, num_inference_steps=steps, guidance_scale=3.0 if text else 1.0, output_type="latent",
                **subject.trained.given,
            )  # fmt: skip
            scores["BayesDiff: total variance"] = theirs.variance.flatten(1).sum(1)
        parts.append((output.output[:, count:], scores))
    features, all_scores = together(parts)
    last: Any = getattr(model, "last", None)
    wrong = None if text else last(features).argmax(1) != torch.tensor(told)
    return features, wrong, all_scores
