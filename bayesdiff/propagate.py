r"""From one step's weights to the final image: tangents along the sampler's own trajectory.

One draw of the weights drives every step, so its deviation stays correlated along the trajectory:

    δg_t     = J_t δx_t + δW ψ_t                     J_t = ∂g/∂x at x_t, ψ_t the (guided) features
    δx_next  = (linear part of the sampler's step)(δg_t, δx_t)
    Var[x_0] = (1/K) Σ_k (δx_0^k)²,                  δW^k ~ N(0, Σ)

The direct term δWψ costs one more convolution and is exact at every step. The response J δx costs a
network call per draw (a finite difference along δx), and is refreshed only at some steps. Between
refreshes the response *of the denoiser* D = a x + b g is predicted: divided by the size of δx (rms over
the image, per draw), extrapolated linearly over the step index from the last two refreshes, multiplied by the
present size. Held so, the stiff part δx/σ_t of an ε-network's response stays exact, as in an exponential
integrator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import NonFiniteError
from bayesdiff.head import Fold, HeadGeometry
from bayesdiff.linearized_scheduler import LinearizedScheduler
from bayesdiff.parametrization import sampling_coefficients


@dataclass(frozen=True)
class Step:
    r"""What was seen of one step of a running pipeline.

    Args:
        index: Its number, from 0.
        output: g, what the scheduler was given, ``(B, C, H, W)``.
        timestep: As the scheduler was given it.
        sample: :math:`x_t`, ``(B, C, H, W)``.
        arguments: The other arguments of ``scheduler.step``.
        features: ψ, what entered the head, guided: weights times branches.
        fold: From the head's output to the network's.
        input_scale: c, the network's input is c·x.
        respond: δx ``(B, C, H, W)`` to Jδx, by one network evaluation of the pipeline's own call.
    """

    index: int
    output: Tensor
    timestep: Any
    sample: Tensor
    arguments: dict[str, Any]
    features: Tensor
    fold: Fold
    input_scale: float
    respond: Callable[[Tensor], Tensor]


class Tangents:
    """K tangents with shared weights, carried beside a running sampler.

    Args:
        deviations: δW, ``(K, C, D)``.
        geometry: The head's.
        scheduler: The sampler, before its first step; copied.
        refresh: r, the response is computed at steps 1, 1 + r, 1 + 2r, … (at step 0 it is 0).
    """

    def __init__(self, deviations: Tensor, geometry: HeadGeometry, scheduler: Any, refresh: int) -> None:
        self.deviations, self.geometry, self.refresh = deviations, geometry, refresh
        self.linearized = LinearizedScheduler(scheduler, len(deviations))
        self.delta: Tensor | None = None  # δx, (K, B, C, H, W)
        self._responses: list[tuple[int, Tensor]] = []  # the last two (step, response / size)

    def __enter__(self) -> Tangents:
        self.linearized.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.linearized.__exit__(*exception)

    def direct(self, step: Step) -> Tensor:
        """δWψ, ``(K, B, C, H, W)``."""
        dtype = torch.promote_types(step.features.dtype, torch.float32)
        weights = self.deviations.to(step.features.device, dtype)
        shift = step.fold(self.geometry.apply(step.features.to(dtype), weights), lead=2)
        return shift[:, :, : step.output.shape[1]]

    def _response(self, step: Step, delta: Tensor) -> Tensor:
        """J δx: computed at a refresh, predicted between."""
        coefficients = sampling_coefficients(
            self.linearized.scheduler, torch.as_tensor(step.timestep), step.input_scale
        )
        a, b = coefficients or (0.0, 1.0)
        size = delta.flatten(2).square().mean(-1).sqrt().view(*delta.shape[:2], *(1,) * (delta.ndim - 2))
        safe = torch.where(size > 0, size, 1.0)
        if (step.index - 1) % self.refresh == 0:
            response = torch.stack([step.respond(d) for d in delta]).to(delta.dtype)
            self._responses = [*self._responses[-1:], (step.index, (a * delta + b * response) / safe)]
            return response
        latest, value = self._responses[-1]
        if len(self._responses) == 2:
            earlier, before = self._responses[0]
            value = value + (value - before) * ((step.index - latest) / (latest - earlier))
        return (value * size - a * delta) / b

    def advance(self, step: Step) -> None:
        """Carry the tangents through one step."""
        d_output = self.direct(step)
        delta = self.delta
        if delta is None:
            delta = torch.zeros_like(d_output, dtype=torch.float64)
        else:
            d_output = d_output + self._response(step, delta)
        self.delta = self.linearized.step(d_output, delta, step.output, step.timestep, step.sample, **step.arguments)

    def variance(self) -> Tensor:
        """Var[x_0], ``(B, C, H, W)`` float32.

        Raises:
            NonFiniteError: The deviations have grown beyond all bounds.
        """
        if self.delta is None:
            raise NonFiniteError("expected at least one step of the sampler, got none")
        variance = self.delta.square().mean(0)
        if not bool(torch.isfinite(variance).all()):
            raise NonFiniteError(
                "expected finite deviations at the end of the trajectory, got NaN or infinity; use float32 or bfloat16, or "
                "refresh more often"
            )
        return variance.float()
