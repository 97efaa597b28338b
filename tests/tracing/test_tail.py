"""From the head's output to the network's: read off in one call, it takes δWφ to what other weights make of the output."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from bayesdiff.checks import UnsupportedHeadError
from bayesdiff.head.find import find_head
from bayesdiff.tracing.rerun import tensors
from bayesdiff.tracing.rows import in_rows
from bayesdiff.tracing.tail import Tail, reading
from tests import cases
from tests.head import networks
from tests.head.networks import Net

B = 3


def noise(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def after(then):
    """A layer of two channels, and what is done with its output h and with x."""

    def run(n, x):
        return then(n.last(n.first(x).tanh()), x)

    return lambda: Net(run, first=nn.Conv2d(2, 3, 1), last=nn.Conv2d(3, 2, 3, padding=1))


#: Networks, and the shape of a sample.
FOLLOWED = {
    "vectors": (networks.mlp, (5,)),
    "trajectory": (networks.trajectory, (4, 3)),
    "series-negated": (networks.series, (2, 6)),
    "volume-mirrored": (networks.volume, (2, 3, 4, 3)),
    "frames": (networks.frames, (2, 3, 4, 5)),
    "frames-of-all-samples-in-turn": (partial(networks.frames, "FB"), (2, 3, 4, 5)),
    "frames-thrown-away": (partial(networks.frames, drop=2), (2, 3, 4, 5)),
    "patches": (networks.patches, (2, 4, 6)),
    "text-tokens-thrown-away": (partial(networks.patches, 3), (2, 4, 6)),
    "one-sequence-for-all": (partial(networks.patches, 1, ragged=True), (2, 4, 6)),
    "itself": (after(lambda h, x: h), (2, 4, 4)),
    "scaled": (after(lambda h, x: -0.3 * h), (2, 4, 4)),
    "scaled-by-row": (after(lambda h, x: h / torch.arange(1, B + 1).view(-1, 1, 1, 1)), (2, 4, 4)),
    "scaled-by-channel": (after(lambda h, x: h * torch.tensor([2.0, 0.5]).view(2, 1, 1)), (2, 4, 4)),
    "input-added": (after(lambda h, x: 0.5 * h + x), (2, 4, 4)),
    "one-channel-kept": (after(lambda h, x: h[:, :1]), (2, 4, 4)),
    "beside-something-else": (after(lambda h, x: torch.cat([x, h], dim=1)), (2, 4, 4)),
    "in-place": (after(lambda h, x: h.mul_(2)), (2, 4, 4)),
    "in-half-precision-behind": (after(lambda h, x: h.bfloat16().float().flip(2)), (2, 4, 4)),
    "more-numbers-than-two-digits": (after(lambda h, x: h.transpose(2, 3)), (2, 110, 110)),
}  # fmt: skip


def read(network, x, path="last"):
    head = find_head(network, path)
    with torch.no_grad(), reading(head) as seen:
        output = network(x)
    return head, output, seen.result(output)


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_tail_takes_other_weights_to_the_output(name):
    make, shape = FOLLOWED[name]
    network, x = make(), noise(B, *shape)
    head, output, (features, tail, rounding) = read(network, x)
    with torch.no_grad():
        assert torch.equal(output[0], network(x)[0])
    delta = noise(head.out_channels, head.in_features, seed=2)
    with torch.no_grad(), head.shifted(delta):
        moved = network(x)[0]
    (shift,) = tail(head.geometry.apply(features, delta[None]))
    tolerance = 2e-2 if "half" in name else 1e-5
    torch.testing.assert_close(shift[0], moved - output[0], rtol=0, atol=tolerance * float(moved.abs().max()))
    assert rounding == torch.finfo(torch.float32).eps
    assert float(shift.abs().max()) > 0.1


@pytest.mark.parametrize(
    "name", [n for n in FOLLOWED if "one-sequence" not in n and "in-turn" not in n and "by-row" not in n]
)
def test_a_network_that_is_evaluated_row_by_row(name):
    """The head is passed once for each; what follows joins them."""
    make, shape = FOLLOWED[name]
    network, x = make(), noise(B, *shape)
    head, forward = find_head(network, "last"), in_rows(network.forward)
    with torch.no_grad(), reading(head, B) as seen:
        output = forward(x)
    features, tail, _ = seen.result(output)
    delta = noise(head.out_channels, head.in_features, seed=2)
    with torch.no_grad(), head.shifted(delta):
        moved = forward(x)[0]
    (shift,) = tail(head.geometry.apply(features, delta[None]))
    tolerance = 2e-2 if "half" in name else 1e-5
    torch.testing.assert_close(shift[0], moved - output[0], rtol=0, atol=tolerance * float(moved.abs().max()))


def test_what_bends_each_number_by_itself_has_its_slope_for_a_scale():
    network, x = after(lambda h, x: h.tanh())(), noise(B, 2, 4, 4, dtype=torch.float64)
    head, output, (features, tail, _) = read(network.double(), x)
    delta = 1e-6 * noise(head.out_channels, head.in_features, seed=2, dtype=torch.float64)
    with torch.no_grad(), head.shifted(delta):
        moved = network(x)[0]
    (shift,) = tail(head.geometry.apply(features, delta[None]))
    torch.testing.assert_close(shift[0], moved - output[0], rtol=0, atol=1e-5 * float(shift.abs().max()))


def test_a_head_that_is_the_output_needs_no_numbers():
    _, _, (_, tail, _) = read(after(lambda h, x: h)(), noise(B, 2, 4, 4))
    assert tail.parts[0].index is None
    assert tail.main() == 0


def test_what_the_head_does_not_reach_has_no_shift():
    head, _output, (features, tail, _) = read(FOLLOWED["beside-something-else"][0](), noise(B, 2, 4, 4))
    (shift,) = tail(head.geometry.apply(features, noise(1, head.out_channels, head.in_features)))
    assert bool((shift[:, :, :2] == 0).all())
    assert bool((shift[:, :, 2:] != 0).all())


class Nested(nn.Module):
    """Returns a nest: a tensor without the head, a list of one for each row, and a flag."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return {"aside": 2 * x, "rows": [-row for row in self.last(x)], "flag": True}


def test_nests_of_outputs():
    network, x = Nested().eval(), noise(B, 2, 4, 4)
    head, output, (features, tail, _) = read(network, x)
    assert [part is None for part in tail.parts] == [True, False, False, False]
    assert tail.main() == 1
    delta = noise(2, 3, seed=2)
    with torch.no_grad(), head.shifted(delta):
        moved = network(x)
    shifts = tail(head.geometry.apply(features, delta[None]))
    for shift, new, old in zip(shifts[1:], moved["rows"], output["rows"], strict=True):
        torch.testing.assert_close(shift[0], new - old)
    assert len(tensors(output)) == len(tail.parts)


REFUSED = {
    "mixed": (lambda h, x: h + h.flip(1), "more than a permutation and a scale"),
    "averaged": (lambda h, x: nn.functional.avg_pool2d(h, 2), "more than a permutation and a scale"),
    "normed": (lambda h, x: h / h.norm(), "more than a permutation and a scale"),
    "repeated": (lambda h, x: torch.cat([h, h], dim=1), "repeated ones"),
    "dropped": (lambda h, x: 0 * x, "none of its numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_more_than_a_permutation_is_refused(name):
    then, message = REFUSED[name]
    with pytest.raises(UnsupportedHeadError, match=message):
        read(after(then)(), noise(B, 2, 4, 4))


def test_the_head_must_be_passed_once():
    twice = Net(lambda n, x: n.last(n.last(x)), last=nn.Conv2d(2, 2, 1))
    with pytest.raises(UnsupportedHeadError, match="one pass through 'last' in a network call, got 2"):
        read(twice, noise(B, 2, 4, 4))
    never = Net(lambda n, x: n.first(x), first=nn.Conv2d(2, 2, 1), last=nn.Conv2d(2, 2, 1))
    with pytest.raises(UnsupportedHeadError, match="got 0"):
        read(never, noise(B, 2, 4, 4))


def test_a_patched_head_is_refused():
    network = after(lambda h, x: h)()
    network.last.register_forward_hook(lambda _, __, output: 1.1 * output)
    with pytest.raises(UnsupportedHeadError, match="to compute Wφ"):
        read(network, noise(B, 2, 4, 4))


def test_hooks_come_off():
    network = after(REFUSED["mixed"][0])()
    with pytest.raises(UnsupportedHeadError):
        read(network, noise(B, 2, 4, 4))
    with pytest.raises(OSError, match="lost"), reading(find_head(network, "last")):
        raise OSError("lost")
    assert not network.last._forward_hooks
    assert not network.last._forward_pre_hooks


def test_equal_tails_share_their_tensors():
    """A run of a thousand steps has a thousand of them."""
    network = networks.patches()
    (_, _, (_, one, _)), (_, _, (_, other, _)) = (read(network, noise(B, 2, 4, 6, seed=i)) for i in (1, 2))
    shared = other.sharing(one)
    assert shared.parts[0].index is one.parts[0].index
    assert shared.parts[0].scale is one.parts[0].scale
    assert one.sharing(Tail(())) is one
    flipped = Net(lambda n, x: n.last(x).flip(-1), last=nn.Conv2d(2, 2, 1))
    _, _, (_, apart, _) = read(flipped, noise(B, 2, 4, 6))
    assert apart.sharing(one).parts[0].index is apart.parts[0].index


def test_rounding_is_that_of_the_coarsest_arithmetic():
    network, x = cases.tiny_unet(channels=1), noise(B, 1, 8, 8)
    head = find_head(network)
    with torch.no_grad(), reading(head) as seen, torch.autocast("cpu", torch.bfloat16):
        seen.result(network(x, 5).sample)
    assert seen.rounding == torch.finfo(torch.bfloat16).eps
