"""Labels as numbers: names of classes, by what the model calls them."""

from __future__ import annotations

import difflib
import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import ArgumentError, BayesdiffWarning, UnknownNameError


def known_classes(pipe: Any) -> dict[str, int]:
    """The names of a pipeline's classes with their numbers: ``pipe.labels``, or ``id2label`` in its configuration.

    Several names of one class are separated by commas, as ImageNet has them. Empty where the pipe names no classes.
    """
    names = getattr(pipe, "labels", None)
    if isinstance(names, Mapping) and names and all(isinstance(v, int) for v in names.values()):
        return {str(name).strip(): number for name, number in names.items()}
    config = getattr(pipe, "config", None)
    by_number = config.get("id2label") if isinstance(config, Mapping) else None
    if not isinstance(by_number, Mapping):
        return {}
    return {name.strip(): int(number) for number, several in by_number.items() for name in str(several).split(",")}


def numbered(labels: Sequence[Any], known: Mapping[str, int] | None = None) -> Tensor:
    """Labels as int64. Names are looked up in ``known``; where that is empty, classes are numbered in the order of their names.

    Args:
        labels: All of the data, where ``known`` is empty.
        known: The model's classes.

    Raises:
        UnknownNameError: Names are not among ``known``; all are listed.
        ArgumentError: Numbers and names are mixed, or a label is neither; or names are numbers, out of order.

    Warns:
        BayesdiffWarning: Classes were numbered in the order of their names.
    """
    texts = [isinstance(label, str) for label in labels]
    if not any(texts):
        return _integers(labels)
    if not all(texts):
        number = next(label for label in labels if not isinstance(label, str))
        name = next(label for label in labels if isinstance(label, str))
        raise ArgumentError(f"expected labels that are all numbers or all names, got {number!r} and {name!r}")
    if not known:
        known = in_order(labels)
    by_key = {_key(name): number for name, number in known.items()}
    strange = sorted({str(label) for label in labels if _key(str(label)) not in by_key})
    if strange:
        said = []
        for name in strange:
            close = difflib.get_close_matches(_key(name), by_key, n=1)
            said.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
        some = ", ".join(map(repr, list(known)[:12])) + (", …" if len(known) > 12 else "")
        raise UnknownNameError(f"expected names of classes that the model knows ({some}), got {', '.join(said)}")
    return torch.tensor([by_key[_key(str(label))] for label in labels], dtype=torch.int64)


def in_order(names: Sequence[str]) -> dict[str, int]:
    """Names of classes with their places in alphabetical order.

    Raises:
        ArgumentError: They are numbers, and their places others: "10" comes before "2".

    Warns:
        BayesdiffWarning: Always; whether the model was trained with these numbers cannot be seen.
    """
    known = {name: i for i, name in enumerate(sorted(set(map(str, names))))}
    some = ", ".join(f"{name!r} {i}" for name, i in list(known.items())[:5]) + (", …" if len(known) > 5 else "")
    if all(name.isdecimal() for name in known) and any(int(name) != i for name, i in known.items()):
        raise ArgumentError(
            "expected classes by name, or by numbers that are their places, got names that are numbers; in their order these "
            f"would be {some}: give each image its number, as the column label of metadata.jsonl"
        )
    warnings.warn(
        f"the model names no classes, so they are numbered in the order of their names: {some}; labels that are numbers say "
        "what the model was trained with", BayesdiffWarning, stacklevel=2,
    )  # fmt: skip
    return known


def _integers(labels: Sequence[Any]) -> Tensor:
    numbers = []
    for place, label in enumerate(labels):
        try:
            numbers.append(operator.index(label))
            torch.tensor(numbers[-1], dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ArgumentError(
                f"expected labels that are integers or names of classes, got {label!r} ({type(label).__name__}) as number {place}"
            ) from error
    return torch.tensor(numbers, dtype=torch.int64)


def _key(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())
