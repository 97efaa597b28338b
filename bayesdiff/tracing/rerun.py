"""A function that can be run again from the same state: the same tensors, the same random numbers.

Tangents and ensembles run a sampler several times. Each run must see what the first saw: so tensors among the arguments are
handed over as copies (a sampler may write into them), and every generator that can be found, PyTorch's, NumPy's and Python's
global ones included, is set back. Afterwards all of them stand where one plain run leaves them.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

Generators = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples, dictionaries and registered outputs, in their order."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def copied(value: Any) -> Any:
    """The same nest, its tensors copied."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)


class Rerun:
    """One call of a function, repeatable.

    Args:
        function: What is run.
        args: Its arguments.
        kwargs: Its named arguments.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.function = function
        self._arguments = copied((args, kwargs))
        found = {id(g): g for g in brought(function, args, kwargs) if isinstance(g, Generators)}
        #: The generators that were found, but for the global ones.
        self.generators = list(found.values())
        self._before = self.states()
        self._after: list[Any] | None = None

    def __call__(self, function: Callable[..., Any] | None = None) -> Any:
        """Run it, or another function with its arguments, from the state that all was in when this was made."""
        self._set(self._before)
        args, kwargs = copied(self._arguments)
        try:
            return (function or self.function)(*args, **kwargs)
        finally:
            if self._after is None:
                self._after = self.states()

    def settle(self) -> None:
        """Leave all generators where the first run left them."""
        if self._after is not None:
            self._set(self._after)

    def states(self) -> list[Any]:
        """The states of all generators, the global ones first."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        states: list[Any] = [torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()]  # noqa: NPY002
        for g in self.generators:
            if isinstance(g, torch.Generator | np.random.RandomState):
                states.append(g.get_state())
            else:
                states.append(g.getstate() if isinstance(g, random.Random) else g.bit_generator.state)
        return states

    def _set(self, states: list[Any]) -> None:
        torch.set_rng_state(states[0])
        if states[1]:
            torch.cuda.set_rng_state_all(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
        random.setstate(states[3])
        for g, state in zip(self.generators, states[4:], strict=True):
            if isinstance(g, torch.Generator | np.random.RandomState):
                g.set_state(state)
            elif isinstance(g, random.Random):
                g.setstate(state)
            else:
                g.bit_generator.state = state


def same_state(one: Any, other: Any) -> bool:
    """Whether two states, or lists of them, are equal."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same_state(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def reachable(function: Any) -> Iterator[Any]:
    """What a function brings along: its closure, its defaults, what a partial holds, what its object has for attributes.

    And the same of the functions among these: a decorator holds what it decorates.
    """
    waiting, seen = [function], {id(function)}
    while waiting:
        for value in _held(waiting.pop()):
            yield value
            for leaf in tree_leaves(value):
                if (hasattr(leaf, "__code__") or isinstance(leaf, functools.partial)) and id(leaf) not in seen:
                    seen.add(id(leaf))
                    waiting.append(leaf)


def _held(function: Any) -> Iterator[Any]:
    """What one function holds itself."""
    if isinstance(function, functools.partial):
        yield from (function.func, function.args, function.keywords)
        return
    yield from (cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _full(cell))
    yield from (getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None))
    owner = getattr(function, "__self__", None)
    owner = function if owner is None and not hasattr(function, "__code__") else owner
    if owner is not None:
        yield owner
        yield from getattr(owner, "__dict__", {}).values()


def _full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # not yet assigned
        return False
    return True


def brought(function: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """All that a function is given or brings along, and what the callable ones among these do: a pipeline has its modules."""
    for leaf in tree_leaves((args, kwargs, list(reachable(function)))):
        yield leaf
        if callable(leaf) and not isinstance(leaf, type | torch.nn.Module):
            yield from tree_leaves(list(reachable(leaf)))
