"""Weights that lie elsewhere, or in another dtype, until the layer runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bayesdiff import fit
from bayesdiff.checks import UnsupportedHeadError
from bayesdiff.head.find import find_head
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.head.layer import Head
from bayesdiff.head.loaded import placement
from tests import cases

LAYERS = cases.layer_cases()


def on_meta(network):
    return any(p.is_meta for p in network.parameters())


def offload(network):
    pytest.importorskip("accelerate").cpu_offload(network, torch.device("cpu"))
    assert on_meta(network)
    return network


def offload_to_disk(folder):
    def place(network):
        pytest.importorskip("accelerate").disk_offload(network, folder, torch.device("cpu"))
        return network

    return place


def groups(network):
    network.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    return network


def groups_on_disk(folder):
    def place(network):
        network.enable_group_offload(
            torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=folder
        )
        return network

    return place


def stored_in_bfloat16(network):
    network.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32, skip_modules_pattern=())
    assert network.conv_out.weight.dtype == torch.bfloat16
    return network


def stored_in_float8(network):
    network.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32, skip_modules_pattern=()
    )
    assert network.conv_out.weight.dtype == torch.float8_e4m3fn
    return network


def fitted(network):
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    generator = torch.Generator().manual_seed(2)
    return fit(network, x, scheduler=cases.scheduler(), generator=generator, progress=False)


@pytest.mark.parametrize("where", ["memory", "disk", "groups", "groups-on-disk"])
def test_offloaded_weights_are_those_that_the_layer_runs_with(where, tmp_path):
    plain = fitted(cases.tiny_unet())
    place = {
        "memory": offload,
        "disk": offload_to_disk(str(tmp_path)),
        "groups": groups,
        "groups-on-disk": groups_on_disk(str(tmp_path)),
    }[where]
    network = place(cases.tiny_unet())
    before = on_meta(network)
    head = find_head(network)
    assert torch.equal(head.weight(), plain.mean)
    assert on_meta(network) == before  # they are away again
    out = fitted(network)
    assert torch.equal(out.mean, plain.mean)
    torch.testing.assert_close(out.precision, plain.precision)
    assert on_meta(network) == before
    assert out.check(network).path == "conv_out"


@pytest.mark.parametrize("store", [stored_in_bfloat16, stored_in_float8])
def test_weights_that_are_only_stored_in_another_dtype(store):
    network = store(cases.tiny_unet())
    dtype = network.conv_out.weight.dtype
    rounded = cases.tiny_unet().conv_out.weight.detach().to(dtype).double().flatten(1)
    assert torch.equal(find_head(network).weight()[:, :-1], rounded)
    assert placement(network) == (torch.device("cpu"), torch.float32)
    out = fitted(network)
    assert torch.equal(out.mean[:, :-1], rounded)
    assert network.conv_out.weight.dtype == dtype
    out.check(network)
    fitted(cases.tiny_unet()).check(network)  # the same weights, rounded


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_every_kind_of_layer_is_run_with_an_input_that_it_takes(case):
    head = Head("", case.layer, HeadGeometry.of(case.layer))
    plain, forward = head.weight(), case.layer.forward
    calls = []

    def replaced(x):
        calls.append(1)
        return forward(x)

    case.layer.forward = replaced
    assert torch.equal(head.weight(), plain)
    assert calls == [1]
    del case.layer.forward


def test_weights_that_cannot_be_had():
    with torch.device("meta"):
        network = nn.ModuleDict({"head": nn.Linear(3, 2)})
    with pytest.raises(
        UnsupportedHeadError, match=r"weights of 'head' .* in memory, got torch.float32 on meta.*without offload"
    ):
        find_head(network, "head").weight()

    def fails(x):
        raise RuntimeError("no kernel")

    network = nn.ModuleDict({"head": nn.Linear(3, 2)})
    network["head"].forward = fails
    with pytest.raises(UnsupportedHeadError, match="no kernel"):
        find_head(network, "head").weight()


def test_placement():
    assert placement(cases.tiny_unet().double()) == (torch.device("cpu"), torch.float64)
    assert placement(nn.Linear(2, 2).bfloat16()) == (torch.device("cpu"), torch.bfloat16)
    assert placement(nn.Linear(2, 2).to(torch.float8_e4m3fn))[1] == torch.float32
    assert placement(nn.Identity()) == (torch.device("cpu"), torch.float32)
