"""Small models that were really trained and ship with the package, weights and data included.

>>> pipe, data = bayesdiff.zoo.load("fashion-ddpm")
>>> pipe("sneaker").images[0]
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import torch
from diffusers import DDPMScheduler, UNet2DModel

from bayesdiff.checks import UnknownNameError
from bayesdiff.zoo.data import ClassImages, read_class_images
from bayesdiff.zoo.pipeline import ClassConditionalPipeline

__all__ = [
    "ClassConditionalPipeline",
    "ClassImages",
    "build_scheduler",
    "load",
    "load_pipeline",
    "names",
    "scheduler_names",
]

_FOLDERS = {"fashion-ddpm": "fashion_ddpm"}

# Schedulers of ε-, v- and x0-prediction networks. Flow matching is another parametrization, and the
# SDE solvers with a Brownian tree ask for one more dependency.
_SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2-a": "KDPM2AncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++-single": "DPMSolverSinglestepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "sa": "SASolverScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}


def names() -> tuple[str, ...]:
    """The models that :func:`load` knows."""
    return tuple(_FOLDERS)


def scheduler_names() -> tuple[str, ...]:
    """The short names of schedulers that :func:`build_scheduler` knows."""
    return tuple(_SCHEDULERS)


def build_scheduler(name: str, config: Any) -> Any:
    """A diffusers scheduler by its short name ("ddim") or class name, with the schedule of ``config``.

    Args:
        name: One of :func:`scheduler_names`, or its class name; case is ignored.
        config: The ``config`` of another scheduler, whose noise schedule is taken over.

    Raises:
        UnknownNameError: There is no scheduler of that name.
    """
    wanted = name.strip().lower()
    for short, class_name in _SCHEDULERS.items():
        if wanted in (short, class_name.lower()):
            return getattr(diffusers, class_name).from_config(config)
    _unknown("scheduler", name, _SCHEDULERS)


def load(
    name: str, *, scheduler: str = "ddim", dtype: torch.dtype = torch.float32
) -> tuple[ClassConditionalPipeline, ClassImages]:
    """Load a shipped model and the shard of data that it ships with.

    Args:
        name: One of :func:`names`.
        scheduler: What samples it; one of :func:`scheduler_names`.
        dtype: Of the network. The weights are stored in float16 and converted.

    Returns:
        The pipeline, on the CPU and in evaluation mode, and a shard of its training images, with
        held-out ones as ``.heldout``.

    Raises:
        UnknownNameError: There is no such model or scheduler.
    """
    if name not in _FOLDERS:
        _unknown("model", name, _FOLDERS)
    folder = Path(__file__).parent / _FOLDERS[name]
    pipe = load_pipeline(folder, scheduler=scheduler, dtype=dtype)
    return pipe, read_class_images(folder / "data.npz", pipe.class_names)


def load_pipeline(
    folder: str | os.PathLike[str], *, scheduler: str = "ddim", dtype: torch.dtype = torch.float32
) -> ClassConditionalPipeline:
    """``ClassConditionalPipeline.from_pretrained`` without progress bars, and with another scheduler.

    Args:
        folder: Where ``save_pretrained`` wrote a :class:`ClassConditionalPipeline`.
        scheduler: What samples it; one of :func:`scheduler_names`.
        dtype: Of the network.

    Raises:
        UnknownNameError: There is no such scheduler.
    """
    schedule = DDPMScheduler.load_config(folder, subfolder="scheduler", local_files_only=True)
    sampler = build_scheduler(scheduler, schedule)
    id2label = ClassConditionalPipeline.load_config(folder, local_files_only=True)["id2label"]
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet", local_files_only=True).eval()
    torch.nn.Module.to(unet, dtype)  # diffusers' own .to() warns of an empty list of modules
    pipe = ClassConditionalPipeline(unet, sampler, id2label)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unknown(kind: str, name: str, known: Iterable[str]) -> NoReturn:
    close = difflib.get_close_matches(str(name).lower(), list(known), n=3)
    near = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise UnknownNameError(f"expected a {kind} that is one of {', '.join(map(repr, known))}, got {name!r}{near}")
