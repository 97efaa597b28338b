"""Bytes to the network's range, crops, and what cannot be right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from bayesdiff.checks import ArgumentError, NonFiniteError, ShapeError
from bayesdiff.data import Framing
from tests.data.conftest import pictures, pixels


def test_bytes_become_minus_one_to_one():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    out = Framing(channels=1).picture(Image.fromarray(ramp))
    assert out.shape == (1, 16, 16)
    assert out.dtype == torch.float32
    torch.testing.assert_close(
        out.double(), torch.linspace(-1, 1, 256, dtype=torch.float64).view(1, 16, 16), atol=1e-7, rtol=0
    )


def test_rows_and_columns_stay_where_they_are():
    image = pictures(n=1)[0]
    out = Framing(channels=3).picture(image)
    assert out.shape == (3, 12, 16)
    for row, column in ((0, 0), (3, 7), (11, 15)):
        expected = torch.tensor(image.getpixel((column, row))) / 127.5 - 1
        torch.testing.assert_close(out[:, row, column], expected.float())


def test_the_crop_is_the_middle_of_what_is_wide_or_high():
    array = np.zeros((8, 24, 3), np.uint8)
    array[:, 8:16] = 200
    wide, high = Image.fromarray(array), Image.fromarray(array.transpose(1, 0, 2))
    for image in (wide, high):
        out = Framing(size=8, channels=3).picture(image)
        assert torch.equal(out, torch.full((3, 8, 8), 200 / 127.5 - 1))


def test_resizing_is_lanczos():
    image = pictures(n=1, height=24, width=24)[0]
    out = Framing(size=8, channels=3).picture(image)
    expected = np.asarray(image.resize((8, 8), Image.Resampling.LANCZOS)).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-6)


def test_arrays_are_resized_as_pictures_are():
    array = pixels(n=2, height=24, width=30)
    framing = Framing(size=(8, 10), channels=3)
    expected = torch.stack([framing.picture(Image.fromarray(a)) for a in array])
    assert torch.equal(framing.arrays("images", array), expected)
    floats = torch.from_numpy(array).movedim(-1, 1).float() / 127.5 - 1
    torch.testing.assert_close(
        framing.arrays("images", floats), expected, atol=0.011, rtol=0
    )  # bytes are rounded, twice
    left = Framing(size=8, channels=3, arrays_too=False)
    assert left.arrays("images", floats).shape == (2, 3, 24, 30)


def test_photographs_are_turned_as_their_tag_says(tmp_path):
    array = pixels(n=1, height=12, width=16)[0]
    image = Image.fromarray(array)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        assert Framing(size=(16, 13), channels=3).problem(turned) == "12 × 16, smaller than 13 × 16"
        out = Framing(channels=3).picture(turned)
    expected = torch.from_numpy(np.rot90(array, -1).copy()).movedim(-1, 0) / 127.5 - 1
    torch.testing.assert_close(out, expected)


MODES = {
    "grey": (lambda: Image.new("L", (8, 8)), "grey, expected coloured"),
    "transparent": (lambda: Image.new("RGBA", (8, 8)), "with transparency"),
    "palette": (lambda: Image.new("P", (8, 8)), "a palette"),
    "cmyk": (lambda: Image.new("CMYK", (8, 8)), "CMYK"),
    "16-bit": (lambda: Image.new("I;16", (8, 8)), "of mode I;16"),
    "small": (lambda: Image.new("RGB", (8, 7)), "8 × 7, smaller than 8 × 8"),
}


@pytest.mark.parametrize("name", MODES)
def test_what_pictures_cannot_be(name):
    make, message = MODES[name]
    image = make()
    framing = Framing(size=8, channels=3)
    assert message in framing.problem(image)
    converted = Framing(size=8, channels=3, convert=True).problem(image)
    assert (converted is None) == (name not in ("16-bit", "small"))
    if converted is None:
        assert Framing(size=8, channels=3, convert=True).picture(image).shape == (3, 8, 8)


def test_transparent_pictures_are_put_on_white():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    out = Framing(channels=3, convert=True).picture(half)
    expected = torch.tensor([255, 127, 127]) / 127.5 - 1
    torch.testing.assert_close(out[:, 0, 0], expected)
    assert float(Framing(channels=3, convert=True).picture(Image.new("RGBA", (4, 4), (0, 0, 0, 0))).min()) == 1


def test_animations_are_not_cut_to_their_first_frame(tmp_path):
    first, second = pictures(n=2)
    first.save(tmp_path / "two.gif", save_all=True, append_images=[second])
    with Image.open(tmp_path / "two.gif") as image:
        assert "2 frames" in Framing(channels=3, convert=True).problem(image)


def test_the_range_is_asked_about():
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = Framing(channels=3)
    with pytest.raises(ArgumentError, match=r"no negative number in 4 of them.*value_range=\(0, 1\)"):
        plain.check_range("images", x)
    with pytest.raises(ArgumentError, match=r"in \[-1, 1\], got .*value_range=\(0, 255\) if they are bytes"):
        plain.check_range("images", x * 255)
    with pytest.raises(ArgumentError, match=r"in \[-1, 1\]"):
        plain.arrays("images", x * 3 - 1.5)
    plain.check_range("images", x * 2 - 1)
    torch.testing.assert_close(Framing(channels=3, value_range=(0, 1)).arrays("images", x), 2 * x - 1)
    torch.testing.assert_close(
        Framing(channels=3, value_range=(0, 255)).arrays("images", x * 255), 2 * x - 1, atol=1e-6, rtol=0
    )
    confirmed = Framing(channels=3, value_range=(-1, 1))
    confirmed.check_range("images", x)
    torch.testing.assert_close(confirmed.arrays("images", x), x)
    with pytest.raises(ArgumentError, match=r"in \[0, 1\], got"):
        Framing(channels=3, value_range=(0, 1)).arrays("images", 2 * x)


def test_latents_have_no_range():
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)).abs() * 5
    Framing(channels=3).check_range("images", x)
    assert torch.equal(Framing(channels=3).arrays("images", x), x)
    three = x[:, :3]
    assert torch.equal(Framing(channels=3, value_range="as-is").arrays("images", three), three)


def test_integers_that_are_no_bytes_are_asked_about():
    x = torch.arange(48).view(1, 3, 4, 4)
    with pytest.raises(ArgumentError, match=r"got torch.int64; say value_range"):
        Framing(channels=3).arrays("images", x)
    out = Framing(channels=3, value_range=(0, 47)).arrays("images", x)
    assert (float(out.min()), float(out.max())) == (-1, 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"size": 0}, "size >= 1"), ({"size": (8, 8, 8)}, "one number or"), ({"size": "big"}, "an integer"),
     ({"value_range": (1, 0)}, "least, largest"), ({"value_range": "bytes"}, "least, largest"),
     ({"value_range": (0, float("nan"))}, "least, largest"), ({"value_range": 3}, "least, largest")],
)  # fmt: skip
def test_settings_are_checked(kwargs, message):
    with pytest.raises(ArgumentError, match=message):
        Framing(**kwargs)


def test_arrays_are_checked():
    x = torch.zeros(2, 3, 8, 8)
    x[1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="1 NaN"):
        Framing(channels=3).arrays("images", x)
    with pytest.raises(ShapeError, match="at least 16 × 16"):
        Framing(size=16, channels=3).arrays("images", x.nan_to_num())
    with pytest.raises(ShapeError, match="1 or 3 channels"):
        Framing(channels=3).arrays("images", np.zeros((2, 8, 8, 4), np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_where_arrays_have_their_channels(channels):
    array = pixels(n=3, channels=channels)
    last = torch.from_numpy(array).movedim(-1, 1).float() / 127.5 - 1
    forms = [array, np.ascontiguousarray(array.transpose(0, 3, 1, 2)), torch.from_numpy(array).movedim(-1, 1)]
    if channels == 1:
        forms.append(array[..., 0])
    for form in forms:
        assert torch.equal(Framing(channels=channels).arrays("images", form), last)
