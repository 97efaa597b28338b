"""Short runs of a pipeline before the work, which ask how it calls its network.

In most of them the network itself is not called. What they mean for the work is judged in :mod:`bayesdiff.fitting.by_pipe`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from bayesdiff.checks import ArgumentError, BayesdiffError, UnsupportedPipelineError
from bayesdiff.fitting.compare import ALIKE, same_arguments
from bayesdiff.fitting.driven import ERRORS, DrivenPipe, Watched
from bayesdiff.fitting.keywords import Keywords
from bayesdiff.fitting.seen import Observer
from bayesdiff.fitting.told import Told
from bayesdiff.head.numbers import tensor_of

#: Steps with one sample and timestep, which must be alike.
REPEATED = 9


class Probe:
    """Asks a pipeline.

    Args:
        driven: Runs it.
        keywords: Of its call.
        observer: Sees the network's head.
    """

    def __init__(self, driven: DrivenPipe, keywords: Keywords, observer: Observer) -> None:
        self.driven, self.keywords, self.observer = driven, keywords, observer

    def call(self, conditioning: Mapping[str, Any], rows: list[int], steps: int) -> dict[str, Any]:
        """The keywords of a call for some rows of a batch."""
        return self.keywords.call(conditioning, rows, rows, steps)

    def one(self, conditioning: Mapping[str, Any]) -> Watched:
        """A plain run of one row; the head is found in it, where its name is not known."""
        original = self.driven.stub

        def stub(network: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.observer.known is None:
                self.observer.find(lambda: network(*args, **{**kwargs, **self.keywords.inputs(conditioning, [0])}))
            return original(network, args, kwargs)

        vars(self.driven)["stub"] = stub
        try:
            return self.driven.watch(self.call(conditioning, [0], 2))
        except (ArgumentError, UnsupportedPipelineError):
            if not self.keywords.own_generators or "generator" not in self.keywords.parameters:
                raise
            self.keywords.own_generators = False  # some take one generator only
            try:
                return self.driven.watch(self.call(conditioning, [0], 2))
            except BayesdiffError:
                self.keywords.own_generators = True
                return self.driven.watch(self.call(conditioning, [0], 2))
        finally:
            del vars(self.driven)["stub"]

    def arguments(
        self, conditioning: Mapping[str, Any], rows: list[int], timesteps: list[Tensor], x: Tensor
    ) -> list[list[Any]]:
        """What the network is given in steps at these timesteps."""
        found: list[list[Any]] = [[] for _ in timesteps]

        def on_network(n: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            leaves = tree_flatten((args, kwargs))[0]
            found[n] += [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            # Not zeros: what else a pipeline steps would stay where it is.
            return tree_map(
                lambda f: f + n + 1 if isinstance(f, Tensor) and f.is_floating_point() else f,
                self.driven.stub(original, args, kwargs),
            )

        keywords = self.call(conditioning, rows, len(timesteps) + 1)
        self.driven.run(keywords, timesteps, lambda _: x, on_network, lambda *_: None)
        return found

    def check_repeated(
        self, conditioning: Mapping[str, Any], rows: list[int], time: Tensor, x: Tensor, steps: int
    ) -> None:  # fmt: skip
        """That steps with the same sample and timestep are told the same: nothing else goes along or changes by step.

        Raises:
            UnsupportedPipelineError: They are not.
        """
        first, *later = self.arguments(conditioning, rows, [time] * min(REPEATED, steps), x)
        if not all(same_arguments(first, step) for step in later):
            pipe, network = type(self.driven.pipe).__name__, type(self.driven.network).__name__
            raise UnsupportedPipelineError(
                f"expected {pipe} to give {network} the same in each step with the same "
                "sample and timestep, got other arguments in a later one: it carries something else along (a second sample, "
                "noise levels by step, inputs that end early); fit the network, with scheduler=… and call=…"
            )

    def alone_alike(
        self, conditioning: Mapping[str, Any], rows: list[int], times: Tensor, x: Tensor, one_time: bool
    ) -> bool:  # fmt: skip
        """Whether the network returns of a row among others what it does of it alone: padding of prompts may not be masked.

        Args:
            conditioning: Of the batch.
            rows: Two images of it.
            times: A timestep of each.
            x: A noisy sample of each.
            one_time: Whether the pipeline takes one timestep for all rows.
        """
        found: list[Tensor] = []

        def on_network(n: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = original(*args, **kwargs)
            found.append(tensor_of(output)[:1].double())
            return output

        for chosen in (rows, rows[:1]):
            count = len(chosen)
            try:
                self.driven.run(
                    self.call(conditioning, chosen, 2), [times[0] if one_time else times[:1].expand(count)],
                    lambda _, c=count: x[:c] / 64, on_network, lambda *_: None,  # type: ignore[misc]
                )  # fmt: skip
            except UnsupportedPipelineError:
                return True  # it is not run alone
        among, alone = found[0], found[-1]
        if among.shape != alone.shape:
            return True
        coarse = float(torch.finfo(x.dtype).eps)
        return float((among - alone).abs().max()) <= max(ALIKE, 30 * coarse) * float(alone.abs().max())

    def tells(self, conditioning: Mapping[str, Any], rows: list[int], times: Tensor, x: Tensor) -> Told | None:
        """How the network can be told a timestep for each row, where the pipeline tells it one; None if it cannot."""
        told = Told.read(self.arguments(conditioning, rows, list(times), x), times.tolist())
        if told is None:
            return None
        apart: list[float] = []

        def on_network(n: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            one = original(*args, **kwargs)
            args, kwargs = told.replace(args, kwargs, times[:1].expand(len(rows)))
            try:
                each, plain = tensor_of(original(*args, **kwargs)).double(), tensor_of(one).double()
                apart.append(float((each - plain).abs().max() / plain.abs().max().clamp(min=1e-12)))
            except torch.OutOfMemoryError:
                raise
            except ERRORS:  # it takes one number only
                apart.append(float("inf"))
            return one

        keywords = self.call(conditioning, rows, 2)
        self.driven.run(keywords, [times[0]], lambda _: x / 64, on_network, lambda *_: None)
        return told if max(apart) <= ALIKE else None
