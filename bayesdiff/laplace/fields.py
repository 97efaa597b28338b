"""What the fields of a posterior must be, whether they were cut from statistics or read from a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdiff.checks import (
    ArgumentError,
    ShapeError,
    check_choice,
    check_finite,
    check_int,
    check_number,
    check_positive,
)
from bayesdiff.laplace.structure import COVARIANCES, STRUCTURES

if TYPE_CHECKING:
    from bayesdiff.laplace.posterior import LaplacePosterior

#: Which covariances a structure may have.
FORMS_OF = {
    "full": ("channels", "joint", "fisher"), "kron": ("channels", "product", "spectral"), "diag": ("diagonal",),
    "lowrank": ("channels", "joint"),
}  # fmt: skip


def settled(posterior: LaplacePosterior) -> dict[str, Any]:
    """Fields that are numbers, as numbers of Python.

    Raises:
        ArgumentError: They are none, or out of range.
    """
    check_choice("structure", posterior.structure, STRUCTURES)
    check_choice("covariance", posterior.covariance, COVARIANCES)
    out: dict[str, Any] = {
        "temperature": check_positive("temperature", posterior.temperature),
        "rank": None if posterior.rank is None else check_int("rank", posterior.rank, least=1),
        "tolerance": check_number("tolerance", posterior.tolerance),
    }
    if not 0 <= out["tolerance"] < 1:
        raise ArgumentError(f"expected 0 <= tolerance < 1, got {posterior.tolerance}")
    for name in ("num_timesteps", "num_images", "dataset_size"):
        out[name] = check_int(name, getattr(posterior, name), least=1)
    for name in ("log_likelihood", "draws_per_image", "cut_share", "amplification"):
        out[name] = check_number(name, getattr(posterior, name))
    if posterior.training_draws is not None:
        out["training_draws"] = check_positive("training_draws", posterior.training_draws)
    tau = by_channel(posterior.prior_precision, len(posterior.mean))
    out["prior_precision"] = float(tau[0]) if bool((tau == tau[0]).all()) else tau.clone()
    return out


def by_channel(prior_precision: float | Tensor, channels: int) -> Tensor:
    """τ by channel, ``(C,)`` float64.

    Raises:
        ArgumentError: It is not one number > 0, nor one for each channel.
    """
    tau = torch.as_tensor(prior_precision, dtype=torch.float64).detach()
    if tau.shape not in ((), (channels,)) or not bool(((tau > 0) & torch.isfinite(tau)).all()):
        raise ArgumentError(
            f"expected a finite prior_precision > 0, or {channels} of them, one for each output channel, got {prior_precision}"
        )
    return tau.expand(channels)


def check_shapes(posterior: LaplacePosterior) -> None:
    """That all tensors are of this head, and finite.

    Raises:
        ShapeError, NonFiniteError: They are not.
        ArgumentError: Noise variances or weights are negative.
    """
    c, d = posterior.geometry.out_channels, posterior.geometry.in_features
    bins = len(posterior.noise_variance) if posterior.noise_variance.ndim == 1 else -1
    shapes: dict[str, list[tuple[int, ...]]] = {
        "mean": [(c, d)], "spectrum": [(1, d), (c, d)], "weights": [(bins,)], "noise_variance": [(bins,)],
        "origins": [(0, 2), (bins, 2)],
    }  # fmt: skip
    for name, allowed in shapes.items():
        value = getattr(posterior, name)
        if tuple(value.shape) not in allowed or value.dtype != torch.float64:
            raise ShapeError(
                f"expected {name} as float64 {' or '.join(map(str, allowed))}, got {value.dtype} {tuple(value.shape)}"
            )
        check_finite(name, value)
    if posterior.sigma.shape != (c, d):
        raise ShapeError(f"expected a covariance of {c} × {d} weights, got {posterior.sigma.shape}")
    if posterior.sigma.form not in FORMS_OF[posterior.structure]:
        raise ShapeError(
            f"expected a covariance for structure {posterior.structure!r}, got a {posterior.sigma.form} one"
        )
    for name, value in posterior.sigma.parts.items():
        check_finite(f"{name} of the covariance", value)
    if not bool((posterior.noise_variance > 0).all()) or bool((posterior.weights < 0).any()):
        raise ArgumentError(
            f"expected noise variances > 0 and weights >= 0, got {float(posterior.noise_variance.min()):.3g} and "
            f"{float(posterior.weights.min()):.3g}"
        )
