"""What a pipeline is called with for a batch of data: prompts, labels and other inputs by its own keywords."""

from __future__ import annotations

import inspect
import itertools
import numbers
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import ArgumentError, BayesdiffWarning
from bayesdiff.head.loaded import placement

#: Keywords that may turn guidance on; 1 or 0 turns it off.
GUIDANCE = re.compile(r"guidance|cfg|pag_scale")
#: And those that look like them.
OTHERS = re.compile(r"rescale|start|stop|end|layers|mode|adaptive")
#: Texts that a pipeline wants as many of as there are prompts, and in a list where those are.
TEXTS = re.compile(r"(negative_)?prompt(_\d+)?")
#: What an image's class label may be called in a network's configuration.
CLASSES = ("num_class_embeds", "num_embeds_ada_norm")


class Keywords:
    """A pipeline's keywords for some images.

    Args:
        pipe: The pipeline.
        network: Its denoising network.
        given: What all calls have, from the user.
    """

    def __init__(self, pipe: Any, network: nn.Module, given: Mapping[str, Any] | None) -> None:
        self.pipe, self.network = pipe, network
        parameters = inspect.signature(type(pipe).__call__).parameters
        self.open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.parameters = dict(itertools.islice(parameters.items(), 1, None))
        self.required = [
            n
            for n, p in self.parameters.items()
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        self._inner = inspect.signature(network.forward).parameters
        self.given = dict(given or {})
        unknown = [k for k in self.given if not self.takes(k)]
        if unknown:
            raise ArgumentError(
                f"expected pipe_kwargs that {type(pipe).__name__} takes, got {', '.join(map(repr, unknown))}"
            )
        self.guidance: dict[str, float] = {}
        self.size: dict[str, int] = {}
        self.own_generators = True
        self._left_out: str | None = None  # a caption or a label, where data have both and a model takes one

    def takes(self, name: str) -> bool:
        """Whether the pipeline has this keyword."""
        return name in self.parameters or self.open

    def place(self, name: str) -> str | None:
        """The pipeline's keyword for a column of the data; None: it is an input of the network itself.

        Raises:
            ArgumentError: Neither has it.
        """
        if name == "prompts":
            name = "prompt"
        if name in self.parameters:
            return name
        if name in self._inner:
            return None
        if name == "class_labels":
            free = [n for n in self.required if n not in self.given]
            if len(free) == 1:  # the one thing that the pipeline must be told
                return free[0]
        if self.open:
            return name
        raise ArgumentError(
            f"expected data that {type(self.pipe).__name__} or {type(self.network).__name__} takes, got {name!r}; the pipe takes "
            f"{', '.join(self.parameters)}"
        )

    def check(self, conditioning: Mapping[str, Any]) -> None:
        """Whether all that the pipeline must be told is there, labels in range.

        Raises:
            ArgumentError: Something is missing or out of range.
        """
        self._choose(conditioning)
        conditioning = self._columns(conditioning)
        places = {self.place(name) for name in conditioning}
        known = {*places, *self.given}
        embedded = any(k and "embeds" in k for k in known)
        if "prompt" in self.parameters and "prompt" not in known and not embedded and None not in places:
            raise ArgumentError(
                f"expected prompts for {type(self.pipe).__name__}, got none: bd.fit(pipe, images, prompts), one for each image"
            )
        missing = [n for n in self.required if n not in known and n != "prompt"]
        if missing and not (len(missing) == 1 and None in places):
            raise ArgumentError(
                f"expected data with {', '.join(map(repr, missing))}, which {type(self.pipe).__name__} must be told for each "
                f"image, got {', '.join(map(repr, conditioning)) or 'images only'}"
            )
        labels = conditioning.get("class_labels")
        if labels is not None:
            values = torch.as_tensor(labels)
            config = getattr(self.network, "config", None)
            most = next((v for v in (getattr(config, c, None) for c in CLASSES) if v is not None), None)
            if values.is_floating_point() or values.ndim != 1:
                raise ArgumentError(
                    f"expected class labels as one integer for each image, got {values.dtype} {tuple(values.shape)}"
                )
            if len(values) and (int(values.min()) < 0 or (most is not None and int(values.max()) >= most)):
                raise ArgumentError(
                    f"expected class labels from 0 to {'the number of classes' if most is None else most - 1}, got "
                    f"{int(values.min())} to {int(values.max())}"
                )

    def _choose(self, conditioning: Mapping[str, Any]) -> None:
        """Of captions and labels, where data have both, those that the model takes."""
        if self._left_out is not None or not {"prompts", "class_labels"} <= conditioning.keys():
            return
        refused = []
        for name in ("prompts", "class_labels"):
            try:
                self.place(name)
            except ArgumentError:
                refused.append(name)
        if len(refused) == 1:
            (self._left_out,) = refused
            warnings.warn(
                f"the data have captions and labels, and {type(self.pipe).__name__} does not take {self._left_out}: they are "
                "left out",
                BayesdiffWarning, stacklevel=2,
            )  # fmt: skip

    def _columns(self, conditioning: Mapping[str, Any]) -> dict[str, Any]:
        return {name: values for name, values in conditioning.items() if name != self._left_out}

    def call(self, conditioning: Mapping[str, Any], rows: list[int], seeds: list[int], steps: int) -> dict[str, Any]:
        """The keywords of a call with some rows of the data."""
        out: dict[str, Any] = {}
        conditioning = self._columns(conditioning)
        for name, values in conditioning.items():
            place = self.place(name)
            if place is not None:
                out[place] = _rows(values, rows, labels=name == "class_labels")
        named = bool(out)
        if isinstance(self.given.get("prompt"), str) and "prompt" not in out:
            out["prompt"], named = [self.given["prompt"]] * len(rows), True
        if not named and "prompt" in self.parameters:
            out["prompt"], named = [""] * len(rows), True
        for name in self.required:  # what it becomes is an input of the network that the data have themselves
            if name not in out and name not in self.given and None in map(self.place, conditioning):
                out[name], named = [0] * len(rows), True
        if "batch_size" in self.parameters and not named:
            out["batch_size"] = len(rows)
        if "num_inference_steps" in self.parameters:
            out["num_inference_steps"] = steps
        if "generator" in self.parameters:
            made = [torch.Generator().manual_seed(s) for s in seeds]
            out["generator"] = made if self.own_generators else made[0]
        if "strength" in self.parameters and "strength" not in self.given:
            out["strength"] = 1.0  # of those that start from an image: from noise alone
        fixed = {k: v for k, v in self.given.items() if k not in out or k not in ("prompt", "generator")}
        if isinstance(out.get("prompt"), list):
            texts = [k for k, v in fixed.items() if isinstance(v, str) and TEXTS.fullmatch(k)]
            fixed |= {k: [fixed[k]] * len(rows) for k in texts}
        return {**out, **self.size, **fixed, **self.guidance}

    def inputs(self, conditioning: Mapping[str, Any], rows: list[int]) -> dict[str, Any]:
        """Inputs of the network itself among the data, which replace the pipeline's."""
        device, dtype = placement(self.network)
        out = {}
        for name, values in self._columns(conditioning).items():
            if self.place(name) is None:
                value = torch.as_tensor(values)[torch.tensor(rows)]
                out[name] = value.to(device, dtype if value.is_floating_point() else value.dtype)
        return out

    def unguided(self) -> Iterator[dict[str, float]]:
        """Settings that may turn guidance off: none, one keyword after the other, several together."""
        yield {}
        defaults = {n: self.given.get(n, p.default) for n, p in self.parameters.items()}
        names = [n for n, v in defaults.items() if _number(v) and GUIDANCE.search(n) and not OTHERS.search(n)]
        for value in (1.0, 0.0):
            for name in names:
                yield {name: value}
        if 1 < len(names) < 4:
            for values in itertools.product((1.0, 0.0), repeat=len(names)):
                yield dict(zip(names, values, strict=True))
        for name, value in defaults.items():  # one that is called otherwise
            if name not in names and isinstance(value, float) and value > 1:
                yield {name: 1.0}


def _number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _rows(values: Any, rows: list[int], *, labels: bool = False) -> Any:
    if isinstance(values, Tensor):
        chosen = values[torch.tensor(rows, device=values.device)]
        return [int(v) for v in chosen] if labels else chosen
    return [int(values[r]) if labels else values[r] for r in rows]
