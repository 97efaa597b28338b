"""Modules whose calls are recorded and replayed: what is kept, what is asked of them, and what is left behind."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from bayesdiff.checks import NonFiniteError, NotRepeatableError, UnsupportedPipelineError
from bayesdiff.head.find import find_head
from bayesdiff.tracing.boxes import modules_of
from bayesdiff.tracing.dual import DualNumbers
from bayesdiff.tracing.network import Session
from bayesdiff.tracing.rerun import Rerun
from tests import cases


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Network(nn.Module):
    """A head behind a bend; what else it does is ``then``."""

    def __init__(self, then=lambda self, out: out):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.then, self.count = then, 0
        for i, p in enumerate(self.parameters()):
            nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(i))
        self.eval()

    def forward(self, x, t, scale=1.0):
        self.count += 1
        return self.then(self, self.conv_out(scale * self.conv_in(x).tanh()))


def sampler(network, steps=3, draw=None):
    @torch.no_grad()
    def run(x):
        for t in range(steps, 0, -1):
            x = x - 0.3 * network(x, torch.tensor(float(t)))
            if draw is not None:
                x = x + 0.1 * draw(x)
        return x

    return run


def session(function, network, x=None, **kwargs):
    x = noise(2, 2, 4, 4) if x is None else x
    run = Rerun(function, (x,), {})
    return Session(run, network, find_head(network, "conv_out"), modules_of(run, (x,), {}, network), **kwargs)


def nothing(*_):
    pass


def test_the_record():
    network = Network()
    run = sampler(network)
    plain = run(noise(2, 2, 6, 6))
    s = session(run, network, noise(2, 2, 6, 6))
    assert torch.equal(s.record(), plain)
    assert s.evaluations == len(s.network.calls) == 3
    x = noise(2, 2, 6, 6)
    for n, call in enumerate(s.network.calls):
        with torch.no_grad():
            expected = network(x, torch.tensor(3.0 - n))
            phi = network.conv_in(x).tanh()
        assert torch.equal(call.output, expected)
        assert torch.equal(call.features, phi)
        assert [float(v) for v in call.scalars.values()] == [3.0 - n]
        assert call.agreement == pytest.approx(float((x.double() * expected.double()).sum()))
        x = x - 0.3 * expected
    assert not s.noisy


def test_a_replay_calls_no_network_but_once_to_ask_again():
    network = Network()
    s = session(sampler(network), network)
    plain, before = s.record(), network.count
    seen = []

    def handler(box, n, args, kwargs, output):
        seen.append(n)
        s.trace.attach(output, torch.ones(1, *output.shape))

    again = s.replay(handler)
    assert torch.equal(again, plain)
    assert seen == [0, 1, 2]
    assert (network.count, s.evaluations) == (before + 1, 4)
    # x_3 = x_0 − 0.3 (f_0 + f_1 + f_2), f as handed out
    assert torch.allclose(s.trace.tangents(again), torch.full((1, *again.shape), -0.9))
    s.replay(nothing)
    assert network.count == before + 1


def test_what_a_handler_does_to_the_output_is_done_to_a_copy():
    network = Network()
    s = session(sampler(network), network)
    plain = s.record()
    moved = s.replay(lambda box, n, args, kwargs, output: output.add_(1), checked=False)
    assert not torch.allclose(moved, plain)
    assert torch.equal(s.replay(nothing), plain)


def test_a_live_run_is_on_the_network_itself():
    network = Network()
    s = session(sampler(network), network)
    plain, trace = s.record(), DualNumbers()
    with s.live(trace), s.head.shifted(torch.full((2, 5), 0.1)):
        moved = s.run()
    assert not torch.allclose(moved, plain)
    assert s.evaluations == 6
    with s.live(trace):
        assert torch.equal(s.run(), plain)


class Growing:
    """Remembers something between runs."""

    def __init__(self, network):
        self.network, self.runs = network, 0

    def __call__(self, x):
        self.runs += 1
        x = sampler(self.network)(x)
        return x if self.runs == 1 else self.network(x, torch.tensor(0.0))


SOURCE = torch.Generator()


def from_a_source_of_its_own(x):
    return torch.randn(x.shape, generator=SOURCE)


def test_runs_that_differ_are_errors():
    network = Network()
    s = session(Growing(network), network)
    s.record()
    with pytest.raises(NotRepeatableError, match=r"expected 3 calls of the network in every run.*got another"):
        s.replay(nothing)
    s = session(sampler(network, draw=from_a_source_of_its_own), network)
    s.record()
    told = r"call 1 of the network to have the inputs of the first run.*noise sampler with a seed"
    with pytest.raises(NotRepeatableError, match=told):
        s.replay(nothing)
    s.replay(nothing, checked=False)  # where inputs are moved on purpose
    with pytest.raises(UnsupportedPipelineError, match="to call Network, got no call"):
        session(lambda x: x, network).record()


def test_random_networks_are_errors():
    network = Network(lambda self, out: out + 0.1 * torch.randn_like(out))
    with pytest.raises(NotRepeatableError, match=r"one that draws random numbers \(dropout\?\)"):
        session(sampler(network), network).record()


@pytest.mark.parametrize("batch", [1, 2])
def test_networks_with_a_memory_are_errors(batch):
    """As a block cache has; asked again after all other calls."""

    def remember(self, out):
        self.last = out + 0.1 * getattr(self, "last", 0)
        return self.last

    network = Network(remember)
    s = session(sampler(network), network, noise(batch, 2, 4, 4))
    s.record()
    with pytest.raises(NotRepeatableError, match=r"same call the same answer, got a difference of"):
        s.replay(nothing)


def test_networks_that_overflow_are_errors():
    network = Network(lambda self, out: out + float("inf"))
    with pytest.raises(NonFiniteError, match="network outputs"):
        session(sampler(network), network).record()


def test_noise_between_calls_is_noticed():
    network, generator = Network(), torch.Generator()
    for draw, noisy in (
        (None, False),
        (torch.randn_like, True),
        (lambda x: torch.randn(x.shape, generator=generator), True),
    ):
        s = session(sampler(network, draw=draw), network)
        s.record()
        assert s.noisy == noisy


@pytest.mark.parametrize("coupled", [False, True])
def test_rows_that_act_on_each_other_are_noticed(coupled):
    network = Network(lambda self, out: out - coupled * 0.1 * out.mean(0))
    x, t = noise(3, 2, 4, 4), torch.tensor(1.0)
    s = session(sampler(network), network)
    with torch.no_grad():
        output = network(x, t)
    for _ in range(2):
        assert s.coupled(s.network, (x, t), {}, output) == coupled
    assert s.evaluations == 1


def test_row_by_row():
    network = cases.tiny_unet(channels=1)

    @torch.no_grad()
    def run(x):
        for t in (900, 500):
            x = x - 0.1 * network(x, t).sample
        return x

    x = noise(3, 1, 8, 8)
    s = Session(Rerun(run, (x,), {}), network, find_head(network), by_row=True)
    together = s.record()
    assert s.evaluations == 2 + 1  # once all rows at once, to compare
    for i in range(3):
        alone = Session(Rerun(run, (x[i : i + 1],), {}), network, find_head(network), by_row=True)
        assert torch.equal(together[i : i + 1], alone.record())
        assert torch.equal(together[i : i + 1], run(x[i : i + 1]))
        for one, several in zip(alone.network.calls, s.network.calls, strict=True):
            assert torch.equal(one.features, several.features[i : i + 1])


def test_rows_that_depend_on_each_other_are_refused_row_by_row():
    network = Network(lambda self, out: out - 0.1 * out.mean(0))
    with pytest.raises(UnsupportedPipelineError, match="rows depend on each other"):
        session(sampler(network), network, by_row=True).record()


def state(network):
    hooks = [h for m in network.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    return hooks, sorted(network.__dict__), sorted(network.conv_out.__dict__)


@pytest.mark.parametrize("own", [False, True])
def test_nothing_is_left_behind_also_on_error(own):
    network = Network()
    if own:
        network.forward = network.forward  # somebody else's patch
    before, patch = state(network), network.__dict__.get("forward")
    fail = []

    def maybe(x):
        if fail:
            raise KeyboardInterrupt
        return 0 * x

    s = session(sampler(network, draw=maybe), network)
    s.record()
    s.replay(nothing)
    fail.append(1)
    for call in (s.record, lambda: s.replay(nothing)):
        with pytest.raises(KeyboardInterrupt):
            call()
    with pytest.raises(KeyboardInterrupt), s.live(DualNumbers()):
        s.run()
    assert state(network) == before
    assert network.__dict__.get("forward") is patch


def test_one_run_of_a_network_at_a_time():
    network = Network()
    inside, go, errors = threading.Event(), threading.Event(), []

    def wait(x):
        inside.set()
        go.wait(10)
        return 0 * x

    first = threading.Thread(target=lambda: session(sampler(network, draw=wait), network).record())
    first.start()
    inside.wait(10)
    try:
        with pytest.raises(UnsupportedPipelineError, match="one run of the network at a time"):
            session(sampler(network), network).record()
    finally:
        go.set()
        first.join()
    session(sampler(network), network).record()
    assert not errors


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Conv2d(2, 3, 1)

    def forward(self, z):
        return self.up(z)

    def decode(self, z, scale=1.0):
        return scale * self.forward(z)


class Pipe:
    def __init__(self, network, decoder):
        self.network, self.decoder, self.flag = network, decoder, [decoder]

    @torch.no_grad()
    def __call__(self, x):
        return self.decoder.decode(sampler(self.network)(x), scale=2.0)


def test_other_modules_are_black_boxes_too():
    network, decoder = Network(), Decoder()
    s = session(Pipe(network, decoder), network)
    assert [box.name for box in s.others] == ["Decoder (0)", "Decoder (0).decode"]
    plain = s.record()
    (box,) = (b for b in s.others if b.calls)
    assert box.method == "decode"  # what is called from outside; its own forward is inside
    seen = []
    assert torch.equal(s.replay(nothing, lambda *call: seen.append(call[0].name)), plain)
    assert seen == ["Decoder (0).decode"]
    (args, kwargs) = ((noise(1, 2, 4, 4),), {"scale": 2.0})
    assert torch.equal(s.evaluate(box, args, kwargs), decoder.decode(*args, **kwargs))
    assert s.other_evaluations == 1
    assert s.evaluations == 4
    assert "decode" not in decoder.__dict__


def test_which_modules_a_function_brings_along():
    network, decoder, other = Network(), Decoder(), nn.Linear(2, 2)
    whole = nn.ModuleDict({"net": network})

    def function(x, extra):
        return decoder(x), network, whole, extra

    run = Rerun(function, (noise(1),), {"extra": [other, network.conv_in]})
    found = modules_of(run, (noise(1),), {"extra": [other, network.conv_in]}, network)
    assert {id(m) for m in found.values()} == {id(decoder), id(other)}
