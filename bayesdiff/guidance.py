r"""Classifier-free guidance, read off what a pipeline did.

A guided output is :math:`g = f_u + s(f_c - f_u)` (Ho & Salimans 2022). Both branches have the same head W,
so the guided output is the head applied to guided features, :math:`g = W\psi` with
:math:`\psi = \varphi_u + s(\varphi_c - \varphi_u)`, and its variance is :math:`\psi^\top\Sigma\psi`. Adding the branches'
variances as if they were independent is an order of magnitude too large. The weights (1 − s, s) need
not be known: they are solved for from the branch outputs and from what the scheduler was given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesdiff.checks import UnsupportedPipelineError, check_finite

#: Rounding steps that the residual of a linear relation may have, relative to its terms.
ROUNDING = 32


def branch_weights(branches: Sequence[Tensor], output: Tensor) -> Tensor:
    r"""Weights w, :math:`\sum_m w_m = 1`, with :math:`g = \sum_m w_m f_m`.

    Args:
        branches: The M network outputs of one step, each ``(B, C, H, W)``.
        output: g, what the scheduler was given.

    Returns:
        w, ``(M,)`` float64 on the CPU.

    Raises:
        NonFiniteError: An output is NaN or infinite.
        UnsupportedPipelineError: No such weights reproduce g to rounding; the message has the residual.
    """
    for f in (*branches, output):
        check_finite("network outputs", f, "the network overflows in this dtype: use bfloat16 or float32")
    base = branches[0].double().flatten()
    differences = torch.stack([f.double().flatten() - base for f in branches[1:]] or [base[:0].expand(0)], dim=0)
    rest = output.double().flatten() - base
    weights = torch.zeros(len(branches), dtype=torch.float64)
    residual = rest
    scale = base.abs().max()
    if len(branches) > 1 and bool(differences.abs().max() > 0):
        # Branches that agree to the last bit need no weight of their own: lstsq gives the least one.
        solution = torch.linalg.lstsq(differences.T.cpu(), rest[:, None].cpu(), driver="gelsd").solution[:, 0]
        weights[1:] = solution
        residual = rest - solution.to(rest.device) @ differences
        scale = torch.maximum(scale, (solution.to(rest.device)[:, None] * differences).abs().max())
    weights[0] = 1 - weights[1:].sum()
    # The coarser of the two dtypes sets the rounding.
    eps = max(torch.finfo(branches[0].dtype).eps, torch.finfo(output.dtype).eps)
    worst, allowed = float(residual.abs().max()), ROUNDING * eps * float(scale)
    if not worst <= allowed:
        raise UnsupportedPipelineError(
            f"expected what the scheduler is given to be a combination of the {len(branches)} network output(s) of the "
            f"step with weights that sum to 1, got a residual of {worst:.3g} (allowed: {allowed:.3g}) with the weights "
            f"{[round(w, 4) for w in weights.tolist()]}: guidance rescaling and other nonlinear guidance cannot be followed"
        )
    return weights


def combine(weights: Tensor, branches: Sequence[Tensor]) -> Tensor:
    r""":math:`\sum_m w_m f_m`, in float32 or better."""
    dtype = torch.promote_types(branches[0].dtype, torch.float32)
    total = torch.zeros_like(branches[0], dtype=dtype)
    for weight, branch in zip(weights.tolist(), branches, strict=True):
        total = total + weight * branch.to(dtype)
    return total
