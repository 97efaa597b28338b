"""The ways to carry a variance through a sampler, as frozen settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Generator

from bayesdiff.checks import ArgumentError, check_int, check_positive
from bayesdiff.rng import check_generator


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all ways have in common.

    Args:
        generator: Of the weight draws. By default one fixed seed, apart from those of samples, so that the same sampling seed
            gives the same map.
        batch_invariant: Evaluate the network row by row, and all else sample by sample, so that a map made alone and in any
            batch is the same to the last bit.
        trajectory: Whether to return the variance after every step.
        factors: Whether to return the deviations themselves.
    """

    generator: Generator | None = None
    batch_invariant: bool = False
    trajectory: bool = False
    factors: bool = False

    def __post_init__(self) -> None:
        check_generator(self.generator)

    def _whole(self, name: str, least: int) -> None:
        """Keep a setting as a plain int of at least ``least``."""
        object.__setattr__(self, name, check_int(name, getattr(self, name), least=least))


@dataclass(frozen=True)
class Tangents(Settings):
    r"""K weight draws as tangents along one trajectory (:mod:`bayesdiff.propagation.tangents`): the default.

    ``generator``, ``batch_invariant``, ``trajectory`` and ``factors`` as of :class:`Settings`; out of range: ``ArgumentError``.

    Args:
        draws: K; the relative noise of a variance is at most :math:`\sqrt{2/K}`, less because the draws are orthogonal.
            More draws cost memory and linear algebra, no network calls.
        extra_calls: Network calls that may be spent on the network's response, in those of the plain run: with 2.5 a map costs
            3.5 times the images alone, and one call more, which asks whether the network repeats itself.
        refresh: r, calls between measurements, on average; by default from ``extra_calls``.
        num_directions: p, evaluations in one measurement; by default what ``extra_calls`` allows. With ``refresh=1`` and p ≥ K
            nothing is approximated but the linearisation.
        directions_per_call: How many of them share one network call, of so many times its batch: as memory allows.
        decoder_calls: Evaluations of a decoder (VAE) that turns the last sample into pixels; with K of them or more it is given
            every draw, with fewer the principal directions and mixtures of the rest.
        schedule: For networks outside a pipeline: the diffusers scheduler whose noise levels the network was trained with. The
            response is then interpolated as the denoiser's, which takes fewer calls.
    """

    draws: int = 128
    extra_calls: float = 2.5
    refresh: int | None = None
    num_directions: int | None = None
    directions_per_call: int = 1
    decoder_calls: int = 20
    schedule: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole("draws", 1)
        object.__setattr__(self, "extra_calls", check_positive("extra_calls", self.extra_calls))
        for name in ("refresh", "num_directions"):
            if getattr(self, name) is not None:
                self._whole(name, 1)
        self._whole("directions_per_call", 1)
        self._whole("decoder_calls", 2)


@dataclass(frozen=True)
class Ensemble(Settings):
    """M whole runs with other weights (:mod:`bayesdiff.propagation.ensemble`; DIFF-UQ's estimator): the reference.

    ``generator``, ``batch_invariant``, ``trajectory`` and ``factors`` as of :class:`Settings`; out of range: ``ArgumentError``.

    Args:
        members: M.
        redraw: New weights for every sample that the network is given, as if the errors of the steps were independent;
            branches of guidance share them.
    """

    members: int = 24
    redraw: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole("members", 2)


@dataclass(frozen=True)
class BayesDiff(Settings):
    """The published recursion for variances (:mod:`bayesdiff.propagation.recursion`), for comparison.

    ``generator``, ``batch_invariant``, ``trajectory`` and ``factors`` as of :class:`Settings`; out of range: ``ArgumentError``.

    Args:
        samples: S, network calls in a quantified step.
        skip_interval: Every how many steps one is quantified.
        centered: With the covariance centred.
    """

    samples: int = 10
    skip_interval: int = 1
    centered: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole("samples", 2)
        self._whole("skip_interval", 1)
        if self.factors:
            raise ArgumentError("expected factors=False for BayesDiff, whose recursion has variances only, got True")


PROPAGATIONS = ("tangents", "ensemble", "bayesdiff", "bayesdiff-centered")


def settings(propagation: str | Settings) -> Settings:
    """Settings, from their name or themselves.

    Raises:
        ArgumentError: It is neither.
    """
    if isinstance(propagation, Tangents | Ensemble | BayesDiff):
        return propagation
    if not isinstance(propagation, str) or propagation not in PROPAGATIONS:
        raise ArgumentError(
            f"expected propagation to be one of {', '.join(map(repr, PROPAGATIONS))}, or bd.Tangents(…), bd.Ensemble(…) or "
            f"bd.BayesDiff(…), got {propagation!r}"
        )
    if propagation == "tangents":
        return Tangents()
    return Ensemble() if propagation == "ensemble" else BayesDiff(centered=propagation.endswith("centered"))
