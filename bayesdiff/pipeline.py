"""A user's pipeline with uncertainty: the very images it makes, and a variance for every pixel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from bayesdiff.checks import (
    ArgumentError,
    ShapeError,
    UnsupportedPipelineError,
    UnsupportedSchedulerError,
    check_choice,
    check_int,
)
from bayesdiff.diffusion.parametrization import alpha_sigma, prediction_type
from bayesdiff.gaussian import Gaussian
from bayesdiff.head.find import check_eval, denoiser
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.probe import adds_noise, check_affine
from bayesdiff.propagation.ensemble import Ensemble
from bayesdiff.propagation.recursion import Recursion
from bayesdiff.propagation.tangents import Propagated, Tangents
from bayesdiff.rng import base_seed, item_generator
from bayesdiff.step import Step
from bayesdiff.watch import GuidedNetwork, Watch

PROPAGATIONS = ("tangents", "ensemble", "bayesdiff", "bayesdiff-centered")


@dataclass(frozen=True)
class UncertaintyOutput:
    r"""What an :class:`UncertaintyPipeline` returns.

    Args:
        images: Exactly what the pipe returns as its images.
        variance: Pixel-wise variance over the posterior of the weights, ``(B, C, H, W)`` float32, in
            squared pixel units (0–1), before the pipe clamps pixels to [0, 1]. Those of ``"bayesdiff"`` can be negative.
        latents: The last sample and its variance (0 where that is negative), in the network's space. The mean is the pipe's
            own last sample for tangents, the members' mean for ensembles, the recursion's E[x] for ``"bayesdiff"``.
        steps: For each denoising step the network's (guided) output and its closed-form variance.
        calls: Network calls in all, the pipe's own included; one on G times the pipe's batch counts as G.
        plain_calls: The pipe's own network calls.
        output: What the pipe returned, whole.
        trajectory: With ``return_trajectory``, the sample after each step and its variance, in the network's space.
        factors: With ``return_factors``, F ``(K, B, C, H, W)`` float32 in pixel units: the covariance of any two pixels
            of a sample is :math:`\sum_k F_k F_k'`.
    """

    images: Any
    variance: Tensor
    latents: Gaussian
    steps: list[Gaussian] = field(repr=False)
    calls: int
    plain_calls: int
    output: Any = field(repr=False)
    trajectory: list[Gaussian] | None = field(default=None, repr=False)
    factors: Tensor | None = field(default=None, repr=False)

    @property
    def std(self) -> Tensor:
        """Pixel-wise standard deviation, ``(B, C, H, W)``, pixel units 0–1; 0 where a variance is negative."""
        return self.variance.clamp(min=0).sqrt()

    def scores(self) -> dict[str, Tensor]:
        r"""Numbers for whole images, ``(B,)`` each.

        ``total_variance``
            :math:`\sum_p v_p` over all pixels and channels: the trace of the covariance, BayesDiff's image score.
        ``mean_std``, ``max_std``
            Over pixels and channels, pixel units 0–1.
        ``top_share``
            With factors, the share of the trace that one direction carries: near 1, one mode of the image is unsure; near 0,
            many independent details are.
        ``effective_rank``
            With factors, :math:`(\sum_k\lambda_k)^2/\sum_k\lambda_k^2` of the covariance's eigenvalues; at most K.
        """
        std = self.std.double().flatten(1)
        scores = {
            "total_variance": self.variance.double().flatten(1).sum(1), "mean_std": std.mean(1), "max_std": std.amax(1),
        }  # fmt: skip
        if self.factors is not None:
            rows = self.factors.double().flatten(2).transpose(0, 1)
            values = torch.linalg.eigvalsh(rows @ rows.mT).clamp(min=0)  # rounding
            total = values.sum(1)
            scores["top_share"] = values.amax(1) / total
            scores["effective_rank"] = total.square() / values.square().sum(1)
        return scores


class UncertaintyPipeline:
    r"""Run a diffusers pipeline and carry the head's posterior along its trajectory.

    The pipe runs its own loop; it is watched, not rewritten, and left as it was.

    Args:
        pipe: A pixel-space diffusers pipeline with a ``scheduler`` and a ``unet`` or ``transformer``.
        posterior: A posterior of that network's head.
        propagation: How a variance is carried along:

            ``"tangents"``
                :math:`\delta x` of K weight draws, linearised (:mod:`bayesdiff.propagation.tangents`).
            ``"ensemble"``
                The same pipe run again with M weight draws, variance about their mean (:mod:`bayesdiff.propagation.ensemble`;
                DIFF-UQ's estimator): the reference.
            ``"bayesdiff"``, ``"bayesdiff-centered"``
                The published recursion for variances, for comparison, and the same with its covariance centred
                (:mod:`bayesdiff.propagation.recursion`); one-step samplers only.
        num_tangents: K, or M; the relative noise of the variance is :math:`\sqrt{2/K}` per pixel, less for tangents, whose
            draws are orthogonal (:meth:`LaplacePosterior.deviations`). Tangents cost memory and linear algebra, not network
            calls: those are p for each measurement.
        extra_calls: How many network calls tangents may spend on measuring the denoiser's response, in those of the plain
            pipe: with 2.5, a map costs 3.5 times the images alone.
        refresh: r, steps between measurements, on average (tangents only); by default from ``extra_calls``.
        num_directions: p, network evaluations in one measurement (tangents only); by default what ``extra_calls`` allows.
            With ``refresh=1`` and p ≥ K nothing is approximated but the linearisation.
        directions_per_call: How many of them share one network call, of so many times the pipe's batch: as memory allows, faster
            on a GPU that the pipe's own batch leaves idle.
        num_samples: S, draws of the sample in each quantified step (bayesdiff only).
        skip_interval: Every how many steps one is quantified (bayesdiff only).
        redraw: New weights at every step (ensemble only), as if the errors of the steps were independent.
        batch_invariant: Evaluate the network row by row, and all else sample by sample, so that a map made alone and in any
            batch is the same to the last bit. Images are then those that the pipe makes if its network is called with one
            row at a time.
        return_trajectory: Whether to return the variance after every step.
        return_factors: Whether to return the deviations themselves (tangents and ensembles).
        generator: For the weight draws, which are made once, here: maps of one object share them, and do
            not depend on the batch. By default one fixed seed (apart from those of samples), so that the same
            sampling seed gives the same map.
        head: Exact path of the output layer; by default where the posterior was fitted.

    Raises:
        HeadMismatchError: The posterior is of another network.
        ArgumentError: An argument is out of range, or the network is in training mode.
        UnsupportedPipelineError: The pipe decodes latents; pixel-wise maps need a pixel-space pipe.
    """

    def __init__(
        self,
        pipe: Any,
        posterior: LaplacePosterior,
        *,
        propagation: str = "tangents",
        num_tangents: int = 64,
        extra_calls: float = 2.5,
        refresh: int | None = None,
        num_directions: int | None = None,
        directions_per_call: int = 1,
        num_samples: int = 10,
        skip_interval: int = 1,
        redraw: bool = False,
        batch_invariant: bool = False,
        return_trajectory: bool = False,
        return_factors: bool = False,
        generator: Generator | None = None,
        head: str | None = None,
    ) -> None:
        self.propagation = check_choice("propagation", propagation, PROPAGATIONS)
        self.num_tangents = check_int("num_tangents", num_tangents, least=2 if propagation == "ensemble" else 1)
        if not extra_calls > 0:
            raise ArgumentError(f"expected extra_calls > 0, got {extra_calls!r}")
        self.extra_calls = float(extra_calls)
        self.refresh = None if refresh is None else check_int("refresh", refresh, least=1)
        self.num_directions = None if num_directions is None else check_int("num_directions", num_directions, least=1)
        self.directions_per_call = check_int("directions_per_call", directions_per_call, least=1)
        self.num_samples = check_int("num_samples", num_samples, least=2)
        self.skip_interval = check_int("skip_interval", skip_interval, least=1)
        if redraw and propagation != "ensemble":
            raise ArgumentError(f'expected propagation="ensemble" with redraw=True, got {propagation!r}')
        if return_factors and propagation.startswith("bayesdiff"):
            raise ArgumentError(f'expected "tangents" or "ensemble" with return_factors=True, got {propagation!r}')
        self.redraw, self.batch_invariant = redraw, batch_invariant
        self.return_trajectory, self.return_factors = return_trajectory, return_factors
        self.pipe, self.posterior = pipe, posterior
        self.network = denoiser(pipe)
        if not hasattr(pipe, "scheduler"):
            raise UnsupportedPipelineError(f"expected a pipeline with a scheduler, got {type(pipe).__name__}")
        if getattr(pipe, "vae", None) is not None or getattr(pipe, "vqvae", None) is not None:
            raise UnsupportedPipelineError(
                f"expected a pixel-space pipeline, got {type(pipe).__name__}, which decodes latents: upsampling a latent "
                "variance would be wrong, and tangents are not carried through a decoder yet"
            )
        self._probed: dict[str, bool] = {}
        self.head = posterior.check(pipe, head)
        check_eval(self.network)
        generator = item_generator(0, 1) if generator is None else generator
        self._seed = base_seed(generator) if redraw or propagation.startswith("bayesdiff") else 0
        # Only the second moments of tangents count, so their draws may be orthogonal; an ensemble's are independent.
        self.deviations = posterior.deviations(self.num_tangents, generator, orthogonal=propagation == "tangents")

    def __call__(self, *args: Any, **kwargs: Any) -> UncertaintyOutput:
        """Run the pipe with its own arguments.

        Raises:
            ArgumentError: ``num_inference_steps`` < 1; an ensemble without ``generator=``.
            UnsupportedPipelineError: The pipe does something that cannot be followed.
            UnsupportedSchedulerError: The scheduler's step is not affine or has no derivative, divides by √ᾱ_T ≈ 0, or has a
                memory that the recursion of BayesDiff does not know.
            NonFiniteError: Features or deviations are NaN or infinite.
        """
        if "num_inference_steps" in kwargs:
            check_int("num_inference_steps", kwargs["num_inference_steps"], least=1)
        ensemble = None
        if self.propagation == "ensemble":
            ensemble = Ensemble(self.posterior, self.deviations, self._seed if self.redraw else None, kwargs)
        steps: list[Gaussian] = []
        samples: list[Tensor] = []
        propagator: Tangents | Recursion | None = None

        with ExitStack() as stack:

            def start(scheduler: Any, step: Step) -> None:
                nonlocal propagator
                check_schedule(scheduler)
                if ensemble is None:
                    first = first_index(scheduler, step.timestep)
                    noisy = self._probe(scheduler, first, step)
                    propagator = self._propagator(scheduler, len(scheduler.timesteps) - first, noisy)
                    stack.enter_context(propagator)

            def follow(step: Step, network: GuidedNetwork) -> None:
                steps.append(self._predict(step))
                if propagator is not None:
                    propagator.advance(step, network)

            watch = stack.enter_context(
                Watch(self.pipe, self.network, self.head, follow, start, self.batch_invariant, samples.append)
            )
            output = self.pipe(*args, **kwargs)
            if not samples:
                raise UnsupportedPipelineError("expected the pipeline to call its scheduler's step, got no call")
            calls = watch.calls
            if isinstance(propagator, Tangents):
                result = propagator.finish(self.return_trajectory, self.return_factors)
            elif isinstance(propagator, Recursion):
                result = propagator.finish(self.return_trajectory)
        if ensemble is not None:
            result = ensemble.run(
                lambda: self.pipe(*args, **kwargs), self._member, self.return_trajectory, self.return_factors
            )
            calls += ensemble.calls
        return self._output(output, result, samples, steps, calls, watch.own_calls)

    def _probe(self, scheduler: Any, first: int, step: Step) -> bool:
        """:func:`bayesdiff.probe.check_affine`, once for each setting of the sampler; and whether it adds noise."""
        plain = {k: v for k, v in step.arguments.items() if isinstance(v, (int, float, str))}
        setting = str(
            (type(scheduler), dict(scheduler.config), torch.as_tensor(scheduler.timesteps).tolist(), first, plain)
        )
        if setting not in self._probed:
            about = first, step.sample.shape[1], step.arguments, step.sample.device
            outputs = step.output.shape[1]
            check_affine(scheduler, *about, output_channels=outputs)
            self._probed[setting] = adds_noise(scheduler, *about, output_channels=outputs)
        return self._probed[setting]

    def _member(self, on_sample: Callable[[Tensor], None]) -> Watch:
        return Watch(self.pipe, self.network, self.head, batch_invariant=self.batch_invariant, on_sample=on_sample)

    def _propagator(self, scheduler: Any, num_steps: int, noisy: bool) -> Tangents | Recursion:
        """What walks beside the sampler, from its first step on."""
        if self.propagation == "tangents":
            return Tangents(
                self.deviations, self.posterior.geometry, scheduler, num_steps, self.extra_calls, self.refresh,
                self.num_directions, self.directions_per_call, self.batch_invariant, noisy,
            )  # fmt: skip
        return Recursion(
            self.posterior, scheduler, self.num_samples, self.skip_interval,
            centered=self.propagation == "bayesdiff-centered", seed=self._seed, batch_invariant=self.batch_invariant,
        )  # fmt: skip

    def _predict(self, step: Step) -> Gaussian:
        """The (guided) output of one step, and its closed-form variance."""
        batch = len(step.sample)
        groups = [slice(b, b + 1) for b in range(batch)] if self.batch_invariant else [slice(0, batch)]
        variance = torch.cat([self._output_variance(step.of(g)) for g in groups])
        return Gaussian(step.output.to(variance.dtype), variance)

    def _output_variance(self, step: Step) -> Tensor:
        variance = step.fold(self.posterior.variance(step.features))[:, : step.output.shape[1]]
        if step.guidance.amount is None:
            return variance
        # Rescaling mixes all pixels; its part is estimated from the draws, relative to the closed form's own estimate.
        linear = step.linear_shift(self.posterior.geometry, self.deviations, step.features)
        rescaled = step.shift(self.posterior.geometry, self.deviations)
        return variance * (rescaled.square().mean(0) / linear.square().mean(0))

    def _output(
        self, output: Any, result: Propagated, samples: list[Tensor], steps: list[Gaussian], calls: int, own_calls: int
    ) -> UncertaintyOutput:
        images = output[0] if isinstance(output, tuple) else output.images
        _check_pixels(images, samples[-1])

        def latent(mean: Tensor, variance: Tensor) -> Gaussian:
            return Gaussian(mean.float(), variance.clamp(min=0).float())

        trajectory = None
        if result.trajectory is not None:
            trajectory = [latent(x, v) for x, v in zip(samples, result.trajectory, strict=True)]
        # Pixels are x/2 + 1/2, so deviations are halved.
        return UncertaintyOutput(
            images, result.variance.float() / 4, latent(samples[-1] if result.mean is None else result.mean, result.variance),
            steps, calls, own_calls, output, trajectory, None if result.factors is None else result.factors.float() / 2,
        )  # fmt: skip


def first_index(scheduler: Any, timestep: Any) -> int:
    """Where in its timesteps a sampler starts: 0, but for pipelines that start from a noisy image."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    found = (torch.as_tensor(scheduler.timesteps).cpu() == torch.as_tensor(timestep).cpu()).nonzero()
    return int(found[0]) if len(found) else 0


def check_schedule(scheduler: Any) -> None:
    """Refuse ε-prediction from (almost) zero terminal signal.

    Raises:
        UnsupportedSchedulerError: The first step divides the network's error by √ᾱ ≈ 0.
    """
    if not hasattr(scheduler, "alphas_cumprod") or prediction_type(scheduler) != "epsilon":
        return
    first = torch.as_tensor(scheduler.timesteps[0])
    alpha = float(alpha_sigma(scheduler, first)[0])
    if alpha < 1e-3:
        raise UnsupportedSchedulerError(
            f"expected √ᾱ_t ≥ 0.001 at the first timestep of an ε-prediction sampler, got {alpha:.2g} at t = {float(first):g}: "
            "the step divides the network's error by it (zero terminal SNR); use timestep_spacing='leading', another "
            "schedule, or a v-prediction network"
        )


def _as_tensor(images: Any) -> Tensor:
    """Images of any diffusers output type as ``(B, C, H, W)`` in their own units."""
    if isinstance(images, Tensor):
        return images.detach().float().cpu()
    if isinstance(images, np.ndarray):
        array = images
    else:
        array = np.stack([np.asarray(image) for image in images]).astype(np.float64) / 255
        array = array[..., None] if array.ndim == 3 else array
    return torch.from_numpy(np.ascontiguousarray(array)).float().movedim(-1, 1)


def _check_pixels(images: Any, sample: Tensor) -> None:
    """Make sure that pixels are clamp(x/2 + 1/2), so that standard deviations may be halved."""
    x = sample.detach().float().cpu()
    seen = _as_tensor(images)
    if seen.shape != x.shape:
        raise ShapeError(
            f"expected images shaped as the sampler's last sample {tuple(x.shape)}, got {tuple(seen.shape)}"
        )
    apart = min(float((seen - (x / 2 + 0.5).clamp(0, 1)).abs().max()), float((seen - x).abs().max()))
    if not apart <= 1 / 255:
        raise UnsupportedPipelineError(
            f"expected pixels x/2 + 1/2 of the sampler's last sample x (or x itself), got a difference of {apart:.3g}"
        )
