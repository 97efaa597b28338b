"""Make 1.2 times as many images, drop the worst by a score: is what is left better than what chance leaves?

The protocol of DIFF-UQ (De Vita & Belagiannis 2025) at a small size: Fréchet distance, precision and recall against
Fashion-MNIST's test images, in the 32 features of a classifier trained on the data. Chance is the mean over many random
drops of the same number, so a row says how far a score is from chance, seed by seed. A second use of the same scores:
images that the classifier takes for another class than was asked for.

The semantic score is the variance of those features: the sampler and the classifier are one function, so it costs the same
run.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

import bayesdiff
from experiments.common import seeded
from experiments.train_fashion_ddpm.train import fashion_mnist
from experiments.usefulness.common import (
    Classifier,
    Folders,
    Size,
    classifier,
    edges,
    fashion,
    frechet,
    posteriors,
    precision_recall,
    standard_error,
)

KEEP = 1 / 1.2
RANDOM_DROPS = 200
BATCH = 40


def run(
    folders: Folders, size: Size, methods: tuple[str, ...] = ("tangents", "ggn", "ensemble", "bayesdiff")
) -> list[dict[str, Any]]:
    """A row for each score and measure: mean over seeds, its standard error, and that of chance."""
    model = classifier(folders)
    test, _ = fashion_mnist(folders.fashion, "t10k")
    real = model.features(test[:, None].float() / 127.5 - 1).double()
    mean, covariance = real.mean(0), torch.cov(real.T)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for seed in range(size.seeds):
        features, wrong, scores = made(model, size, seed, methods)
        keep = round(len(features) * KEEP)
        chance = [
            measures(features[torch.randperm(len(features), generator=seeded(s))[:keep]], real, mean, covariance)
            for s in range(RANDOM_DROPS if size.images > 50 else 10)
        ]
        base = {k: sum(c[k] for c in chance) / len(chance) for k in chance[0]}
        for name, score in scores.items():
            least = measures(features[score.argsort()[:keep]], real, mean, covariance)
            for key, value in least.items():
                found.setdefault((name, key), []).append((value, base[key]))
            if bool(wrong.any()) and not bool(wrong.all()):
                ranks = score.argsort().argsort().double() / len(score)
                found.setdefault((name, "AUROC of a wrong class"), []).append(
                    (float(binary_auroc(ranks, wrong.long())), 0.5)
                )
    rows = []
    for (name, key), pairs in found.items():
        values = torch.tensor(pairs, dtype=torch.float64)
        difference = values[:, 0] - values[:, 1]
        rows.append(
            {
                "score": name, "measure": key, "value": float(values[:, 0].mean()), "chance": float(values[:, 1].mean()),
                "difference": float(difference.mean()), "difference_se": standard_error(difference), "seeds": len(pairs),
            }
        )  # fmt: skip
    return rows


def measures(features: Tensor, real: Tensor, mean: Tensor, covariance: Tensor) -> dict[str, float]:
    """Fréchet distance to all test images; precision and recall to as many of them as there are."""
    precision, recall = precision_recall(features.double(), real[:: max(1, len(real) // len(features))])
    return {"Fréchet distance": frechet(features, mean, covariance), "precision": precision, "recall": recall}


def made(
    model: Classifier, size: Size, seed: int, methods: tuple[str, ...]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Features of one seed's images, which of them the classifier takes for another class, and all their scores."""
    pipe, _, posterior = fashion(size.fit)
    classes = [i % 10 for i in range(size.images)]
    parts: dict[str, list[Tensor]] = {}
    found: list[Tensor] = []
    for first in range(0, size.images, BATCH):
        labels = torch.tensor(classes[first : first + BATCH])
        noise = torch.randn(len(labels), 1, 28, 28, generator=seeded(10_000 * (seed + 1) + first))

        def sampler(x: Tensor, labels: Tensor = labels) -> Tensor:
            scheduler = copy.deepcopy(pipe.scheduler)
            scheduler.set_timesteps(size.steps)
            for t in scheduler.timesteps:
                f = pipe.unet(x, t, class_labels=labels, return_dict=False)[0]
                x = scheduler.step(f, t, x, return_dict=False)[0]
            return torch.cat([((x + 1) / 2).flatten(1), model.features(x)], 1)

        tangents = bayesdiff.Tangents(draws=size.draws, schedule=pipe.scheduler)
        output = bayesdiff.propagate(sampler, pipe.unet, posterior, noise, propagation=tangents)
        images, features = output.output[:, :784].view(-1, 1, 28, 28).clamp(0, 1), output.output[:, 784:]
        std = output.std[:, :784]
        scores = {
            "weights: total variance": std.square().sum(1),
            "weights: mean std": std.mean(1),
            "weights: largest std": std.amax(1),
            "weights: semantic": output.variance[:, 784:].sum(1),
            "edge density": edges(images).flatten(1).mean(1),
            "brightness": images.flatten(1).mean(1),
        }
        if "ggn" in methods:
            ggn = bayesdiff.propagate(sampler, pipe.unet, posteriors(posterior)["GGN"], noise, propagation=tangents)
            scores["GGN: total variance"] = ggn.variance[:, :784].sum(1)
        if "ensemble" in methods:
            members = bayesdiff.propagate(
                sampler, pipe.unet, posterior, noise, propagation=bayesdiff.Ensemble(members=4)
            )
            scores["ensemble of 4: total variance"] = members.variance[:, :784].sum(1)
        if "bayesdiff" in methods:
            run = bayesdiff.UncertaintyPipeline(
                pipe, posteriors(posterior)["diagonal EF"], propagation=bayesdiff.BayesDiff(skip_interval=2)
            )
            theirs = run(labels.tolist(), latents=noise, num_inference_steps=size.steps, output_type="latent")
            scores["BayesDiff: total variance"] = theirs.variance.flatten(1).sum(1)
        for key, value in scores.items():
            parts.setdefault(key, []).append(value.double())
        found.append(features)
    features = torch.cat(found)
    wrong = model.last(features).argmax(1) != torch.tensor(classes)
    return features, wrong, {k: torch.cat(v) for k, v in parts.items()}
