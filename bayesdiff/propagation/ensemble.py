r"""The reference: the same pipe run again with other weights, and the moments of what comes out.

Each of M members draws :math:`W_m \sim \mathcal N(W, \Sigma)` once and keeps it for its whole trajectory, from the same noise:
DIFF-UQ's estimator (UAI 2025), nonlinear, M times the calls. With ``redraw`` it draws anew at every step, as if the
errors of the steps were independent, which one network's are not: errors then average out, and the variance is too small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from bayesdiff.checks import ArgumentError
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.propagation.tangents import Propagated
from bayesdiff.rng import item_generator
from bayesdiff.watch import Watch


class Moments:
    """Mean and variance of tensors that are never held at once (Welford 1962)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self._squares = torch.zeros(())

    def add(self, value: Tensor) -> None:
        if self.count == 0:
            self.mean = self._squares = torch.zeros_like(value, dtype=torch.float64)
        self.count += 1
        away = value.double() - self.mean
        self.mean = self.mean + away / self.count
        self._squares = self._squares + away * (value.double() - self.mean)

    @property
    def variance(self) -> Tensor:
        """About the mean, divided by n − 1."""
        return self._squares / (self.count - 1)


class Ensemble:
    """M trajectories with other weights, from the state that the pipe's generators are in when this is made.

    Args:
        posterior: Of the head's weights.
        deviations: δW of the M ≥ 2 members, ``(M, C, D)``.
        redraw: A seed: new weights at every step, instead.
        kwargs: The pipe's arguments, ``generator`` among them.

    Raises:
        ArgumentError: There is no generator that could be set back.
    """

    def __init__(
        self, posterior: LaplacePosterior, deviations: Tensor, redraw: int | None, kwargs: dict[str, Any]
    ) -> None:
        self.posterior, self.deviations, self.redraw = posterior, deviations, redraw
        #: Network calls so far.
        self.calls = 0
        value = kwargs.get("generator")
        if value is None:
            raise ArgumentError(
                "expected generator=… for an ensemble, so that every trajectory starts from the same noise, got none"
            )
        self._generators: list[Generator] = list(value) if isinstance(value, Sequence) else [value]
        self._states = [g.get_state() for g in self._generators]

    def run(
        self,
        pipe: Callable[[], Any],
        watch: Callable[[Callable[[Tensor], None]], Watch],
        trajectory: bool = False,
        factors: bool = False,
    ) -> Propagated:
        """Run the pipe M times, and leave its generators as they are now.

        Args:
            pipe: Runs it.
            watch: Makes a :class:`~bayesdiff.watch.Watch` of it, which calls what it is given with every sample.
            trajectory: Whether to return the variances of all steps.
            factors: Whether to return every member's deviation from the mean.
        """
        now = [g.get_state() for g in self._generators]
        last = Moments()
        along: list[Moments] = []
        members: list[Tensor] = []
        try:
            for m in range(len(self.deviations)):
                for g, state in zip(self._generators, self._states, strict=True):
                    g.set_state(state)
                samples: list[Tensor] = []
                member = watch(samples.append)
                with member.head.shifted(self._weights(m, member)), member:
                    pipe()
                self.calls += member.calls
                last.add(samples[-1])
                if trajectory:
                    along = along or [Moments() for _ in samples]
                    for moments, sample in zip(along, samples, strict=True):
                        moments.add(sample)
                if factors:
                    members.append(samples[-1].double())
        finally:
            for g, state in zip(self._generators, now, strict=True):
                g.set_state(state)
        away = (torch.stack(members) - last.mean) / (last.count - 1) ** 0.5 if factors else None
        return Propagated(last.variance, last.mean, tuple(m.variance for m in along) if trajectory else None, away)

    def _weights(self, m: int, member: Watch) -> Tensor | Callable[[], Tensor]:
        """δW of member m; that of the step it is at, if they are redrawn."""
        seed = self.redraw
        if seed is None:
            return self.deviations[m]
        drawn: dict[int, Tensor] = {}

        def current() -> Tensor:
            if member.steps not in drawn:
                drawn.clear()
                drawn[member.steps] = self.posterior.deviations(1, item_generator(seed, m, member.steps))[0]
            return drawn[member.steps]

        return current
