"""A user's pipeline with uncertainty: the very images it makes, and a variance for every pixel."""

from __future__ import annotations

from collections.abc import Sequence
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
from bayesdiff.gaussian import Gaussian
from bayesdiff.head import check_eval, denoiser
from bayesdiff.parametrization import alpha_sigma, prediction_type
from bayesdiff.posterior import LaplacePosterior
from bayesdiff.propagate import Step, Tangents
from bayesdiff.rng import item_generator
from bayesdiff.watch import Respond, Watch

PROPAGATIONS = ("tangents", "ensemble")


@dataclass(frozen=True)
class UncertaintyOutput:
    """What an :class:`UncertaintyPipeline` returns.

    Args:
        images: Exactly what the pipe returns as its images.
        variance: Pixel-wise variance over the posterior of the weights, ``(B, C, H, W)`` float32, in
            squared pixel units (0–1), before the pipe clamps pixels to [0, 1].
        latents: The sampler's last sample and its variance, in the network's space.
        steps: For each denoising step the network's (guided) output and its closed-form variance.
        calls: Network calls in all, the pipe's own included.
        plain_calls: The pipe's own network calls.
        output: What the pipe returned, whole.
    """

    images: Any
    variance: Tensor
    latents: Gaussian
    steps: list[Gaussian] = field(repr=False)
    calls: int
    plain_calls: int
    output: Any = field(repr=False)

    @property
    def std(self) -> Tensor:
        """Pixel-wise standard deviation, ``(B, C, H, W)``, pixel units 0–1."""
        return self.variance.sqrt()


class UncertaintyPipeline:
    r"""Run a diffusers pipeline and carry the head's posterior along its trajectory.

    The pipe runs its own loop; it is watched, not rewritten, and left as it was.

    Args:
        pipe: A pixel-space diffusers pipeline with a ``scheduler`` and a ``unet`` or ``transformer``.
        posterior: A posterior of that network's head.
        propagation: ``"tangents"``: :math:`\delta x` of K weight draws, linearised
            (:mod:`bayesdiff.propagate`); ``"ensemble"``: the same pipe run again with M weight draws,
            variance about their mean (DIFF-UQ's estimator, with one draw for a whole trajectory).
        num_tangents: K, or M; the relative noise of the variance is :math:`\sqrt{2/K}` per pixel. Tangents
            cost memory and linear algebra, not network calls: those are p for each measurement.
        refresh: r, steps between measurements of the denoiser's response, on average (tangents only).
        num_directions: p, network evaluations in one measurement (tangents only); by default such that a map costs
            about 3.5 times the calls of the plain pipe. With ``refresh=1`` and p ≥ K nothing is approximated but the
            linearisation.
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
        refresh: int = 4,
        num_directions: int | None = None,
        generator: Generator | None = None,
        head: str | None = None,
    ) -> None:
        self.propagation = check_choice("propagation", propagation, PROPAGATIONS)
        self.num_tangents = check_int("num_tangents", num_tangents, least=1 if propagation == "tangents" else 2)
        self.refresh = check_int("refresh", refresh, least=1)
        self.num_directions = None if num_directions is None else check_int("num_directions", num_directions, least=1)
        self.pipe, self.posterior = pipe, posterior
        self.network = denoiser(pipe)
        if not hasattr(pipe, "scheduler"):
            raise UnsupportedPipelineError(f"expected a pipeline with a scheduler, got {type(pipe).__name__}")
        if getattr(pipe, "vae", None) is not None or getattr(pipe, "vqvae", None) is not None:
            raise UnsupportedPipelineError(
                f"expected a pixel-space pipeline, got {type(pipe).__name__}, which decodes latents: upsampling a latent "
                "variance would be wrong, and tangents are not carried through a decoder yet"
            )
        self.head = posterior.check(pipe, head)
        check_eval(self.network)
        generator = item_generator(0, 1) if generator is None else generator
        self.deviations = posterior.deviations(self.num_tangents, generator)

    def __call__(self, *args: Any, **kwargs: Any) -> UncertaintyOutput:
        """Run the pipe with its own arguments.

        Raises:
            ArgumentError: ``num_inference_steps`` < 1; an ensemble without ``generator=``.
            UnsupportedPipelineError: The pipe does something that cannot be followed.
            UnsupportedSchedulerError: The scheduler's step has no derivative, or divides by √ᾱ_T ≈ 0.
            NonFiniteError: Features or deviations are NaN or infinite.
        """
        if "num_inference_steps" in kwargs:
            check_int("num_inference_steps", kwargs["num_inference_steps"], least=1)
        run = self._tangents if self.propagation == "tangents" else self._ensemble
        return run(args, kwargs)

    def _tangents(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> UncertaintyOutput:
        steps: list[Gaussian] = []
        tangents: Tangents | None = None

        with ExitStack() as stack:

            def start(scheduler: Any) -> None:
                nonlocal tangents
                check_schedule(scheduler)
                tangents = Tangents(
                    self.deviations, self.posterior.geometry, scheduler, self.refresh, self.num_directions
                )
                stack.enter_context(tangents)

            def follow(step: Step, respond: Respond) -> None:
                steps.append(self._predict(step))
                if tangents is not None:
                    tangents.advance(step, respond)

            watch = stack.enter_context(Watch(self.pipe, self.network, self.head, follow, start))
            output = self.pipe(*args, **kwargs)
            if tangents is None or watch.sample is None:
                raise UnsupportedPipelineError("expected the pipeline to call its scheduler's step, got no call")
            latents = Gaussian(watch.sample.float(), tangents.finish().square().mean(0).float())
        return self._output(output, latents, latents.mean, steps, watch.calls, watch.own_calls)

    def _ensemble(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> UncertaintyOutput:
        generators = _generators(kwargs.get("generator"))
        if not generators:
            raise ArgumentError(
                "expected generator=… for an ensemble, so that every trajectory starts from the same noise, got none"
            )
        before = [g.get_state() for g in generators]
        steps: list[Gaussian] = []

        def follow(step: Step, _: Respond) -> None:
            steps.append(self._predict(step))

        with Watch(self.pipe, self.network, self.head, follow, check_schedule) as watch:
            output = self.pipe(*args, **kwargs)
        if watch.sample is None:
            raise UnsupportedPipelineError("expected the pipeline to call its scheduler's step, got no call")
        plain, calls = watch.sample.float(), watch.calls
        after = [g.get_state() for g in generators]
        # Welford's running moments: M samples are never held at once.
        mean = torch.zeros_like(plain, dtype=torch.float64)
        squares = torch.zeros_like(mean)
        try:
            for m, delta in enumerate(self.deviations, start=1):
                for g, state in zip(generators, before, strict=True):
                    g.set_state(state)
                with self.head.shifted(delta), Watch(self.pipe, self.network, self.head) as member:
                    self.pipe(*args, **kwargs)
                calls += member.calls
                sample = member.sample.double()  # type: ignore[union-attr]
                away = sample - mean
                mean += away / m
                squares += away * (sample - mean)
        finally:
            for g, state in zip(generators, after, strict=True):
                g.set_state(state)
        latents = Gaussian(mean.float(), (squares / (len(self.deviations) - 1)).float())
        return self._output(output, latents, plain, steps, calls, watch.own_calls)

    def _predict(self, step: Step) -> Gaussian:
        """The (guided) output of one step, and its closed-form variance."""
        variance = step.fold(self.posterior.variance(step.features))[:, : step.output.shape[1]]
        return Gaussian(step.output.to(variance.dtype), variance)

    def _output(
        self, output: Any, latents: Gaussian, plain: Tensor, steps: list[Gaussian], calls: int, own_calls: int
    ) -> UncertaintyOutput:
        images = output[0] if isinstance(output, tuple) else output.images
        _check_pixels(images, plain)
        # Pixels are x/2 + 1/2, so variances are divided by 4.
        return UncertaintyOutput(images, latents.variance / 4, latents, steps, calls, own_calls, output)


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


def _generators(value: Any) -> list[Generator]:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) else [value]


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
