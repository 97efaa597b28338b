"""Naive float64 twins of the package's fast paths. Written to be read, not to be run on anything large."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev


def jacobian(layer: nn.Module, inputs: Tensor) -> Tensor:
    """∂ output / ∂ weights of a layer by reverse-mode autograd: ``(B, P, C, C, D)`` float64.

    The last two dimensions are the layer's weights, with the bias as the last column; P are the positions
    of the output, flattened.
    """
    layer = type_double(layer)
    names = [n for n, _ in layer.named_parameters()]
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    channel = 1 if isinstance(layer, nn.Conv2d) else -1

    def output(values: dict[str, Tensor], x: Tensor) -> Tensor:
        out = functional_call(layer, values, (x.unsqueeze(0),))
        return out.movedim(channel, -1)[0].flatten(0, -2) if out.ndim > 2 else out[0].unsqueeze(0)  # (P, C)

    rows = []
    for x in inputs.double():
        blocks = jacrev(output)(parameters, x)
        weight = blocks["weight"].flatten(3)  # (P, C, C, D − 1)
        parts = [weight] + ([blocks["bias"].unsqueeze(-1)] if "bias" in names else [])
        rows.append(torch.cat(parts, dim=-1))
    return torch.stack(rows)


def type_double(layer: nn.Module) -> nn.Module:
    """A float64 copy of a Conv2d or Linear."""
    import copy

    return copy.deepcopy(layer).double()


def dense_posterior(
    layer: nn.Module,
    inputs: Tensor,
    residuals: Tensor,
    bins: Tensor,
    images: Tensor,
    noise_variance: Tensor,
    *,
    prior_precision: float,
    structure: str,
    covariance: str,
    scale: float = 1.0,
) -> Tensor:
    """The covariance of all C·D weights, ``(C·D, C·D)``, from explicit Jacobians, one position at a time."""
    jac = jacobian(layer, inputs)  # (B, P, C, C, D)
    channel = 1 if isinstance(layer, nn.Conv2d) else -1
    r = residuals.double().movedim(channel, -1).flatten(1, -2) if residuals.ndim > 2 else residuals.double()[:, None]
    size = jac.shape[3] * jac.shape[4]
    precision = torch.zeros(size, size, dtype=torch.float64)
    gradients: dict[int, Tensor] = {}
    for b in range(len(inputs)):
        weight = 1 / noise_variance[bins[b]].double()
        for p in range(jac.shape[1]):
            j = jac[b, p].flatten(1)  # (C, C·D)
            precision += weight * j.T @ j
            g = weight * j.T @ r[b, p]
            gradients[int(images[b])] = gradients.get(int(images[b]), torch.zeros(size, dtype=torch.float64)) + g
    precision *= scale
    meat = scale * sum(torch.outer(g, g) for g in gradients.values())
    d = jac.shape[4]
    if structure == "diag":
        precision, meat = precision.diagonal().diag(), meat.diagonal().diag()
    if structure == "kron":
        meat = nearest_kronecker(meat, size // d, d)
    prior = prior_precision * torch.eye(size, dtype=torch.float64)
    if covariance == "ef":
        return torch.linalg.inv(meat + prior)
    inverse = torch.linalg.inv(precision + prior)
    return inverse if covariance == "ggn" else inverse @ meat @ inverse


def nearest_kronecker(matrix: Tensor, c: int, d: int) -> Tensor:
    """B ⊗ A nearest to a ``(c·d, c·d)`` matrix: the leading singular pair of the rearranged matrix."""
    rearranged = matrix.view(c, d, c, d).permute(0, 2, 1, 3).reshape(c * c, d * d)
    u, s, vh = torch.linalg.svd(rearranged, full_matrices=False)
    return torch.kron(s[0] * u[:, 0].view(c, c).contiguous(), vh[0].view(d, d).contiguous())


def dense_variance(layer: nn.Module, inputs: Tensor, covariance: Tensor) -> Tensor:
    """diag(J Σ Jᵀ), shaped as the layer's output, float64."""
    jac = jacobian(layer, inputs).flatten(3)  # (B, P, C, C·D)
    variance = torch.einsum("bpci,ij,bpcj->bpc", jac, covariance, jac)
    if isinstance(layer, nn.Conv2d):
        shape = type_double(layer)(inputs.double()).shape
        return variance.transpose(1, 2).reshape(shape)
    return variance.reshape(*inputs.shape[:-1], -1)


def log_evidence(
    precision: Tensor, weight: Tensor, tau: float, squares: Tensor, counts: Tensor, noise_variance: Tensor
) -> float:
    """Log marginal likelihood of Bayesian linear regression around W, term by term.

    ``precision`` is the (C·D)² data precision, ``squares`` and ``counts`` the residual sums of squares and the
    number of scalar observations in each bin.
    """
    log_likelihood = sum(
        -0.5 * float(s / v) - 0.5 * float(n) * math.log(2 * math.pi * float(v))
        for s, n, v in zip(squares, counts, noise_variance, strict=True)
    )
    size = len(precision)
    log_det = torch.linalg.slogdet(precision + tau * torch.eye(size, dtype=torch.float64)).logabsdet.item()
    return log_likelihood - 0.5 * (log_det - size * math.log(tau) + tau * float(weight.square().sum()))


def central_difference(function, x: Tensor, direction: Tensor, step: float = 1e-5) -> Tensor:
    """(f(x + h d) − f(x − h d)) / 2h in float64."""
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)
