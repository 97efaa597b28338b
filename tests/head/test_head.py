"""The head: found exactly, computed with exactly, and never changed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from bayesdiff.checks import AmbiguousHeadError, HeadNotFoundError, ShapeError, UnsupportedHeadError
from bayesdiff.head.find import find_head
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.head.layer import Head
from bayesdiff.head.sums import gram_matrix, outer_products
from tests import cases
from tests.references import im2col, jacobian

LAYERS = cases.layer_cases()


def test_found_by_exact_path_in_known_families():
    unet = cases.tiny_unet()
    head = find_head(unet)
    assert (head.path, head.in_features, head.out_channels) == ("conv_out", 8 * 9 + 1, 3)
    assert head.layer is unet.conv_out
    dit = cases.tiny_dit()
    assert find_head(dit).layer is dit.proj_out_2  # not proj_out_1, a modulation
    sd3 = cases.tiny_sd3()
    assert find_head(sd3).layer is sd3.proj_out


def test_unknown_network():
    class Net(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            for name in names:
                setattr(self, name, nn.Linear(3, 2))

    assert find_head(Net("proj_out", "other")).path == "proj_out"
    assert find_head(Net("a", "b"), "b").path == "b"
    with pytest.raises(HeadNotFoundError, match="head="):
        find_head(Net("a"))
    with pytest.raises(HeadNotFoundError, match="'c'"):
        find_head(Net("a"), "c")
    with pytest.raises(AmbiguousHeadError, match="conv_out, proj_out"):
        find_head(Net("conv_out", "proj_out"))
    with pytest.raises(HeadNotFoundError, match="unet"):
        find_head(object())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(4, 4, 3, stride=2), "stride"),
        (nn.Conv2d(4, 4, 3, dilation=2), "dilation"),
        (nn.Conv2d(4, 4, 3, groups=2), "groups"),
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d"),
        (nn.ConvTranspose1d(4, 4, 3), "ConvTranspose1d"),
    ],
)
def test_unsupported_layers_are_refused_by_name(layer, message):
    net = nn.Sequential(layer)
    with pytest.raises(UnsupportedHeadError, match=message):
        find_head(net, "0")


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_linear_algebra_equals_explicit_jacobian(case):
    geometry = HeadGeometry.of(case.layer)
    x, r = case.inputs.double(), case.residuals.double()
    jac = jacobian(case.layer, x)  # (B, P, C, C, D)
    phi = jac[:, :, 0, 0]
    # The Jacobian is φ in the block of its own channel and zero elsewhere.
    c = geometry.out_channels
    for i in range(c):
        for j in range(c):
            torch.testing.assert_close(jac[:, :, i, j], phi if i == j else torch.zeros_like(phi))
    torch.testing.assert_close(geometry.design(x), phi)
    torch.testing.assert_close(im2col(case.layer, x), phi)
    expected = torch.einsum("bpi,bpj->ij", phi, phi)
    torch.testing.assert_close(gram_matrix(geometry, x), expected, rtol=1e-10, atol=1e-10)
    in_float32 = gram_matrix(geometry, case.inputs)
    assert in_float32.dtype == torch.float64
    assert float((in_float32 - expected).abs().max() / expected.abs().max()) < 5e-6
    channel = 1 if geometry.kind == "conv" else -1
    by_position = r.movedim(channel, -1).flatten(1, -2) if r.ndim > 2 else r[:, None]
    expected = torch.einsum("bpc,bpd->bcd", by_position, phi)
    torch.testing.assert_close(outer_products(geometry, x, r), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_apply_is_the_layer(case):
    geometry = HeadGeometry.of(case.layer)
    weight = Head("", case.layer, geometry).weight().float()
    out = geometry.apply(case.inputs, torch.stack([weight, 2 * weight]))
    torch.testing.assert_close(out[0], case.layer(case.inputs).detach())
    torch.testing.assert_close(out[1], 2 * case.layer(case.inputs).detach())
    assert geometry.output_shape(case.inputs) == out[0].shape
    variances = weight.double().square()
    naive = im2col(case.layer, case.inputs).square() @ variances.T  # (B, P, C)
    naive = naive.reshape(out[0].shape) if geometry.kind == "linear" else naive.mT.reshape(out[0].shape)
    torch.testing.assert_close(geometry.squared(case.inputs.double(), variances), naive)
    rows = torch.stack([weight.double()] * 2)  # Σ_k (F φ)_k², a factor for each of two outputs
    both = geometry.squared_norm(case.inputs.double(), rows)
    mean = geometry.apply(case.inputs.double(), weight.double()[None])[0]
    channel = 1 if geometry.kind == "conv" else -1
    expected = mean.square().sum(channel, keepdim=True)
    torch.testing.assert_close(both, torch.cat([expected, expected], dim=channel))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_autocast_does_not_reach_the_algebra(case):
    geometry = HeadGeometry.of(case.layer)
    weight = Head("", case.layer, geometry).weight().float()

    def everything():
        return [
            geometry.apply(case.inputs, weight[None]), gram_matrix(geometry, case.inputs), geometry.squared(case.inputs, weight),
            outer_products(geometry, case.inputs, case.residuals),
            geometry.squared_norm(case.inputs, weight[None], weight[:, : len(weight)].square()),
        ]  # fmt: skip

    plain = everything()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(plain, everything(), strict=True))


def test_geometry_round_trip_and_shapes():
    for case in LAYERS:
        geometry = HeadGeometry.of(case.layer)
        assert HeadGeometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry
    geometry = HeadGeometry.of(nn.Conv2d(3, 2, 3, padding=1))
    stored = {
        "kind": "conv", "in_channels": 3, "out_channels": 2, "bias": True, "kernel_size": [3, 3], "padding": [1, 1, 1, 1],
        "padding_mode": "zeros",
    }  # fmt: skip
    assert HeadGeometry.from_dict(stored) == geometry  # as the first versions wrote it
    linear = HeadGeometry.of(nn.Linear(3, 2))
    assert (linear.kernel_size, linear.padding) == ((1, 1), (0, 0, 0, 0))  # as they were
    for layer, shape, message in [
        (nn.Conv1d(3, 2, 3), (2, 3, 5, 5), r"\(batch, 3, length\)"),
        (nn.Conv2d(3, 2, 3), (2, 4, 5, 5), r"\(batch, 3, height, width\)"),
        (nn.Conv3d(3, 2, 3), (2, 3, 5, 5), r"\(batch, 3, frames, height, width\)"),
        (nn.Linear(3, 2), (3,), r"\(batch, ..., 3\)"),
    ]:
        with pytest.raises(ShapeError, match=message):
            HeadGeometry.of(layer).check(torch.zeros(shape))


def test_hooks_come_off_also_on_error():
    unet = cases.tiny_unet()
    head = find_head(unet)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    with pytest.raises(RuntimeError), head.capture(), head.shifted(torch.ones(3, 73)):
        unet(torch.zeros(1, 7, 8, 8), 0)  # wrong channels
    assert not head.layer._forward_hooks
    assert not head.layer._forward_pre_hooks
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())


def test_shifted_is_the_network_with_other_weights():
    unet = cases.tiny_unet()
    head = find_head(unet)
    delta = torch.randn(3, 73, generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(unet)
    with torch.no_grad():
        other.conv_out.weight += delta[:, :-1].view_as(other.conv_out.weight)
        other.conv_out.bias += delta[:, -1]
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), head.shifted(delta):
        shifted = unet(x, 10).sample
    torch.testing.assert_close(shifted, other(x, 10).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_shifted_is_the_layer_with_other_weights(case, dtype):
    layer, other = copy.deepcopy(case.layer).to(dtype), copy.deepcopy(case.layer).double()
    head = Head("", layer, HeadGeometry.of(layer))
    delta = torch.randn(head.out_channels, head.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        other.load_state_dict(layer.state_dict())  # as the layer rounds them
        other.weight += delta[:, : head.geometry.num_weights].view_as(other.weight)
        if other.bias is not None:
            other.bias += delta[:, -1]
        x = case.inputs.to(dtype)
        with head.shifted(delta):
            shifted = layer(x) if dtype != torch.float32 else layer(input=x)
        assert shifted.dtype == dtype
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(shifted.double(), other(x.double()), rtol=tolerance, atol=tolerance)


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_a_layer_that_computes_its_map_passes(case, dtype):
    layer = copy.deepcopy(case.layer).to(dtype)
    head = Head("", layer, HeadGeometry.of(layer))
    with torch.no_grad():
        for scale in (1e-3, 1, 30):
            x = case.inputs.to(dtype) * scale
            outputs = []
            with head.capture(outputs) as captured:
                layer(x)
            head.check_linear(captured[0], outputs[0])
            if dtype in HALF:  # as in a network that casts for its head
                head.check_linear(captured[0].float(), outputs[0].float())
            if dtype == torch.float32:
                with torch.autocast("cpu", torch.bfloat16):
                    half = layer(x)
                    head.check_linear(x, half.float())
                head.check_linear(x, half)
    spoilt = outputs[0] * 1.5
    with pytest.raises(UnsupportedHeadError, match=r"to compute Wφ, but its output differs from it by up to .* \(0\.5"):
        head.check_linear(captured[0], spoilt)


def tiled(self, x, weight, bias):
    """Circular along one axis only, the well-known patch for seamless textures."""
    x = nn.functional.pad(nn.functional.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
    return nn.functional.conv2d(x, weight, bias)


class OwnConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return tiled(self, x, weight, bias)


def halve(module, args, output):
    return output * 0.5


PATCHES = {
    "hook": (lambda n: n.conv_out.register_forward_hook(halve), "the forward hook halve"),
    "lambda": (lambda n: n.conv_out.register_forward_hook(lambda m, a, o: o + 0.01), "the forward hook .*<lambda>"),
    "tiling": (lambda n: setattr(n.conv_out, "_conv_forward", tiled.__get__(n.conv_out)), "an overridden '_conv_forward'"),
    "subclass": (lambda n: setattr(n.conv_out, "__class__", OwnConv), "an overridden '_conv_forward'"),
    "forward": (lambda n: setattr(n.conv_out, "forward", lambda x: tiled(0, x, n.conv_out.weight, None)), "overridden 'forward'"),
    "shape": (lambda n: n.conv_out.register_forward_hook(lambda m, a, o: o[:, :1]), r"is \(2, 1, 8, 8\), not \(2, 3, 8, 8\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", PATCHES)
def test_a_layer_that_computes_something_else_is_refused_by_name(name):
    patch, message = PATCHES[name]
    network = cases.tiny_unet()
    patch(network)
    head, outputs = find_head(network), []
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), head.capture(outputs) as captured:
        head.layer(x)
    with pytest.raises(UnsupportedHeadError, match=f"'conv_out' to compute Wφ.*{message}"):
        head.check_linear(captured[0], outputs[0])


def test_what_changes_the_input_or_the_weights_is_part_of_the_map():
    network = cases.tiny_unet()
    network.conv_out.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    nn.utils.parametrizations.weight_norm(network.conv_out)
    head, outputs = find_head(network), []
    with torch.no_grad(), head.capture(outputs) as captured:
        network(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), 3)
    head.check_linear(captured[0], outputs[0])
    assert not network.conv_out._forward_hooks
    assert len(network.conv_out._forward_pre_hooks) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_left_to_other_checks(value):
    layer = nn.Conv2d(2, 2, 3, padding=1)
    x = torch.randn(2, 2, 5, 5)
    x[0, 0, 2, 2] = value
    Head("", layer, HeadGeometry.of(layer)).check_linear(x, layer(x))
