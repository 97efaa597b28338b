r"""One image, whatever it comes as, to a float32 tensor ``(C, H, W)`` in the network's range [−1, 1].

Images are cropped in the middle to the wanted aspect ratio and resized with Lanczos's filter. 8-bit numbers are mapped by
x/127.5 − 1. What floating-point numbers mean cannot be seen from one of them, so a range that cannot be right is an error,
and ``value_range`` says what is right.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bayesdiff.checks import ArgumentError, ShapeError, check_finite, check_int

#: What PIL raises on files that are damaged, or no images at all.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
AS_IS = "as-is"
_MODES = {1: "L", 3: "RGB"}
_WORDS = {
    "1": "black and white", "L": "grey", "LA": "grey with transparency", "P": "a palette", "PA": "a palette with transparency",
    "RGBA": "with transparency (RGBA)", "CMYK": "CMYK", "RGB": "coloured",
}  # fmt: skip
_SLACK = 0.01  # of the range: what a filter that overshoots leaves


@dataclass(frozen=True)
class Framing:
    """How images become what the network takes.

    Args:
        size: (height, width), or one number for both; None leaves images as large as they are.
        channels: Of the network's images, 1 or 3; None takes 3 for files and PIL images, and arrays as they are.
        value_range: Of arrays: (least, largest), which become −1 and 1, or ``"as-is"`` for numbers that are in the network's
            space already. By default 8-bit numbers are 0 to 255, and floating-point ones are −1 to 1 and must look so.
        convert: Turn grey, palette and CMYK images into what the network takes, and put transparent ones on white. Without it
            these are errors.
        arrays_too: Whether ``size`` is asked of arrays, too, or of files and PIL images only.

    Raises:
        ArgumentError: An argument is out of range.
    """

    size: int | tuple[int, int] | None = None
    channels: int | None = None
    value_range: tuple[float, float] | str | None = None
    convert: bool = False
    arrays_too: bool = True

    def __post_init__(self) -> None:
        if self.size is not None:
            pair = self.size if isinstance(self.size, (tuple, list)) else (self.size, self.size)
            if len(pair) != 2:
                raise ArgumentError(f"expected size as one number or (height, width), got {self.size!r}")
            object.__setattr__(self, "size", tuple(check_int("size", s, least=1) for s in pair))
        if self.value_range is None or (isinstance(self.value_range, str) and self.value_range == AS_IS):
            return
        try:
            low, high = (float(v) for v in self.value_range)
        except (TypeError, ValueError):
            low, high = 0.0, 0.0
        if not (low < high and np.isfinite([low, high]).all()):
            raise ArgumentError(
                f"expected value_range as (least, largest) or {AS_IS!r}, such as (0, 1), got {self.value_range!r}"
            )
        object.__setattr__(self, "value_range", (low, high))

    @property
    def mode(self) -> str | None:
        """PIL's name for the network's channels; None where PIL has no images of so many."""
        return _MODES.get(3 if self.channels is None else self.channels)

    # PIL images and files

    def problem(self, image: Image.Image) -> str | None:
        """Why this image cannot be used, or None if it can."""
        width, height = image.size
        if self.mode is None:
            return f"an image, where the network takes {self.channels} channels: give arrays or tensors"
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # a photograph, then its preview
            return f"{frames} frames, expected one"
        if image.mode != self.mode:
            kind = _WORDS.get(image.mode, f"of mode {image.mode}")
            if image.mode not in _WORDS:
                return f"{kind}, expected {_WORDS[self.mode]}"
            if not self.convert:
                return f"{kind}, expected {_WORDS[self.mode]} (convert=True converts it)"
        elif "transparency" in image.info and not self.convert:
            return "with a transparent colour, expected none (convert=True puts it on white)"
        if self.size is not None:
            if _turned(image):
                width, height = height, width
            if height < self.size[0] or width < self.size[1]:  # type: ignore[index]
                return f"{width} × {height}, smaller than {self.size[1]} × {self.size[0]}"  # type: ignore[index]
        return None

    def picture(self, image: Image.Image) -> Tensor:
        """A PIL image without a :meth:`problem` as ``(C, H, W)`` in [−1, 1], turned as its EXIF tag says."""
        assert self.mode is not None
        image = ImageOps.exif_transpose(image)
        if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode != self.mode:
            image = image.convert(self.mode)
        if self.size is not None:
            height, width = self.size  # type: ignore[misc]
            image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        array = np.array(image, dtype=np.uint8)
        return _bytes(torch.from_numpy(array if array.ndim == 3 else array[..., None]).movedim(-1, 0))

    # Arrays and tensors

    def array(self, name: str, value: Any) -> Tensor:
        """One image as ``(C, H, W)``, from a tensor ``(C, H, W)`` or an array ``(H, W, C)``, ``(H, W)`` or ``(C, H, W)``."""
        return self.arrays(name, value[None])[0]

    def arrays(self, name: str, value: Any) -> Tensor:
        """As :meth:`array`, of a batch. Ranges are checked by :meth:`check_range`, which must have seen more than one image.

        Raises:
            ShapeError: It has no axis of the network's channels, or images are smaller than ``size``.
            ArgumentError: Numbers are outside of ``value_range``, or of a type whose range is not known.
            NonFiniteError: Some are NaN or infinite.
        """
        x = _channels_first(value, self.channels)
        if x.dtype == torch.uint8 and self.value_range is None:
            if x.ndim == 4 and x.shape[1] not in _MODES:
                raise ShapeError(
                    f"expected {name} of 1 or 3 channels where numbers are 8-bit, got {x.shape[1]} in {tuple(value.shape)}"
                )
            return _bytes(self._sized(name, x))
        if not x.is_floating_point() and self.value_range is None:
            raise ArgumentError(
                f"expected {name} as floating-point numbers in the network's space (pixels in [-1, 1]) or as uint8, got "
                f"{x.dtype}; say value_range=(least, largest) for other integers"
            )
        check_finite(name, x)
        if isinstance(self.value_range, tuple):
            low, high = self.value_range
            self._inside(name, x, low, high)
            x = (x.double() - low) * (2 / (high - low)) - 1
            return self._sized(name, x.float())
        if self.value_range is None and _pixels(x):
            self._inside(name, x, -1.0, 1.0)
        return self._sized(name, x)

    def check_range(self, name: str, value: Any) -> None:
        """That floating-point images can be in [−1, 1]: among several there is a negative number.

        Raises:
            ArgumentError: All are in [0, 1], or some are outside of [−1, 1].
        """
        if self.value_range is not None:
            return
        x = _channels_first(value, self.channels)
        if not x.is_floating_point() or not _pixels(x) or not x.numel():
            return
        check_finite(name, x)
        self._inside(name, x, -1.0, 1.0)
        least, largest = float(x.min()), float(x.max())
        if least >= 0 and largest > least:
            raise ArgumentError(
                f"expected {name} in [-1, 1], got no negative number in {len(x)} of them ({least:.3g} to {largest:.3g}): say "
                "value_range=(0, 1) if 0 is black and 1 is white, or value_range=(-1, 1) if they are right as they are"
            )

    def _inside(self, name: str, x: Tensor, low: float, high: float) -> None:
        if not x.numel():
            return
        least, largest = float(x.min()), float(x.max())
        slack = _SLACK * (high - low)
        if low - slack <= least and largest <= high + slack:
            return
        guess = " or value_range=(0, 255) if they are bytes" if least >= 0 and 2 < largest <= 255 else ""
        raise ArgumentError(
            f"expected {name} in [{low:g}, {high:g}], got {least:.4g} to {largest:.4g}: say "
            f"value_range=(least, largest) for what is black and white{guess}, or "
            f"value_range={AS_IS!r} if they are in the network's space (latents)"
        )

    def _sized(self, name: str, x: Tensor) -> Tensor:
        if self.size is None or not self.arrays_too or x.ndim != 4 or tuple(x.shape[2:]) == self.size:
            return x
        height, width = self.size  # type: ignore[misc]
        if x.shape[2] < height or x.shape[3] < width:
            raise ShapeError(
                f"expected {name} of at least {height} × {width} (height × width), got {x.shape[2]} × {x.shape[3]}; size=… "
                "makes images smaller, never larger"
            )
        planes = [
            np.asarray(ImageOps.fit(Image.fromarray(plane.numpy()), (width, height), Image.Resampling.LANCZOS))
            for plane in (x if x.dtype == torch.uint8 else x.float()).flatten(0, 1)
        ]
        sized = torch.from_numpy(np.stack(planes)).view(*x.shape[:2], height, width)
        if x.dtype == torch.uint8 or self.value_range == AS_IS or not _pixels(x):
            return sized
        return sized.clamp(-1, 1)  # the filter overshoots at edges, which PIL cuts off for bytes, too


def _bytes(x: Tensor) -> Tensor:
    return x.float() / 127.5 - 1


def _pixels(x: Tensor) -> bool:
    """Whether a batch can be one of pixels. What has other channels is latents, which have no range."""
    return x.ndim >= 4 and x.shape[1] in _MODES


def _turned(image: Image.Image) -> bool:
    return image.getexif().get(0x0112, 1) in (5, 6, 7, 8)


def _channels_first(value: Any, channels: int | None) -> Tensor:
    """A batch with its channels second. Tensors have them there; arrays may have them last, or none if there is one."""
    if isinstance(value, Tensor):
        if value.ndim == 3 and value.dtype == torch.uint8 and channels == 1:
            return value[:, None].cpu()
        return value.cpu()
    array = np.array(value)  # a copy: arrays of PIL and of files cannot be written to
    try:
        x = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except TypeError as error:
        raise ArgumentError(f"expected images as arrays of numbers, got {array.dtype} {array.shape}") from error
    if x.ndim == 3 and x.dtype == torch.uint8 and channels in (1, None):
        return x[:, None]
    wanted = tuple(_MODES) if channels is None else (channels,)
    if (
        x.ndim == 4
        and x.shape[1] not in wanted
        and (x.shape[3] in wanted or (x.dtype == torch.uint8 and x.shape[3] <= 4))
    ):
        return x.movedim(-1, 1)
    return x
