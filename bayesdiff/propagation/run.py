"""One run of a function or a pipeline with uncertainty, from the first call to the map."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import (
    BayesdiffWarning,
    NonFiniteError,
    UnequalTangentsError,
    UnsupportedPipelineError,
    UnsupportedSchedulerError,
    check_finite,
)
from bayesdiff.diffusion.parametrization import alpha_sigma, prediction_type
from bayesdiff.gaussian import Gaussian
from bayesdiff.head.compiled import uncompiled
from bayesdiff.head.find import Head
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.output import UncertaintyOutput
from bayesdiff.propagation.ensemble import EnsembleRun, Moments
from bayesdiff.propagation.recursion import Recursion
from bayesdiff.propagation.returned import returned
from bayesdiff.propagation.settings import BayesDiff, Ensemble, Settings, Tangents
from bayesdiff.propagation.steps import Direct, DrawnVariance, branches, step_variance
from bayesdiff.propagation.tangents import TangentRun, warn
from bayesdiff.tracing.boxes import modules_of
from bayesdiff.tracing.network import Session
from bayesdiff.tracing.rerun import Rerun
from bayesdiff.tracing.step import OnStep, Probe, Spy, Step, call_step, previous_sample


class UncertainRun:
    """A function or a pipeline, run with uncertainty.

    Args:
        function: What is run: a function, or a pipeline.
        network: Its denoising network.
        head: The network's output layer.
        posterior: Of the head's weights.
        settings: How a variance is carried.
        deviations: δW, ``(K, C, D)``.
        seed: For what else is drawn.
        args: The function's arguments.
        kwargs: Its named arguments.
    """

    def __init__(
        self, function: Callable[..., Any], network: nn.Module, head: Head, posterior: LaplacePosterior, settings: Settings,
        deviations: Tensor, seed: int, args: tuple[Any, ...], kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        self.function, self.posterior, self.settings = function, posterior, settings
        self.deviations, self.seed = deviations, seed
        self.run = Rerun(function, args, kwargs)
        self.scheduler = getattr(function, "scheduler", None)
        others = modules_of(self.run, args, kwargs, network)
        self.session = Session(self.run, network, head, others, by_row=settings.batch_invariant)
        self.direct = Direct(
            self.session, posterior.geometry, deviations, by_sample=settings.batch_invariant, working=posterior.working
        )
        self.steps: list[Step] = []

    @uncompiled()
    def __call__(self) -> UncertaintyOutput:
        """All of it; the generators end where one plain run leaves them."""
        try:
            output = self.session.record()
            self.probe()
            if isinstance(self.settings, Ensemble):
                return self._ensemble(output, self.settings)
            if isinstance(self.settings, BayesDiff):
                return self._recursion(output, self.settings)
            assert isinstance(self.settings, Tangents)
            return self._tangents(output, self.settings)
        finally:
            self.run.settle()
            self.steps.clear()
            self.session.release()

    def again(self, on_step: OnStep | None = None) -> Callable[..., Any] | None:
        """The function for later runs: a pipe without its progress bar, whose scheduler's steps are seen."""
        if self.scheduler is None:
            return None
        clone = copy.copy(self.function)
        if on_step is not None:
            vars(clone)["scheduler"] = Spy(self.scheduler, on_step)
        bar = getattr(clone, "_progress_bar_config", None) or {}
        vars(clone)["_progress_bar_config"] = {**bar, "disable": True}
        return clone

    def probe(self) -> None:
        """See every step, and which rows of the network's outputs it is given."""
        if self.scheduler is None:
            return
        probe = Probe(self.session)
        self.session.replay(probe.on_network, lambda *_: None, self.again(probe.on_step))
        self.steps = probe.steps
        if not self.steps:
            warnings.warn(
                f"expected {type(self.function).__name__} to call its scheduler's step, got no call: there are no steps and no "
                "latents in the output", BayesdiffWarning, stacklevel=5,
            )  # fmt: skip
        else:
            check_schedule(self.scheduler, self.steps[0].timestep)

    def _predicted(self) -> dict[str, Any]:
        """What is given to each step, and its variance."""
        calls = self.session.network.calls
        variances = [
            step_variance(s, calls, self.posterior, by_sample=self.settings.batch_invariant) for s in self.steps
        ]
        exact = [v is not None for v in variances]
        if not all(exact):
            drawn = DrawnVariance(self.session, self.direct)
            self.session.replay(drawn.on_network, lambda *_: None, self.again(drawn.on_step))
            variances = [d if v is None else v for v, d in zip(variances, drawn.variances, strict=True)]
        found = [v for v in variances if v is not None]
        steps = [Gaussian(s.output.to(v.dtype), v) for s, v in zip(self.steps, found, strict=True)]
        self.steps.clear()  # their samples are not needed any more
        return {"steps": steps, "exact_steps": exact}

    def _counts(self) -> dict[str, Any]:
        s = self.session
        return {"calls": s.evaluations, "plain_calls": len(s.network.calls), "other_calls": s.other_evaluations}

    def _tangents(self, output: Any, settings: Tangents) -> UncertaintyOutput:
        scheduler = settings.schedule if settings.schedule is not None else self.scheduler
        run = TangentRun(
            self.session, settings, self.direct, len(self.deviations), scheduler=scheduler,
            stages=int(getattr(self.scheduler, "order", 1) or 1), branches=branches(self.steps),
        )  # fmt: skip
        predicted = self._predicted()
        run.measure(self.again())
        samples: list[Tensor] = []
        along: list[Tensor] = []  # Σ_k δx² after each step

        def on_step(original: Callable[..., Any], given: dict[str, Any]) -> Any:
            result = call_step(original, given)
            with self.session.trace.paused():
                step = len(samples)
                sample = previous_sample(result).detach()
                if not settings.trajectory and step + 1 < len(predicted["steps"]):  # only the last is asked for
                    samples.append(sample.new_zeros(()))
                    along[step : step + 1] = [samples[-1]]
                    return result
                t = self.session.trace.tangents(sample)
                samples.append(sample.float().clone())
                total = torch.zeros_like(samples[-1]) if t is None else sum_of_squares(t)
                along[step : step + 1] = [total + along[step] if step < len(along) else total]
            return result

        decoded = self.session.decoded()
        variance, factors, first = torch.zeros(()), [], torch.zeros(())
        for draws in run.chunks(decoded=decoded):
            before = list(along)
            samples.clear()
            try:
                again = run.carry(draws, self.again(on_step))
            except UnequalTangentsError:
                if run.every or not decoded:
                    raise
                run.every, along = True, before
                samples.clear()
                again = run.carry(draws, self.again(on_step))
            found = returned(again, self.session.trace)
            check_finite("results", found.value, "the function itself returns them")
            if draws.start == 0:
                first = found.tangents[0].clone()
            variance = variance + sum_of_squares(found.tangents) / len(self.deviations)
            if settings.factors:
                factors.append(found.tangents.float() / len(self.deviations) ** 0.5)
        if not bool(torch.isfinite(variance).all()):
            raise NonFiniteError(
                "expected finite deviations at the end of the run, got NaN or infinity; use float32 or bfloat16, or more "
                "extra_calls"
            )
        steps = [Gaussian(x, v / len(self.deviations)) for x, v in zip(samples, along, strict=True)]
        selfcheck, residual = run.selfcheck.run(first, self.again()), run.residual()
        if self.scheduler is not None:  # which keeps what a plain run leaves in it
            self.session.replay(lambda *_: None, lambda *_: None, self.again())
        bend = max(run.bends, default=float("nan"))
        warn(residual, settings, bend)
        return UncertaintyOutput(
            output, variance.float(), **self._counts(), **predicted, latents=steps[-1] if steps else None,
            residual=residual, decoder_residual=bend, selfcheck=selfcheck,
            trajectory=steps if settings.trajectory and steps else None,
            factors=torch.cat(factors) if factors else None, denoising=run.denoising(),
        )  # fmt: skip

    def _ensemble(self, output: Any, settings: Ensemble) -> UncertaintyOutput:
        run = EnsembleRun(self.session, settings, self.posterior, self.deviations, self.seed)
        predicted = self._predicted()
        moments: list[Moments] = []
        samples: list[Tensor] = []

        def on_step(original: Callable[..., Any], given: dict[str, Any]) -> Any:
            result = call_step(original, given)
            samples.append(previous_sample(result).detach().clone())
            del samples[: 0 if settings.trajectory else -1]
            return result

        def after(member: bool) -> None:
            if member:
                moments.extend(Moments() for _ in samples[len(moments) :])
                for m, sample in zip(moments, samples, strict=True):
                    m.add(sample)
            samples.clear()

        run.run(output, self.again(on_step), after)
        along = [Gaussian(m.mean.float(), m.variance.float()) for m in moments]
        factors = run.factors
        check_finite("variances", run.result.variance, "a member returns such values")
        return UncertaintyOutput(
            output, run.result.variance.float(), **self._counts(), **predicted, latents=along[-1] if along else None,
            trajectory=along if settings.trajectory and along else None,
            factors=None if factors is None else factors.float(),
        )  # fmt: skip

    def _recursion(self, output: Any, settings: BayesDiff) -> UncertaintyOutput:
        if self.scheduler is None or not self.steps:
            raise UnsupportedPipelineError(
                "expected a pipeline with a scheduler for the recursion of BayesDiff, got a function; use "
                'propagation="tangents"'
            )
        run = Recursion(self.session, self.posterior, settings, self.scheduler, self.seed)
        again = self.session.replay(run.on_network, lambda *_: None, self.again(run.on_step))
        predicted = self._predicted()
        result = run.finish(again)
        return UncertaintyOutput(
            output, result.variance, **self._counts(), **predicted, latents=result.latents, trajectory=result.trajectory
        )


def sum_of_squares(tangents: Tensor) -> Tensor:
    """Σ_l t_l² over the first dimension, summed in float64, in float32."""
    total = torch.zeros(tangents.shape[1:], dtype=torch.float64, device=tangents.device)
    for t in tangents:
        total += t.square()
    return total.float()


def check_schedule(scheduler: Any, timestep: Any) -> None:
    """Refuse ε-prediction from (almost) zero terminal signal.

    Raises:
        UnsupportedSchedulerError: The first step divides the network's error by √ᾱ ≈ 0.
    """
    if not hasattr(scheduler, "alphas_cumprod") or prediction_type(scheduler) != "epsilon":
        return
    first = torch.as_tensor(timestep).flatten()[0]
    alpha = float(alpha_sigma(scheduler, first)[0])
    if alpha < 1e-3:
        raise UnsupportedSchedulerError(
            f"expected √ᾱ_t ≥ 0.001 at the first timestep of an ε-prediction sampler, got {alpha:.2g} at t = {float(first):g}: "
            "the step divides the network's error by it (zero terminal SNR); use timestep_spacing='leading', another "
            "schedule, or a v-prediction network"
        )
