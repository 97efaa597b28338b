r"""The weights over t of a training loss, as functions of t.

With SNR = α²/σ² and :math:`x_0 = a x_t + b g` (:mod:`bayesdiff.diffusion.parametrization`), a loss on :math:`x_0` with weight w
is one on the network's output g with weight :math:`b^2 w`. Both weightings of the field are stated so once, for every
prediction, with :math:`q = b^2\,\mathrm{SNR}`, the weight that makes a loss on g one on ε:

    min-SNR    min(SNR, γ) b² = min(1, γ/SNR) q         γ = 5 (Hang et al. 2023)
    P2         q / (k + SNR)^γ                          k = γ = 1 (Choi et al. 2022)

These vary by powers of ten within a bin of t, so they enter each draw's gradient and curvature in the pass over the data.
Weights by bin ("uniform", "noise", a tensor) enter when a posterior is cut (:mod:`bayesdiff.laplace.cut`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import ArgumentError, check_positive, check_returned
from bayesdiff.diffusion.parametrization import alpha_sigma, prediction_type

#: A scheduler and timesteps ``(B,)`` to weights ``(B,)``, float64.
Weighting = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, γ) on x_0 (Hang et al. 2023, eq. 7).

    Args:
        gamma: γ > 0.

    Raises:
        ArgumentError: γ is not positive.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        check_positive("gamma", self.gamma)

    def at(self, scheduler: Any, t: Tensor) -> Tensor:
        """The weights of the loss on the network's output, ``(B,)``."""
        snr, q = _snr(scheduler, t)
        return q * (self.gamma / snr).clamp(max=1)


@dataclass(frozen=True)
class P2:
    """1/(k + SNR)^γ on ε (Choi et al. 2022, eq. 8).

    Args:
        gamma: γ > 0.
        k: k > 0.

    Raises:
        ArgumentError: γ or k is not positive.
    """

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        check_positive("gamma", self.gamma)
        check_positive("k", self.k)

    def at(self, scheduler: Any, t: Tensor) -> Tensor:
        """The weights of the loss on the network's output, ``(B,)``."""
        snr, q = _snr(scheduler, t)
        return q / (self.k + snr) ** self.gamma


#: Weightings by name; what else can be named is by bin.
WEIGHTINGS: dict[str, MinSNR | P2] = {"min-snr": MinSNR(), "p2": P2()}


def as_weighting(choice: Any) -> Weighting | None:
    """A weighting of each draw by its t; None where the choice is one by bin (a name or a tensor) or not of this module.

    A function is called with u = t/T in [0, 1], ``(B,)`` float64, and returns weights ``(B,)``.
    """
    chosen = WEIGHTINGS.get(choice) if isinstance(choice, str) else choice
    if isinstance(chosen, (MinSNR, P2)):
        return lambda scheduler, t: _checked(chosen.at(scheduler, t), t)
    if isinstance(chosen, Tensor) or not callable(chosen):
        return None
    return lambda scheduler, t: _checked(chosen(t.double() / scheduler.config.num_train_timesteps), t)


def _snr(scheduler: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    """SNR and q = b² SNR, without the quotients that vanish or diverge at the ends."""
    alpha, sigma = alpha_sigma(scheduler, t)
    snr = (alpha / sigma).square()
    q = {
        "epsilon": torch.ones_like(alpha),
        "v_prediction": (alpha / (alpha.square() + sigma.square())).square(),
        "sample": snr,
        "flow": (alpha / (alpha + sigma)).square(),
    }[prediction_type(scheduler)]
    return snr, q


def _checked(weights: Any, t: Tensor) -> Tensor:
    w = check_returned("loss_weights(t/T)", weights, tuple(t.shape))
    if not bool(((w >= 0) & torch.isfinite(w)).all()):
        raise ArgumentError(
            f"expected finite loss_weights >= 0 at every t, got {w.min().item()} to {w.max().item()} at t from "
            f"{t.min().item()} to {t.max().item()}"
        )
    return w
