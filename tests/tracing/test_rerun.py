"""A function that is run again: the same arguments, the same random numbers, and generators left where one run leaves them."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch

from bayesdiff.tracing.rerun import Rerun, copied, same_state, tensors

MAKERS = {
    "torch": lambda: torch.Generator().manual_seed(3),
    "numpy": lambda: np.random.default_rng(3),
    "numpy-old": lambda: np.random.RandomState(3),
    "python": lambda: random.Random(3),
}


def drawn(generator):
    if isinstance(generator, torch.Generator):
        return float(torch.randn((), generator=generator, dtype=torch.float64))
    if isinstance(generator, random.Random):
        return generator.gauss(0, 1)
    return float(generator.normal())


class Holder:
    """A generator among its attributes; called, or its method."""

    def __init__(self, generator):
        self.generator = generator

    def __call__(self):
        return drawn(self.generator)

    def sample(self):
        return drawn(self.generator)


def closure(generator):
    return lambda: drawn(generator)


def nested(generator):
    inner = closure(generator)
    return lambda: inner()


def decorated(generator):
    inner = closure(generator)

    @torch.no_grad()
    def run():
        return inner()

    return run


def default(generator):
    def run(*, generator=generator):
        return drawn(generator)

    return run


#: How a function comes by its generator.
WAYS = {
    "argument": lambda g: (drawn, (g,), {}),
    "named": lambda g: (lambda *, generator: drawn(generator), (), {"generator": g}),
    "listed": lambda g: (lambda gs: drawn(gs["all"][0]), ({"all": [g]},), {}),
    "closure": lambda g: (closure(g), (), {}),
    "closure-of-a-closure": lambda g: (nested(g), (), {}),
    "decorated": lambda g: (decorated(g), (), {}),
    "partial-of-a-method": lambda g: (functools.partial(Holder(g).sample), (), {}),
    "default": lambda g: (default(g), (), {}),
    "partial": lambda g: (functools.partial(drawn, g), (), {}),
    "callable-object": lambda g: (Holder(g), (), {}),
    "method": lambda g: (Holder(g).sample, (), {}),
    "noise-sampler": lambda g: (lambda sampler: sampler(), (closure(g),), {}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MAKERS)
def test_generators_are_found_and_set_back(kind, way):
    generator, theirs = MAKERS[kind](), MAKERS[kind]()
    function, args, kwargs = WAYS[way](generator)
    run = Rerun(function, args, kwargs)
    first = run()
    assert first == drawn(theirs)  # the first run is the plain one
    assert [run(), run()] == [first, first]
    run(lambda *_, **__: drawn(generator) + drawn(generator))  # another function, which draws more
    run.settle()
    assert drawn(generator) == drawn(theirs)


def test_global_generators_are_set_back():
    def function():
        return float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002

    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    run = Rerun(function, (), {})
    first = run()
    assert run() == first
    run.settle()
    after = function()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    assert function() == first
    assert function() == after


def test_arguments_are_handed_over_as_copies():
    x, kept = torch.ones(3), {"y": [torch.zeros(2)]}

    def function(x, nest):
        x += 1
        nest["y"][0].fill_(float(x.sum()))
        return x, nest["y"][0]

    run = Rerun(function, (x, kept), {})
    one, other = run(), run()
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert torch.equal(x, torch.ones(3))
    assert torch.equal(kept["y"][0], torch.zeros(2))


def test_an_error_of_the_first_run_leaves_generators_where_it_came():
    generator, theirs = (torch.Generator().manual_seed(0) for _ in range(2))

    def function(g):
        torch.randn(3, generator=g)
        raise OSError("lost")

    run = Rerun(function, (generator,), {})
    with pytest.raises(OSError, match="lost"):
        run()
    torch.randn(5, generator=generator)
    run.settle()
    torch.randn(3, generator=theirs)
    assert torch.equal(generator.get_state(), theirs.get_state())


def test_settling_before_any_run_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    Rerun(drawn, (generator,), {}).settle()
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


def test_nests():
    x = torch.ones(2)
    nest = {"a": [x, (x, 3)], "b": "text"}
    assert [t is x for t in tensors(nest)] == [True, True]
    again = copied(nest)
    assert again["b"] == "text"
    assert again["a"][0] is not x
    assert torch.equal(again["a"][1][0], x)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.zeros(2), False),
        (torch.ones(2), 1.0, False),
        (np.ones(2), np.ones(2), True),
        ({"a": torch.ones(2)}, {"a": torch.ones(2)}, True),
        ({"a": 1}, {"b": 1}, False),
        ((1, [torch.ones(1)]), (1, [torch.ones(1)]), True),
        ([1, 2], [1], False),
    ],
)
def test_states_are_compared(one, other, same):
    assert same_state(one, other) == same
