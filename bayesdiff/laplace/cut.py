r"""From sums to the fields of a posterior: noise, weights over timesteps, prior, precision, gradients, and Σ.

Everything here is cheap beside the pass over the data, so one set of sums serves every structure, covariance, prior and noise.

What the loss was (its weights over t, ψ instead of r) enters the *sandwich* only: H and the scores. Noise variances, the
evidence, the prior that it chooses, the GGN and the EF are those of the likelihood: Gaussian residuals of variance σ_t²,
whatever the loss. Each of the N·M draws that the training saw is an observation of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import (
    ArgumentError,
    EmptyDataError,
    NotPositiveDefiniteError,
    check_choice,
    check_finite,
    check_int,
)
from bayesdiff.diffusion.weighting import WEIGHTINGS
from bayesdiff.laplace.covariance import amplification
from bayesdiff.laplace.evidence import evidence_noise, evidence_prior_precision
from bayesdiff.laplace.loss import Loss, Squares
from bayesdiff.laplace.statistics import Statistics
from bayesdiff.laplace.structure import COVARIANCES, STRUCTURES, build
from bayesdiff.laplace.training import Scores, check_training_draws, score_factor


def cut(
    statistics: Statistics, mean: Tensor, *, structure: str, covariance: str, rank: int | None, tolerance: float, **settings: Any
) -> dict[str, Any]:  # fmt: skip
    """The fields of a posterior that come from the data, by name.

    Arguments and errors are those of :meth:`bayesdiff.LaplacePosterior.from_statistics`.
    """
    try:
        parts = _parts(statistics, mean, structure=structure, covariance=covariance, **settings)
        precision = parts["precision"]
        sigma = build(
            structure, covariance, precision, parts.pop("scores"), parts["prior_precision"], rank, tolerance
        )  # fmt: skip
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NotPositiveDefiniteError(
            "expected sums whose eigenvalues can be found in float64, got sums so ill-conditioned that they cannot; look at "
            "the features, some are larger than others by many powers of ten"
        ) from error
    return {**parts, "sigma": sigma, "amplification": amplification(sigma, precision)}


def _parts(
    statistics: Statistics,
    mean: Tensor,
    *,
    structure: str,
    covariance: str,
    prior_precision: float | Tensor | str | None,
    noise_variance: float | Tensor | str,
    loss_weights: str | Tensor,
    dataset_size: int | None,
    training_draws: float | None = None,
) -> dict[str, Any]:
    """What Σ is made of, and the other fields."""
    check_settings(
        len(mean), statistics.num_bins, structure=structure, covariance=covariance, prior_precision=prior_precision,
        noise_variance=noise_variance, loss_weights=loss_weights, dataset_size=dataset_size, training_draws=training_draws,
    )  # fmt: skip
    check_scores(covariance, statistics.loss, statistics.weighted)
    if statistics.weighted and not (isinstance(loss_weights, str) and loss_weights == "uniform"):
        raise ArgumentError(
            f"expected loss_weights to be left as they are, got {loss_weights}: the statistics were made with "
            "weights of each draw"
        )
    n = statistics.num_images
    if not n:
        raise EmptyDataError("expected at least one image to fit to, got none")
    for name, sums in statistics.sums().items():
        check_finite(name, sums, "features or residuals are too large even for float64: scale the data")
    noise = statistics.noise_variance()
    if not bool((noise > 0).all()):
        raise ArgumentError("expected residuals that do not vanish, got a noise variance of 0 in some timestep bin")
    size = n if dataset_size is None else check_int("dataset_size", dataset_size, least=1)
    training_draws = None if training_draws is None else check_training_draws(training_draws)
    if size < n:
        raise ArgumentError(f"expected dataset_size >= the {n} images fitted to, got {size}")
    draws = statistics.num_draws / n
    # From the draws here to the draws of the training: N·M instead of n·m.
    scale = size / n * (1 if training_draws is None else training_draws / draws)
    diagonal = structure == "diag"
    count = statistics.positions * statistics.trained_channels
    squares = statistics.squared_residuals.sum(1)

    def choose_prior(precision: Tensor) -> Tensor:
        spectrum = precision.diagonal() if diagonal else torch.linalg.eigvalsh(precision)
        return _prior(prior_precision, spectrum[None].cpu(), mean)

    if not isinstance(noise_variance, str):
        noise = torch.as_tensor(noise_variance).to(noise).expand(noise.shape).clone()
    elif noise_variance == "evidence":
        noise, _ = evidence_noise(
            scale * statistics.gram, scale * squares, scale * count, mean.to(noise), noise, choose_prior,
            diagonal=diagonal,
        )  # fmt: skip
    weights = 1 / noise
    if covariance == "sandwich":
        pooled = statistics.pooled_variance()
        if not 0 < pooled < math.inf:
            raise ArgumentError(
                "expected a loss that some draws have a weight in, got the weight 0 (or no curvature) for all of them; look at "
                "loss_weights"
            )
        weights = _loss_weights(loss_weights, noise, pooled)
    curvature = statistics.loss_curvature if covariance == "sandwich" else statistics.precision
    precision = scale * curvature(weights)
    by_image = None if covariance == "ggn" else statistics.scores_by_image(weights)
    if covariance == "sandwich" and by_image is not None:  # the empirical Fisher is what it is about 0
        by_image = by_image.centred()
    scores, cut_share = _scores(by_image, precision, training_draws, len(mean))
    scores = scores * math.sqrt(size)
    full = precision
    if diagonal:
        precision = precision.diagonal(dim1=-2, dim2=-1).clone()
        scores = scores.square().sum(0, keepdim=True).sqrt()
    elif len(scores) > scores.shape[1] * scores.shape[2]:
        # More images than weights: the triangular factor has the same Gram matrix and fewer rows.
        scores = torch.linalg.qr(scores.flatten(1), mode="r").R.unflatten(1, scores.shape[1:])
    spectrum = _spectrum(statistics, covariance, scores, scale, noise, diagonal=diagonal)
    if covariance == "ggn":
        scores = scores[:0]
    log_likelihood = -0.5 * scale * float((squares / noise + count * torch.log(2 * math.pi * noise)).sum())
    tau = _prior(prior_precision, spectrum.cpu(), mean)
    origins = full.new_zeros(0, 2)
    if covariance == "sandwich" and by_image is not None and by_image.degrees:
        origins = _origins(statistics, by_image, full, tau.to(full), training_draws or draws) * size
    return {
        "precision": precision.cpu().contiguous(), "spectrum": spectrum.cpu().contiguous(), "scores": scores.cpu().contiguous(),
        "prior_precision": tau, "weights": weights.cpu(),
        "noise_variance": noise.cpu(), "log_likelihood": log_likelihood, "num_images": n, "dataset_size": size,
        "draws_per_image": draws, "training_draws": training_draws, "origins": origins.cpu(), "cut_share": cut_share,
    }  # fmt: skip


def _scores(
    by_image: Scores | None, precision: Tensor, training_draws: float | None, channels: int
) -> tuple[Tensor, float]:
    """A factor of the covariance of an image's summed score over M draws, ``(R, C, D)``; the share that was cut."""
    if by_image is None:
        return precision.new_zeros(0, channels, precision.shape[-1]), 0.0
    if training_draws is None:
        return by_image.summed() / math.sqrt(len(by_image.counts)), 0.0
    metric = precision if precision.ndim == 2 else precision.mean(0)
    factor, share = score_factor(by_image, training_draws, metric)
    return factor * training_draws, share


def _origins(statistics: Statistics, scores: Scores, precision: Tensor, tau: Tensor, training_draws: float) -> Tensor:
    """What A and B/M add to the mean predictive variance over the features of each bin, ``(T, 2)``, for N = 1."""
    gram = statistics.gram / statistics.positions.clamp(min=1)[:, None, None]
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    channels = len(tau)

    def by_bin(factor: Tensor) -> Tensor:
        total = gram.new_zeros(len(gram))
        if precision.ndim == 2 and bool((tau == tau[0]).all()):  # all channels at once
            rows = factor.flatten(0, 1)
            half = torch.linalg.solve(precision + tau[0] * eye, rows.T @ rows)
            whole = torch.linalg.solve(precision + tau[0] * eye, half.T)
            return torch.einsum("bij,ij->b", gram, whole) * training_draws**2 / channels
        for c in range(channels):
            h = precision if precision.ndim == 2 else precision[c]
            rows = torch.linalg.solve(h + tau[c] * eye, factor[:, c].T @ factor[:, c])  # H⁻¹ S
            total += torch.einsum("bij,ij->b", gram, torch.linalg.solve(h + tau[c] * eye, rows.T))
        return total * training_draws**2 / channels

    within = by_bin(scores.within)
    between = by_bin(scores.total) - scores.inverse_draws * within
    return torch.stack([between, within / training_draws], dim=1)


def check_scores(covariance: str, loss: Loss, weighted: bool) -> None:
    """That the scores of a loss are what a covariance is made of.

    Raises:
        ArgumentError: They are not.
    """
    if covariance == "ef" and not (isinstance(loss, Squares) and not weighted):
        raise ArgumentError(
            f'expected statistics of squares without weights over t for covariance "ef", got those of {loss}, '
            f"weighted={weighted}: its gradients are the likelihood's"
        )


def check_settings(
    channels: int,
    bins: int,
    *,
    structure: str,
    covariance: str,
    prior_precision: float | Tensor | str | None,
    noise_variance: float | Tensor | str,
    loss_weights: str | Tensor,
    dataset_size: int | None,
    training_draws: float | None = None,
) -> None:
    """What can be refused of the settings of a posterior before there are any statistics.

    Raises:
        ArgumentError: A setting is out of range.
    """
    check_choice("structure", structure, STRUCTURES)
    check_choice("covariance", covariance, COVARIANCES)
    if isinstance(prior_precision, str):
        check_choice("prior_precision", prior_precision, ("evidence", "channel"))
    elif prior_precision is not None:
        _check_numbers("prior_precision", prior_precision, channels, 'output channel; or None, "evidence", "channel"')
    if isinstance(noise_variance, str):
        check_choice("noise_variance", noise_variance, ("residual", "evidence"))
        if noise_variance == "evidence" and covariance == "ef":
            raise ArgumentError(
                'expected noise_variance "residual" or given numbers for covariance "ef": the fixed point is the GGN\'s'
            )
    else:
        _check_numbers("noise_variance", noise_variance, bins, 'timestep bin; or "residual", "evidence"')
    if training_draws is not None:
        check_training_draws(training_draws)
    if (isinstance(loss_weights, str) and loss_weights in WEIGHTINGS) or callable(loss_weights):
        raise ArgumentError(
            f"expected loss_weights by bin, got {loss_weights!r}, which are a function of t: give them to "
            "bayesdiff.fit, they enter with "
            "the pass over the data"
        )
    if isinstance(loss_weights, str):
        check_choice("loss_weights", loss_weights, ("uniform", "noise"))
    else:
        try:
            weights = torch.as_tensor(loss_weights, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            weights = torch.full((bins,), float("nan"))
        right = weights.shape == (bins,) and bool(((weights >= 0) & torch.isfinite(weights)).all())
        if not right or not bool(weights.any()):
            raise ArgumentError(
                f"expected loss_weights 'uniform', 'noise', or {bins} finite numbers >= 0, not all 0, one for each timestep "
                f"bin, got {loss_weights}"
            )
    if dataset_size is not None:
        check_int("dataset_size", dataset_size, least=1)


def _check_numbers(name: str, value: float | Tensor, count: int, each: str) -> None:
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.full((), float("nan"))
    if numbers.shape not in ((), (count,)) or not bool(((numbers > 0) & torch.isfinite(numbers)).all()):
        raise ArgumentError(
            f"expected {name} a finite number > 0, or {count} of them, one for each {each}; got {value}"
        )


def _loss_weights(choice: str | Tensor, noise: Tensor, pooled: float) -> Tensor:
    """The weight of each timestep bin in the training loss, in units of 1/(residual variance)."""
    if isinstance(choice, str):
        return 1 / noise if choice == "noise" else torch.full_like(noise, 1 / pooled)
    return torch.as_tensor(choice).to(noise) / pooled


def _prior(choice: float | Tensor | str | None, spectrum: Tensor, mean: Tensor) -> Tensor:
    """τ by channel, ``(C,)``."""
    if choice is None or (isinstance(choice, str) and choice == "evidence"):
        return torch.full((len(mean),), evidence_prior_precision(spectrum, mean), dtype=torch.float64)
    if isinstance(choice, str):
        rows = spectrum.expand(mean.shape)
        return torch.tensor(
            [evidence_prior_precision(r[None], w[None]) for r, w in zip(rows, mean, strict=True)]
        ).double()
    return torch.as_tensor(choice, dtype=torch.float64).detach().cpu().expand(len(mean)).clone()


def _spectrum(
    statistics: Statistics, covariance: str, scores: Tensor, scale: float, noise: Tensor, *, diagonal: bool
) -> Tensor:
    """Eigenvalues (or the diagonal) of the likelihood's precision, ``(1 or C, D)``."""
    if covariance == "ef":
        if diagonal:
            return scores[0].square()
        flat = scores.flatten(1)
        values = scores.new_zeros(flat.shape[1])
        nonzero = torch.linalg.svdvals(flat).square()
        values[: len(nonzero)] = nonzero
        return values.view(scores.shape[1:])
    fisher = scale * statistics.precision(1 / noise)
    return (fisher.diagonal().clone() if diagonal else torch.linalg.eigvalsh(fisher))[None]
