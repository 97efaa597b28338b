r"""From images to what a scheduler calls a sample, and the place of a pipeline's decoder in it.

Between its last sample x and the decoder a pipeline unpacks, scales, shifts: :math:`z_i = s_i x_{j(i)} + b_i`. The map is
read off with tangents of x, and its inverse takes what the encoder returns to samples. The noise of the encoder's own
posterior is drawn anew for each draw, as training draws it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import ArgumentError, ShapeError, UnsupportedPipelineError
from bayesdiff.fitting.driven import ERRORS, Watched
from bayesdiff.tracing.tail import BASE


@dataclass(frozen=True)
class Clean:
    """Clean samples of a batch: a mean, and the standard deviation of an encoder's posterior.

    Args:
        mean: ``(n, *sample)``.
        std: The same shape, or None.
    """

    mean: Tensor
    std: Tensor | None = None

    def __len__(self) -> int:
        return len(self.mean)

    def draw(self, rows: Tensor, noise: Tensor | None) -> Tensor:
        """x_0 of some rows; with standard normal numbers for each, or without."""
        rows = rows.to(self.mean.device)
        if self.std is None or noise is None:
            return self.mean[rows]
        return self.mean[rows] + self.std[rows] * noise.to(self.mean)


class Encoder:
    """Images to samples, by the pipeline's encoder and the inverse of what the pipeline does before its decoder.

    Args:
        first, second: Two plain runs of one row, with last samples of zeros and of others.
        sample: The last sample of the second.

    Raises:
        UnsupportedPipelineError: What enters the decoder is not the sample, permuted, scaled and shifted.
    """

    def __init__(self, first: Watched, second: Watched, sample: Tensor) -> None:
        z, t, x = first.entered, first.tangents, sample.double().flatten()
        if z is None or t is None or second.entered is None or first.decoder is None:
            raise UnsupportedPipelineError(
                "expected what enters the decoder to come from the last sample, got something else; encode the images, and give "
                "them as samples"
            )
        ones, low, high = t.flatten(1).double()
        safe = torch.where(ones == 0, 1.0, ones)
        index = (low / safe).round().long() + BASE * (high / safe).round().long()
        index = index.clamp(0, len(x) - 1)
        scale, shift = ones, z.double().flatten()
        again = scale * x[index] + shift
        apart = float((again - second.entered.double().flatten()).abs().max())
        allowed = 1e3 * torch.finfo(z.dtype).eps * float(again.abs().max() + shift.abs().max())
        if not apart <= allowed or len(index) != len(x) or len(index.unique()) != len(x) or bool((ones == 0).any()):
            raise UnsupportedPipelineError(
                f"expected what enters {type(first.decoder).__name__}.decode to be the last sample {tuple(sample.shape)}, "
                f"permuted, scaled and shifted, got {len(index.unique())} of {len(x)} numbers in {len(index)} places, off by up "
                f"to {apart:.2g}; encode the images, and give them as samples"
            )
        self.vae, self.latent, self.sample = first.decoder, z.shape, sample.shape
        self.dtype = z.dtype
        place = index.argsort()
        self._place, self._scale, self._shift = place, scale[place], shift[place]

    def __call__(self, images: Tensor, *, drawn: bool) -> Clean:
        """Encode images ``(n, C, H, W)``, or videos ``(n, C, F, H, W)``, in [−1, 1].

        Args:
            images: The images.
            drawn: Whether samples of the encoder's posterior will be asked for, and not its mean.
        """
        mean, std = self._encode(images)
        return Clean(
            self._sample(mean, len(images)), self._sample(std, len(images), 0.0) if drawn and std is not None else None
        )

    def encoded(self, images: Tensor) -> torch.Size:
        """What the encoder makes of these images: its shape."""
        return self._encode(images)[0].shape

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        vae = self.vae
        dtype = next(vae.parameters()).dtype
        if dtype == torch.float16 and bool(getattr(getattr(vae, "config", None), "force_upcast", False)):
            vae, dtype = copy.deepcopy(vae).float(), torch.float32  # it overflows in half precision
        x = images.to(next(vae.parameters()).device, dtype)
        if x.ndim == 4 and len(self.latent) == 5:
            x = x.unsqueeze(2)
        elif x.ndim == 5 and len(self.latent) == 4:  # frame by frame
            x = x.transpose(1, 2).flatten(0, 1)
        try:
            with torch.no_grad():
                encode: Any = vae.encode
                return _moments(encode(x))
        except torch.OutOfMemoryError:
            raise
        except ERRORS as error:
            raise ShapeError(
                f"expected images that {type(vae).__name__} encodes, got {tuple(images.shape)}; it says: {error}"
            ) from error

    def _sample(self, z: Tensor, n: int, shift: float | None = None) -> Tensor:
        flat = z.double().reshape(n, -1)
        if flat.shape[1] != len(self._place):
            raise ShapeError(
                f"expected images that are encoded to {tuple(self.latent)}, got {tuple(z.shape)} for {n} of them: images of one "
                "size, which the pipe makes, too"
            )
        moved = flat[:, self._place] - (self._shift if shift is None else shift)
        return (moved / self._scale).view(n, *self.sample[1:])


def _moments(encoded: Any) -> tuple[Tensor, Tensor | None]:
    """Mean and standard deviation of what a VAE returns; one without a posterior has no deviation."""
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is not None:
        return posterior.mode(), getattr(posterior, "std", None)
    for name in ("latents", "latent"):
        value = getattr(encoded, name, None)
        if isinstance(value, Tensor):
            return value, None
    raise UnsupportedPipelineError(
        f"expected an encoder that returns latent_dist, latents or latent, got {type(encoded).__name__}"
    )


def are_pixels(images: Tensor, vae: nn.Module | None, space: str | None) -> bool:
    """Whether data are to be encoded: they have the channels that the encoder takes, and not those that it returns.

    Raises:
        ArgumentError: It cannot be told.
    """
    if space is not None:
        return space == "pixels"
    if vae is None:
        return False
    config = getattr(vae, "config", None)
    taken = getattr(config, "in_channels", None) or 3
    if images.ndim > 3 and images.shape[1] == 3 and taken not in (1, 3):
        taken = 3  # it makes more of them itself (Mochi's Fourier features, Wan 2.2's patches)
    returned = getattr(config, "latent_channels", None) or getattr(config, "z_dim", None)
    if taken == returned and images.ndim > 2 and images.shape[1] == taken:
        raise ArgumentError(f'expected space="pixels" or "samples" where images and latents both have {taken} channels')
    return images.ndim > 3 and images.shape[1] == taken
