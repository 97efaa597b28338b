"""The head, found by what comes out of the network when a layer's output is replaced by numbers."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import nn

from bayesdiff.checks import AmbiguousHeadError, HeadNotFoundError, UnsupportedHeadError
from bayesdiff.head import numbers as numbers_module
from bayesdiff.head.find import denoiser, find_head, find_head_by_call
from bayesdiff.head.numbers import send_numbers, tensor_of
from tests import cases
from tests.head import networks
from tests.head.networks import Net


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def video_unet():
    torch.manual_seed(0)
    return UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=("DownBlockSpatioTemporal",) * 2,
        up_block_types=("UpBlockSpatioTemporal",) * 2, block_out_channels=(32, 32), layers_per_block=1,
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, cross_attention_dim=16, num_attention_heads=(2, 2),
    ).eval()  # fmt: skip


def text():
    return {"encoder_hidden_states": noise(2, 5, 16), "pooled_projections": noise(2, 16)}


FOUND = {
    "unet": (cases.tiny_unet, lambda n: n(noise(2, 3, 8, 8), 3), "conv_out"),
    "dit": (cases.tiny_dit, lambda n: n(noise(2, 4, 8, 8), torch.tensor([3, 5]), torch.tensor([1, 2])), "proj_out_2"),
    "sd3": (cases.tiny_sd3, lambda n: n(noise(2, 4, 8, 8), timestep=torch.tensor([3, 5]), **text()), "proj_out"),
    "sd3-bfloat16": (
        lambda: cases.tiny_sd3().bfloat16(),
        lambda n: n(
            noise(2, 4, 8, 8).bfloat16(),
            timestep=torch.tensor([3, 5]),
            return_dict=False,
            **{k: v.bfloat16() for k, v in text().items()},
        ),
        "proj_out",
    ),
    "svd": (video_unet, lambda n: n(noise(2, 3, 4, 8, 8), 3, noise(2, 1, 16), added_time_ids=noise(2, 3)), "conv_out"),
    "vectors": (networks.mlp, lambda n: n(noise(3, 5)), "last"),
    "trajectory": (networks.trajectory, lambda n: n(noise(3, 4, 3)), "last"),
    "series": (networks.series, lambda n: n(noise(3, 2, 6)), "last"),
    "volume": (networks.volume, lambda n: n(noise(2, 2, 3, 4, 5)), "last"),
    "frames": (networks.frames, lambda n: n(noise(2, 2, 3, 4, 5)), "last"),
    "text-tokens": (lambda: networks.patches(3), lambda n: n(noise(2, 2, 4, 6)), "last"),
    "one-sequence": (lambda: networks.patches(1, ragged=True), lambda n: [*n(noise(2, 2, 4, 6))], "last"),
    "learned-variance": (
        lambda: Net(lambda n, x: n.last(n.first(x)).chunk(2, dim=1)[0], first=nn.Conv1d(2, 4, 1), last=nn.Conv1d(4, 4, 1)),
        lambda n: n(noise(3, 2, 6)),
        "last",
    ),
    "another-layer-is-called-last": (
        lambda: Net(lambda n, x: (n.head(x), n.aside(x))[0], head=nn.Linear(5, 5), aside=nn.Linear(5, 5)),
        lambda n: n(noise(3, 5)),
        "head",
    ),
    "convolutions-on-the-way": (
        lambda: Net(lambda n, x: n.b(n.a(n.c(x)).relu()), a=nn.Conv1d(2, 2, 1), b=nn.Conv1d(2, 2, 3), c=nn.Conv1d(2, 2, 1)),
        lambda n: n(noise(3, 2, 6)),
        "b",
    ),
    "more-than-the-head": (
        lambda: Net(lambda n, x: torch.cat([x[:, :2], n.head(x)], dim=1), head=nn.Linear(5, 5)),
        lambda n: n(noise(3, 5)),
        "head",
    ),
    "a-dictionary": (networks.mlp, lambda n: {"sample": n(noise(3, 5))[0], "loss": None}, "last"),
    "a-list": (networks.mlp, lambda n: (list(n(noise(3, 5))[0]),), "last"),
    "a-ragged-list": (networks.mlp, lambda n: list(n(noise(3, 5))[0].flatten().split([4, 5, 6])), "last"),
}  # fmt: skip


def hooks(network):
    return [h for m in network.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


@pytest.mark.parametrize("name", FOUND)
def test_found_by_a_call(name):
    make, call, path = FOUND[name]
    network = make()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    head = find_head_by_call(network, lambda: call(network))
    assert head.path == path
    assert head.layer is network.get_submodule(path)
    assert not hooks(network)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    with torch.no_grad():
        outputs = []
        with head.capture(outputs) as inputs:
            result = tensor_of(call(network))
        head.check_linear(inputs[0], outputs[0])
        numbers = send_numbers(head.layer, lambda: call(network))
        reached = numbers.index >= 0
        flat = outputs[0].flatten()
        assert torch.equal((flat[numbers.index] * numbers.sign)[reached], result[reached])
        assert reached.all() == (name != "more-than-the-head")


@pytest.mark.parametrize("name", ["sd3", "sd3-bfloat16", "series", "text-tokens"])
def test_numbers_in_several_digits(name, monkeypatch):
    """As in half precision, or with more outputs than float32 has integers."""
    make, call, path = FOUND[name]
    network = make()
    with torch.no_grad():
        whole = send_numbers(network.get_submodule(path), lambda: call(network))
        monkeypatch.setattr(numbers_module, "FLOAT", 4)
        monkeypatch.setattr(numbers_module, "HALF", 2)
        calls = []
        digits = send_numbers(network.get_submodule(path), lambda: (calls.append(1), call(network))[1])
    assert torch.equal(whole.index, digits.index)
    assert torch.equal(whole.sign, digits.sign)
    assert len(calls) >= 3


def test_a_network_that_returns_less_precision_than_its_head():
    network = Net(lambda n, x: n.last(x).half(), last=nn.Linear(5, 400))
    numbers = send_numbers(network.last, lambda: network(noise(3, 5)))
    assert torch.equal(numbers.index, torch.arange(1200).view(3, 400))
    with torch.autocast("cpu", torch.bfloat16):
        network = Net(lambda n, x: n.last(x), last=nn.Linear(5, 400))
        assert torch.equal(send_numbers(network.last, lambda: network(noise(3, 5))).index, numbers.index)


def two(join):
    return Net(lambda n, x: join(n.a(x), n.b(x)), a=nn.Linear(5, 5), b=nn.Linear(5, 5))


REFUSED = {
    "more-than-a-fold": (two(lambda a, b: a + b), HeadNotFoundError, 'among the last 2 of 2 that were called .*head="path'),
    "cut-off-below": (two(lambda a, b: a.relu()), HeadNotFoundError, "reordered or negated"),
    "saturated": (two(lambda a, b: a.clamp(-2, 2)), HeadNotFoundError, "reordered or negated"),
    "scaled": (two(lambda a, b: a * 0.5), HeadNotFoundError, "reordered or negated"),
    "repeated": (two(lambda a, b: torch.cat([a, a])), HeadNotFoundError, "reordered or negated"),
    "two-heads": (two(lambda a, b: torch.cat([a, b])), AmbiguousHeadError, 'found b, a; name the right one with head="b"'),
    "twice": (
        Net(lambda n, x: torch.cat([n.a(x), n.a(-x)]), a=nn.Linear(5, 5)),
        UnsupportedHeadError,
        "one pass through 'a' in a network call, got 2",
    ),
    "stride": (
        Net(lambda n, x: n.a(x[:, None]), a=nn.Conv1d(1, 5, 3, stride=2)),
        UnsupportedHeadError,
        "stride",
    ),
    "transposed": (Net(lambda n, x: n.a(x[:, None]), a=nn.ConvTranspose1d(1, 5, 3)), UnsupportedHeadError, "ConvTranspose1d"),
    "no-layers": (Net(lambda n, x: x), HeadNotFoundError, "got none called"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_a_call(name):
    network, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        find_head_by_call(network, lambda: network(noise(3, 5)))
    assert not hooks(network)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_hooks_come_off_when_a_call_fails(call):
    network, calls = networks.mlp(), []

    def run():
        calls.append(1)
        if len(calls) == call:
            network(noise(3, 4))
        return network(noise(3, 5))[0] * 2

    with pytest.raises(RuntimeError):
        find_head_by_call(network, run)
    assert not hooks(network)
    assert len(calls) == call


def test_the_table_is_a_shortcut_and_no_more():
    unet = cases.tiny_unet()
    assert find_head(unet, call=lambda: pytest.fail("not needed")).path == "conv_out"
    # A class of the same name, from elsewhere.
    UNet2DModel = type("UNet2DModel", (Net,), {})
    other = UNet2DModel(lambda n, x: n.final(x), final=nn.Linear(5, 5))
    assert find_head(other, call=lambda: other(noise(3, 5))).path == "final"
    with pytest.raises(HeadNotFoundError, match="head="):
        find_head(other)
    # A layer in a wrapper.
    unet.conv_out = nn.Sequential(unet.conv_out)
    with pytest.raises(UnsupportedHeadError, match="Sequential"):
        find_head(unet)
    assert find_head(unet, call=lambda: unet(noise(2, 3, 8, 8), 3)).path == "conv_out.0"
    # Layers with promising names, and another that is the head.
    network = Net(
        lambda n, x: n.z(n.head(x) + n.conv_out(x)), head=nn.Linear(5, 5), conv_out=nn.Linear(5, 5), z=nn.Linear(5, 5)
    )
    with pytest.raises(AmbiguousHeadError):
        find_head(network)
    assert find_head(network, call=lambda: network(noise(3, 5))).path == "z"


def test_an_adapter_around_the_layer_is_named():
    class Lora(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

    unet = cases.tiny_unet()
    unet.conv_out = Lora(unet.conv_out)
    with pytest.raises(UnsupportedHeadError, match="Lora; merge its adapter"):
        find_head(unet)


class Pipe:
    def __init__(self, **components):
        vars(self).update(components)


def test_pipelines_with_several_networks():
    high, low = cases.tiny_sd3(), cases.tiny_sd3(1)
    pipe = Pipe(transformer=high, transformer_2=low, vae=nn.Linear(1, 1), text_encoder=nn.Linear(1, 1))
    for ask in (denoiser, find_head):
        with pytest.raises(
            AmbiguousHeadError, match=r"'transformer' and 'transformer_2'.*head=\"transformer_2.proj_out\""
        ):
            ask(pipe)
    for name, network in (("transformer", high), ("transformer_2", low)):
        for head in (f"{name}.proj_out", name):
            assert denoiser(pipe, head) is network
            found = find_head(pipe, head)
            assert (found.path, found.layer) == (f"{name}.proj_out", network.proj_out)
        assert (
            find_head(network, f"{name}.proj_out").layer is network.proj_out
        )  # the network itself knows that path, too
    with pytest.raises(AmbiguousHeadError):
        find_head(pipe, "proj_out")
    with pytest.raises(HeadNotFoundError, match="'nothing' in SD3"):
        find_head(pipe, "transformer_2.nothing")
    for alone in (Pipe(transformer=high, transformer_2=None), Pipe(transformer=None, transformer_2=high)):
        assert denoiser(alone) is high
        assert find_head(alone).path == "proj_out"
        assert find_head(alone, "proj_out").layer is high.proj_out
    assert denoiser(Pipe(transformer=high, transformer_2=high)) is high
    with pytest.raises(AmbiguousHeadError, match="'unet' and 'refiner'"):
        denoiser(Pipe(unet=cases.tiny_unet(), refiner=cases.tiny_unet()))


def test_pipelines_with_a_network_of_another_name():
    network = networks.mlp()
    pipe = Pipe(model=network)
    with pytest.raises(HeadNotFoundError, match=r'head="network\.path\.to\.layer"'):
        denoiser(pipe)
    assert denoiser(pipe, "model.last") is network
    assert find_head(pipe, "model.last").layer is network.last
    assert find_head(pipe, "model", call=lambda: network(noise(3, 5))).path == "model.last"
