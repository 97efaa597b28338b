"""Fitting: one posterior however the data come, the right sums, the network left alone, and errors by name."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from bayesdiff import fit
from bayesdiff.checks import (
    ArgumentError,
    BayesdiffError,
    EmptyDataError,
    NonFiniteError,
    ShapeError,
    UnsupportedHeadError,
    UnsupportedPipelineError,
    UnsupportedSchedulerError,
)
from bayesdiff.diffusion.noising import draw
from bayesdiff.head.find import find_head
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.rng import base_seed
from tests import cases, references

VP = cases.scheduler()
V = cases.scheduler(prediction_type="v_prediction")
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
N = 7
#: In float64, what differs only in the order of sums agrees to this.
ROUNDING = 1e-9


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def images(channels=1, height=8, width=8, n=N):
    return torch.rand(n, channels, height, width, generator=generator(1)) * 2 - 1


def unet(**kwargs):
    return cases.tiny_unet(channels=1, **kwargs).double()


def text(dtype=torch.float64):
    """What SD3 takes beside its image."""
    g = generator(5)
    return {
        "encoder_hidden_states": torch.randn(N, 5, 16, generator=g).to(dtype),
        "pooled_projections": torch.randn(N, 16, generator=g).to(dtype),
    }


def labels():
    return {"class_labels": torch.arange(N) % 4}


def plain_dit():
    """A DiT without learned variance."""
    torch.manual_seed(0)
    config = {k: v for k, v in cases.tiny_dit().config.items() if not k.startswith("_")}
    return DiTTransformer2DModel(**{**config, "out_channels": 4}).eval()


class Flipped(nn.Module):
    """A convolution whose output is folded: mirrored."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv_in, self.conv_out = nn.Conv2d(1, 5, 3, padding=1), nn.Conv2d(5, 1, 3, padding=1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3

    def forward(self, x, timestep, return_dict):
        return (self.conv_out(self.conv_in(x).tanh()).flip(-1),)


NETWORKS = {
    "unet": lambda: (unet(), VP, {"images": images()}),
    "unet-v": lambda: (unet(), V, {"images": images()}),
    "unet-labels": lambda: (unet(classes=4), VP, {"images": images(), **labels()}),
    "unet-3-channels": lambda: (cases.tiny_unet().double(), VP, {"images": images(3)}),
    "conv-flipped": lambda: (Flipped().double(), VP, {"images": images(1, 6, 10)}),
    "dit": lambda: (plain_dit().double(), VP, {"images": images(4), **labels()}),
    "sd3": lambda: (cases.tiny_sd3().double(), FLOW, {"images": images(4), **text()}),
    "sd3-wide": lambda: (cases.tiny_sd3().double(), FLOW, {"images": images(4, 6, 12), **text()}),
    # As many tokens in both batches, folded otherwise.
    "sd3-two-sizes": lambda: (
        cases.tiny_sd3().double(),
        FLOW,
        [{"images": images(4, *size), **text()} for size in ((8, 8), (4, 16))],
    ),
}


def fitted(network, data, scheduler=VP, seed=3, **kwargs):
    return fit(network, data, scheduler=scheduler, generator=generator(seed), progress=False, **kwargs)


def assert_same(a, b, exact=False):
    rounding = 0 if exact else ROUNDING
    shape = (2, 8, 8, 8) if a.geometry.kind == "conv" else (2, 5, 16)
    features = torch.randn(shape, generator=generator(9), dtype=torch.float64)
    torch.testing.assert_close(a.noise_variance, b.noise_variance, rtol=rounding, atol=0)
    torch.testing.assert_close(a.variance(features), b.variance(features), rtol=rounding, atol=0)
    torch.testing.assert_close(a.precision, b.precision, rtol=0, atol=rounding * float(a.precision.max()))
    assert (a.num_images, a.dataset_size) == (b.num_images, b.dataset_size)


class Stored(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class Streamed(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def rows(data):
    """A mapping of tensors as a list of mappings, one for each image."""
    return [{k: v[i] for k, v in data.items()} for i in range(len(data["images"]))]


def batches(data, ends=(0, 3, 3, 4, 7)):
    """Batches of 3, 0, 1 and 3."""
    if isinstance(data, dict):
        return [{k: v[i:j] for k, v in data.items()} for i, j in pairwise(ends)]
    return [data[i:j] for i, j in pairwise(ends)]


# One posterior however the work is cut.


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_the_batch_size_changes_nothing(name, draws):
    """With 3 draws, batches of 1, 2, 4 and 5 split an image's draws over network calls."""
    network, scheduler, data = NETWORKS[name]()
    whole = fitted(network, data, scheduler, draws_per_image=draws, batch_size=64)
    assert whole.statistics.num_draws == N * draws
    assert whole.num_images == whole.dataset_size == N
    for size in (1, 2, 3, 4, 5):
        assert_same(fitted(network, data, scheduler, draws_per_image=draws, batch_size=size), whole)


def test_the_batch_size_is_what_the_network_sees():
    sizes = []
    network = unet()
    network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    fitted(network, images(), draws_per_image=3, batch_size=7)
    assert max(sizes) <= 7
    assert sizes == [N] * (3 + 2)  # the first call is made twice, and once more before the third
    sizes.clear()
    fitted(network, images(), draws_per_image=3, batch_size=2)
    assert sorted(sizes) == [1] * 3 + [2] * (3 * 3 + 5)  # the last of seven images has no neighbour
    sizes.clear()
    fitted(network, images(n=2), draws_per_image=6, batch_size=7)
    assert sizes == [6, 6, 6]  # few images, many draws: an image has several rows


FORMS = {
    "float64": lambda x: x.double(),
    "mapping": lambda x: {"images": x},
    "mapping-of-numpy": lambda x: {"images": x.numpy()},
    "dataset": lambda x: Stored(list(x)),
    "dataset-of-mappings": lambda x: Stored(rows({"images": x})),
    "iterable-dataset": lambda x: Streamed(list(x)),
    "loader": lambda x: DataLoader(Stored(list(x)), batch_size=3),
    "list-of-batches": batches,
    "list-of-mappings": lambda x: batches({"images": x}),
    "generator": lambda x: iter(batches(x)),
    "one-big-batch": lambda x: (x,),
    "list-of-images": list,
    "dataset-of-tuples": lambda x: Stored([(one,) for one in x]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_posterior(form):
    network, x = unet(), images()
    whole = fitted(network, x, draws_per_image=2, batch_size=4)
    assert_same(fitted(network, FORMS[form](x), draws_per_image=2, batch_size=4), whole)


@pytest.mark.parametrize("form", ["dataset", "list", "generator"])
def test_conditioning_stays_with_its_image(form):
    network, _, data = NETWORKS["unet-labels"]()
    whole = fitted(network, data, draws_per_image=2, batch_size=4)
    other = {"dataset": Stored(rows(data)), "list": batches(data), "generator": iter(batches(data))}[form]
    assert_same(fitted(network, other, draws_per_image=2, batch_size=4), whole)
    swapped = fitted(network, {**data, "class_labels": data["class_labels"].flip(0)}, draws_per_image=2)
    assert not torch.equal(swapped.precision, whole.precision)


def test_a_pipeline_is_its_network_and_its_scheduler():
    network, x = unet(), images()
    pipe = DDIMPipeline(network, V)
    own = fit(pipe, x, generator=generator(), progress=False)
    assert_same(own, fit(network, x, scheduler=pipe.scheduler, generator=generator(), progress=False), exact=True)
    assert_same(fitted(pipe, x, VP), fitted(network, x, VP), exact=True)
    assert not torch.equal(own.precision, fitted(pipe, x, VP).precision)
    assert own.head_path == fitted(network, x, head="conv_out").head_path == "conv_out"


def test_arguments_reach_the_posterior():
    network, x = unet(), images()
    kwargs = {
        "structure": "diag", "covariance": "sandwich", "prior_precision": 0.3, "loss_weights": "noise", "dataset_size": 50,
    }  # fmt: skip
    out = fitted(network, x, noise_bins=4, **kwargs)
    again = LaplacePosterior.from_statistics(out.statistics, find_head(network), **kwargs)
    assert_same(out, again, exact=True)
    assert (out.structure, out.covariance, out.dataset_size) == ("diag", "sandwich", 50)
    assert float(out.prior_precision) == 0.3
    assert torch.equal(out.weights, 1 / out.noise_variance)
    assert len(out.noise_variance) == 4
    assert fitted(network, x, cases.scheduler(num_train_timesteps=50)).num_timesteps == 50


def test_the_progress_bar_is_optional(capsys):
    fitted(unet(), images())
    assert capsys.readouterr().err == ""
    fit(unet(), images(), scheduler=VP, generator=generator())
    assert f"{N}/{N}" in capsys.readouterr().err


# Seeds.


def test_one_seed_one_posterior():
    network, x = unet(), images()
    first, again, other = (fitted(network, x, draws_per_image=2, seed=s) for s in (3, 3, 4))
    assert_same(first, again, exact=True)
    assert torch.equal(first.sample(2, generator()), again.sample(2, generator()))
    assert not torch.equal(first.precision, other.precision)


@pytest.mark.parametrize(
    "form",
    [
        "mapping",
        "generator",
        "dataset",
    ],
)
def test_torchs_own_generator_is_left_alone(form):
    torch.manual_seed(0)
    network, data = unet(), FORMS[form](images())
    before = torch.get_rng_state()
    fitted(network, data)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_torchs_own_is_used():
    out = []
    for seed in (0, 0, 1):
        network = unet()
        torch.manual_seed(seed)
        out.append(fit(network, images(), scheduler=VP, progress=False))
    assert_same(out[0], out[1], exact=True)
    assert not torch.equal(out[0].precision, out[2].precision)


# The sums.


def noised(scheduler, x, t, noise):
    """x_t and the target as the papers have them, without the package."""
    if scheduler is FLOW:
        s = float(t) / 1000
        return (1 - s) * x + s * noise, noise - x
    alpha = float(scheduler.alphas_cumprod[int(t)].double().sqrt())
    sigma = (1 - float(scheduler.alphas_cumprod[int(t)].double())) ** 0.5
    return alpha * x + sigma * noise, alpha * noise - sigma * x if scheduler is V else noise


def draws_of(data, scheduler, draws):
    """Image by image, draw by draw: number of the image, t, x_t, target and conditioning, a batch of one."""
    seed = base_seed(generator())
    images = [row for batch in (data if isinstance(data, list) else [data]) for row in rows(batch)]
    for i, row in enumerate(images):
        x = row.pop("images").double()
        for t, noise in zip(*draw(scheduler, tuple(x.shape), seed, i, 1, draws), strict=True):
            x_t, target = noised(scheduler, x, t, noise.double())
            yield i, t, x_t[None], target[None], {k: v[None] for k, v in row.items()}


def patches(image, size=2):
    """An image ``(1, C, H, W)`` cut into tokens as diffusers' transformers fold them: ``(1, tokens, p·p·C)``."""
    _, _, height, width = image.shape
    tokens = [
        torch.stack([image[0, :, i + p, j + q] for p in range(size) for q in range(size)]).flatten()
        for i in range(0, height, size)
        for j in range(0, width, size)
    ]
    return torch.stack(tokens)[None]


@pytest.mark.parametrize("covariance", ["sandwich", "ggn", "ef"])
@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_the_posterior_equals_a_naive_loop(name, structure, covariance):
    """One image, one draw, one position at a time, with a dense covariance of all weights."""
    network, scheduler, data = NETWORKS[name]()
    draws, bins, scale = 2, 5, 3.0
    out = fitted(
        network, data, scheduler, draws_per_image=draws, batch_size=5, structure=structure, covariance=covariance,
        noise_bins=bins, prior_precision=0.7, dataset_size=round(scale * N),
    )  # fmt: skip
    head = find_head(network)
    features, residuals, which, numbers = [], [], [], []
    for i, t, x_t, target, conditioning in draws_of(data, scheduler, draws):
        with torch.no_grad(), head.capture() as captured:
            residual = target - network(x_t, timestep=t[None], return_dict=False, **conditioning)[0]
        features.append(captured[0])
        residuals.append(patches(residual) if name == "sd3" else residual)
        which.append(int(float(t) * bins / 1000))
        numbers.append(i)
    features, residuals, which = torch.cat(features), torch.cat(residuals), torch.tensor(which)
    if covariance != "sandwich":
        noise = torch.stack([
            residuals[which == b].square().mean() if b in which else torch.tensor(1.0) for b in range(bins)
        ])  # fmt: skip
    else:
        noise = residuals.square().mean().expand(bins)
    dense = references.dense_posterior(
        head.layer, features, residuals, which, torch.tensor(numbers), noise,
        prior_precision=0.7, structure=structure, covariance=covariance, scale=scale,
    )  # fmt: skip
    expected = references.dense_variance(head.layer, features[:3], dense)
    torch.testing.assert_close(out.variance(features[:3]), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_are_the_gradients_of_the_training_loss(name):
    """Σ r φᵀ of an image is −∂/∂W of ½ ‖target − f‖², by autograd through the whole network, its fold included."""
    network, scheduler, data = NETWORKS[name]()
    out = fitted(network, data, scheduler, draws_per_image=2, batch_size=5)
    scores = out.statistics.image_scores(torch.ones(10))
    layer = find_head(network).layer
    assert len(scores) == (2 * N if isinstance(data, list) else N)
    expected = torch.zeros_like(scores)
    for i, t, x_t, target, conditioning in draws_of(data, scheduler, 2):
        output = network(x_t, timestep=t[None], return_dict=False, **conditioning)[0]
        loss = 0.5 * (target - output).square().sum()
        weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias])
        expected[i] -= torch.cat([weight.flatten(1), bias[:, None]], dim=1)
    torch.testing.assert_close(scores, expected, rtol=1e-8, atol=1e-8)


def test_what_follows_a_convolution_is_not_taken_for_granted():
    """With Fourier time embeddings a U-Net divides what its head returns by t."""
    config = {k: v for k, v in cases.tiny_unet(channels=1).config.items() if not k.startswith("_")}
    network = UNet2DModel(**{**config, "time_embedding_type": "fourier"}).eval()
    with pytest.raises((UnsupportedHeadError, UnsupportedPipelineError), match="conv_out"):
        fitted(network, images())


@pytest.mark.parametrize("covariance", ["sandwich", "ggn"])
def test_variance_falls_with_the_size_of_the_data_set(covariance):
    """Where the prior is nothing to the data: as 1/N."""
    network, x = unet(), images(n=12)
    features = torch.randn(2, 8, 8, 8, generator=generator(9), dtype=torch.float64)
    few, many = (fitted(network, x, covariance=covariance, dataset_size=n, prior_precision=1e-12) for n in (None, 600))
    assert (few.dataset_size, many.dataset_size, many.num_images) == (12, 600, 12)
    torch.testing.assert_close(many.variance(features), few.variance(features) / 50, rtol=1e-5, atol=0)
    with pytest.raises(ArgumentError, match=r"dataset_size >= the 12 images"):
        fitted(network, x, dataset_size=11)


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_bfloat16_networks(name):
    network, scheduler, data = NETWORKS[name]()
    exact = fitted(network, data, scheduler, draws_per_image=4)
    network = network.to(torch.bfloat16)
    data = {k: v if k == "images" else v.to(torch.bfloat16) for k, v in data.items()}
    out = fitted(network, data, scheduler, draws_per_image=4)
    sums = (out.statistics.gram, out.statistics.squared_residuals, out.statistics.image_scores(torch.ones(10)))
    assert all(s.dtype == torch.float64 and bool(s.isfinite().all()) for s in sums)
    assert torch.equal(out.mean, find_head(network).weight())
    features = torch.randn(2, 8, 8, 8) if name == "unet" else torch.randn(2, 16, 16)
    half = out.variance(features.to(torch.bfloat16))
    assert half.dtype == torch.float32
    assert float(half.mean() / exact.variance(features).mean()) == pytest.approx(1, abs=0.05)


def test_conditioning_is_cast_as_images_are():
    network, scheduler, data = NETWORKS["sd3"]()
    fitted(network.to(torch.bfloat16), {"images": data["images"], **text(torch.float32)}, scheduler)


# The network is left as it was.


def state(network):
    """All that a fit might change."""
    return (
        [h for m in network.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks)],
        [m.training for m in network.modules()],
        [(n, p.requires_grad, p.grad) for n, p in network.named_parameters()],
        [v.numpy().tobytes() for v in network.state_dict().values()],
        list(network.__dict__),
    )


@pytest.mark.parametrize("call", [1, 2, 3, None])
@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_nothing_is_left_behind_also_when_interrupted(name, call):
    """Call 2 of SD3 is the one that reads the fold."""
    network, scheduler, data = NETWORKS[name]()
    network.train()
    find_head(network).layer.eval()
    next(network.parameters()).requires_grad_(False)
    before = state(network)
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    handle = network.register_forward_hook(interrupt)
    if call is None:
        fitted(network, data, scheduler, batch_size=2)
    else:
        with pytest.raises(KeyboardInterrupt):
            fitted(network, data, scheduler, batch_size=2)
        assert len(calls) == call
    handle.remove()
    assert state(network) == before


def test_running_out_of_memory_is_not_a_wrong_shape():
    def exhaust(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    network = unet()
    network.register_forward_hook(exhaust)
    with pytest.raises(torch.OutOfMemoryError):
        fitted(network, images())


# Errors.


def spoilt(value):
    x = images()
    x[3, 0, 2, 2] = value
    return x


BAD_DATA = {
    "no-images": (images()[:0], EmptyDataError, "at least one image"),
    "no-images-in-mapping": ({"images": images()[:0]}, EmptyDataError, "at least one image"),
    "no-batches": ([], EmptyDataError, "at least one image"),
    "empty-generator": (iter(()), EmptyDataError, "at least one image"),
    "only-empty-batches": ([images()[:0]] * 2, EmptyDataError, "at least one image"),
    "empty-dataset": (Stored([]), EmptyDataError, "at least one image"),
    "empty-string": ("", ArgumentError, "a folder of images, got ''"),
    "empty-mapping": ({}, ArgumentError, r"the key 'images', got \[\]"),
    "wrong-key": ({"pixels": images()}, ArgumentError, r"the key 'images', got \['pixels'\]"),
    "string": ("images/", ArgumentError, "a folder of images, got 'images/'"),
    "int": (3, ArgumentError, "an iterable of batches, got int"),
    "none": (None, ArgumentError, "an iterable of batches, got NoneType"),
    "list-of-ints": ([1, 2], ArgumentError, "'images', got int"),
    "images-with-lists": (Stored([(x, [0.5]) for x in images()]), ArgumentError, "a caption or an integer label"),
    "integers": ((images() * 100).long(), ArgumentError, r"pixels in \[-1, 1\]\) or as uint8, got torch.int64"),
    "from-0-to-1": (images().abs(), ArgumentError, r"in \[-1, 1\], got no negative number in 7.*value_range=\(0, 1\)"),
    "from-0-to-255": (images().abs() * 255, ArgumentError, r"in \[-1, 1\], got .* to 25.*value_range=\(0, 255\)"),
    "channels": (images(3), ShapeError, r"images of 1 channels, got 3 in \(7, 3, 8, 8\)"),
    "one-image": (images()[0], ShapeError, r"\(n, channels, height, width\), got \(1, 8, 8\)"),
    "size": (images(1, 7, 7), ShapeError, r"fit UNet2DModel, got images \(1, 7, 7\).*Sizes of tensors must match"),
    "nan": (spoilt(float("nan")), NonFiniteError, "finite images, got 1 NaN and 0 infinite"),
    "inf": ([images(), spoilt(float("inf"))], NonFiniteError, "finite images, got 0 NaN and 1 infinite"),
    "labels": ({"images": images(), "class_labels": torch.zeros(6)}, ShapeError, "7 rows of 'class_labels'.*6"),
    "one-label": ({"images": images(), "class_labels": torch.tensor(1)}, ShapeError, "7 rows of 'class_labels'"),
    "label-batches": (
        [{"images": images(), "class_labels": torch.zeros(7)}, {"images": images(), "class_labels": torch.zeros(6)}],
        ShapeError,
        "7 rows of 'class_labels'",
    ),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(name):
    data, error, message = BAD_DATA[name]
    network = cases.tiny_unet(channels=1, classes=4 if name == "label-batches" else None)
    if name == "label-batches":
        data[0]["class_labels"] = data[0]["class_labels"].long()
    with pytest.raises(error, match=message):
        fitted(network, data)


@pytest.mark.parametrize(
    "data",
    [torch.tensor(1.0), {"images": torch.tensor(1.0)}, {"images": images(), "class_labels": None},
     {"images": images(), "prompt": ["a"] * N}],
    ids=["scalar", "scalar-in-mapping", "none-for-labels", "strings"],
)  # fmt: skip
def test_more_bad_data(data):
    with pytest.raises((ArgumentError, ShapeError)):
        fitted(cases.tiny_unet(channels=1, classes=4), data)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("unet-labels", {"class_labels": None}),
        ("unet-labels", {"class_labels": torch.full((N,), 4)}),
        ("unet", labels()),
        ("unet", {"nonsense": torch.zeros(N)}),
        ("dit", {"class_labels": None}),
        ("sd3", {"pooled_projections": None}),
        ("sd3", {"encoder_hidden_states": None}),
        ("sd3", {"images": images(4, 32, 32)}),
    ],
    ids=[
        "no-labels", "label-out-of-range", "labels-too-many", "unknown-name", "dit-no-labels", "sd3-no-pooled",
        "sd3-no-text", "sd3-too-large",
    ],
)  # fmt: skip
def test_what_the_network_refuses_is_told_in_its_own_words(name, changes):
    network, scheduler, data = NETWORKS[name]()
    data = {k: v for k, v in {**data, **changes}.items() if v is not None}
    with pytest.raises(BayesdiffError, match="the network says"):
        fitted(network, data, scheduler)


def test_outputs_shaped_unlike_the_target_are_refused():
    with pytest.raises(ShapeError, match=r"return \(7, 4, 9, 9\), as its target, got \(7, 4, 8, 8\)"):
        fitted(cases.tiny_sd3(), {"images": images(4, 9, 9), **text(torch.float32)}, FLOW)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_network_that_overflows_is_noticed(value):
    network = cases.tiny_unet(channels=1)
    with torch.no_grad():
        network.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = value
    with pytest.raises(NonFiniteError, match=r"finite features.*bfloat16 or float32"):
        fitted(network, images(1, 8, 16))
    network = cases.tiny_unet(channels=1)
    with torch.no_grad():
        network.conv_out.bias.fill_(value)
    with pytest.raises(NonFiniteError, match="finite residuals"):
        fitted(network, images(1, 8, 16))


BAD_ARGUMENTS = {
    "structure": ({"structure": "cube"}, "structure to be one of 'full', .*, got 'cube'"),
    "covariance": ({"covariance": "bootstrap"}, "covariance to be one of 'sandwich', .*, got 'bootstrap'"),
    "no-draws": ({"draws_per_image": 0}, "draws_per_image >= 1, got 0"),
    "half-a-draw": ({"draws_per_image": 1.5}, "draws_per_image to be an integer >= 1, got 1.5"),
    "no-batch": ({"batch_size": 0}, "batch_size >= 1, got 0"),
    "negative-batch": ({"batch_size": -1}, "batch_size >= 1, got -1"),
    "no-bins": ({"noise_bins": 0}, "noise_bins >= 1, got 0"),
    "no-data-set": ({"dataset_size": 0}, "dataset_size >= 1, got 0"),
    "negative-prior": ({"prior_precision": -1.0}, "prior_precision .*; got -1"),
    "loss-weights": ({"loss_weights": "equal"}, "loss_weights to be one of 'uniform', 'noise', got 'equal'"),
    "too-few-loss-weights": ({"loss_weights": torch.ones(3)}, "loss_weights .* 10 finite numbers"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name):
    kwargs, message = BAD_ARGUMENTS[name]
    with pytest.raises(ArgumentError, match=message):
        fitted(unet(), images(), **kwargs)


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_cost_no_network_call(name):
    network, calls = unet(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ArgumentError):
        fitted(network, images(), **BAD_ARGUMENTS[name][0])
    assert not calls


def test_the_scheduler_is_needed_and_must_have_a_schedule():
    with pytest.raises(ArgumentError, match="scheduler=… beside a bare network"):
        fit(unet(), images(), generator=generator(), progress=False)
    with pytest.raises(UnsupportedSchedulerError, match="EDMEulerScheduler"):
        fitted(unet(), images(), EDMEulerScheduler())
    with pytest.raises(UnsupportedSchedulerError, match="'score'"):
        fitted(unet(), images(), cases.scheduler(prediction_type="score"))


def test_the_head_must_be_passed_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x, timestep, return_dict):
            return (self.head(self.head(x)),)

    with pytest.raises(UnsupportedHeadError, match="one pass through 'head' in a network call, got 2"):
        fitted(Twice().eval(), images())


def test_random_networks_are_refused():
    network = unet()
    dropout = network.mid_block.resnets[0].dropout
    dropout.p = 0.1
    network.train()
    with pytest.raises(ArgumentError, match=r"Dropout at 'mid_block\.resnets\.0\.dropout' in training mode"):
        fitted(network, images())
    dropout.p = 0.0  # nothing is random: the mode does not matter
    assert_same(fitted(network, images()), fitted(unet(), images()))


def test_label_dropout_is_random_too():
    with pytest.raises(ArgumentError, match="training mode"):
        fitted(plain_dit().train(), {"images": images(4), **labels()})
