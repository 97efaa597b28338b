r"""What the data leave open: models of the variance of a training target about the network's output, given x_t.

    constant      one variance for all numbers of a bin of t
    tweedie       Var[g | x_t] = σ²/(αb²) (a + b ∂f/∂x), measured            (:mod:`bayesdiff.diffusion.tweedie`)
    log-linear    log σ² = βᵀφ + γᵀ(ℓ, ℓ²) for each output of the head, in the head's own features φ and the level of noise ℓ

and of the shape of the residual, r = sZ: normal, Student's t, or through the quantiles found (quantile recalibration, Kuleshov
et al. 2018). All are fitted to held-out residuals of one bin of t, and know nothing of the weights: their variance φᵀΣφ is
added.

The log-linear variance is a generalised linear model of r² (Harvey 1976; Davidian & Carroll 1987): its Fisher information
½ Σ φφᵀ does not depend on β, so one Cholesky factor serves all steps of Fisher scoring. The ridge is chosen by likelihood on
images left out, and the residuals that shapes are fitted to are those of images left out, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Generator, Tensor

from bayesdiff.calibration.heldout import Observed
from bayesdiff.calibration.shape_fits import SHAPES, fit_shape
from bayesdiff.calibration.shapes import Prediction, Shape
from bayesdiff.checks import ArgumentError, EmptyDataError, check_choice, check_finite
from bayesdiff.head.geometry import HeadGeometry

SCALES = ("constant", "tweedie", "log-linear")
#: Ridges that are tried, in those of the mean square of a standardised feature.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
#: Steps of Fisher scoring, at most, and the relative decrease of the loss that ends it.
ITERATIONS, CONVERGED = 40, 1e-8
#: The shape of what is left is found in so many parts of the images, each by a model of the others: with two, these models saw
#: half of the images, are worse than the one of all, and their residuals too wide for it.
FOLDS = 8
#: A measured variance is no less than this share of the mean squared residual.
FLOOR = 0.01
#: Levels of noise are divided by their standard deviation, or by this where they are nearly one.
NARROW = 0.05


@dataclass(frozen=True)
class Sample:
    """Some positions of held-out rows, that a noise model of one bin is fitted to.

    Args:
        phi: φ, with the constant 1 if the head has a bias, ``(n, D)``.
        residual: ``(n, C)`` float64.
        level: ``(n,)`` float64.
        image: ``(n,)``.
        tweedie: ``(n, C)``, NaN where it was not measured.
    """

    phi: Tensor
    residual: Tensor
    level: Tensor
    image: Tensor
    tweedie: Tensor

    @classmethod
    def of(cls, geometry: HeadGeometry, rows: Iterable[Observed], number: int, generator: Generator) -> Sample:
        """``number`` positions of each row, or all; where Tweedie's variance was measured, rather those.

        Raises:
            EmptyDataError: There are no rows.
        """
        parts: list[tuple[Tensor, ...]] = []
        for o in rows:
            for i in range(len(o.residual)):
                residual, tweedie = (_positions(geometry, v[i]) for v in (o.residual, o.tweedie))
                score = torch.rand(len(residual), generator=generator).to(residual.device)
                score = score + torch.isfinite(tweedie).any(1)
                chosen = score.topk(min(number, len(score))).indices
                phi = geometry.design(o.inputs[i : i + 1])[0, chosen].float()
                count = len(chosen)
                parts.append((
                    phi, residual[chosen], o.level[i].expand(count).to(residual), o.image[i].expand(count).to(phi.device),
                    tweedie[chosen],
                ))  # fmt: skip
        if not parts:
            raise EmptyDataError("expected held-out rows to fit a noise model to, got none")
        return cls(*(torch.cat(v) for v in zip(*parts, strict=True)))

    def __getitem__(self, which: Tensor) -> Sample:
        return Sample(self.phi[which], self.residual[which], self.level[which], self.image[which], self.tweedie[which])


class Scale(Protocol):
    """A variance of the residual: how it is fitted, and what it is of a row and of a sample's positions."""

    def of_rows(self, geometry: HeadGeometry, rows: Observed) -> Tensor:
        """Shaped as the residuals, float64; NaN where it is not known."""

    def of_sample(self, sample: Sample) -> Tensor:
        """``(n, C)`` float64; NaN where it is not known."""


@dataclass(frozen=True)
class Constant:
    """One variance."""

    variance: float

    @classmethod
    def fit(cls, sample: Sample) -> Constant:
        return cls(float(sample.residual.square().mean()))

    def of_rows(self, geometry: HeadGeometry, rows: Observed) -> Tensor:
        return torch.full_like(rows.residual, self.variance)

    def of_sample(self, sample: Sample) -> Tensor:
        return torch.full_like(sample.residual, self.variance)


@dataclass(frozen=True)
class Tweedie:
    """The measured variance, but no less than :data:`FLOOR` of the mean squared residual.

    Args:
        least: That floor.
        floored: The share of measurements that were below it when it was fitted.
    """

    least: float
    floored: float = 0.0

    @classmethod
    def fit(cls, sample: Sample) -> Tweedie:
        least = FLOOR * float(sample.residual.square().mean())
        known = sample.tweedie[torch.isfinite(sample.tweedie)]
        if not len(known):
            raise ArgumentError("expected measured responses for Tweedie's variance, got none: probes=0?")
        return cls(least, float((known < least).double().mean()))

    def of_rows(self, geometry: HeadGeometry, rows: Observed) -> Tensor:
        return rows.tweedie.clamp(min=self.least)

    def of_sample(self, sample: Sample) -> Tensor:
        return sample.tweedie.clamp(min=self.least)


@dataclass(frozen=True)
class LogLinear:
    r"""log σ²_c = β_cᵀφ + γ_cᵀ(1, ℓ, ℓ²), ℓ standardised.

    Args:
        weights: β, ``(C, D)`` float64.
        trend: γ, ``(C, 3)``.
        center: Mean and standard deviation of the level in the fit.
        ridge: Of :data:`RIDGES`, that was chosen.
        left_out: The variance at each position of the fit, by a model of that ridge that did not see its image but most of the
            others, ``(n, C)``.
    """

    weights: Tensor
    trend: Tensor
    center: tuple[float, float]
    ridge: float
    left_out: Tensor | None = field(default=None, repr=False, compare=False)

    @classmethod
    def fit(cls, sample: Sample) -> LogLinear:
        """By penalised likelihood; the ridge by two-fold cross-validation over images."""
        tried = []
        for ridge in RIDGES:
            found = out_of_fold(sample, lambda part, r=ridge: cls._with(part, r))  # type: ignore[misc]
            tried.append((float((found.log() + sample.residual.square() / found).mean()), ridge))
        ridge = min(tried)[1]
        left_out = out_of_fold(sample, lambda part: cls._with(part, ridge), FOLDS)
        return replace(cls._with(sample, ridge), left_out=left_out)

    @classmethod
    def _with(cls, sample: Sample, ridge: float) -> LogLinear:
        phi, square = sample.phi.double(), sample.residual.square()
        mean, std = phi.mean(0), phi.std(0, correction=0)
        varies = std > 1e-6 * phi.abs().amax(0).clamp(min=1e-30)  # not the constant 1
        std = torch.where(varies, std, 1.0)
        center = (float(sample.level.mean()), max(float(sample.level.std(correction=0)), NARROW))
        basis = _trend(sample.level, center)
        x = torch.cat([(phi - mean) / std * varies, basis], dim=1)
        penalty = torch.full((x.shape[1],), ridge * len(x), dtype=torch.float64, device=x.device)
        penalty[-3] = 0  # the mean of log σ² is free
        penalty += 1e-9 * len(x)
        factor = torch.linalg.cholesky(x.mT @ x / 2 + penalty.diag())
        theta = x.new_zeros(x.shape[1], square.shape[1])
        theta[-3] = square.mean(0).clamp(min=1e-30).log()

        def loss(theta: Tensor) -> Tensor:
            eta = x @ theta
            return 0.5 * (eta + square * (-eta).exp()).sum(0) + 0.5 * (penalty[:, None] * theta.square()).sum(0)

        value = loss(theta)
        for _ in range(ITERATIONS):
            gradient = x.mT @ (0.5 * (1 - square * (-(x @ theta)).exp())) + penalty[:, None] * theta
            step = torch.cholesky_solve(gradient, factor)
            share = torch.ones_like(value)
            for _ in range(30):  # halved where it does not descend
                trial = loss(theta - share * step)
                worse = ~(trial <= value)
                if not bool(worse.any()):
                    break
                share = torch.where(worse, share / 2, share)
            theta = torch.where(worse, theta, theta - share * step)
            before, value = value, torch.where(worse, value, trial)
            if bool(((before - value) <= CONVERGED * before.abs()).all()):
                break
        weights = (theta[:-3] * varies[:, None] / std[:, None]).mT
        trend = theta[-3:].mT.clone()
        trend[:, 0] -= weights @ mean
        return cls(weights, trend, center, ridge)

    def of_rows(self, geometry: HeadGeometry, rows: Observed) -> Tensor:
        x = rows.inputs.to(torch.promote_types(rows.inputs.dtype, torch.float32))
        eta = geometry.apply(x, self.weights[None].to(x))[0].double()
        shift = _trend(rows.level, self.center) @ self.trend.cpu().mT
        shape = (len(shift), -1, *(1,) * (eta.ndim - 2)) if geometry.kind == "conv" else (
            len(shift), *(1,) * (eta.ndim - 2), -1
        )  # fmt: skip
        return (eta + shift.to(eta).view(shape)).exp()

    def of_sample(self, sample: Sample) -> Tensor:
        return (sample.phi.double() @ self.weights.mT + _trend(sample.level, self.center) @ self.trend.mT).exp()


FITS: dict[str, Callable[[Sample], Scale]] = {
    "constant": Constant.fit, "tweedie": Tweedie.fit, "log-linear": LogLinear.fit,
}  # fmt: skip


@dataclass(frozen=True)
class Noise:
    """The noise model of one bin of t: a scale and the shape of what is left.

    Args:
        scale: The variance s².
        shape: Of Z.
    """

    scale: Scale
    shape: Shape

    def predict(self, geometry: HeadGeometry, rows: Observed, weights: Tensor) -> tuple[Prediction, Tensor]:
        """Of the residual about 0, the variance of the weights added to s².

        Args:
            geometry: Of the head.
            rows: What enters it.
            weights: φᵀΣφ, shaped as its output.

        Returns:
            The prediction of the numbers where s² is known, and which those are (shaped as the residuals).
        """
        variance = self.scale.of_rows(geometry, rows)
        known = torch.isfinite(variance)
        total = variance[known] + weights.to(variance)[known]
        return Prediction(torch.zeros_like(total), total.sqrt(), self.shape), known


def fit_noise(sample: Sample, scale: str, shapes: Sequence[str] = SHAPES) -> dict[str, Noise]:
    """Noise models of one scale with several shapes.

    Args:
        sample: Held-out residuals of one bin of t.
        scale: One of :data:`SCALES`.
        shapes: Some of :data:`SHAPES`.

    Raises:
        ArgumentError: Another name, responses that were not measured, or residuals that do not vary.
        NonFiniteError: A residual is NaN or infinite.
    """
    check_choice("scale", scale, SCALES)
    check_finite("held-out residuals", sample.residual)
    if not bool(sample.residual.square().mean() > 0):
        raise ArgumentError("expected held-out residuals that are not all 0, got zeros")
    found = FITS[scale](sample)
    left_out = found.left_out if isinstance(found, LogLinear) else None
    variance = found.of_sample(sample) if left_out is None else left_out
    known = torch.isfinite(variance)
    z = sample.residual[known] / variance[known].sqrt()
    return {shape: Noise(found, fit_shape(z, shape)) for shape in shapes}


def out_of_fold(sample: Sample, fit: Callable[[Sample], Scale], folds: int = 2) -> Tensor:
    """The variance of each part of the images by what was fitted to the other parts, ``(n, C)``."""
    images, rank = torch.unique(sample.image, return_inverse=True)
    if len(images) < 2:
        raise EmptyDataError("expected at least two images to fit a noise model to, got one")
    out = torch.empty_like(sample.residual)
    for fold in range(min(folds, len(images))):
        part = rank % folds == fold
        out[part] = fit(sample[~part]).of_sample(sample[part])
    return out


def _trend(level: Tensor, center: tuple[float, float]) -> Tensor:
    z = (level - center[0]) / center[1]
    return torch.stack([torch.ones_like(z), z, z.square()], dim=-1)


def _positions(geometry: HeadGeometry, row: Tensor) -> Tensor:
    """One row of the head's output, ``(positions, C)``."""
    return row.flatten(1).mT if geometry.kind == "conv" else row.reshape(-1, row.shape[-1])
