"""Small models that were really trained, weights and data included.

>>> pipe, data = bayesdiff.zoo.load("fashion-ddpm")
>>> pipe("sneaker").images[0]
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn, overload

import diffusers
import torch
from diffusers import DDPMScheduler, UNet2DModel

from bayesdiff.checks import BayesdiffError, UnknownNameError, UnsupportedSchedulerError
from bayesdiff.zoo.data import ClassImages, read_class_images
from bayesdiff.zoo.pipeline import ClassConditionalPipeline
from bayesdiff.zoo.prompts import PromptImages, read_prompt_images

__all__ = [
    "ClassConditionalPipeline",
    "ClassImages",
    "ModelFilesError",
    "PromptImages",
    "build_scheduler",
    "load",
    "load_pipeline",
    "load_text_pipeline",
    "names",
    "scheduler_names",
]

_FOLDERS = {
    "fashion-ddpm": "fashion_ddpm",
    "fashion-4step": "fashion_4step",
    "earth-sd": "earth_sd",
    "earth-sd3": "earth_sd3",
}


class ModelFilesError(BayesdiffError, FileNotFoundError):
    """A model's files are not where they should be; the message says where they can be had."""


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


@overload
def load(
    name: Literal["fashion-ddpm", "fashion-4step"], *, scheduler: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[ClassConditionalPipeline, ClassImages]: ...


@overload
def load(
    name: Literal["earth-sd", "earth-sd3"], *, scheduler: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, PromptImages]: ...


@overload
def load(name: str, *, scheduler: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]: ...


def load(name: str, *, scheduler: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a shipped model and the shard of data that it ships with.

    Args:
        name: One of :func:`names`.
        scheduler: What samples it; one of :func:`scheduler_names`. By default "ddim" for "fashion-ddpm", and for the
            others the scheduler that they were saved with.
        dtype: Of the networks. The weights are stored in float16 and converted.

    Returns:
        The pipeline, on the CPU and in evaluation mode, and a shard of its training images, with held-out ones as
        ``.heldout``, and with N and M of its training as ``.dataset_size`` and ``.training_draws``: a
        :class:`ClassConditionalPipeline` with :class:`ClassImages`, or for "earth-sd" and "earth-sd3" diffusers'
        ``StableDiffusionPipeline`` or ``StableDiffusion3Pipeline`` with :class:`PromptImages`.

    Raises:
        UnknownNameError: There is no such model or scheduler.
        ModelFilesError: The model's files are not there: an installed package has no weights of the earth models.
        UnsupportedSchedulerError: "earth-sd3" is a flow, and ``scheduler`` is none of flow matching.
    """
    if name not in _FOLDERS:
        _unknown("model", name, _FOLDERS)
    folder = Path(__file__).parent / _FOLDERS[name]
    if not (folder / "model_index.json").exists():
        raise ModelFilesError(
            f"expected the files of {name!r} in {folder}, found none: they are too large for the installed package. "
            "Load it from a checkout of the source repository, or give its folder bayesdiff/zoo/"
            f"{_FOLDERS[name]} from there to diffusers' DiffusionPipeline.from_pretrained"
        )
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    size, draws, shard = training["dataset_size"], training["training_draws"], folder.parent / training["data"]
    if (shard / "data.npz").exists():
        pipe = load_pipeline(folder, scheduler=scheduler or training["sampler"], dtype=dtype)
        data = read_class_images(shard / "data.npz", pipe.class_names, dataset_size=size, training_draws=draws)
        return pipe, data
    return load_text_pipeline(folder, scheduler=scheduler, dtype=dtype), read_prompt_images(shard, size, draws)


def load_text_pipeline(
    folder: str | os.PathLike[str], *, scheduler: str | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """``DiffusionPipeline.from_pretrained`` of any pipeline in one dtype, without progress bars.

    Args:
        folder: Where ``save_pretrained`` wrote the pipeline.
        scheduler: What samples it; one of :func:`scheduler_names`. By default the one that was saved.
        dtype: Of all networks.

    Raises:
        UnknownNameError: There is no such scheduler.
        UnsupportedSchedulerError: The pipeline is a flow, and ``scheduler`` is none of flow matching.
    """
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            torch.nn.Module.to(module, dtype).eval()  # exactly, from float16
    if scheduler is not None:
        if "prediction_type" not in pipe.scheduler.config:
            raise UnsupportedSchedulerError(
                f"expected no scheduler for a model of flow matching, which has {type(pipe.scheduler).__name__}, got "
                f"{scheduler!r}; leave it out"
            )
        pipe.scheduler = build_scheduler(scheduler, pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
