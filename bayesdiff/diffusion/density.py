r"""How often a network saw each timestep in its training: a density of u = t/T on [0, 1], 0 clean and 1 noise.

    uniform        u ~ U(0, 1)                                  DDPM (Ho et al. 2020) and most others
    logit-normal   log u/(1 − u) ~ N(m, s²)                     Stable Diffusion 3 (Esser et al. 2024, eq. 19)
    gaussian       u ~ N(m, s²), cut to [0, 1]                  most weight in the middle

A flow trained with a *shifted* schedule, u → k u/(1 + (k − 1)u), has log u/(1 − u) moved by log k: so a shifted logit-normal is
one with the mean m + log k. A density is anything that can be called with (generator, n) and returns n numbers in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from bayesdiff.checks import ArgumentError, check_choice, check_positive, check_returned

#: A generator and n to n numbers u in [0, 1].
Density = Callable[[Generator, int], Tensor]


@dataclass(frozen=True)
class LogitNormal:
    """u whose logit is normal: Stable Diffusion 3's is ``LogitNormal(0, 1)``.

    Args:
        mean: m, the mean of the logit; above 0 there is more noise.
        std: s > 0, its standard deviation.

    Raises:
        ArgumentError: m is not finite, or s not positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check(self.mean, self.std)

    def __call__(self, generator: Generator, n: int) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.randn(n, generator=generator, dtype=torch.float64))


@dataclass(frozen=True)
class TruncatedNormal:
    """u ~ N(m, s²), cut to [0, 1]: by the inverse of its distribution function, so one number is drawn for each u.

    Args:
        mean: m.
        std: s > 0.

    Raises:
        ArgumentError: m is not finite, s not positive, or next to nothing of the density lies in [0, 1].
    """

    mean: float = 0.5
    std: float = 0.2

    def __post_init__(self) -> None:
        _check(self.mean, self.std)
        low, high = self._ends()
        if high - low < 1e-6:
            raise ArgumentError(
                f"expected a density with some of its weight in [0, 1], got mean {self.mean}, std {self.std}"
            )

    def _ends(self) -> tuple[float, float]:
        """The distribution function at 0 and at 1."""
        low, high = ((x - self.mean) / self.std / math.sqrt(2) for x in (0.0, 1.0))
        return (1 + math.erf(low)) / 2, (1 + math.erf(high)) / 2

    def __call__(self, generator: Generator, n: int) -> Tensor:
        low, high = self._ends()
        u = low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)
        # At the very ends rounding can leave the interval.
        return (self.mean + self.std * torch.special.ndtri(u)).clamp(0, 1)


DENSITIES = ("uniform", "logit-normal", "gaussian")


def as_density(choice: str | Density) -> Density | None:
    """A density by its name, or as given; None for the uniform one, which :func:`bayesdiff.diffusion.noising.draw` draws itself.

    Raises:
        ArgumentError: Another name, or nothing that can be called.
    """
    if isinstance(choice, str):
        check_choice("timestep_density", choice, DENSITIES)
        return {"uniform": None, "logit-normal": LogitNormal(), "gaussian": TruncatedNormal()}[choice]
    if not callable(choice):
        raise ArgumentError(
            f"expected timestep_density {', '.join(map(repr, DENSITIES))}, LogitNormal(…), or a function of "
            "(generator, n) "
            f"that returns n numbers in [0, 1], got {choice!r}"
        )
    return choice


def sample(density: Density, generator: Generator) -> Tensor:
    """One u, a float64 scalar.

    Raises:
        ShapeError: The density returned something other than one number.
        ArgumentError: It is outside [0, 1].
    """
    u = check_returned("timestep_density(generator, 1)", density(generator, 1), (1,))
    if not 0 <= float(u) <= 1:
        raise ArgumentError(f"expected timestep_density to return numbers in [0, 1], got {float(u)}")
    return u[0]


def _check(mean: float, std: float) -> None:
    if not math.isfinite(mean):
        raise ArgumentError(f"expected a finite mean, got {mean}")
    check_positive("std", std)
