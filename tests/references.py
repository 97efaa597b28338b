"""Naive float64 twins of the package's fast paths. Written to be read, not to be run on anything large."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev


@functools.lru_cache(maxsize=32)
def jacobian(layer: nn.Module, inputs: Tensor) -> Tensor:
    """∂ output / ∂ weights of a layer by reverse-mode autograd: ``(B, P, C, C, D)`` float64.

    The last two dimensions are the layer's weights, with the bias as the last column; P are the positions
    of the output, flattened.
    """
    layer = type_double(layer)
    names = [n for n, _ in layer.named_parameters()]
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    channel = -1 if isinstance(layer, nn.Linear) else 1

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
    """A float64 copy of a layer."""
    import copy

    return copy.deepcopy(layer).double()


def im2col(layer: nn.Module, inputs: Tensor) -> Tensor:
    """φ of a layer ``(B, P, D)`` float64, one patch at a time, from the padding as the layer itself keeps it."""
    x = inputs.double()
    if isinstance(layer, nn.Linear):
        phi = x.reshape(len(x), -1, x.shape[-1])
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        kernel = layer.kernel_size
        places = itertools.product(*(range(s - k + 1) for s, k in zip(x.shape[2:], kernel, strict=True)))
        patches = [
            x[(..., *(slice(i, i + k) for i, k in zip(place, kernel, strict=True)))].flatten(1) for place in places
        ]
        phi = torch.stack(patches, dim=1)
    return phi if layer.bias is None else torch.cat([phi, torch.ones_like(phi[..., :1])], dim=-1)


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
    channel = -1 if isinstance(layer, nn.Linear) else 1
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
    counts = [int((images == i).sum()) for i in gradients]
    scores = about_their_mean(list(gradients.values()), counts) if covariance == "sandwich" else gradients.values()
    meat = scale * sum(torch.outer(g, g) for g in scores)
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


def about_their_mean(sums: list[Tensor], counts: list[int]) -> list[Tensor]:
    """Sums of so many scores, each score less the images' mean: n⁻¹ Σ of squares is a covariance; one alone stays."""
    n = len(sums)
    means = [g / m for g, m in zip(sums, counts, strict=True)]
    away = [(g - sum(means) / n) * math.sqrt(n / (n - 1)) for g in means] if n > 1 else means
    return [m * g for g, m in zip(away, counts, strict=True)]


def nearest_kronecker(matrix: Tensor, c: int, d: int) -> Tensor:
    """B ⊗ A nearest to a ``(c·d, c·d)`` matrix: the leading singular pair of the rearranged matrix."""
    rearranged = matrix.view(c, d, c, d).permute(0, 2, 1, 3).reshape(c * c, d * d)
    u, s, vh = torch.linalg.svd(rearranged, full_matrices=False)
    return torch.kron(s[0] * u[:, 0].view(c, c).contiguous(), vh[0].view(d, d).contiguous())


def dense_variance(layer: nn.Module, inputs: Tensor, covariance: Tensor) -> Tensor:
    """diag(J Σ Jᵀ), shaped as the layer's output, float64."""
    jac = jacobian(layer, inputs).flatten(3)  # (B, P, C, C·D)
    variance = torch.einsum("bpci,ij,bpcj->bpc", jac, covariance, jac)
    if not isinstance(layer, nn.Linear):
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


def ddim_moments(
    abar: float, abar_next: float, mean: Tensor, variance: Tensor, mean_eps: Tensor, variance_eps: Tensor, cov: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of DDIM (η = 0) as BayesDiff has it (Kou et al. 2024): E[x'], Var[x'] of moments of x and ε."""
    alpha, sigma, alpha_next, sigma_next = (math.sqrt(v) for v in (abar, 1 - abar, abar_next, 1 - abar_next))
    of_x = alpha_next / alpha
    of_eps = sigma_next - of_x * sigma
    return (
        of_x * mean + of_eps * mean_eps,
        of_x**2 * variance + 2 * of_x * of_eps * cov + of_eps**2 * variance_eps,
    )


def ddpm_moments(
    abar: float, abar_next: float, mean: Tensor, variance: Tensor, mean_eps: Tensor, variance_eps: Tensor, cov: Tensor
) -> tuple[Tensor, Tensor]:
    """One ancestral step of DDPM, without its noise."""
    beta = 1 - abar / abar_next
    return (
        (mean - beta / math.sqrt(1 - abar) * mean_eps) / math.sqrt(1 - beta),
        variance / (1 - beta)
        - 2 * beta / ((1 - beta) * math.sqrt(1 - abar)) * cov
        + beta**2 / ((1 - beta) * (1 - abar)) * variance_eps,
    )


def posterior_noise(abar: float, abar_next: float, *, large: bool = False) -> float:
    """The noise variance of DDPM's ancestral step: β̃ (fixed_small) or β (fixed_large); none in the last step."""
    if abar_next == 1:
        return 0.0
    beta = 1 - abar / abar_next
    return beta if large else (1 - abar_next) / (1 - abar) * beta


def bayesdiff_recursion(
    moments, noises: list[float], abars: list[float], network, samples: list[Tensor], variances: list[Tensor],
    draws: list[Tensor], skip_interval: int = 1, centered: bool = False,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """BayesDiff's recursion along a trajectory that is given: the last E[x], and Var[x] after each step.

    Args:
        moments: :func:`ddim_moments` or :func:`ddpm_moments`.
        noises: s² of each step.
        abars: ᾱ at each step's timestep, and at last where the last step ends.
        network: (x, n) to ε at step n.
        samples: x at each step, ``(B, C, H, W)``.
        variances: Var[ε] at each step.
        draws: z of each step, ``(S, C, H, W)``.
    """
    mean, variance, after = samples[0], torch.zeros_like(samples[0]), []
    for n, x in enumerate(samples):
        cov, variance_eps = torch.zeros_like(mean), variances[n]
        if n == 0:
            mean_eps = network(x, n)
        elif n % skip_interval:
            mean_eps, variance_eps = network(x, n), torch.zeros_like(mean)
        else:
            drawn = [mean + variance.clamp(min=0).sqrt() * z for z in draws[n]]
            eps = [network(v, n) for v in drawn]
            s = len(drawn)
            mean_eps = sum(eps) / s
            if centered:
                middle = sum(drawn) / s
                cov = sum((v - middle) * (e - mean_eps) for v, e in zip(drawn, eps, strict=True)) / (s - 1)
            else:
                cov = sum(v * e for v, e in zip(drawn, eps, strict=True)) / s - mean * sum(eps) / s
        mean, variance = moments(abars[n], abars[n + 1], mean, variance, mean_eps, variance_eps, cov)
        variance = variance + noises[n]
        after.append(variance)
    return mean, after


def schur_complement(b, v, mu):
    """What is left of a positive B when its action on the rows of V is known."""
    seen = v @ b @ v.T + mu * torch.eye(len(v), dtype=b.dtype)
    return b - b @ v.T @ torch.linalg.pinv(seen, hermitian=True) @ v @ b


def extended_response(v, images, probe, known=None, *, floor, regularization):
    """One sample's J ``(P, P)`` from Jv of the rows of V ``(p, P)``, and the symmetric part that is extended, both dense."""
    size = v.shape[1]
    inner = range(len(v) - probe)
    if known is not None:
        found = sum(float(v[i] @ known @ v[i]) for i in inner)
        measured = max(0.0, sum(float(v[i] @ images[i]) for i in inner))
        if found > measured or not inner:
            known = known * (measured / found if inner else 0.0)
    gain = 0.0
    if probe:
        gain = float(v[-1] @ images[-1])
        if known is not None:
            gain -= min(float(v[-1] @ known @ v[-1]), max(0.0, gain))
    y = images - gain * v
    m = (v @ y.T + y @ v.T) / 2
    values, vectors = torch.linalg.eigh(m)
    symmetric = torch.zeros(size, size, dtype=v.dtype)
    largest = float(torch.linalg.matrix_norm(y, ord=2))
    if known is not None:
        largest = max(largest, float(torch.linalg.eigvalsh(known)[-1]))
    for value, q in zip(values, vectors.T, strict=True):
        if value > max(1e-9 * float(torch.linalg.matrix_norm(y, ord=2)), floor * float(values[-1])):
            z = q @ y
            symmetric += torch.outer(z, z) / max(float(value), float(z @ z) / largest)
    if known is not None:
        symmetric += schur_complement(known, v, regularization * float(torch.linalg.eigvalsh(known)[-1]))
    eye = torch.eye(size, dtype=v.dtype)
    return gain * eye + y.T @ v + symmetric @ (eye - v.T @ v), symmetric


def smoothed_responses(places, *, before, after, **settings):
    """J at each of some places ``(V, images, probe)``, from its own measurement and those of all others."""

    def chain(ordered):
        out = [extended_response(*ordered[0], **settings)[1]]
        for place in ordered[1:]:
            out.append(extended_response(*place, out[-1], **settings)[1])
        return out

    forward, backward = chain(places), chain(places[::-1])[::-1]
    out = []
    for n, place in enumerate(places):
        known = [before * forward[n - 1]] if n else []
        known += [after * backward[n + 1]] if n + 1 < len(places) else []
        out.append(extended_response(*place, sum(known) if known else None, **settings)[0])
    return out


def draw_scores(layer: nn.Module, inputs: Tensor, residuals: Tensor, weights: Tensor) -> list[Tensor]:
    """Σ_p w Jᵀr of each draw, ``(C·D,)`` float64, one position at a time."""
    jac = jacobian(layer, inputs)
    channel = -1 if isinstance(layer, nn.Linear) else 1
    r = residuals.double().movedim(channel, -1).flatten(1, -2) if residuals.ndim > 2 else residuals.double()[:, None]
    out = []
    for b in range(len(inputs)):
        g = torch.zeros(jac.shape[3] * jac.shape[4], dtype=torch.float64)
        for p in range(jac.shape[1]):
            g += weights[b].double() * jac[b, p].flatten(1).T @ r[b, p]
        out.append(g)
    return out


def between_and_within(scores: list[Tensor], images: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """T, B̂ and Â of one-way random effects, dense, by loops over images and draws."""
    size = len(scores[0])
    total, within, degrees, inverse = torch.zeros(size, size).double(), torch.zeros(size, size).double(), 0, 0.0
    numbers = sorted(set(images))
    means = []
    for i in numbers:
        own = [g for g, k in zip(scores, images, strict=True) if k == i]
        mean = sum(own) / len(own)
        means.append(mean)
        inverse += 1 / len(own) / len(numbers)
        degrees += len(own) - 1
        for g in own:
            within += torch.outer(g - mean, g - mean)
    for mean in about_their_mean(means, [1] * len(means)):
        total += torch.outer(mean, mean) / len(numbers)
    within /= degrees
    return total, within, total - inverse * within


def projected(matrix: Tensor, metric: Tensor) -> Tensor:
    """The positive part of a matrix in a positive definite metric, scaled to the trace that the matrix has in it."""
    values, vectors = torch.linalg.eigh(metric)
    root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    inner = inverse @ matrix @ inverse
    values, vectors = torch.linalg.eigh(inner)
    positive = sum(float(v) * torch.outer(q, q) for v, q in zip(values, vectors.T, strict=True) if v > 0)
    return root @ (positive * inner.trace() / positive.trace()) @ root
