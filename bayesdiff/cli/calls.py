"""How a pipeline is called from the command line: with prompts, with classes, or with neither, as its own signature has it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Generator

from bayesdiff.checks import ArgumentError
from bayesdiff.data import known_classes
from bayesdiff.data.labels import numbered


@dataclass(frozen=True)
class Wanted:
    """What is to be drawn.

    Args:
        prompts: Texts, taken in turns.
        classes: Names or numbers of classes, taken in turns.
        count: Samples in all; None for one of each prompt or class.
        steps: Denoising steps; None for the pipeline's own number.
        guidance_scale: None for the pipeline's own.
        eta: None for the pipeline's own.
    """

    prompts: Sequence[str]
    classes: Sequence[str]
    count: int | None
    steps: int | None
    guidance_scale: float | None
    eta: float | None


@dataclass(frozen=True)
class Call:
    """Keywords of a pipeline, and a title for each sample."""

    keywords: dict[str, Any]
    titles: list[str]


def call_of(pipe: Any, wanted: Wanted, generators: Sequence[Generator] | None = None) -> Call:
    """The keywords that draw what is wanted.

    Args:
        pipe: The pipeline.
        wanted: What is wanted of it.
        generators: One for each sample.

    Raises:
        ArgumentError: The pipeline must be told something else, or does not take what is given.
        UnknownNameError: A class is none of the pipeline's.
    """
    kind = type(pipe).__name__
    parameters = dict(inspect.signature(type(pipe).__call__).parameters)
    parameters.pop("self", None)
    required = [
        name for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name != "prompt"
    ]  # fmt: skip
    by_class = "class_labels" if "class_labels" in parameters else None
    if by_class is None and "prompt" not in parameters and len(required) == 1 and _may_be_int(parameters[required[0]]):
        by_class = required[0]  # the one thing that it must be told
    other = [name for name in required if name != by_class]
    if other:
        raise ArgumentError(
            f"expected a pipeline that draws from a prompt, a class, or nothing, got {kind}, which must be given "
            f"{', '.join(map(repr, other))}, too; use bayesdiff.UncertaintyPipeline from Python"
        )
    _check_kind(kind, wanted, "prompt" in parameters, by_class, needed=by_class in required)
    given = list(wanted.prompts or wanted.classes)
    count = wanted.count or max(1, len(given))
    told = [given[i % len(given)] for i in range(count)] if given else []
    keywords: dict[str, Any] = {}
    titles = [str(t) for t in told] or [str(i) for i in range(count)]
    if wanted.prompts:
        keywords["prompt"] = told
    elif wanted.classes and by_class is not None:
        keywords[by_class], titles = _classes(pipe, told)
    elif "batch_size" in parameters:
        keywords["batch_size"] = count
    elif count > 1:
        raise ArgumentError(f"expected --num-samples 1 for {kind}, which draws one sample in a call, got {count}")
    options = {
        "num_inference_steps": ("--steps", wanted.steps), "guidance_scale": ("--guidance-scale", wanted.guidance_scale),
        "eta": ("--eta", wanted.eta),
    }  # fmt: skip
    for name, (option, value) in options.items():
        if value is None:
            continue
        if name not in parameters:
            raise ArgumentError(f"expected no {option} for {kind}, which takes none, got {value:g}")
        keywords[name] = value
    if generators is not None and "generator" in parameters:
        keywords["generator"] = list(generators[:count])
    return Call(keywords, titles)


def _may_be_int(parameter: inspect.Parameter) -> bool:
    """Whether a parameter says that it takes integers."""
    return parameter.annotation is parameter.empty or re.search(r"\bint\b", str(parameter.annotation)) is not None


def _check_kind(kind: str, wanted: Wanted, by_prompt: bool, by_class: str | None, *, needed: bool) -> None:
    if wanted.prompts and wanted.classes:
        raise ArgumentError("expected --prompt or --class, got both")
    if by_prompt and not wanted.prompts:
        raise ArgumentError(f"expected --prompt for {kind}, got {'--class' if wanted.classes else 'none'}")
    if not by_prompt and wanted.prompts:
        raise ArgumentError(
            f"expected {'--class' if by_class else 'no --prompt'} for {kind}, which takes no text, got --prompt"
        )
    if by_class is None and wanted.classes:
        raise ArgumentError(f"expected no --class for {kind}, which has no classes, got {wanted.classes[0]!r}")
    if needed and not wanted.classes:
        raise ArgumentError(f"expected --class for {kind}, got none")


def _classes(pipe: Any, told: Sequence[str]) -> tuple[list[int], list[str]]:
    """Classes by number, and their names."""
    numbers = [int(t) if t.isdecimal() else t for t in told]
    if hasattr(pipe, "class_indices"):  # a pipeline that looks them up itself
        indices = [int(i) for i in pipe.class_indices(numbers)]
        return indices, [pipe.class_names[i] if pipe.class_names else str(i) for i in indices]
    known = known_classes(pipe)
    if not known and not all(isinstance(n, int) for n in numbers):
        raise ArgumentError(
            f"expected --class as a number for {type(pipe).__name__}, which names no classes, got {told[0]!r}"
        )
    return [n if isinstance(n, int) else int(numbered([n], known)) for n in numbers], list(told)
