"""Networks behind torch.compile, warmed up or not: the posterior and the map of the network as it was written."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import bayesdiff as bd
from bayesdiff.head.compiled import uncompiled
from tests import cases

DRAWS = bd.Tangents(draws=4)


class Backend:
    """Runs what torch.compile found as it is, and counts."""

    def __init__(self):
        self.compiled = self.ran = 0

    def __call__(self, graph, _):
        self.compiled += 1

        def run(*args):
            self.ran += 1
            return graph.forward(*args)

        return run


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(1, 6, 3, padding=1)

    def forward(self, x):
        return torch.sin(self.conv_in(x))


class Network(nn.Module):
    """Small, so that compiling it takes no time."""

    def __init__(self):
        super().__init__()
        self.inner, self.conv_out = Inner(), nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, x, t):
        return self.conv_out(self.inner(x) * t)


def network():
    torch.manual_seed(0)
    return Network().eval()


@torch.no_grad()
def loop(net, x):
    for t in (0.9, 0.5, 0.1):
        x = x - 0.3 * net(x, torch.tensor(t))
    return x


def whole(net, backend):
    return torch.compile(net, backend=backend)


def in_place(net, backend):
    net.compile(backend=backend)
    return net


def head_only(net, backend):
    net.conv_out = torch.compile(net.conv_out, backend=backend)
    return net


def inner_only(net, backend):
    net.inner.compile(backend=backend)
    return net


def fitted(net, scheduler, head=None):
    data = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return bd.fit(
        net, data, scheduler=scheduler, call=lambda n, x, t, _: n(x, t[0] / 1000), head=head, batch_size=1, progress=False,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("how", [whole, in_place, head_only, inner_only])
def test_fitted_and_mapped_as_it_was_written(how, warm):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    plain = network()
    posterior = fitted(plain, cases.scheduler())
    expected = bd.propagate(loop, plain, posterior, plain, x, propagation=DRAWS)
    backend = Backend()
    torch._dynamo.reset()
    net = how(network(), backend)
    if warm:
        loop(net, x)
        assert backend.ran >= 3
    before = (backend.compiled, backend.ran)
    own = fitted(net, cases.scheduler())
    assert torch.equal(own.weight_variance(), posterior.weight_variance())
    found = bd.propagate(loop, net, posterior, net, x, propagation=DRAWS)
    assert torch.equal(found.std, expected.std)
    many = bd.propagate(loop, net, posterior, net, x, propagation=bd.Ensemble(members=3))
    assert torch.equal(many.output, expected.output)
    assert (backend.compiled, backend.ran) == before
    assert torch.equal(loop(net, x), loop(plain, x))  # afterwards compiled as ever
    assert backend.ran > before[1]
    assert backend.compiled == before[0] or not warm


def test_threads_leave_compiled_code_compiled():
    """PyTorch's setting is one for all threads: the last that goes puts it back, in whatever order they came."""
    backend = Backend()
    torch._dynamo.reset()
    net, x = whole(network(), backend), torch.randn(2, 1, 8, 8)
    one, other = uncompiled(), uncompiled()
    for step in (one.__enter__, other.__enter__, lambda: one.__exit__(None, None, None)):
        step()
        loop(net, x)
        assert backend.ran == 0
    other.__exit__(None, None, None)
    loop(net, x)
    assert backend.ran > 0


def test_a_pipeline_with_a_compiled_network():
    pipe = cases.class_pipeline(DDIMScheduler(clip_sample=False))
    posterior = cases.class_posterior(pipe)

    def std():
        up = bd.UncertaintyPipeline(pipe, posterior, propagation=DRAWS)
        return up([1], num_inference_steps=3, generator=cases.seeds(0)).std

    expected = std()
    pipe.unet = torch.compile(pipe.unet, backend=Backend())
    assert bd.find_head(pipe).path == "conv_out"
    assert torch.equal(std(), expected)
    data = {"images": torch.zeros(2, 1, 8, 8), "class_labels": torch.tensor([0, 1])}
    assert bd.fit(pipe, data, progress=False).head_path == "conv_out"
