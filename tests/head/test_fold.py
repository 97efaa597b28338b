"""From the head's output to the network's and back: every residual at the features that it belongs to, and no others."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from bayesdiff import fit
from bayesdiff.checks import (
    AmbiguousHeadError,
    ArgumentError,
    ShapeError,
    UnsupportedHeadError,
)
from bayesdiff.diffusion.noising import draw
from bayesdiff.head.find import find_head
from bayesdiff.head.fold import Fold
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.laplace.statistics import Statistics
from bayesdiff.rng import base_seed
from tests import cases
from tests.head import networks
from tests.head.networks import Net
from tests.references import im2col

N, DRAWS, BINS = 5, 2, 4
SCHEDULER = cases.scheduler()

#: Networks, the shape of a sample, and how many positions of one sample's output the head has.
FITTED = {
    "vectors": (networks.mlp, (5,), 1),
    "trajectory": (networks.trajectory, (4, 3), 4),
    "series-negated": (networks.series, (2, 6), 6),
    "volume-mirrored": (networks.volume, (2, 3, 4, 3), 36),
    "frames": (networks.frames, (2, 3, 4, 5), 60),
    "frames-of-all-samples-in-turn": (partial(networks.frames, "FB"), (2, 3, 4, 5), 60),
    "frames-thrown-away": (partial(networks.frames, drop=2), (2, 3, 4, 5), 60),
    "patches": (networks.patches, (2, 4, 6), 6),
    "text-tokens-thrown-away": (partial(networks.patches, 3), (2, 4, 6), 6),
    "one-sequence-for-all": (partial(networks.patches, 1, ragged=True), (2, 4, 6), 6),
}  # fmt: skip


def samples(*shape, n=N):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1)) * 0.5


def fitted(network, data, **kwargs):
    generator = torch.Generator().manual_seed(3)
    return fit(network, data, scheduler=SCHEDULER, noise_bins=BINS, generator=generator, progress=False, **kwargs)


@pytest.mark.parametrize("name", FITTED)
def test_statistics_are_those_of_the_training_loss(name):
    """Scores by autograd through the whole network; precision, residuals and counts from the features that reach its output."""
    make, shape, positions = FITTED[name]
    network, x = make().double(), samples(*shape)
    layer = network.last
    out = fitted(network, x, draws_per_image=DRAWS, batch_size=4)
    assert out.head_path == "last"
    statistics = out.statistics
    assert (statistics.num_images, statistics.num_draws) == (N, N * DRAWS)
    scores, gram = torch.zeros_like(statistics.image_scores(torch.ones(BINS))), torch.zeros_like(statistics.gram)
    squares, count = torch.zeros(BINS, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)
    seed = base_seed(torch.Generator().manual_seed(3))
    for i in range(N):
        for t, noise in zip(*draw(SCHEDULER, shape, seed, i, 1, DRAWS), strict=True):
            alpha = SCHEDULER.alphas_cumprod[int(t)].double()
            x_t = (alpha.sqrt() * x[i].double() + (1 - alpha).sqrt() * noise.double())[None]
            kept: list = []
            handle = layer.register_forward_hook(lambda _, args, output, kept=kept: kept.extend((args[0], output)))
            result = network(x_t)[0]
            handle.remove()
            residual = noise.double()[None] - result
            parameters = [layer.weight] + ([] if layer.bias is None else [layer.bias])
            grads = torch.autograd.grad(0.5 * residual.square().sum(), [*parameters, kept[1]])
            parts = [grads[0].flatten(1)] + ([] if layer.bias is None else [grads[1][:, None]])
            scores[i] -= torch.cat(parts, dim=1)
            # A position counts if the loss depends on it.
            linear = isinstance(layer, nn.Linear)
            reached = (grads[-1] if linear else grads[-1].movedim(1, -1)).flatten(0, -2).ne(0).any(1)
            features = kept[0] if kept[0].ndim > 2 or not linear else kept[0][:, None]
            phi = im2col(layer, features.detach()).flatten(0, 1)[reached]
            b = int(float(t) * BINS / 1000)
            gram[b] += phi.T @ phi
            squares[b] += residual.detach().square().sum()
            count[b] += len(phi)
    torch.testing.assert_close(statistics.image_scores(torch.ones(BINS)), scores, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(statistics.gram, gram, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(statistics.squared_residuals.sum(1), squares, rtol=1e-9, atol=1e-12)
    assert torch.equal(statistics.positions, count)
    assert float(count.sum()) == positions * N * DRAWS


@pytest.mark.parametrize("name", FITTED)
def test_the_batch_size_changes_nothing(name):
    make, shape, _ = FITTED[name]
    network, x = make().double(), samples(*shape)
    whole = fitted(network, x, draws_per_image=DRAWS).statistics
    for size in (1, 2, 3):
        part = fitted(network, x, draws_per_image=DRAWS, batch_size=size).statistics
        torch.testing.assert_close(part.gram, whole.gram, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(part.image_scores(torch.ones(BINS)), whole.image_scores(torch.ones(BINS)))
        assert torch.equal(part.positions, whole.positions)


@pytest.mark.parametrize("name", ["dit", "sd3", "series-negated", "frames-of-all-samples-in-turn", "patches"])
def test_a_fold_is_read_off_exactly(name):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 4, 8, 8, generator=generator)
    t = torch.tensor([3, 5])
    if name == "dit":
        network = cases.tiny_dit()
        head, call = find_head(network), lambda: network(images, t, torch.tensor([1, 2]))
    elif name == "sd3":
        network = cases.tiny_sd3()
        text = {
            "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator),
            "pooled_projections": torch.randn(2, 16, generator=generator),
        }
        head, call = find_head(network), lambda: network(images, timestep=t, **text)
    else:
        make, shape, _ = FITTED[name]
        network = make()
        head, call = find_head(network, "last"), lambda: network(samples(*shape))
    outputs: list = []
    with torch.no_grad():
        fold = Fold.read(head, call)
        with head.capture(outputs):
            result = call()[0]
    assert torch.equal(outputs[0].flatten()[fold.index] * fold.sign, result)
    assert not head.layer._forward_hooks


def test_what_is_more_than_a_fold_is_refused():
    bent = Net(lambda n, x: n.last(x).tanh(), last=nn.Linear(5, 5))
    with pytest.raises(UnsupportedHeadError, match="what follows 'last' to scale all its numbers alike"):
        fitted(bent, samples(5), head="last")
    summed = Net(lambda n, x: n.last(x) + n.last(x).flip(-1), last=nn.Linear(5, 5))
    with pytest.raises(UnsupportedHeadError, match="'last'"):
        fitted(summed, samples(5), head="last")
    twice = Net(lambda n, x: n.last(n.last(x)), last=nn.Linear(5, 5))
    with pytest.raises(UnsupportedHeadError, match="one pass through 'last' in a network call, got 2"):
        fitted(twice, samples(5), head="last")


def test_pixels_that_are_thrown_away_are_refused():
    border = Net(lambda n, x: n.last(x)[:, :, 1:-1], last=nn.Conv1d(2, 2, 3, padding=2))
    with pytest.raises(UnsupportedHeadError, match="the same channels of 'last' for each place"):
        fitted(border, samples(2, 6))
    odd = Net(lambda n, x: torch.cat([n.last(x)[:, :2, :3], n.last(x)[:, 2:, 3:]], dim=2), last=nn.Conv1d(2, 4, 1))
    with pytest.raises(UnsupportedHeadError):
        fitted(odd, samples(2, 6))


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_channels_that_are_thrown_away_have_no_residual(kind):
    """A learned variance. What is left is the fit of a network without it."""
    if kind == "conv":
        layer, shape, run = nn.Conv1d(2, 4, 1), (2, 6), lambda n, x: n.last(x)[:, :2]
        small = nn.Conv1d(2, 2, 1)
    else:
        layer, shape, run = nn.Linear(3, 6), (4, 3), lambda n, x: n.last(x)[..., :3]
        small = nn.Linear(3, 3)
    kept = len(layer.weight) // 2
    wide, narrow = Net(run, last=layer), Net(lambda n, x: n.last(x), last=small)
    small.weight.data, small.bias.data = layer.weight.data[:kept], layer.bias.data[:kept]
    whole, part = (fitted(network, samples(*shape)).statistics for network in (wide, narrow))
    scores = whole.image_scores(torch.ones(BINS))
    torch.testing.assert_close(scores[:, :kept], part.image_scores(torch.ones(BINS)))
    assert not scores[:, kept:].any()
    torch.testing.assert_close(whole.gram, part.gram)
    assert (whole.trained_channels, part.trained_channels) == (kept, kept)
    torch.testing.assert_close(whole.noise_variance(), part.noise_variance())


def test_a_head_of_zeros_is_not_taken_for_the_network():
    """Its output equals its mirror image: only numbers tell where a residual belongs."""
    network = Net(
        lambda n, x: n.last(n.first(x).tanh()).flip(-1), first=nn.Conv1d(2, 3, 1), last=nn.Conv1d(3, 2, 3, padding=1)
    )
    network.double()
    with torch.no_grad():
        network.last.weight.zero_()
        network.last.bias.zero_()
    x = samples(2, 6)
    zero = fitted(network, x, prior_precision=1.0).statistics.image_scores(torch.ones(BINS))
    with torch.no_grad():
        network.last.weight.fill_(1e-12)
    out = fitted(network, x, prior_precision=1.0)
    torch.testing.assert_close(out.statistics.image_scores(torch.ones(BINS)), zero, rtol=1e-6, atol=1e-6)


def test_the_head_of_an_unknown_network_is_found_in_fitting():
    network = Net(
        lambda n, x: n.z(n.head(x) + n.conv_out(x)), head=nn.Linear(5, 5), conv_out=nn.Linear(5, 5), z=nn.Linear(5, 5)
    )
    with pytest.raises(AmbiguousHeadError):
        find_head(network)
    assert fitted(network, samples(5)).head_path == "z"
    with pytest.raises(ArgumentError, match="loss_weights"):
        fitted(network, samples(5), loss_weights=torch.ones(2))
    with pytest.raises(ArgumentError, match="prior_precision"):
        fitted(network, samples(5), prior_precision=torch.ones(3))
    with pytest.raises(ShapeError, match="the network says"):
        fitted(network, samples(4))


def test_a_layer_that_does_not_compute_its_map_is_not_fitted():
    network = networks.mlp()
    network.last.register_forward_hook(lambda m, args, output: 0.5 * output)
    with pytest.raises(UnsupportedHeadError, match=r"'last' to compute Wφ.*forward hook .*<lambda>"):
        fitted(network, samples(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    exact = fitted(networks.patches(2).double(), samples(2, 4, 6), draws_per_image=4)
    half = fitted(networks.patches(2).to(dtype), samples(2, 4, 6), draws_per_image=4)
    assert torch.equal(exact.statistics.positions, half.statistics.positions)
    torch.testing.assert_close(half.precision, exact.precision, rtol=0, atol=0.02 * float(exact.precision.max()))


def test_rows_of_one_draw_are_summed():
    layer = nn.Conv2d(2, 3, 3, padding=1)
    x, r = samples(2, 4, 4, n=6).double(), samples(3, 4, 4, n=6).double()
    together, apart = (Statistics(HeadGeometry.of(layer), 2) for _ in range(2))
    bins, images, rows = torch.tensor([0, 1]), torch.tensor([7, 8]), torch.tensor([1, 0, 0, 1, 1, 0])
    together.update(x, r, bins, images, rows)
    apart.update(x, r, bins[rows], images[rows])
    weights = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(together.image_scores(weights), apart.image_scores(weights))
    torch.testing.assert_close(together.gram, apart.gram)
    assert torch.equal(together.positions, apart.positions)
    assert (together.num_draws, apart.num_draws) == (2, 6)
    with pytest.raises(ShapeError, match="got 6, 6, 5, 2"):
        together.update(x, r, bins, images, rows[:5])
