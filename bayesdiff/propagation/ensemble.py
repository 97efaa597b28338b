r"""The reference: the same function run again with other weights, and the moments of what comes out.

Each of M members draws :math:`W_m \sim \mathcal N(W, \Sigma)` once and keeps it for its whole run, from the same noise:
DIFF-UQ's estimator (UAI 2025), nonlinear, M times the calls. With ``redraw`` it draws anew for every sample that the network is
given, as if the errors of the steps were independent, which one network's are not: errors then average out, and the variance is
too small.

Before the first member the ensemble itself is tested: a run on the recorded outputs, that is with δW = 0, must give the
network what the first run gave it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import NotRepeatableError
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.propagation.coordinates import branch_order
from bayesdiff.propagation.returned import values
from bayesdiff.propagation.settings import Ensemble
from bayesdiff.rng import item_generator
from bayesdiff.tracing.before_clamp import BeforeClamp
from bayesdiff.tracing.network import Session


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


class EnsembleRun:
    """M runs with other weights.

    Args:
        session: The recorded run.
        settings: M, and whether weights are redrawn.
        posterior: Of the head's weights.
        deviations: δW of the members, ``(M, C, D)``.
        seed: Of weights that are redrawn.
    """

    def __init__(
        self, session: Session, settings: Ensemble, posterior: LaplacePosterior, deviations: Tensor, seed: int
    ) -> None:  # fmt: skip
        self.session, self.settings, self.posterior = session, settings, posterior
        self.deviations, self.seed = deviations, seed
        #: Of what the members return, before the last clamp.
        self.result = Moments()
        #: Each member's result, if factors were asked for.
        self.members: list[Tensor] = []

    def run(
        self, output: Any, function: Callable[..., Any] | None = None, after: Callable[[bool], None] | None = None
    ) -> None:
        """All members.

        Args:
            output: What the first run returned.
            function: What to run, with the arguments of the session's function; by default that function.
            after: Called after each run, with whether it was a member's.

        Raises:
            NotRepeatableError: A member with δW = 0 does not reproduce the first run.
        """
        again = self.session.replay(lambda *_: None, lambda *_: None, function)
        if not _equal(values(output, None), values(again, None)):
            raise NotRepeatableError(
                "expected a member with δW = 0 to return what the first run returned, got something else: the function draws "
                "noise from a source of its own, or remembers something between runs"
            )
        if after is not None:
            after(False)
        for m in range(self.settings.members):
            trace = BeforeClamp()
            with self.session.live(trace), self._weights(m):
                found = values(self.session.run(function), trace)
            self.result.add(found)
            if self.settings.factors:
                self.members.append(found.double())
            if after is not None:
                after(True)

    @property
    def factors(self) -> Tensor | None:
        """Deviations F with covariance Σ_k F_k F_k', ``(M, *shape)``, if they were asked for."""
        if not self.members:
            return None
        return (torch.stack(self.members) - self.result.mean) / (self.result.count - 1) ** 0.5

    @contextmanager
    def _weights(self, m: int) -> Iterator[None]:
        """The head with δW of member m; redrawn, that of the sample that it is given, which branches of guidance share."""
        if not self.settings.redraw:
            with self.session.head.shifted(self.deviations[m]):
                yield
            return
        drawn: dict[int, Tensor] = {}
        first = [branch == 0 for branch, _ in branch_order(self.session.network.calls)]
        samples = [n - 1 for n in itertools.accumulate(first)]  # by call

        def current() -> Tensor:
            n = samples[self.session.network.position - 1]
            if n not in drawn:
                drawn.clear()
                drawn[n] = self.posterior.deviations(1, item_generator(self.seed, m, n))[0]
            return drawn[n]

        with self.session.head.shifted(current):
            yield


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
