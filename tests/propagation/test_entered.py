"""What enters a module with tangents and what it returns: which places they share, and how the one responds to the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bayesdiff.checks import NonFiniteError
from bayesdiff.head.find import find_head
from bayesdiff.propagation.entered import Entered, Match
from bayesdiff.tracing.network import Session
from bayesdiff.tracing.rerun import Rerun, tensors

R, K = 3, 4


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Network(nn.Module):
    """A head behind whatever ``body`` makes of the arguments."""

    def __init__(self, body, inputs=2, outputs=2, then=lambda h: h):
        super().__init__()
        self.conv_out, self.body, self.then = nn.Conv2d(inputs, outputs, 3, padding=1), body, then
        for i, p in enumerate(self.parameters()):
            nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(i))
        self.double().eval()

    def forward(self, *args, **kwargs):
        return self.then(self.conv_out(self.body(*args, **kwargs)))


def entered(network, args, kwargs, tangents):
    """The call with these tangents on its arguments, by their number among all tensors."""
    run = Rerun(lambda: network(*args, **kwargs), (), {})
    session = Session(run, network, find_head(network, "conv_out"))
    with torch.no_grad():
        session.record()
    kept = []

    def function():
        leaves = tensors((args, kwargs))
        for i, t in tangents.items():
            session.trace.attach(leaves[i], t)
        return network(*args, **kwargs)

    session.replay(lambda box, n, a, k, output: kept.append(Entered(session, box, a, k, output)), None, function)
    return kept[0], session


X, OTHER = normal(R, 2, 5, 4), normal(R, 3, 5, 4, seed=1)


def of(x, seed=2, channels=None):
    """K tangents, of some of its channels only."""
    t = normal(K, *x.shape, seed=seed)
    if channels is not None:
        t[:, :, [c for c in range(x.shape[1]) if c not in channels]] = 0
    return t


#: A network, its arguments, which of them have tangents, and the shared places (None: all).
CALLS = {
    "plain": (Network(lambda x, t: (x * t).tanh()), (X, torch.tensor(0.7)), {}, {0: of(X)}, (None, None)),
    "named": (Network(lambda *, sample: sample.tanh()), (), {"sample": X}, {0: of(X)}, (None, None)),
    "nested": (Network(lambda nest: nest["x"][0].sin()), ({"x": [X], "n": 3},), {}, {0: of(X)}, (None, None)),
    "conditioned": (
        Network(lambda x, c: torch.cat([x, c], 1).tanh(), 5), (X, OTHER), {}, {0: of(X)}, (None, None)
    ),
    "channels-of-a-mask": (
        Network(lambda x: x.tanh(), 5), (torch.cat([X, OTHER], 1),), {}, {0: of(torch.cat([X, OTHER], 1), channels=(0, 1))},
        (torch.arange(40), None),
    ),
    "channels-behind-a-mask": (
        Network(lambda x: x.tanh(), 5), (torch.cat([OTHER, X], 1),), {}, {0: of(torch.cat([OTHER, X], 1), channels=(3, 4))},
        (torch.arange(60, 100), None),
    ),
    "learned-variance": (Network(lambda x: x.tanh(), 2, 4), (X,), {}, {0: of(X)}, (None, torch.arange(40))),
    "two-arguments": (
        Network(lambda x, c: torch.cat([x, c], 1).tanh(), 5), (X, OTHER), {}, {0: of(X), 1: of(OTHER, 3)},
        (torch.arange(40), None),
    ),
    "list": (
        Network(lambda xs: torch.stack(xs).tanh(), then=lambda h: list(h)), (list(X.clone()),), {},
        {i: of(X)[:, i] for i in range(R)}, (None, None),
    ),
    "of-another-size": (
        Network(lambda x: x[:, :, ::2].tanh()), (X,), {}, {0: of(X)}, None
    ),
}  # fmt: skip


def exact(network, args, kwargs, entered, shifts):
    """J along packed shifts ``(R, p, P)``, by torch's own derivative."""
    leaves = tensors((args, kwargs))
    which = list(entered.tangents)
    flat = torch.utils._pytree.tree_flatten((args, kwargs))

    def function(*values):
        new = list(flat[0])
        for i, v in zip(which, values, strict=True):
            new[i] = v
        a, k = torch.utils._pytree.tree_unflatten(new, flat[1])
        out = network(*a, **k)
        return torch.stack(out) if isinstance(out, list) else out

    columns = []
    for s in shifts.unbind(1):
        values = tuple(flat[0][i] for i in which)
        _, d = torch.func.jvp(function, values, tuple(entered.given.unpack(s)))
        columns.append(d.flatten(1))
    assert leaves
    return torch.stack(columns, 1)


@pytest.mark.parametrize("name", CALLS)
def test_derivatives(name):
    network, args, kwargs, tangents, _ = CALLS[name]
    call, session = entered(network, args, kwargs, tangents)
    assert call
    assert call.rows.shape[:2] == (R, K)
    shifts = torch.nn.functional.normalize(call.rows, dim=2)
    expected = exact(network, args, kwargs, call, shifts)
    assert call.size == expected.shape[2]
    before = session.evaluations
    for together in (1, 3):
        one_sided = call.derivatives(shifts, torch.full((R, 1), 1e-6), together)
        torch.testing.assert_close(one_sided, expected, rtol=0, atol=1e-5)
    assert session.evaluations == before + 2 * K
    central = call.derivatives(shifts, torch.ones(R, 1), central=True)
    torch.testing.assert_close(central, expected, rtol=0, atol=1e-8)
    assert session.evaluations == before + 4 * K
    # A one-sided step is as long as a typical deviation: it is a difference along it.
    coarse = call.derivatives(shifts, torch.full((R, 1), 0.5))
    assert not torch.allclose(coarse, expected, atol=1e-3)


@pytest.mark.parametrize("name", CALLS)
def test_places_that_input_and_output_share(name):
    network, args, kwargs, tangents, places = CALLS[name]
    call, _ = entered(network, args, kwargs, tangents)
    match = call.match()
    if places is None:
        assert match is None
        return
    for got, expected in zip((match.inputs, match.outputs), places, strict=True):
        assert (got is None and expected is None) or torch.equal(got, expected)
    # What is shared is the sample: X, wherever it was.
    assert torch.equal(match.taken(call.given.pack(call.values)), X.flatten(1))


def test_taken_and_placed_are_inverse():
    match = Match(torch.tensor([4, 2, 0]), torch.tensor([1, 3, 5]))
    rows = normal(R, 5)
    assert torch.equal(match.taken(rows), rows[:, [4, 2, 0]])
    placed = match.placed(match.taken(rows), 5)
    assert torch.equal(placed[:, ::2], rows[:, ::2])
    assert bool((placed[:, 1::2] == 0).all())
    outputs = normal(R, 6)
    assert torch.equal(match.read(match.written(match.read(outputs), 6)), match.read(outputs))
    assert bool((match.written(match.read(outputs), 6)[:, ::2] == 0).all())
    whole = Match(None, None)
    assert all(take(rows) is rows for take in (whole.taken, whole.read))
    assert all(put(rows, 5) is rows for put in (whole.placed, whole.written))


def test_a_call_without_tangents_is_nothing():
    network, args, kwargs, _, _ = CALLS["plain"]
    call, session = entered(network, args, kwargs, {})
    assert not call
    assert session.evaluations == 2  # the run, and once again


def test_rows_that_act_on_each_other_are_one():
    network = Network(lambda x: (x - 0.3 * x.mean(0)).tanh())
    call, _ = entered(network, (X,), {}, {0: of(X)})
    assert call.rows.shape == (1, K, X.numel())
    shifts = torch.nn.functional.normalize(call.rows, dim=2)
    found = call.derivatives(shifts, torch.ones(1, 1), central=True)
    for i in range(K):
        _, d = torch.func.jvp(network, (X,), (shifts[0, i].view_as(X),))
        torch.testing.assert_close(found[0, i], d.flatten(), rtol=0, atol=1e-8)


def test_steps_are_no_smaller_than_rounding_allows():
    """A float32 network, and deviations of 1e-12."""
    network = Network(lambda x: x.tanh()).float()
    x = X.float()
    call, _ = entered(network, (x,), {}, {0: of(x).float()})
    shifts = torch.nn.functional.normalize(call.rows.double(), dim=2)
    found = call.derivatives(shifts, torch.full((R, 1), 1e-12))
    expected = exact(network.double(), (X,), {}, call, shifts)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_deviations_must_be_finite(bad):
    network, args, kwargs, tangents, _ = CALLS["plain"]
    t = tangents[0].clone()
    t[1, 0, 0, 2, 2] = bad
    with pytest.raises(NonFiniteError, match="finite deviations"):
        entered(network, args, kwargs, {0: t})


def test_a_module_that_overflows_near_the_trajectory_is_named():
    limit = float(X.abs().max())
    network = Network(lambda x: torch.where(x.abs() > limit, torch.inf, x))
    call, _ = entered(network, (X,), {}, {0: of(X)})
    with pytest.raises(NonFiniteError, match="the network overflows near the trajectory"):
        call.derivatives(normal(R, 1, X[0].numel()), torch.full((R, 1), 1e3))
