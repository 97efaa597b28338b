r"""From one step's weights to the final image: tangents along the sampler's own trajectory.

One draw of the weights drives every step, so its deviation stays correlated along the trajectory:

    δg_t     = J_t δx_t + δW ψ_t                     J_t = ∂g/∂x at x_t, ψ_t the (guided) features
    δx_next  = (linear part of the sampler's step)(δg_t, δx_t)
    Var[x_0] = (1/K) Σ_k (δx_0^k)²,                  δW^k ~ N(0, Σ)

The direct term δWψ costs one more convolution and is exact at every step. The network's response J δx is measured only
at some steps, there along a few directions (:mod:`bayesdiff.propagation.response`), as the response of the denoiser D = a x + b g:
so the stiff part δx/σ_t of an ε-network's own response stays exact, as in an exponential integrator.

Two passes. The first walks beside the running pipeline and measures, at p directions of its own deviations; between
measurements it extrapolates from the last two. When the trajectory is known, the second takes the same linear recursion
again, each response extended by what all measurements know, and *interpolated* over the step index. It needs no
network call.

Draws that are orthogonal (:func:`bayesdiff.rng.orthogonal_normal`) leave less noise in the mean square; as many as Σ has
dimensions leave none.

Whole trajectories with other weights (:mod:`bayesdiff.propagation.ensemble`) are what this approximates; the published recursion for
variances alone is in :mod:`bayesdiff.propagation.recursion`.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdiff.checks import NonFiniteError
from bayesdiff.diffusion.parametrization import sampling_coefficients
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.linearized_scheduler import LinearizedScheduler
from bayesdiff.propagation.response import Directions, Response, smoothed
from bayesdiff.rng import item_generator
from bayesdiff.step import Step
from bayesdiff.watch import GuidedNetwork

#: d: steps between measurements shrink towards the end, where deviations grow, n ∝ 1 − (1 − u)^d for even u.
DENSITY = 1.5
#: By default there is a measurement in every so many steps at least, and in solvers of several stages in every so many.
WIDEST, WIDEST_OF_STAGES = 5, 2
#: R in √B where the sampler adds noise: such a trajectory is rough, and so is the response along it.
SHARE_WITH_NOISE = 1.6


@dataclass(frozen=True)
class Propagated:
    r"""What a propagator returns, in the network's space.

    Args:
        variance: Of the sampler's last sample, ``(B, C, H, W)`` float64.
        mean: Of the last sample, where the method has one of its own.
        trajectory: The variance after each step, if asked for.
        factors: :math:`F_k = \delta x_0^k/\sqrt K`, ``(K, B, C, H, W)``, if asked for: covariance between any two elements
            :math:`\sum_k F_k F_k'`.
    """

    variance: Tensor
    mean: Tensor | None = None
    trajectory: tuple[Tensor, ...] | None = None
    factors: Tensor | None = None


def spread(places: list[int], number: int, density: float) -> list[int]:
    """Some of the places, the last among them: n ∝ 1 − (1 − u)^density for even u."""
    if number >= len(places):
        return places
    u = np.linspace(0, 1, number) if number > 1 else np.ones(1)
    return [places[int(n)] for n in np.unique(((len(places) - 1) * (1 - (1 - u) ** density)).round())]


def plan(
    num_steps: int, extra_calls: float, refresh: int | None = None, num_directions: int | None = None, stages: int = 1,
    noisy: bool = False,
) -> tuple[list[int], int]:  # fmt: skip
    r"""At which steps to measure the response, and along how many directions.

    A budget of B = ``extra_calls`` × steps is spent evenly, R ≈ p ≈ √B; where the sampler adds noise and p = 3 is left, R ≈
    1.6 √B. But R is no less than a fifth of the steps, or half of them in solvers of several stages; no less than four,
    which a cubic needs, where p = 3 can be had; and all of them where they are five or fewer. R is one more where that
    wastes less of B.

    Args:
        num_steps: N, calls of the scheduler's step.
        extra_calls: Network calls of all measurements together, in those of the plain pipeline.
        refresh: r; given, one step in r is measured on average.
        num_directions: p; given, it is not chosen.
        stages: Calls that make one step of the solver (2 for Heun's). Samples in different stages lie off one smooth
            trajectory to different sides, so all measurements but the last are in one of them.
        noisy: Whether the sampler adds noise.

    Returns:
        Steps from 1 to the last, denser late, and p ≥ 1.
    """
    places = sorted({*range(1, num_steps, stages), num_steps - 1} - {0})
    last = len(places)
    if last < 1:
        return [], num_directions or 1
    budget = extra_calls * num_steps
    if refresh is not None:
        number = last if refresh == 1 else math.ceil((num_steps - 1) / refresh)
    elif last <= 5 and budget >= 3 * last:
        number = last
    else:
        widest = WIDEST_OF_STAGES if stages > 1 else WIDEST
        number = max(round(budget**0.5), math.ceil(last / widest), 4 if budget >= 12 else 1)
        if noisy:
            number = max(number, min(round(SHARE_WITH_NOISE * budget**0.5), int(budget / 3)))
        number = max(number, number + 1, key=lambda r: r * int(budget / r))
    number = min(number, last)
    steps = spread(places, number, DENSITY)
    if refresh == 1:
        steps = list(range(1, num_steps))
    return steps, num_directions or max(1, int(budget / len(steps)))


class Tangents:
    """K tangents with shared weights, carried beside a running sampler.

    Args:
        deviations: δW, ``(K, C, D)``.
        geometry: The head's.
        scheduler: The sampler, after ``set_timesteps`` and before its first step; copied.
        num_steps: How many steps are to come.
        extra_calls: Network calls that may be spent, in those of the plain pipeline; see :func:`plan`.
        refresh: r, steps between measurements of the response, on average.
        num_directions: p, network evaluations in one measurement.
        directions_per_call: How many directions share one network call, of so many times the batch.
        batch_invariant: Work on each sample by itself, so that its numbers do not depend on the batch to the last bit.
        noisy: Whether the sampler adds noise.
    """

    def __init__(
        self,
        deviations: Tensor,
        geometry: HeadGeometry,
        scheduler: Any,
        num_steps: int,
        extra_calls: float = 2.5,
        refresh: int | None = None,
        num_directions: int | None = None,
        directions_per_call: int = 1,
        batch_invariant: bool = False,
        noisy: bool = False,
    ) -> None:
        self.directions_per_call = directions_per_call
        self.deviations, self.geometry, self.batch_invariant = deviations, geometry, batch_invariant
        stages = int(getattr(scheduler, "order", 1))
        self.refreshed, self.num_directions = plan(num_steps, extra_calls, refresh, num_directions, stages, noisy)
        self._linearized = LinearizedScheduler(scheduler, len(deviations))
        self._again = LinearizedScheduler(scheduler, len(deviations))  # for the second pass
        # By step, one for each group of samples.
        self._measured: dict[int, list[tuple[Directions, Tensor]]] = {}
        self._responses: dict[int, list[Response]] = {}
        # Off the trajectory, as in the stages of a solver, J is another: there measurements do not know of each other.
        self._shared = stages == 1
        self._last: list[Tensor] | None = None  # what the last measurement knows
        self._steps: list[Step] = []
        self._delta: Tensor | None = None  # δx, (K, B, C, H, W)
        self._variances: list[Tensor] = []

    def __enter__(self) -> Tangents:
        self._linearized.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._linearized.__exit__(*exception)

    def advance(self, step: Step, network: GuidedNetwork) -> None:
        """The first pass, through one step."""
        due = step.index in self.refreshed or not self._responses  # a run may be longer than planned
        if due and self._delta is not None:
            self._measured[step.index] = measured = self._measure(step, self._delta, network)
            fitted = [Response.fit(*m, e) for m, e in zip(measured, self._last or repeat(None), strict=False)]
            self._last = [r.extension for r in fitted] if self._shared else None
            self._responses[step.index] = [r.to(working_dtype(step.sample)) for r in fitted]
        step = step.kept()
        self._steps.append(step)
        weights = _line(list(self._responses)[-2:], step.index)
        self._delta = self._through(self._linearized, step, self._delta, weights)
        self._variances.append(self._delta.square().mean(0))

    def finish(self, trajectory: bool = False, factors: bool = False) -> Propagated:
        """The second pass.

        Raises:
            NonFiniteError: There was no step, or the deviations have grown beyond all bounds.
        """
        if self._delta is None:
            raise NonFiniteError("expected at least one step of the sampler, got none")
        delta: Tensor | None = self._delta
        nodes = list(self._responses)
        everywhere = len(nodes) == max(step.index for step in self._steps)
        exact = everywhere and not any(chosen.probe for groups in self._measured.values() for chosen, _ in groups)
        if len(nodes) > 1 and not exact:
            if self._shared:
                self._smooth()
            delta = None
            self._variances.clear()
            for step in self._steps:
                delta = self._through(self._again, step, delta, interpolation(nodes, step.index))
                self._variances.append(delta.square().mean(0))
        if delta is None or not bool(torch.isfinite(delta).all()):
            raise NonFiniteError(
                "expected finite deviations at the end of the trajectory, got NaN or infinity; use float32 or bfloat16, "
                "or refresh more often"
            )
        return Propagated(
            self._variances[-1], None, tuple(self._variances) if trajectory else None,
            delta / len(delta) ** 0.5 if factors else None,
        )  # fmt: skip

    def _smooth(self) -> None:
        """Let every measurement know of all others."""
        nodes, dtype = list(self._responses), working_dtype(self._steps[0].sample)
        for group, measured in enumerate(zip(*self._measured.values(), strict=True)):
            for n, response in zip(nodes, smoothed(measured), strict=True):
                self._responses[n][group] = response.to(dtype)

    def _groups(self, batch: int) -> list[slice]:
        """The samples that are worked on together: all, or each by itself."""
        return [slice(b, b + 1) for b in range(batch)] if self.batch_invariant else [slice(0, batch)]

    def _coefficients(self, step: Step) -> tuple[Tensor, Tensor]:
        """(a, b) of the denoiser, ``(B, 1, 1)``; (0, 1), the raw output, where the schedule is of another kind."""
        t = torch.as_tensor(step.timestep)
        pairs = [
            sampling_coefficients(self._linearized.scheduler, t, c) or (0.0, 1.0) for c in step.input_scale.tolist()
        ]
        both = torch.tensor(pairs, dtype=torch.float64, device=step.sample.device)
        return both[:, 0].view(-1, 1, 1), both[:, 1].view(-1, 1, 1)

    def _measure(self, step: Step, delta: Tensor, network: GuidedNetwork) -> list[tuple[Directions, Tensor]]:
        """Directions and the denoiser's Jδ along them, for each group."""
        a, b = self._coefficients(step)
        rows, shape = _rows(delta), step.sample.shape
        groups = self._groups(shape[0])
        mixture = torch.randn(len(delta), generator=item_generator(0, step.index), dtype=torch.float64)
        chosen = [Directions.choose(rows[g], self.num_directions, mixture) for g in groups]
        shifts = [torch.cat(pieces) for pieces in zip(*(c.shifts() for c in chosen), strict=True)]
        images = []
        for first in range(0, len(shifts), self.directions_per_call):
            some = shifts[first : first + self.directions_per_call]
            responses = network.derivatives([v.view(shape) for v in some])
            images += [a[:, 0] * v + b[:, 0] * r.to(v).flatten(1) for v, r in zip(some, responses, strict=True)]
        stacked = torch.stack(images, dim=1)
        return [(c, stacked[g]) for c, g in zip(chosen, groups, strict=True)]

    def _through(
        self, linearized: LinearizedScheduler, step: Step, delta: Tensor | None, weights: dict[int, float]
    ) -> Tensor:
        """One step of the recursion, the response a sum of measured ones."""
        groups = self._groups(len(step.sample))
        shifts = [step.of(g).shift(self.geometry, self.deviations) for g in groups]
        d_output = (shifts[0] if len(shifts) == 1 else torch.cat(shifts, dim=1)).double()  # δWψ
        if delta is None:
            delta = torch.zeros_like(d_output)
        else:
            a, b = self._coefficients(step)
            rows = _rows(delta).to(working_dtype(step.sample))
            denoised = torch.cat([self._respond(weights, i, rows[g]) for i, g in enumerate(groups)]).double()
            d_output = d_output + ((denoised - a * _rows(delta)) / b).transpose(0, 1).reshape(delta.shape)
        return linearized.step(d_output, delta, step.output, step.timestep, step.sample, **step.arguments)

    def _respond(self, weights: dict[int, float], group: int, rows: Tensor) -> Tensor:
        return sum((w * self._responses[n][group](rows) for n, w in weights.items()), torch.zeros_like(rows))


def _rows(delta: Tensor) -> Tensor:
    """``(K, B, C, H, W)`` to ``(B, K, C·H·W)`` float64."""
    return delta.double().flatten(2).transpose(0, 1).contiguous()


def working_dtype(sample: Tensor) -> torch.dtype:
    """What responses are applied in: float64 for a float64 network, float32 for all others."""
    return torch.promote_types(sample.dtype, torch.float32)


def _line(nodes: list[int], n: int) -> dict[int, float]:
    """Weights of the line through the last two of the nodes, at n."""
    if len(nodes) < 2 or n == nodes[-1]:
        return dict.fromkeys(nodes[-1:], 1.0)
    share = (n - nodes[1]) / (nodes[1] - nodes[0])
    return {nodes[0]: -share, nodes[1]: 1 + share}


def interpolation(nodes: list[int], n: int) -> dict[int, float]:
    """Weights of the cubic through the four nodes around n (Lagrange); the line through the last two beyond them."""
    if n >= nodes[-1]:
        return _line(nodes[-2:], n)
    after = bisect.bisect_right(nodes, n)
    first = min(max(after - 2, 0), max(len(nodes) - 4, 0))
    chosen = nodes[first : first + 4]
    weights = {m: math.prod((n - k) / (m - k) for k in chosen if k != m) for m in chosen}
    return {m: w for m, w in weights.items() if w}
