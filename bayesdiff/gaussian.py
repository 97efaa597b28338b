"""What the layers of the package hand to one another: a Gaussian with a diagonal covariance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.checks import NegativeVarianceError, ShapeError


@dataclass(frozen=True, repr=False)
class Gaussian:
    r"""Independent Gaussians :math:`\mathcal N(\mu_i, \sigma_i^2)`, one for each element of a tensor.

    Args:
        mean: :math:`\mu`, any shape.
        variance: :math:`\sigma^2 \ge 0`, the shape of ``mean``, in the square of its units.

    Raises:
        ShapeError: The two shapes differ.
        NegativeVarianceError: A variance is negative or NaN. It is never clamped.
    """

    mean: Tensor
    variance: Tensor

    def __post_init__(self) -> None:
        if self.mean.shape != self.variance.shape:
            raise ShapeError(
                f"expected a mean and a variance of one shape, got {tuple(self.mean.shape)} and "
                f"{tuple(self.variance.shape)}"
            )
        bad = ~(self.variance >= 0)
        if bool(bad.any()):
            raise NegativeVarianceError(
                f"expected variances >= 0, got {int(bad.sum())} of {bad.numel()} negative or NaN "
                f"(least: {self.variance.nan_to_num(nan=float('-inf')).min().item():.3g})"
            )

    def __repr__(self) -> str:
        """One line, no tensors."""
        shape, variance = tuple(self.mean.shape), self.variance.double().mean().item()
        return f"Gaussian({shape}, mean variance {variance:.3g})"

    @property
    def std(self) -> Tensor:
        """Standard deviation, the shape and units of ``mean``."""
        return self.variance.sqrt()

    @property
    def shape(self) -> torch.Size:
        return self.mean.shape

    def __getitem__(self, index: object) -> Gaussian:
        """The Gaussian of the elements that ``index`` selects."""
        return Gaussian(self.mean[index], self.variance[index])  # type: ignore[index]

    def __iter__(self) -> Iterator[Tensor]:
        """``mean, variance = gaussian``."""
        yield self.mean
        yield self.variance

    def __len__(self) -> int:
        return len(self.mean)
