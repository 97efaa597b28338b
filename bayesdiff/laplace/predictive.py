r"""The predictive distribution of a head's output at one step.

    mean Wφ        variance φᵀΣ_cφ = ‖R_cφ‖²_v + Σ_d d_cd φ_d²

One convolution (or matrix product) with the rows of R as its output channels, and for ``diag`` one of φ² with the
variances as its kernel. Monte Carlo re-estimates these two numbers, with a relative error of √(2/(n−1)) in the variance; it
is needed where a link has no formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from bayesdiff.checks import check_choice, check_finite, check_int
from bayesdiff.gaussian import Gaussian
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.laplace.links import LINK_APPROXIMATIONS, Link
from bayesdiff.laplace.push import push_deviations

if TYPE_CHECKING:
    from bayesdiff.laplace.posterior import LaplacePosterior

#: Numbers of the outputs of one chunk of Monte Carlo draws.
CHUNK = 2**25


def variance(posterior: LaplacePosterior, features: Tensor) -> Tensor:
    """See :meth:`bayesdiff.LaplacePosterior.variance`."""
    posterior.geometry.check(features)
    x = features.detach().to(posterior.working(features.dtype))
    parts = {k: getattr(posterior.sigma, k) for k in ("rows", "scales", "diagonal")}
    placed = {k: None if v is None else posterior.placed(k, v, x) for k, v in parts.items()}
    values = posterior.temperature * closed_variance(posterior.geometry, x, **placed)
    # What is not finite in the features is not finite here: so the large tensor need not be read twice.
    if not bool(torch.isfinite(values).all()):
        check_finite("features", features)
        check_finite("variances", values, "the features are too large for this dtype: use float64")
    return values.to(torch.promote_types(features.dtype, torch.float32))


def predict(
    posterior: LaplacePosterior, features: Tensor, link_approx: str, n_samples: int, link: Link, generator: Generator | None
) -> Gaussian:  # fmt: skip
    """See :meth:`bayesdiff.LaplacePosterior.predict`."""
    check_choice("link_approx", link_approx, LINK_APPROXIMATIONS)
    geometry = posterior.geometry
    geometry.check(features)
    check_finite("features", features)
    mean = posterior.placed("mean", posterior.mean, features)
    x = features.detach().to(mean.dtype)
    if link_approx == "mc":
        check_int("n_samples", n_samples, least=2)
        return monte_carlo(geometry, x, mean, lambda k: posterior.deviations(k, generator), n_samples, link)
    output = geometry.apply(x, mean[None])[0]
    if link_approx == "linearized" and not link.elementwise:
        check_int("n_samples", n_samples, least=1)
        away = geometry.apply(x, posterior.deviations(n_samples, generator).to(mean))
        return push_deviations(link, output, away)
    return link.moments(Gaussian(output, variance(posterior, x)), link_approx)


def closed_variance(
    geometry: HeadGeometry, inputs: Tensor, rows: Tensor | None, scales: Tensor | None, diagonal: Tensor | None
) -> Tensor:
    """φᵀΣ_cφ at every position, shaped as the layer's output; the parts as in :class:`bayesdiff.laplace.structure.Covariance`."""
    total = None if rows is None else geometry.squared_norm(inputs, rows, scales)
    if diagonal is not None:
        part = geometry.squared(inputs, diagonal)
        total = part if total is None else total + part
    if total is None:
        raise ValueError("expected rows or a diagonal, got neither")
    shape = list(total.shape)
    shape[1 if geometry.kind == "conv" else -1] = geometry.out_channels
    return total.expand(shape).contiguous()


def monte_carlo(
    geometry: HeadGeometry,
    inputs: Tensor,
    mean: Tensor,
    draw: Callable[[int], Tensor],
    n_samples: int,
    link: Link,
) -> Gaussian:
    """Mean and variance (divided by n − 1) of a link of the output over weight draws.

    Many draws go through the layer at once, as output channels of one convolution or matrix product; moments of chunks are
    merged by Chan's formula, so memory does not grow with n.

    Args:
        geometry: The head's.
        inputs: What enters the layer, in the working dtype.
        mean: W, ``(C, D)``, in that dtype.
        draw: k to k draws of δW, ``(k, C, D)``.
        n_samples: n ≥ 2.
        link: The map; for one that is not elementwise, its result may have any shape.
    """
    outputs = geometry.apply(inputs, mean[None])[0]
    chunk = max(1, min(n_samples, CHUNK // outputs.numel()))
    count = 0
    average, squares = torch.zeros(()), torch.zeros(())
    while count < n_samples:
        k = min(chunk, n_samples - count)
        values = geometry.apply(inputs, mean + draw(k).to(mean))
        values = torch.stack([link(v) for v in values]) if not link.elementwise else link(values)
        fresh = values.mean(0)
        scatter = (values - fresh).square_().sum(0)
        if count == 0:
            average, squares = fresh, scatter
        else:
            away = fresh - average
            average = average + away * (k / (count + k))
            squares = squares + scatter + away.square() * (count * k / (count + k))
        count += k
    return Gaussian(average, squares / (n_samples - 1))
