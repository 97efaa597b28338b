"""Make 1.2 times as many images, drop the worst by a score: is what is left better than what chance leaves?

The protocol of DIFF-UQ (De Vita & Belagiannis 2025) at a small size: Fréchet distance, precision and recall against held-out
images, in features of a classifier trained on the data (Fashion-MNIST) or of EfficientNet-Lite0 (the earth). Chance is the mean
over many random drops of the same number, so a row says how far a score is from chance, seed by seed. A second use of the same
scores: images that the classifier takes for another class than was asked for.

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
from experiments.usefulness.common import Folders, Size, earth, edges, fashion, posteriors, standard_error
from experiments.usefulness.spaces import Classifier, EarthFeatures, Frechet, classifier, precision_recall

KEEP = 1 / 1.2
RANDOM_DROPS = 200
BATCH = 40
METHODS = ("tangents", "ggn", "ensemble", "bayesdiff")
#: Of one seed: features of the images, which of them are taken for another class than was asked for, and all scores.
Made = tuple[Tensor, Tensor | None, dict[str, Tensor]]


def run(folders: Folders, size: Size, methods: tuple[str, ...] = METHODS) -> list[dict[str, Any]]:
    """Of ``fashion-ddpm``: a row for each score and measure."""
    model = classifier(folders)
    test, _ = fashion_mnist(folders.fashion, "t10k")
    real = model.features(test[:, None].float() / 127.5 - 1)
    return judged("fashion-ddpm", real, [garments(model, size, seed, methods) for seed in range(size.seeds)])


def run_earth(folders: Folders, size: Size) -> list[dict[str, Any]]:
    """Of ``earth-sd``: a row for each score and measure."""
    _, data, _ = earth(size.fit)
    heldout = (data.heldout.images + 1) / 2
    model = EarthFeatures(heldout)
    real = torch.cat([model(some) for some in heldout.split(64)])
    return judged("earth-sd", real, [patches(model, size, seed) for seed in range(size.seeds)])


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


def garments(model: Classifier, size: Size, seed: int, methods: tuple[str, ...]) -> Made:
    """Images of the ten classes in turn, by DDIM."""
    pipe, _, posterior = fashion(size.fit)
    classes = [i % 10 for i in range(size.images)]
    parts = []
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
        scores = scores_of(output, output.output[:, :784].view(-1, 1, 28, 28).clamp(0, 1))
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
        parts.append((output.output[:, 784:], scores))
    features, all_scores = together(parts)
    return features, model.last(features).argmax(1) != torch.tensor(classes), all_scores


def patches(model: EarthFeatures, size: Size, seed: int) -> Made:
    """Images of held-out captions, guidance 3, through the pipeline and its decoder."""
    pipe, data, posterior = earth(size.fit)
    pipe.set_progress_bar_config(disable=True)
    order = torch.randperm(len(data.heldout.prompts), generator=seeded(seed))[: size.images].tolist()
    parts = []
    for first in range(0, len(order), BATCH):
        prompts = [data.heldout.prompts[i] for i in order[first : first + BATCH]]
        noise = torch.randn(len(prompts), 4, 16, 16, generator=seeded(10_000 * (seed + 1) + first))

        def sampler(x: Tensor, prompts: list[str] = prompts) -> Tensor:
            images = pipe(
                prompts, latents=x, num_inference_steps=size.steps, guidance_scale=3.0, output_type="pt"
            ).images
            return torch.cat([images.flatten(1), model(images)], 1)

        tangents = bayesdiff.Tangents(draws=size.draws, schedule=pipe.scheduler)
        output = bayesdiff.propagate(sampler, pipe.unet, posterior, noise, propagation=tangents)
        count = output.output.shape[1] - 32
        images = output.output[:, :count].unflatten(1, (3, 64, 64))
        parts.append((output.output[:, count:], scores_of(output, images)))
    features, scores = together(parts)
    return features, None, scores
