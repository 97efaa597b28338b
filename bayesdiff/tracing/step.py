r"""The steps of a pipeline's scheduler, and what the network's branches do in them.

A guided output is :math:`g = f_u + s(f_c - f_u)` (Ho & Salimans 2022). Both branches have the same head W, so the guided output
is the head applied to guided features, :math:`g = W\psi` with :math:`\psi = \sum_m w_m\varphi_m`, and its variance is
:math:`\psi^\top\Sigma\psi`. Adding the branches' variances as if they were independent is an order of magnitude too large.

The weights are read off: each row of each network output is given tangents, ones and numbers, and the pipeline's own code
takes them to
the scheduler. Ones arrive as w, numbers as w times the place that they came from. What arrives otherwise (guidance that is
rescaled, for example) is not a weighted sum, and the step is not ``exact``.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bayesdiff.tracing.boxes import Box
from bayesdiff.tracing.network import Session
from bayesdiff.tracing.record import Call
from bayesdiff.tracing.rerun import tensors

#: No more network calls than this are told apart in one step.
CALLS = 4
#: Weights that differ by less, relative to the largest, are one.
SAME = 1e-4

OnStep = Callable[[Callable[..., Any], dict[str, Any]], Any]


class Spy:
    """A scheduler to all who look at it, whose ``step`` is seen; the scheduler itself is not changed.

    Args:
        scheduler: The scheduler.
        on_step: Called with its own ``step`` and the arguments by name; returns what ``step`` returns.
    """

    def __init__(self, scheduler: Any, on_step: OnStep) -> None:
        original = scheduler.step
        signature = inspect.signature(original)
        known = ("model_output", "timestep", "sample")
        names = list(signature.parameters)[:3]
        others: dict[str, str] = {}
        if len(names) == 3 and not set(known) <= set(signature.parameters) and all(
            signature.parameters[n].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD for n in names
        ):  # fmt: skip
            others = dict(zip(names, known, strict=True))  # other names for the same three

        def own(**given: Any) -> Any:
            first = [given.pop(name) for name in known]
            return original(*first, **given)

        @functools.wraps(original)  # pipelines look at the signature to see what step takes
        def step(*args: Any, **kwargs: Any) -> Any:
            given = dict(signature.bind(*args, **kwargs).arguments)
            if others:
                return on_step(own, {others.get(name, name): value for name, value in given.items()})
            if "model_output" not in given:  # a step that takes *args and **kwargs
                given = {**dict(zip(known, args, strict=False)), **kwargs}
            return on_step(original, given)

        self.__dict__.update(_scheduler=scheduler, step=step)
        # A pipeline that asks for the very type of its scheduler takes this for another kind.
        if not hasattr(scheduler, "scale_model_input"):
            self.__dict__["scale_model_input"] = as_it_is

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pipelines ask what kind of scheduler they have
        return self._scheduler.__class__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_scheduler"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_scheduler"], name, value)

    def __len__(self) -> int:
        return len(self._scheduler)

    def __copy__(self) -> Any:  # a copy is a scheduler of its own, whose steps are not seen
        return copy.copy(self._scheduler)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._scheduler, memo)


def as_it_is(sample: Tensor, *_: Any, **__: Any) -> Tensor:
    """The sample."""
    return sample


def previous_sample(result: Any) -> Tensor:
    """The sample in what a scheduler's ``step`` returns."""
    if isinstance(result, Tensor):
        return result
    value = result[0] if isinstance(result, tuple) else result.prev_sample
    assert isinstance(value, Tensor)
    return value


@dataclass(frozen=True)
class Source:
    """One row of one network call, as it enters a sample of the scheduler's.

    Args:
        call: The number of the network call.
        row: The row.
        weight: w.
    """

    call: int
    row: int
    weight: float


@dataclass
class Step:
    """What a scheduler was given.

    Args:
        index: Its number, from 0.
        output: g.
        sample: x.
        timestep: As it was given.
        arguments: The other arguments of ``step``.
        calls: Numbers of the network calls since the last step.
        sources: For each sample, the rows that g is a weighted sum of; empty where it is none.
        places: Which number of such a row each number of g is, ``(numel of a sample,)``; None: its own.
    """

    index: int
    output: Tensor
    sample: Tensor
    timestep: Any
    arguments: dict[str, Any]
    calls: tuple[int, ...]
    sources: list[list[Source]] = field(default_factory=list)
    places: Tensor | None = None

    @property
    def exact(self) -> bool:
        """Whether g is a weighted sum of rows of the network's outputs."""
        return bool(self.sources)


class Probe:
    """A run on the record that sees every step, and which rows of the network's outputs enter it.

    Args:
        session: The recorded run.
        visit: Called with each step before it is taken.
    """

    def __init__(self, session: Session, visit: Callable[[Step], None] | None = None) -> None:
        self.session, self.visit = session, visit
        self.steps: list[Step] = []
        self._since: list[int] = []
        self._rows = max(rows_of(call.output)[0] for call in session.network.calls)
        #: Tangents of every dual tensor: two for each row of a step's calls, and one for the sample's own.
        self.slots = 2 * self._rows * CALLS + 1

    def on_network(self, box: Box, n: int, args: Any, kwargs: Any, output: Any) -> None:
        """Give each row of the output ones and numbers of its own."""
        number, leaves = rows_of(output)
        offset = 2 * self._rows * (len(self._since) % CALLS)
        self._since.append(n)
        for i, f in enumerate(leaves):
            dtype = torch.promote_types(f.dtype, torch.float32)
            t = torch.zeros(self.slots, *f.shape, dtype=dtype, device=f.device)
            rows = [(i, slice(None))] if len(leaves) > 1 else [(r, slice(r, r + 1)) for r in range(number)]
            for r, where in rows:
                part = t[offset + 2 * r, where]
                part.fill_(1)
                t[offset + 2 * r + 1, where] = torch.arange(1, part.numel() + 1, dtype=dtype, device=f.device).view(
                    part.shape
                )
            self.session.trace.attach(f, t)

    def on_step(self, original: Callable[..., Any], given: dict[str, Any]) -> Any:
        """Read off what arrives, then take the step untraced."""
        output, sample = given["model_output"], given["sample"]
        rest = {k: v for k, v in given.items() if k not in ("model_output", "sample", "timestep")}
        rest |= rest.pop("kwargs", {})
        with self.session.trace.paused():
            calls = tuple(self._since)
            kept = recorded(output, [self.session.network.calls[n] for n in calls])
            step = Step(len(self.steps), kept, sample.detach(), given.get("timestep"), rest, calls)
            found = self.session.trace.tangents(output)
            if found is not None and len(calls) <= CALLS:
                self._read(step, found)
            self.steps.append(step)
            if self.visit is not None:
                self.visit(step)
            self._since = []
            return call_step(original, given)

    def _read(self, step: Step, found: Tensor) -> None:
        sources: list[list[Source]] = []
        if bool(found[-1].any()):  # the sample itself is in it
            return
        for b in range(len(step.output)):
            pairs = found[:-1, b].flatten(1).double().unflatten(0, (-1, 2))  # (rows, 2, numel)
            reaching = pairs.ne(0).any(2).any(1).nonzero().flatten().tolist()
            mine: list[Source] = []
            for i in reaching:
                ones, numbers = pairs[i]
                weight = float(ones[0])
                if not bool(((ones - weight).abs() <= SAME * abs(weight)).all()) or weight == 0:
                    return
                where = numbers / weight - 1
                places = where.round().long()
                if not bool(((where - places).abs() < 0.02 * (1 + SAME * where.abs())).all()) or int(places.min()) < 0:
                    return
                if step.places is None:
                    known = self.steps[-1].places if self.steps else None
                    step.places = known if known is not None and torch.equal(known, places) else places
                elif not torch.equal(step.places, places):
                    return
                mine.append(Source(step.calls[i // self._rows], i % self._rows, weight))
            if not mine:
                return
            sources.append(mine)
        step.sources = sources


def recorded(output: Tensor, calls: Sequence[Call]) -> Tensor:
    """What a scheduler is given, apart from its tangents: the record itself where that is it, so that a run keeps it once."""
    for f in (f for call in calls for f in tensors(call.output)):
        if (f.shape, f.dtype) == (output.shape, output.dtype) and torch.equal(f, output):
            return f
    return output.detach().clone()


def rows_of(output: Any) -> tuple[int, list[Tensor]]:
    """How many rows a network's output has, and its tensors: rows of one, or one each."""
    leaves = [f for f in tensors(output) if f.is_floating_point()]
    if len(leaves) == 1:
        return (len(leaves[0]) if leaves[0].ndim > 1 else 1), leaves
    return len(leaves), leaves


def call_step(original: Callable[..., Any], given: dict[str, Any]) -> Any:
    """The scheduler's own step, with the arguments as they were bound."""
    signature = inspect.signature(original)
    if not given.keys() <= signature.parameters.keys():
        return original(**given)
    bound = inspect.BoundArguments(signature, given)
    return original(*bound.args, **bound.kwargs)
