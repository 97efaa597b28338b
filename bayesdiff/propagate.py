r"""From one step's weights to the final image: tangents along the sampler's own trajectory.

One draw of the weights drives every step, so its deviation stays correlated along the trajectory:

    δg_t     = J_t δx_t + δW ψ_t                     J_t = ∂g/∂x at x_t, ψ_t the (guided) features
    δx_next  = (linear part of the sampler's step)(δg_t, δx_t)
    Var[x_0] = (1/K) Σ_k (δx_0^k)²,                  δW^k ~ N(0, Σ)

The direct term δWψ costs one more convolution and is exact at every step. The network's response J δx is measured only
at some steps, there along a few directions (:mod:`bayesdiff.response`), as the response of the denoiser D = a x + b g:
so the stiff part δx/σ_t of an ε-network's own response stays exact, as in an exponential integrator.

Two passes. The first walks beside the running pipeline and measures, at p directions of its own deviations; between
measurements it extrapolates from the last two. When the trajectory is known, the second takes the same linear recursion
again with responses *interpolated* over the step index. It needs no network call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.interpolate import make_interp_spline
from torch import Tensor

from bayesdiff.checks import NonFiniteError
from bayesdiff.head import Fold, HeadGeometry
from bayesdiff.linearized_scheduler import LinearizedScheduler
from bayesdiff.parametrization import sampling_coefficients
from bayesdiff.response import Response
from bayesdiff.rng import item_generator

#: Fewest measurements of the response in a run, where it has so many steps.
LEAST_REFRESHES = 10
#: By default all measurements together cost so many times the calls of the plain pipeline.
EXTRA_CALLS = 2.5
#: Steps between measurements shrink towards the end, where deviations grow: n ∝ 1 − (1 − u)^DENSITY, u even.
DENSITY = 1.5


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
    """

    index: int
    output: Tensor
    timestep: Any
    sample: Tensor
    arguments: dict[str, Any]
    features: Tensor
    fold: Fold
    input_scale: float


def refresh_steps(num_steps: int, refresh: int) -> list[int]:
    """The steps at which the response is measured: from 1 to the last, one in ``refresh`` on average, denser late."""
    last = num_steps - 1
    if last < 1:
        return []
    number = min(last, max(math.ceil(last / refresh), LEAST_REFRESHES))
    if number == last:
        return list(range(1, num_steps))
    u = np.linspace(0, 1, number)
    return [int(n) for n in np.unique((1 + (last - 1) * (1 - (1 - u) ** DENSITY)).round())]


class Tangents:
    """K tangents with shared weights, carried beside a running sampler.

    Args:
        deviations: δW, ``(K, C, D)``.
        geometry: The head's.
        scheduler: The sampler, after ``set_timesteps`` and before its first step; copied.
        refresh: r, steps between measurements of the response, on average.
        num_directions: p, network evaluations in one measurement; by default what :data:`EXTRA_CALLS` allows,
            at least 4.
    """

    def __init__(
        self,
        deviations: Tensor,
        geometry: HeadGeometry,
        scheduler: Any,
        refresh: int = 4,
        num_directions: int | None = None,
    ) -> None:
        self.deviations, self.geometry = deviations, geometry
        num_steps = len(scheduler.timesteps)
        self.refreshed = refresh_steps(num_steps, refresh)
        affordable = max(4, round(EXTRA_CALLS * num_steps / max(1, len(self.refreshed))))
        self.num_directions = affordable if num_directions is None else num_directions
        self._linearized = LinearizedScheduler(scheduler, len(deviations))
        self._again = LinearizedScheduler(scheduler, len(deviations))  # for the second pass
        self._responses: dict[int, Response] = {}
        self._steps: list[Step] = []
        self._delta: Tensor | None = None  # δx, (K, B, C, H, W)

    def __enter__(self) -> Tangents:
        self._linearized.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._linearized.__exit__(*exception)

    def advance(self, step: Step, respond: Callable[[Tensor], Tensor]) -> None:
        """The first pass, through one step.

        Args:
            step: What was seen of it.
            respond: δx ``(B, C, H, W)`` to Jδx, by one network evaluation of the pipeline's own call.
        """
        self._steps.append(step)
        if step.index in self.refreshed and self._delta is not None:
            self._responses[step.index] = self._measure(step, self._delta, respond)
        self._delta = self._through(self._linearized, step, self._delta, _line(list(self._responses)[-2:], step.index))

    def finish(self) -> Tensor:
        """The second pass.

        Returns:
            δx_0, ``(K, B, C, H, W)`` float64.

        Raises:
            NonFiniteError: There was no step, or the deviations have grown beyond all bounds.
        """
        if self._delta is None:
            raise NonFiniteError("expected at least one step of the sampler, got none")
        delta: Tensor | None = self._delta
        nodes = list(self._responses)
        if 1 < len(nodes) < len(self._steps) - 1:  # else the first pass was exact, or there is nothing to interpolate
            spline = make_interp_spline(nodes, np.eye(len(nodes)), k=min(3, len(nodes) - 1))
            delta = None
            for step in self._steps:
                weights = dict(zip(nodes, spline(step.index).tolist(), strict=True))
                delta = self._through(self._again, step, delta, weights)
        if delta is None or not bool(torch.isfinite(delta).all()):
            raise NonFiniteError(
                "expected finite deviations at the end of the trajectory, got NaN or infinity; use float32 or bfloat16, "
                "or refresh more often"
            )
        return delta

    def _coefficients(self, step: Step) -> tuple[float, float]:
        """(a, b) of the denoiser; (0, 1), the raw output, where the schedule is of another kind."""
        pair = sampling_coefficients(self._linearized.scheduler, torch.as_tensor(step.timestep), step.input_scale)
        return pair or (0.0, 1.0)

    def _measure(self, step: Step, delta: Tensor, respond: Callable[[Tensor], Tensor]) -> Response:
        a, b = self._coefficients(step)
        shape = step.sample.shape

        def jacobian(v: Tensor) -> Tensor:
            return a * v + b * respond(v.view(shape)).to(v).flatten(1)

        mixture = torch.randn(len(delta), generator=item_generator(0, step.index), dtype=torch.float64)
        return Response.measure(jacobian, _rows(delta), self.num_directions, mixture)

    def _through(
        self, linearized: LinearizedScheduler, step: Step, delta: Tensor | None, weights: dict[int, float]
    ) -> Tensor:
        """One step of the recursion, the response a sum of measured ones."""
        dtype = torch.promote_types(step.features.dtype, torch.float32)
        shift = self.geometry.apply(step.features.to(dtype), self.deviations.to(step.features.device, dtype))
        d_output = step.fold(shift, lead=2)[:, :, : step.output.shape[1]].double()  # δWψ
        if delta is None:
            delta = torch.zeros_like(d_output)
        else:
            a, b = self._coefficients(step)
            rows = _rows(delta)
            denoised = sum((w * self._responses[n](rows) for n, w in weights.items()), torch.zeros_like(rows))
            d_output = d_output + (denoised - a * rows).transpose(0, 1).reshape(delta.shape) / b
        return linearized.step(d_output, delta, step.output, step.timestep, step.sample, **step.arguments)


def _rows(delta: Tensor) -> Tensor:
    """``(K, B, C, H, W)`` to ``(B, K, C·H·W)`` float64."""
    return delta.double().flatten(2).transpose(0, 1)


def _line(nodes: list[int], n: int) -> dict[int, float]:
    """Weights of the line through the last two of the nodes, at n."""
    if len(nodes) < 2 or n == nodes[-1]:
        return dict.fromkeys(nodes[-1:], 1.0)
    share = (n - nodes[1]) / (nodes[1] - nodes[0])
    return {nodes[0]: -share, nodes[1]: 1 + share}
