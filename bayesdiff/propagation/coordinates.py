r"""The network's own coordinates: where each call is on the trajectory, and which denoiser it stands for.

Whatever convention a sampler has, a network sees :math:`x_{in} = \alpha x_0 + \sigma\varepsilon`, with α and σ by its own
timestep; so its output gives the denoiser :math:`D = a\,x_{in} + b\,f` (:mod:`bayesdiff.diffusion.parametrization`), whose
Jacobian changes more slowly along a trajectory than the output's. What is interpolated is that of :math:`\sqrt\alpha\,D`: what a
network does wrong is divided by α in D, so at much noise D of an under-trained one changes by powers of ten from call to call.
The timestep is found among the arguments by what it does: it is a number, and it falls or rises from call to call.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from bayesdiff.checks import UnsupportedSchedulerError
from bayesdiff.diffusion.parametrization import alpha_sigma, clean_coefficients, is_flow, prediction_type
from bayesdiff.tracing.record import Call

#: α is taken to be no less than this.
LEAST_ALPHA = 1e-4
#: α, σ, a and b of the raw output.
UNKNOWN = (1.0, 0.0, 0.0, 1.0)


def levels(calls: Sequence[Call]) -> list[float] | None:
    """The noise level of each call, as the network is told it; None where no argument is one.

    Rather a single number than several, rather one that falls or rises, rather one of many values.
    """
    best: tuple[bool, bool, list[float]] | None = None
    for name in calls[0].scalars:
        if not all(name in call.scalars for call in calls):
            continue
        values = [float(call.scalars[name].mean()) for call in calls]
        if len(set(values)) < 2:
            continue
        single = all(call.scalars[name].numel() == 1 for call in calls)
        steps = [b - a for a, b in itertools.pairwise(values) if a != b]
        found = (single, min(steps) > 0 or max(steps) < 0, values)
        if best is None or found[:2] > best[:2] or (found[:2] == best[:2] and len(set(values)) > 2 * len(set(best[2]))):
            best = found
    return None if best is None else best[2]


def branch_order(calls: Sequence[Call]) -> list[tuple[int, int]]:
    """For each call, which branch of its sample it is, and its number among that branch's calls.

    Guidance may call the network for each branch apart: one call after the other with the same sample at the same level,
    and other conditions. Their responses are different ones.
    """
    out: list[tuple[int, int]] = []
    seen: dict[int, int] = {}
    at = levels(calls) or [0.0] * len(calls)
    for n, call in enumerate(calls):
        follows = n > 0 and call.sums[:2] == calls[n - 1].sums[:2] and at[n] == at[n - 1]
        branch = out[-1][0] + 1 if follows else 0
        out.append((branch, seen.get(branch, 0)))
        seen[branch] = out[-1][1] + 1
    return out


class Coordinates:
    """(a, b) of the calls of one run.

    Args:
        scheduler: The schedule that the network was trained with, or None.
        calls: The recorded calls.
    """

    def __init__(self, scheduler: Any, calls: Sequence[Call]) -> None:
        self.scheduler, self.levels, self.number = scheduler, levels(calls), len(calls)
        self._sign = -1.0 if calls[0].agreement < 0 else 1.0

    def __call__(self, n: int) -> tuple[float, float]:
        """(a, b) of call n; (0, 1), the raw output, where they are not known."""
        return self._known(n)[2:]

    def noise(self, n: int) -> tuple[float, float] | None:
        """α and σ of what the network sees in call n; None where they are not known."""
        alpha, sigma, *_ = self._known(n)
        return (alpha, sigma) if sigma > 0 else None

    def interpolated(self, n: int) -> tuple[float, float]:
        """√α (a, b) of call n: of what is interpolated."""
        alpha, _, a, b = self._known(n)
        return scale_of(alpha) * a, scale_of(alpha) * b

    def _known(self, n: int) -> tuple[float, float, float, float]:
        """α, σ, a and b."""
        if self.scheduler is None or self.levels is None:
            return UNKNOWN
        try:
            return self._at(self.levels[n])
        except (UnsupportedSchedulerError, AttributeError):  # a schedule of another kind
            return UNKNOWN

    def _at(self, level: float) -> tuple[float, float, float, float]:
        assert self.levels is not None
        prediction = prediction_type(self.scheduler)
        sigma_data = getattr(self.scheduler.config, "sigma_data", None)
        if sigma_data is not None:
            return _preconditioned(self.scheduler, float(sigma_data), prediction, level)
        steps = float(self.scheduler.config.num_train_timesteps)
        fraction = max(map(abs, self.levels)) <= 1.5 and any(v % 1 for v in self.levels)
        share = level if fraction else level / steps
        if is_flow(self.scheduler):
            # A network may be told t, t/1000 or 1 − t/1000, and may return the velocity in either direction.
            sigma = 1 - share if self.levels[-1] > self.levels[0] else share
            a, b = clean_coefficients("flow", 1 - sigma, sigma)
            return 1 - sigma, sigma, a, self._sign * b
        alpha, sigma = (float(v) for v in alpha_sigma(self.scheduler, torch.tensor(share * steps)))
        if alpha < 1e-6 and prediction == "epsilon":
            return UNKNOWN
        return alpha, sigma, *clean_coefficients(prediction, alpha, sigma)


def scale_of(alpha: float) -> float:
    """√α: of a denoiser as it is interpolated."""
    return max(alpha, LEAST_ALPHA) ** 0.5


def _preconditioned(
    scheduler: Any, sigma_data: float, prediction: str, level: float
) -> tuple[float, float, float, float]:
    r"""α, σ, a and b behind the preconditioning of Karras et al. (2022), Table 1, whose network is told log σ/4.

    :math:`x_0 = c_{skip}x + c_{out}f` with :math:`x = x_{in}/c_{in}`.
    """
    sigmas = torch.as_tensor(scheduler.sigmas).double().cpu()
    told = torch.as_tensor(scheduler.precondition_noise(sigmas[sigmas > 0])).double().cpu()
    sigma = float(sigmas[sigmas > 0][(told - level).abs().argmin()])
    sign = {"epsilon": 1.0, "v_prediction": -1.0}.get(prediction)
    if sign is None:
        return UNKNOWN
    c = (sigma**2 + sigma_data**2) ** -0.5
    return c, sigma * c, sigma_data**2 * c, sign * sigma_data * sigma * c
