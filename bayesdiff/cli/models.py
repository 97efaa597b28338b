"""Models by name: shipped ones, folders of ``save_pretrained``, and names on the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from bayesdiff import zoo
from bayesdiff.checks import ArgumentError, UnknownNameError, UnsupportedPipelineError
from bayesdiff.diffusion.parametrization import is_flow

_INDEX = "model_index.json"
#: What loading a folder that is damaged, incomplete, or of a class that is not there may raise.
_LOADING = (
    OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError,
)  # fmt: skip


def load_model(name: str, scheduler: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """A pipeline in evaluation mode and without progress bars, and for a shipped one the data that it ships with.

    Args:
        name: A shipped model, a folder, or a name on the hub.
        scheduler: What samples it, instead of its own: one of :func:`bayesdiff.zoo.scheduler_names`.
        dtype: Of its networks.

    Raises:
        UnknownNameError: There is no such model or scheduler.
        UnsupportedPipelineError: diffusers cannot load it.
        ArgumentError: The scheduler is not one for this model.
    """
    if name in zoo.names():
        with quiet():
            return zoo.load(name, scheduler=scheduler, dtype=dtype)
    pipe = _load(name, dtype)
    if scheduler is not None:
        own = getattr(pipe, "scheduler", None)
        if own is None or is_flow(own):
            raise ArgumentError(
                f"expected the model's own {type(own).__name__} for a flow model, got --scheduler {scheduler}: leave it out"
            )
        pipe.scheduler = zoo.build_scheduler(scheduler, own.config)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe, None


def _load(name: str, dtype: torch.dtype) -> Any:
    folder = Path(name)
    if not (folder / _INDEX).is_file() and (folder.exists() or not _is_hub_name(name)):
        raise UnknownNameError(
            f"expected --model to be one of {', '.join(map(repr, zoo.names()))}, or a folder written by save_pretrained, or "
            f"OWNER/NAME on the Hugging Face hub, got {name!r}, where there is no {_INDEX}"
        )
    local = folder.exists()
    try:
        with quiet():
            own = _own_class(folder) if local else None
            if own is None:
                return DiffusionPipeline.from_pretrained(name, torch_dtype=dtype, local_files_only=local)
            pipe = own.from_pretrained(folder, local_files_only=True)
            torch.nn.Module.to(pipe.unet, dtype)  # diffusers' own .to() warns of an empty list of modules
            return pipe
    except _LOADING as error:
        kind = UnsupportedPipelineError if local else UnknownNameError
        raise kind(
            f"expected a pipeline that diffusers can load, got {name!r}, which it cannot ({type(error).__name__}: {error})"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and remarks of diffusers and transformers, which are for those who load by hand."""
    loggings = [diffusers.utils.logging]
    if importlib.util.find_spec("transformers") is not None:
        loggings.append(importlib.import_module("transformers.utils.logging"))
    before = [(logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in loggings]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for logging in loggings:
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        try:
            yield
        finally:
            for logging, (verbosity, bar) in zip(loggings, before, strict=True):
                logging.set_verbosity(verbosity)
                if bar:
                    logging.enable_progress_bar()


def _own_class(folder: Path) -> Any:
    """A pipeline class of this package, which diffusers does not look for."""
    kind = DiffusionPipeline.load_config(folder, local_files_only=True).get("_class_name")
    return getattr(zoo, kind, None) if isinstance(kind, str) and kind in zoo.__all__ else None


def _is_hub_name(name: str) -> bool:
    owner, slash, rest = name.partition("/")
    return bool(slash and owner and rest) and "/" not in rest and not name.startswith((".", "~"))
