"""Prompts that the text model never saw: is it less sure of what it draws for them?

Three seeds of every prompt of three kinds: captions of the training, captions put together of words of the training as they never
stood together, and prompts of another world. The image's own contrast is the control: a spread is larger where there is more to
see.
"""

from __future__ import annotations

from typing import Any

import torch
from torchmetrics.functional.classification import binary_auroc

import bayesdiff
from experiments.common import seeded
from experiments.usefulness.common import Folders, Size, Subject, edges, standard_error

STRANGE = (
    "a portrait of a cat", "a circuit board", "a plate of spaghetti", "handwritten digits", "a red sports car at night",
    "xqzt vvrk plmm", "a bowl of fruit on a table", "stained glass window",
)  # fmt: skip
MIXED = (
    "ice and snow, desert", "forest in the polar sea", "desert with an island of forest", "snow in the tropics, coast",
    "grassland, ice and snow, tropics", "mountains in the open sea", "tropics, polar, desert",
    "polar desert with grassland in the sea",
)  # fmt: skip


def run(subject: Subject, folders: Folders, size: Size) -> list[dict[str, Any]]:
    """A row for each kind and score: mean over prompts with standard errors over them, and the AUROC against seen ones."""
    seen = list(dict.fromkeys(subject.data.prompts))
    count = min(len(STRANGE), max(2, size.images // 30))
    kinds = {
        "captions of the training": seen[:: max(1, len(seen) // count)][:count],
        "its words, put together anew": list(MIXED[:count]),
        "another world": list(STRANGE[:count]),
    }
    found: dict[str, dict[str, torch.Tensor]] = {}
    propagation = bayesdiff.Tangents(draws=size.draws)
    for kind, prompts in kinds.items():
        parts: dict[str, list[torch.Tensor]] = {}
        for seed in range(min(3, size.seeds)):
            output = bayesdiff.UncertaintyPipeline(subject.pipe, subject.posterior, propagation=propagation)(
                prompts, num_inference_steps=size.steps, guidance_scale=3.0, output_type="pt",
                generator=[seeded(100 * seed + i) for i in range(len(prompts))], **subject.trained.given,
            )  # fmt: skip
            images = torch.as_tensor(output.images).float()
            assert output.latents is not None
            for key, value in {
                "weights: mean std": output.std.flatten(1).mean(1),
                "weights: mean std of the latents": output.latents.variance.clamp(min=0).sqrt().flatten(1).mean(1),
                "first step: mean variance": output.steps[0].variance.flatten(1).mean(1),
                "contrast": images.flatten(2).std(2).mean(1),
                "edge density": edges(images).flatten(1).mean(1),
                "std over contrast": output.std.flatten(1).mean(1) / images.flatten(2).std(2).mean(1),
            }.items():
                parts.setdefault(key, []).append(value.double())
        found[kind] = {k: torch.stack(v).mean(0) for k, v in parts.items()}  # over seeds
    first = next(iter(kinds))
    rows = []
    for kind, scores in found.items():
        for key, values in scores.items():
            row: dict[str, Any] = {
                "model": subject.name, "kind": kind, "score": key, "mean": float(values.mean()), "se": standard_error(values),
                "prompts": len(values),
            }  # fmt: skip
            if kind != first:
                both = torch.cat([found[first][key], values])
                ranks = both.argsort().argsort().double() / len(both)
                target = torch.cat([torch.zeros(len(found[first][key])), torch.ones(len(values))]).long()
                row["auroc"] = float(binary_auroc(ranks, target))
            rows.append(row)
    return rows
