r"""Is a predictive distribution right? Scores of predictions against what came, as ``torchmetrics.Metric`` classes.

All are streaming and can be merged (``merge_state``) or synchronised over processes: their states are sums, counts or lists. A
prediction is a :class:`bayesdiff.Gaussian` or a :class:`bayesdiff.calibration.Prediction`, the target a tensor of its shape.

=============================  ================================================================================
:class:`GaussianNLL`           −log f(y), nats for each number (of any predicted density)
:class:`CRPS`                  ∫ (F(x) − 1{x ≥ y})² dx, in units of y
:class:`IntervalCoverage`      how often y lies in the central interval of a level, and how wide that is
:class:`PITHistogram`          the histogram of F(y), flat if F is right
:class:`ENCE`                  how far the predicted spread is from the error, in bins of predicted spread
:class:`Sharpness`             the predicted spread itself
=============================  ================================================================================

Scores of an uncertainty against an error, which ask for its order only, are in :mod:`bayesdiff.calibration.ranking`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from bayesdiff.calibration.shapes import Prediction
from bayesdiff.checks import ArgumentError, EmptyDataError, ShapeError, check_finite, check_int
from bayesdiff.gaussian import Gaussian

#: Cells of an octave of the predicted variance, in which :class:`ENCE` keeps its sums.
CELLS = 32
#: Variances that it takes lie between 2^−100 and 2^100.
OCTAVES = 100


class _Score(Metric):
    """A metric of predictions."""

    full_state_update = False
    is_differentiable = False
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._zeros("count")

    def _zeros(self, name: str, *size: int) -> None:
        """A state that is summed over processes; float64, as sums of many numbers are."""
        self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def _number(self) -> Tensor:
        """How many numbers there were.

        Raises:
            EmptyDataError: None.
        """
        if not bool(self.count > 0):
            raise EmptyDataError(
                f"expected predictions before {type(self).__name__} is computed, got none; update it first"
            )
        return self.count


def _checked(prediction: Gaussian | Prediction, target: Tensor) -> tuple[Prediction, Tensor]:
    given = Prediction.of(prediction)
    if not isinstance(target, Tensor):
        raise ArgumentError(f"expected the target as a tensor, got {type(target).__name__}")
    if given.location.shape != target.shape:
        raise ShapeError(
            f"expected a target of the prediction's shape {tuple(given.location.shape)}, got {tuple(target.shape)}"
        )
    check_finite("predicted means", given.location)
    check_finite("predicted spreads", given.scale)
    return given, check_finite("targets", target)


class GaussianNLL(_Score):
    r"""The mean negative log-likelihood in nats, of a Gaussian :math:`\tfrac12\log 2\pi\sigma^2 + (y-\mu)^2/2\sigma^2`.

    Of a :class:`Prediction` it is −log of that density. A difference of two is how much better one predicts.
    """

    higher_is_better = False
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._zeros("total")

    def update(self, prediction: Gaussian | Prediction, target: Tensor) -> None:
        """Add predictions and what came, of one shape."""
        given, target = _checked(prediction, target)
        self.total += self._values(given, target).sum()
        self.count += target.numel()

    @staticmethod
    def _values(given: Prediction, target: Tensor) -> Tensor:
        return -given.log_density(target)

    def compute(self) -> Tensor:
        """The mean, float64."""
        return self.total / self._number()


class CRPS(GaussianNLL):
    r"""The mean continuous ranked probability score, in the units of y (Gneiting & Raftery 2007): |y − μ| without a spread."""

    @staticmethod
    def _values(given: Prediction, target: Tensor) -> Tensor:
        return given.crps(target)


class IntervalCoverage(_Score):
    """How often y lies in the central interval of nominal probability p, and the mean width of that interval.

    Args:
        levels: Nominal probabilities p in (0, 1).
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ArgumentError: A level is not in (0, 1).
    """

    inside: Tensor
    total_width: Tensor

    def __init__(self, levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.levels = tuple(float(v) for v in levels)
        if not self.levels or not all(0 < v < 1 for v in self.levels):
            raise ArgumentError(f"expected levels in (0, 1), got {levels!r}")
        self._zeros("inside", len(self.levels))
        self._zeros("total_width", len(self.levels))

    def update(self, prediction: Gaussian | Prediction, target: Tensor) -> None:
        """Add predictions and what came, of one shape."""
        given, target = _checked(prediction, target)
        y = target.double()
        for i, level in enumerate(self.levels):
            low, high = given.interval(level)
            self.inside[i] += ((low <= y) & (y <= high)).sum()
            self.total_width[i] += (high - low).sum()
        self.count += target.numel()

    def compute(self) -> dict[str, Tensor]:
        """``coverage`` and ``width``, one number for each level; widths in the units of y."""
        number = self._number()
        return {"coverage": self.inside / number, "width": self.total_width / number}


class PITHistogram(_Score):
    """The histogram of the probability integral transform F(y): flat at 1 if F is right, a U if too narrow, a hump if too wide.

    Args:
        bins: Of equal width on [0, 1].
        kwargs: Of ``torchmetrics.Metric``.
    """

    counts: Tensor

    def __init__(self, bins: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = check_int("bins", bins, least=1)
        self._zeros("counts", self.bins)

    def update(self, prediction: Gaussian | Prediction, target: Tensor) -> None:
        """Add predictions and what came, of one shape."""
        given, target = _checked(prediction, target)
        place = (given.cdf(target) * self.bins).long().clamp(max=self.bins - 1)  # F(y) = 1 belongs to the last
        self.counts += torch.bincount(place.flatten(), minlength=self.bins)
        self.count += target.numel()

    def compute(self) -> Tensor:
        """The density in each bin, ``(bins,)``, of mean 1."""
        return self.counts * self.bins / self._number()


class ENCE(_Score):
    r"""The expected normalised calibration error (Levi et al. 2022): is the spread as large as the error, in all places?

    .. math:: \frac1B\sum_b \frac{|\mathrm{RMV}_b - \mathrm{RMSE}_b|}{\mathrm{RMV}_b},

    over B bins of equally many predictions, in the order of their predicted variance; RMV² is their mean variance and RMSE²
    their mean squared error about the predicted mean. Sums are kept in cells of 1/32 octave of the variance, so bins are of equal
    size up to a cell. One variance for all makes one bin. Chance alone makes it about √(1/πn), n numbers in a bin.

    Args:
        bins: B.
        kwargs: Of ``torchmetrics.Metric``.
    """

    higher_is_better = False
    sums: Tensor

    def __init__(self, bins: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = check_int("bins", bins, least=1)
        self._zeros("sums", 3, 2 * OCTAVES * CELLS)

    def update(self, prediction: Gaussian | Prediction, target: Tensor) -> None:
        """Add predictions and what came, of one shape.

        Raises:
            ArgumentError: A predicted variance is infinite, or of no size that is met: below 2^−100 or above 2^100.
        """
        given, target = _checked(prediction, target)
        variance = given.variance.flatten()
        mantissa, exponent = torch.frexp(variance)
        if not bool((torch.isfinite(variance) & (exponent >= -OCTAVES) & (exponent < OCTAVES)).all()):
            raise ArgumentError(
                f"expected predicted variances between 2^−{OCTAVES} and 2^{OCTAVES}, got some from {float(variance.min()):.3g} "
                f"to {float(variance.max()):.3g} (Student's t with ν ≤ 2 has none)"
            )
        cell = (exponent.long() + OCTAVES) * CELLS + ((mantissa - 0.5) * (2 * CELLS)).long()
        error = (target.double().flatten() - given.mean.flatten()).square()
        for row, values in zip(self.sums, (torch.ones_like(variance), variance, error), strict=True):
            row.index_add_(0, cell, values)
        self.count += target.numel()

    def compute(self) -> Tensor:
        """The error, float64; 0 is best."""
        rmv, rmse = self.curve()
        return ((rmv - rmse).abs() / rmv).mean()

    def curve(self) -> tuple[Tensor, Tensor]:
        """RMV and RMSE of each bin that is not empty, of rising variance: the reliability diagram."""
        number = self._number()
        counts = self.sums[0]
        middle = (counts.cumsum(0) - counts / 2) / number
        place = (middle * self.bins).long().clamp(max=self.bins - 1)
        binned = self.sums.new_zeros(3, self.bins).index_add_(1, place, self.sums)
        count, variance, error = binned[:, binned[0] > 0]
        return (variance / count).sqrt(), (error / count).sqrt()


class Sharpness(_Score):
    """How narrow predictions are, whatever comes: the root of their mean variance and the mean of their std, in units of y."""

    variance: Tensor
    std: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._zeros("variance")
        self._zeros("std")

    def update(self, prediction: Gaussian | Prediction) -> None:
        """Add predictions."""
        given = Prediction.of(prediction)
        variance = check_finite("predicted variances", given.variance)
        self.variance += variance.sum()
        self.std += variance.sqrt().sum()
        self.count += variance.numel()

    def compute(self) -> dict[str, Tensor]:
        """``rms`` and ``mean``."""
        number = self._number()
        return {"rms": (self.variance / number).sqrt(), "mean": self.std / number}
