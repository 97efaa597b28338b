"""What ships: the model, its data, and the schedulers that sample it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from bayesdiff import zoo
from bayesdiff.checks import ArgumentError, ShapeError, UnknownNameError
from tests.cases import seeds


@pytest.fixture(scope="module")
def shipped():
    return zoo.load("fashion-ddpm")


def test_the_shipped_network_denoises_held_out_images(shipped):
    """Better than the best linear guess: ε̂ = √(1−ᾱ) x_t has loss ᾱ for data of unit variance, less for real ones."""
    pipe, data = shipped
    x0, y = data.heldout.images[:64], data.heldout.labels[:64]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x0.shape, generator=generator)
    losses, linear = [], []
    for t in (100, 300, 600):
        x_t = pipe.scheduler.add_noise(x0, noise, torch.full((64,), t))
        with torch.no_grad():
            output = pipe.unet(x_t, t, class_labels=y).sample
        losses.append((output - noise).square().mean().item())
        slope = (x_t * noise).sum() / x_t.square().sum()
        linear.append((slope * x_t - noise).square().mean().item())
    assert all(ours < 0.35 * guess for ours, guess in zip(losses, linear, strict=True)), (losses, linear)
    assert losses[0] > losses[1] > losses[2]


def test_the_shipped_network_knows_its_classes(shipped):
    """The right label predicts the noise of a held-out image better than a wrong one."""
    pipe, data = shipped
    x0, y = data.heldout.images[:96], data.heldout.labels[:96]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    x_t = pipe.scheduler.add_noise(x0, noise, torch.full((96,), 500))
    with torch.no_grad():
        right, wrong = (pipe.unet(x_t, 500, class_labels=c).sample - noise for c in (y, (y + 5) % 10))
    better = (right.square().flatten(1).mean(1) < wrong.square().flatten(1).mean(1)).float().mean()
    assert better > 0.9


def test_the_shard_is_balanced_and_in_the_networks_space(shipped):
    _, data = shipped
    assert data.dataset_size == 60_000
    assert data.num_images == 2_000
    assert data.heldout.num_images == 1_000
    for part, each in ((data, 200), (data.heldout, 100)):
        assert part.images.shape[1:] == (1, 28, 28)
        assert part.images.dtype == torch.float32
        assert part.labels.dtype == torch.int64
        assert part.labels.bincount().tolist() == [each] * 10
        assert part.images.min() == -1
        assert part.images.max() == 1
    assert data.class_names[7] == "Sneaker"
    # No held-out image is among those that the network was trained on.
    train = {image.numpy().tobytes() for image in data.images}
    assert not any(image.numpy().tobytes() in train for image in data.heldout.images)


def test_data_is_a_mapping_that_can_be_cut(shipped):
    _, data = shipped
    assert isinstance(data, Mapping)
    assert dict(data).keys() == data.as_dict().keys() == {"images", "class_labels"}
    assert data["images"] is data.images
    part = data.subset(data.labels == 3)
    assert part.num_images == 200
    assert set(part.labels.tolist()) == {3}
    assert part.dataset_size == 60_000
    assert part.heldout is data.heldout
    assert data.subset(slice(4, 7)).images.equal(data.images[4:7])
    with pytest.raises(KeyError, match="images"):
        data["pixels"]


def test_class_images_are_checked():
    images = torch.zeros(3, 1, 4, 4)
    with pytest.raises(ShapeError, match=r"labels \(N,\)"):
        zoo.ClassImages(images, torch.zeros(2, dtype=torch.int64), ("a",), 3)
    with pytest.raises(ArgumentError, match="0 to 1, got 0 to 2"):
        zoo.ClassImages(images, torch.tensor([0, 1, 2]), ("a", "b"), 3)


def test_weights_are_what_the_file_holds_in_any_dtype(shipped):
    pipe, _ = shipped
    double, _ = zoo.load("fashion-ddpm", dtype=torch.float64)
    assert pipe.unet.dtype == torch.float32
    assert double.unet.dtype == torch.float64
    assert not pipe.unet.training
    for a, b in zip(pipe.unet.parameters(), double.unet.parameters(), strict=True):
        assert a.double().equal(b)
        assert a.equal(a.half().float())


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers with numpy 2
@pytest.mark.parametrize("name", zoo.scheduler_names())
def test_every_scheduler_samples_the_shipped_model(name):
    pipe, _ = zoo.load("fashion-ddpm", scheduler=name)
    assert pipe.scheduler.config.beta_schedule == "linear"
    image = pipe("trouser", num_inference_steps=10, generator=seeds(0), output_type="np").images
    assert image.shape == (1, 28, 28, 1)
    # A trouser: dark to the left and to the right, brighter in the middle.
    assert image[0, :, 9:19].mean() > 3 * max(image[0, :, :5].mean(), image[0, :, -5:].mean())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fashion-dpm"}, r"model .* got 'fashion-dpm'; did you mean 'fashion-ddpm' or 'fashion-4step'\?"),
        ({"name": "fashion-ddpm", "scheduler": "ddin"}, r"scheduler .* got 'ddin'; did you mean .*'ddim'"),
        ({"name": "fashion-ddpm", "scheduler": "x"}, r"'euler'.*got 'x'$"),
    ],
)
def test_unknown_names(arguments, message):
    with pytest.raises(UnknownNameError, match=message):
        zoo.load(**arguments)


def test_scheduler_by_class_name():
    assert type(zoo.build_scheduler("EulerDiscreteScheduler", {})) is type(zoo.build_scheduler("euler", {}))
