"""What a model takes: the size and the channels of its images, as its configuration has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bayesdiff.data.framing import Framing
from bayesdiff.data.images import ImageData, open_images
from bayesdiff.data.labels import known_classes


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's networks by name, sorted; those of a bare network are itself."""
    if isinstance(pipe, nn.Module):
        return {"": pipe}
    parts = getattr(pipe, "components", None)
    named = dict(parts) if isinstance(parts, Mapping) else dict(getattr(pipe, "__dict__", {}))
    return {name: part for name, part in sorted(named.items()) if isinstance(part, nn.Module)}


def autoencoder(pipe: Any) -> nn.Module | None:
    """What turns images into latents and back, if the pipeline has such a thing."""
    if isinstance(pipe, nn.Module):
        return None
    return next((m for m in modules_of(pipe).values() if hasattr(m, "encode") and hasattr(m, "decode")), None)


def resolution(pipe: Any, network: nn.Module) -> tuple[int, int] | None:
    """(height, width) of the images that the model was trained on; None where its configuration does not say."""
    sample = getattr(pipe, "default_sample_size", None) or _configured(network, "sample_size")
    pair = (sample, sample) if isinstance(sample, int) else sample
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(s, int) and s > 0 for s in pair):
        return None
    vae = autoencoder(pipe)
    if vae is None:
        return pair[0], pair[1]
    blocks = _configured(vae, "block_out_channels")
    factor = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", None)
    factor = factor or (2 ** (len(blocks) - 1) if isinstance(blocks, (tuple, list)) else None)
    return None if not isinstance(factor, int) else (pair[0] * factor, pair[1] * factor)


def framing_of(
    pipe: Any,
    network: nn.Module,
    size: int | tuple[int, int] | None = None,
    value_range: tuple[float, float] | str | None = None,
    convert: bool = False,
) -> Framing:
    """How images become what ``pipe`` takes.

    Args:
        pipe: A pipeline, or the network.
        network: The denoising network.
        size: Instead of the model's :func:`resolution`, to which files and PIL images go by default; arrays are left as large as
            they are unless it is given.
        value_range: See :class:`Framing`.
        convert: See :class:`Framing`.
    """
    vae = autoencoder(pipe)
    channels = _configured(network if vae is None else vae, "in_channels")
    if vae is not None and channels not in (1, 3):
        channels = 3  # of an encoder that works on patches, or has no such number
    return Framing(size or resolution(pipe, network), channels, value_range, convert, arrays_too=size is not None)


def images_for(
    pipe: Any,
    network: nn.Module,
    images: Any,
    prompts: Any = None,
    *,
    space: str | None = None,
    size: int | tuple[int, int] | None = None,
    value_range: tuple[float, float] | str | None = None,
    convert: bool = False,
) -> ImageData:
    """Images in any of their forms, as ``pipe`` takes them, with its classes by name.

    Args:
        pipe: A pipeline, or the network.
        network: The denoising network.
        images: As of :func:`bayesdiff.data.open_images`.
        prompts: As there.
        space: ``"samples"``: what is given is a sample already, and its range is its own.
        size: See :func:`framing_of`.
        value_range: See :class:`Framing`.
        convert: See :class:`Framing`.

    Raises:
        ArgumentError, BadImagesError, EmptyDataError, ShapeError: As of :func:`bayesdiff.data.open_images`.
    """
    if space == "samples" and value_range is None:
        value_range = "as-is"
    framing = framing_of(pipe, network, size, value_range, convert)
    return open_images(images, prompts, framing, names=known_classes(pipe))


def _configured(module: nn.Module, name: str) -> Any:
    return getattr(getattr(module, "config", None), name, None)
