"""Figures show the numbers they are given, on one scale, and files are whole or not there."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from bayesdiff.checks import ArgumentError, NonFiniteError, ShapeError
from bayesdiff.plotting import MAX_COLUMNS, plot_maps


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def panels(figure):
    """The axes with pictures, and the colour bar's."""
    pictures = [axes for axes in figure.axes if axes.images and axes.get_label() != "<colorbar>"]
    (bar,) = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    return pictures, bar


def shown(axes):
    return np.asarray(axes.images[0].get_array())


# --- maps ---


def test_a_map_is_the_standard_deviation_on_the_shared_scale():
    std = torch.zeros(2, 1, 4, 4)
    std[0, 0, 1, 2], std[1, 0, 3, 0] = 0.1, 0.2
    figure = plot_maps(torch.full((2, 1, 4, 4), 0.5), std, titles=["Bag", "Coat"])
    pictures, bar = panels(figure)
    assert len(pictures) == 2 * 3
    sample, first, overlay, _, second, _ = pictures
    assert sample.get_title() == "Bag"
    low, high = bar.get_ylim()
    assert low == 0
    assert 0.1 < high <= 0.2  # one scale for both, set by the larger
    colours = matplotlib.colormaps["inferno"]
    np.testing.assert_allclose(shown(first)[1, 2], colours(0.1 / high)[:3])
    np.testing.assert_allclose(shown(second)[3, 0], colours(1.0)[:3])
    np.testing.assert_allclose(shown(first)[0, 0], colours(0.0)[:3])
    np.testing.assert_allclose(shown(sample), 0.5)
    # Where the network is sure the overlay is grey; where it isn't, coloured.
    assert np.ptp(shown(overlay)[0, 0]) < 1e-12
    assert np.ptp(shown(overlay)[1, 2]) > 0.1


def test_channels_are_combined_by_root_mean_square():
    std = torch.tensor([0.3, 0.0, 0.4]).view(1, 3, 1, 1).expand(1, 3, 2, 2).clone()
    _, bar = panels(plot_maps(rand(1, 3, 2, 2), std))
    assert bar.get_ylim()[1] == pytest.approx((0.25 / 3) ** 0.5)


def test_every_form_of_images_is_the_same_picture():
    pixels = (rand(2, 3, 5, 4) * 255).round() / 255
    array = pixels.permute(0, 2, 3, 1).numpy()
    forms = [
        pixels,
        array,
        (array * 255).round().astype(np.uint8),
        torch.from_numpy((array * 255).round().astype(np.uint8)),
        [Image.fromarray(image) for image in (array * 255).round().astype(np.uint8)],
    ]
    for form in forms:
        pictures, _ = panels(plot_maps(form, rand(2, 3, 5, 4)))
        np.testing.assert_allclose(shown(pictures[3]), array[1], atol=1e-6)


@pytest.mark.parametrize("form", ["BHW", "BHWC", "BCHW", "L"])
def test_grey_images(form):
    grey = (rand(2, 5, 4) * 255).round() / 255
    images = {
        "BHW": grey,
        "BHWC": grey[..., None].numpy(),
        "BCHW": grey[:, None],
        "L": [Image.fromarray(image) for image in (grey * 255).round().to(torch.uint8).numpy()],
    }[form]
    pictures, _ = panels(plot_maps(images, rand(2, 1, 5, 4)))
    np.testing.assert_allclose(shown(pictures[0]), grey[0].numpy()[..., None].repeat(3, -1), atol=1e-6)


def test_a_reference_has_its_own_row_on_the_same_scale():
    std = rand(2, 1, 4, 4)
    pictures, bar = panels(plot_maps(rand(2, 1, 4, 4), std, reference=2 * std, names=("tangents", "ensemble")))
    assert [axes.get_ylabel() for axes in pictures[:4]] == ["sample", "tangents", "ensemble", "overlay"]
    assert bar.get_ylim()[1] == pytest.approx(2 * np.quantile(std.numpy(), 0.99), rel=1e-5)


def test_many_samples_go_on_below():
    count = MAX_COLUMNS + 3
    figure = plot_maps(rand(count, 1, 4, 6), rand(count, 1, 4, 6), titles=[str(i) for i in range(count)])
    pictures, _ = panels(figure)
    assert len(pictures) == 3 * count
    boxes = np.array([axes.get_position().bounds for axes in pictures])
    lower, upper = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    assert lower.min() > 0
    assert upper.max() < 1
    apart = (lower[:, None] >= upper[None]) | (upper[:, None] <= lower[None])
    assert (apart.any(-1) | np.eye(len(boxes), dtype=bool)).all()  # no two panels overlap
    width, height = figure.get_size_inches() * boxes[0, 2:]
    assert width / height == pytest.approx(6 / 4)  # pixels are square


def test_zero_everywhere_is_drawn():
    pictures, _ = panels(plot_maps(rand(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)))
    np.testing.assert_allclose(shown(pictures[1]), np.broadcast_to(matplotlib.colormaps["inferno"](0.0)[:3], (4, 4, 3)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"std": rand(2, 1, 4, 5)}, ShapeError, r"2 images of 4 × 5 .* got \(2, 1, 4, 4\)"),
        ({"std": rand(3, 1, 4, 4)}, ShapeError, "3 images"),
        ({"std": rand(2, 4, 4)}, ShapeError, r"\(B, C, H, W\), got \(2, 4, 4\)"),
        ({"images": rand(2, 2, 4, 4)}, ShapeError, r"1 or 3 channels.*got \(2, 2, 4, 4\)"),
        ({"images": [Image.new("L", (5, 4))] * 2}, ShapeError, r"got \(2, 4, 5, 3\)"),
        ({"images": [Image.new("L", (4, 4)), Image.new("L", (5, 4))]}, ShapeError, "one size"),
        ({"images": ["a.png", "b.png"]}, ShapeError, "list of PIL images"),
        ({"titles": ["one"]}, ShapeError, "each of the 2 samples, got 1"),
        ({"reference": rand(2, 1, 4, 5)}, ShapeError, r"reference shaped as std \(2, 1, 4, 4\)"),
        ({"std": rand(2, 1, 4, 4) / 0}, NonFiniteError, "std"),
        ({"std": -rand(2, 1, 4, 4)}, ArgumentError, ">= 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message, tmp_path):
    path = tmp_path / "figure.png"
    with pytest.raises(error, match=message):
        plot_maps(**{"images": rand(2, 1, 4, 4), "std": rand(2, 1, 4, 4), "path": path, **change})
    assert not path.exists()


def test_the_figure_is_written_and_pyplot_is_left_alone(tmp_path):
    import matplotlib.pyplot as plt

    settings, figures = dict(matplotlib.rcParams), plt.get_fignums()
    plot_maps(rand(1, 1, 4, 4), rand(1, 1, 4, 4), path=tmp_path / "f.png")
    assert dict(matplotlib.rcParams) == settings
    assert plt.get_fignums() == figures
    with Image.open(tmp_path / "f.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 100
