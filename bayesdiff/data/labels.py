"""Labels as numbers: names of classes, by what the model calls them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import ArgumentError, UnknownNameError


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


def numbered(labels: Sequence[int | str], known: Mapping[str, int] | None = None) -> Tensor:
    """Labels as int64. Names are looked up in ``known``; where that is empty, classes are numbered in the order of their names.

    Raises:
        UnknownNameError: Names are not among ``known``; all are listed.
        ArgumentError: Numbers and names are mixed.
    """
    texts = [isinstance(label, str) for label in labels]
    if not any(texts):
        return torch.tensor([int(label) for label in labels], dtype=torch.int64)
    if not all(texts):
        number = next(label for label in labels if not isinstance(label, str))
        name = next(label for label in labels if isinstance(label, str))
        raise ArgumentError(f"expected labels that are all numbers or all names, got {number!r} and {name!r}")
    if not known:
        known = {name: i for i, name in enumerate(sorted(set(map(str, labels))))}
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


def _key(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())
