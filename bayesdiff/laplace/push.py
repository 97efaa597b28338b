"""Deviations pushed through a map of many numbers, to first order: its derivative along each of them.

Forward-mode differentiation where the map has it, and finite differences where it has not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from bayesdiff.checks import BayesdiffWarning, ShapeError, check_finite, check_int
from bayesdiff.gaussian import Gaussian


def push_deviations(
    function: Callable[[Tensor], Tensor], mean: Tensor, deviations: Tensor, *, chunk_size: int = 1
) -> Gaussian:
    r"""The linearized moments of a map whose outputs each depend on many inputs, such as a VAE's decoder.

        mean h(μ)          variance (1/K) Σ_k (J δ_k)²          J = ∂h/∂x at μ

    K draws δ of the input's deviations stand for its covariance, correlations included; the variance has a relative error
    of √(2/K). J δ is a Jacobian-vector product by forward-mode differentiation, 2–3 calls' worth each. Where the function
    contains an operation that has no forward derivative (fused attention), or hides it (``detach``), J δ is
    the central difference (h(μ + εδ) − h(μ − εδ))/(2ε), after a warning. Its step is, sample by sample,

        rms(εδ) = u^{1/3} rms(μ)

    with u the spacing of floating-point numbers of the mean's dtype at 1, and 1 in the place of rms(μ) where this is 0.
    Truncation and rounding are then of one size, of order u^{2/3}: 2e-5 in float32, some per cent in bfloat16.

    Args:
        function: h, of ``(B, ...)`` to ``(B, ...)``. It is called without recording gradients.
        mean: μ, ``(B, ...)``.
        deviations: δ, ``(K, B, ...)``, in the units of the mean, with mean zero.
        chunk_size: Deviations that go through the function together as one batch. More than 1 is faster on a GPU, takes
            as many times the memory, and needs a function that treats the samples of a batch independently.

    Returns:
        A :class:`Gaussian` shaped as h(μ), in its dtype or float32 if that is half precision.

    Raises:
        ShapeError: The deviations do not fit the mean, or there are none.
        ArgumentError: ``chunk_size`` is not a positive integer.
        NonFiniteError: The input, h(μ) or a derivative is NaN or infinite.
    """
    check_int("chunk_size", chunk_size, least=1)
    if deviations.shape[1:] != mean.shape or deviations.ndim != mean.ndim + 1 or len(deviations) == 0:
        raise ShapeError(
            f"expected deviations of shape (K, {', '.join(map(str, mean.shape))}) with K >= 1, got "
            f"{tuple(deviations.shape)}"
        )
    check_finite("mean", mean)
    check_finite("deviations", deviations)
    with torch.no_grad():
        deviations = deviations.to(mean)
        center = check_finite("function(mean)", function(mean))
        differentiate = _forward_derivative
        if (reason := _no_forward_derivative(function, mean, deviations[0])) is not None:
            warnings.warn(
                f"the function has no forward derivative ({reason}): using central finite differences, whose relative "
                f"error is of order {torch.finfo(mean.dtype).eps ** (2 / 3):.0e}",
                BayesdiffWarning,
                stacklevel=2,
            )
            differentiate = _central_difference
        total = torch.zeros_like(center, dtype=torch.float64)
        for part in deviations.split(chunk_size):
            if len(part) == 1:
                total += differentiate(function, mean, part[0]).double().square()
            else:
                images = differentiate(function, mean.expand_as(part).flatten(0, 1), part.flatten(0, 1))
                total += images.unflatten(0, (len(part), -1)).double().square().sum(0)
        check_finite("derivatives of the function", total)
    dtype = torch.promote_types(center.dtype, torch.float32)
    return Gaussian(center.to(dtype), (total / len(deviations)).to(dtype))


def _forward_derivative(function: Callable[[Tensor], Tensor], x: Tensor, delta: Tensor) -> Tensor:
    image: Tensor = torch.func.jvp(function, (x,), (delta,))[1]
    return image


def _central_difference(function: Callable[[Tensor], Tensor], x: Tensor, delta: Tensor) -> Tensor:
    """J δ for each sample of ``(B, ...)``, with the step that :func:`push_deviations` documents."""

    def rms(tensor: Tensor) -> Tensor:
        inner = tuple(range(1, tensor.ndim))
        size = tensor.double().square().mean(inner, keepdim=True).sqrt() if inner else tensor.double().abs()
        return torch.where(size > 0, size, 1.0)

    step = torch.finfo(x.dtype).eps ** (1 / 3) * rms(x) / rms(delta)
    moved = (step * delta.double()).to(x.dtype)
    difference = function(x + moved).double() - function(x - moved).double()
    # One step for each sample: the result may have another number of dimensions than the input.
    return difference / (2 * step).reshape(-1, *[1] * (difference.ndim - 1))


def _no_forward_derivative(function: Callable[[Tensor], Tensor], x: Tensor, delta: Tensor) -> str | None:
    """Why forward-mode differentiation cannot be used along ``delta``; None if it can."""
    try:
        image = _forward_derivative(function, x, delta)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    # A derivative of 0 everywhere may be a detached one: the function itself tells.
    if not bool(image.any()) and bool(_central_difference(function, x, delta).any()):
        return "its derivative is 0 everywhere but its differences are not; it may contain a detach"
    return None
