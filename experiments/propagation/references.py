"""What the propagators are judged by: many whole trajectories with other weights in the head.

Each reference is computed once and kept in a file of its own, with the settings it belongs to; one that fits is read again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import bayesdiff
from bayesdiff.io import write_tensors
from bayesdiff.propagation.settings import Settings
from experiments.common import fitted


@dataclass(frozen=True)
class Sampling:
    """One way to sample: a scheduler of the zoo, its steps, the guidance."""

    name: str
    scheduler: str
    steps: int
    guidance_scale: float = 1.0
    redrawn: bool = False  # whether there is a reference with weights redrawn at every step, too


SAMPLINGS = (
    Sampling("ddim-50", "ddim", 50, redrawn=True),
    Sampling("dpm++-25", "dpm++", 25),
    Sampling("dpm++-25-guided", "dpm++", 25, 3.0),
    Sampling("ddim-20", "ddim", 20),
    Sampling("euler-a-25", "euler-a", 25),
    Sampling("unipc-10", "unipc", 10),
    Sampling("tcd-4", "tcd", 4),
    Sampling("heun-13", "heun", 13),
)


@dataclass(frozen=True)
class Setting:
    """What all runs of the experiment share."""

    samples: int
    trajectories: int
    seed: int

    def pipe(self, sampling: Sampling) -> tuple[Any, bayesdiff.LaplacePosterior]:
        """The sampling pipeline, and the posterior."""
        pipe, _ = bayesdiff.zoo.load("fashion-ddpm", scheduler=sampling.scheduler)
        return pipe, fitted(self.seed)

    def run(
        self, pipe: Any, posterior: bayesdiff.LaplacePosterior, sampling: Sampling, propagation: Settings
    ) -> bayesdiff.UncertaintyOutput:
        """One call of an ``UncertaintyPipeline``."""
        up = bayesdiff.UncertaintyPipeline(pipe, posterior, propagation=propagation)
        generators = [torch.Generator().manual_seed(self.seed + i) for i in range(self.samples)]
        return up(
            [pipe.class_names[i % pipe.num_classes] for i in range(self.samples)], num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale, generator=generators, output_type="pt",
        )  # fmt: skip


def reference(folder: Path, setting: Setting, sampling: Sampling, redraw: bool = False) -> Tensor:
    """Per-pixel standard deviation over whole trajectories, ``(B, C, H, W)`` in pixel units; from its file if it fits."""
    path = folder / "references" / f"{sampling.name}{'-redrawn' if redraw else ''}.safetensors"
    wanted = {k: str(v) for k, v in (asdict(setting) | asdict(sampling) | {"redraw": redraw}).items()}
    if path.exists():
        with safe_open(path, "pt") as file:
            if file.metadata() == wanted:
                return file.get_tensor("std")
    pipe, posterior = setting.pipe(sampling)
    generator = torch.Generator().manual_seed(setting.seed + 1_000_003)
    ensemble = bayesdiff.Ensemble(members=setting.trajectories, redraw=redraw, generator=generator)
    output = setting.run(pipe, posterior, sampling, ensemble)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {"std": output.std}, metadata=wanted)
    return output.std
