"""The head: found exactly, computed with exactly, and never changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bayesdiff.checks import AmbiguousHeadError, HeadNotFoundError, ShapeError, UnsupportedHeadError
from bayesdiff.head.find import find_head
from bayesdiff.head.fold import Fold
from bayesdiff.head.geometry import HeadGeometry
from tests import cases
from tests.references import jacobian

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
    expected = torch.einsum("bpi,bpj->ij", phi, phi)
    torch.testing.assert_close(geometry.gram(x), expected, rtol=1e-10, atol=1e-10)
    in_float32 = geometry.gram(case.inputs)
    assert in_float32.dtype == torch.float64
    assert float((in_float32 - expected).abs().max() / expected.abs().max()) < 5e-6
    channel = 1 if geometry.kind == "conv" else -1
    by_position = r.movedim(channel, -1).flatten(1, -2) if r.ndim > 2 else r[:, None]
    expected = torch.einsum("bpc,bpd->bcd", by_position, phi)
    torch.testing.assert_close(geometry.outer(x, r), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_apply_is_the_layer(case):
    from bayesdiff.head.find import Head

    geometry = HeadGeometry.of(case.layer)
    weight = Head("", case.layer, geometry).weight().float()
    out = geometry.apply(case.inputs, torch.stack([weight, 2 * weight]))
    torch.testing.assert_close(out[0], case.layer(case.inputs).detach())
    torch.testing.assert_close(out[1], 2 * case.layer(case.inputs).detach())


def test_geometry_round_trip_and_shapes():
    geometry = HeadGeometry.of(nn.Conv2d(3, 2, 3, padding=1))
    assert HeadGeometry.from_dict(geometry.to_dict()) == geometry
    with pytest.raises(ShapeError, match=r"\(batch, 3, height, width\)"):
        geometry.check(torch.zeros(2, 4, 5, 5))


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
    import copy

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


@pytest.mark.parametrize("name", ["dit", "sd3", "unet"])
def test_fold_is_read_off_exactly(name):
    generator = torch.Generator().manual_seed(0)
    if name == "unet":
        network = cases.tiny_unet()
        args = {"sample": torch.randn(2, 3, 8, 8, generator=generator), "timestep": torch.tensor([3, 5])}
    elif name == "dit":
        network = cases.tiny_dit()
        args = {
            "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
            "timestep": torch.tensor([3, 5]),
            "class_labels": torch.tensor([1, 2]),
        }
    else:
        network = cases.tiny_sd3()
        args = {
            "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
            "timestep": torch.tensor([3, 5]),
            "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator),
            "pooled_projections": torch.randn(2, 16, generator=generator),
        }
    head = find_head(network)
    with torch.no_grad():
        fold = Fold.read(head, lambda: network(**args)[0])
        with head.capture() as features:
            output = network(**args)[0]
        torch.testing.assert_close(fold(head.layer(features[0])), output, rtol=0, atol=0)
    assert not head.layer._forward_hooks
