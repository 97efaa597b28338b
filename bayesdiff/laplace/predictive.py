r"""The predictive distribution of a head's output at one step.

    mean Wφ        variance φᵀΣ_cφ = ‖R_cφ‖²_v + Σ_d d_cd φ_d²

One convolution (or matrix product) with the rows of R as its output channels, and for ``diag`` one of φ² with the
variances as its kernel. Monte Carlo re-estimates these two numbers, with a relative error of √(2/(n−1)) in the variance; it
is needed where a link has no formula.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayesdiff.gaussian import Gaussian
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.laplace.links import Link

#: Numbers of the outputs of one chunk of Monte Carlo draws.
CHUNK = 2**25


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
