"""A network is told from others, and from itself with other weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import bayesdiff as bd
from bayesdiff.checks import HeadMismatchError, ShapeError
from bayesdiff.head.identity import NetworkIdentity
from tests import cases


def trained(network):
    """One step of training."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 1e-4 * torch.randn_like(parameter)


def body(network):
    with torch.no_grad():
        network.mid_block.resnets[0].conv1.weight.mul_(1.001)


def head(network):
    with torch.no_grad():
        network.conv_out.weight[0, 0, 0, 0] += 1e-3


def renamed(network):
    network.extra = nn.Linear(2, 2)


CHANGES = (trained, body, head, renamed)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_network_is_another(change):
    network = cases.tiny_unet()
    known = NetworkIdentity.of(network)
    known.check(network)
    change(network)
    with pytest.raises(HeadMismatchError, match="fit the posterior again"):
        known.check(network, "before")


def test_what_is_the_same_network():
    network = cases.tiny_unet()
    known = NetworkIdentity.of(network)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        known.check(nn.Module.to(cases.tiny_unet(), dtype))
    half = nn.Module.to(cases.tiny_unet(), torch.bfloat16)
    NetworkIdentity.of(half).check(half)
    with pytest.raises(HeadMismatchError):  # digits that a rounded one does not have
        NetworkIdentity.of(half).check(network)
    known.check(torch.compile(network, backend="eager"))
    layer = nn.Linear(3, 2).to("meta")  # not in memory: nothing to compare
    NetworkIdentity.of(layer).check(nn.Linear(3, 2))
    with pytest.raises(ShapeError):
        NetworkIdentity("x", torch.zeros(2, 3))


def run(up):
    return up([1], num_inference_steps=3, generator=[torch.Generator().manual_seed(0)]).std


@pytest.fixture
def made(tmp_path):
    pipe = cases.class_pipeline(DDIMScheduler(clip_sample=False))
    return pipe, cases.class_posterior(pipe)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_weights_that_change_after_construction(made, change, tmp_path):
    pipe, posterior = made
    settings = bd.Tangents(draws=4, extra_calls=1)
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=settings)
    before = run(up)
    posterior.save(tmp_path)
    change(pipe.unet)
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(HeadMismatchError):
        run(up)
    for known in (posterior, bd.LaplacePosterior.load(tmp_path)):
        with pytest.raises(HeadMismatchError):
            bd.UncertaintyPipeline(pipe, known)
        with pytest.raises(HeadMismatchError):
            bd.propagate(lambda: pipe.unet(torch.ones(1, 1, 8, 8), 5).sample, pipe.unet, known)
    with pytest.raises(HeadMismatchError):
        bd.LaplacePosterior.load(tmp_path, pipe)
    assert not calls  # before the first network call
    assert bool(torch.isfinite(before).all())


def test_a_network_that_is_replaced(made):
    pipe, posterior = made
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Tangents(draws=4, extra_calls=1))
    pipe.unet = cases.tiny_unet(channels=1, classes=4, seed=7)
    with pytest.raises(HeadMismatchError):
        run(up)


def test_weights_that_change_during_a_fit(made):
    pipe, _ = made

    def batches():
        yield torch.zeros(2, 1, 8, 8)
        body(pipe.unet)
        yield torch.zeros(2, 1, 8, 8)

    def call(network, x, t, batch):
        return network(x, t, class_labels=torch.zeros(len(x), dtype=torch.long)).sample

    with pytest.raises(HeadMismatchError, match="when the fit began"):
        bd.fit(pipe.unet, batches(), scheduler=cases.scheduler(), call=call, progress=False)


def test_statistics_alone_do_not_know_their_network(made):
    """Then what the pipeline was made with is what it is compared with."""
    pipe, posterior = made
    again = bd.LaplacePosterior.from_statistics(posterior.statistics, bd.find_head(pipe), dataset_size=32)
    assert again.network is None
    up = bd.UncertaintyPipeline(pipe, again, propagation=bd.Tangents(draws=4, extra_calls=1))
    run(up)
    body(pipe.unet)
    with pytest.raises(HeadMismatchError, match="when this UncertaintyPipeline was made"):
        run(up)
