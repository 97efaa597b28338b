r"""The published recursion for variances: BayesDiff (Kou et al., ICLR 2024), as it is and with its covariance centred.

For a one-step sampler :math:`x' = A x + B g + s z`, with the network's errors taken as independent from step to step,

    E[x']   = A E[x] + B E[g]
    Var[x'] = A² Var[x] + 2AB Cov[x, g] + B² Var[g] + s²
    Cov[x, g] ≈ (1/S) Σ_i x_i g(x_i) − E[x] (1/S) Σ_i g(x_i),    x_i ~ N(E[x], Var[x]) pixel by pixel,

E[g] the mean of the g(x_i), Var[g] the head's closed-form variance at the pipeline's own sample; of guided branches
:math:`\sum_m w_m^2 v_m`, as if they were independent. Only one step in ``skip_interval`` is quantified; in
the others Var[x'] = A² Var[x] + s².

The covariance is not centred: :math:`\sum_i (x_i - E[x])\,g(x_i)` over ten draws is noise as large as g, and the variance
soon negative. The centred repair takes the sample covariance, :math:`\sum_i (x_i - \bar x)(g(x_i) - \bar g)/(S-1)`.

A and B are the derivatives of the scheduler's own step, taken on dual numbers. Differences from the authors' program: it
moves the
trajectory itself by draws from N(g, Var[g]), while here it is the pipe's own; its DDPM sampler has slips (an A² without the
square, β of the wrong step) that its paper does not.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from bayesdiff.checks import (
    NegativeVarianceWarning,
    NonFiniteError,
    UnsupportedPipelineError,
    UnsupportedSchedulerError,
)
from bayesdiff.gaussian import Gaussian
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.propagation.returned import returned
from bayesdiff.propagation.settings import BayesDiff
from bayesdiff.propagation.steps import row_features
from bayesdiff.rng import item_generator
from bayesdiff.tracing.boxes import Box
from bayesdiff.tracing.dual import DualNumbers
from bayesdiff.tracing.network import Session
from bayesdiff.tracing.step import Probe, Step, call_step, previous_sample

#: How much of a step may come from earlier ones, relative to what comes from this.
MEMORY = 1e-6


@dataclass(frozen=True)
class Recursed:
    """Variance ``(B, C, H, W)`` of what is returned, in its units; the last sample with E[x]; and after each step."""

    variance: Tensor
    latents: Gaussian
    trajectory: list[Gaussian] | None


class Recursion:
    """Means and variances of the published recursion, beside a run on the record.

    Args:
        session: The recorded run.
        posterior: For Var[g].
        settings: S, the skip interval, centred or not.
        scheduler: The sampler.
        seed: Of the draws, which all samples of a batch share.
    """

    def __init__(
        self, session: Session, posterior: LaplacePosterior, settings: BayesDiff, scheduler: Any, seed: int
    ) -> None:  # fmt: skip
        self.session, self.posterior, self.settings, self.scheduler, self.seed = (
            session,
            posterior,
            settings,
            scheduler,
            seed,
        )
        self._probe = Probe(session, self._advance)
        self._duals = DualNumbers()
        self._given: Callable[..., Any] | None = None
        self._calls: list[tuple[Box, tuple[Any, ...], dict[str, Any]]] = []
        self._coefficients: tuple[Tensor, Tensor] | None = None
        self._mean: Tensor | None = None
        self._variance: Tensor | None = None
        self._last: Tensor | None = None
        self._previous: Tensor | None = None
        self._along: list[Gaussian] = []
        self._clamped = 0

    def draws(self, index: int, shape: torch.Size) -> Tensor:
        """z ``(S, C, H, W)`` float64 of one step: x_i = E[x] + √Var[x] z_i."""
        generator = item_generator(self.seed, index)
        return torch.randn(self.settings.samples, *shape, generator=generator, dtype=torch.float64)

    def on_network(self, box: Box, n: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep the call, to evaluate it at other samples."""
        self._calls.append((box, args, kwargs))
        self._probe.on_network(box, n, args, kwargs, output)

    def on_step(self, original: Callable[..., Any], given: dict[str, Any]) -> Any:
        """One step: the recursion's, then the scheduler's, on duals of its own."""
        taken: list[Any] = []

        def twice(*args: Any, **kwargs: Any) -> Any:
            return taken[0]

        def step() -> Any:
            if not taken:
                taken.append(self._differentiated(original, given))
            return taken[0]

        twice.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        self._given = step
        result = self._probe.on_step(twice, given)
        sample = previous_sample(result).detach()
        self._calls.clear()
        self._previous = sample.clone()
        assert self._mean is not None
        assert self._variance is not None
        self._along.append(Gaussian(self._mean.float(), self._variance.clamp(min=0).float()))
        del self._along[: 0 if self.settings.trajectory else -1]
        dtype = torch.promote_types(sample.dtype, torch.float32)
        ones = torch.ones(1, *sample.shape, dtype=dtype, device=sample.device)
        self.session.trace.attach(previous_sample(result), self._slots(ones))
        return result

    def _slots(self, ones: Tensor) -> Tensor:
        """The sample's own tangent, in the last of the slots that rows of the network's outputs have."""
        t = ones.new_zeros(self._probe.slots, *ones.shape[1:])
        t[-1:] = ones
        return t

    def _advance(self, step: Step) -> None:
        if not step.exact:
            raise UnsupportedPipelineError(
                "expected the scheduler to be given a weighted sum of the network's outputs, as the recursion of BayesDiff does, "
                'got something else (guidance that is rescaled?); use propagation="tangents"'
            )
        noise = self._noise_variance(step)
        assert self._given is not None
        self._given()
        assert self._coefficients is not None
        a, b = self._coefficients
        first = self._mean is None or self._variance is None
        mean = step.sample.double() if self._mean is None else self._mean
        variance = torch.zeros_like(mean) if self._variance is None else self._variance
        g, extra = step.output.double(), torch.zeros_like(mean)
        if step.index % self.settings.skip_interval == 0:
            covariance = torch.zeros_like(mean)
            if not first:
                g, covariance = self._covariance(step, mean, variance)
            extra = 2 * a * b * covariance + b.square() * self._output_variance(step)
        self._mean = a * mean + b * g
        self._variance = a.square() * variance + extra + noise

    def finish(self, output: Any) -> Recursed:
        """The variance of what is returned; elements may be negative, of which there is a warning.

        Raises:
            NonFiniteError: A moment is NaN or infinite.
            UnsupportedPipelineError: What is returned is not the last sample, scaled.
        """
        assert self._mean is not None
        assert self._variance is not None
        assert self._previous is not None
        if not bool(torch.isfinite(self._variance).all()):
            raise NonFiniteError("expected finite variances, got NaN or infinity: the recursion has diverged")
        negative = float((self._variance < 0).double().mean())
        if negative or self._clamped:
            warnings.warn(
                f"{negative:.1%} of the recursion's variances are negative, and in {self._clamped} steps some were taken "
                'as 0 to draw from; use propagation="tangents"', NegativeVarianceWarning, stacklevel=6,
            )  # fmt: skip
        if self.session.decoded():
            raise UnsupportedPipelineError(
                "expected a pipeline that returns its last sample, scaled, for the recursion of BayesDiff, which has no "
                'covariance to decode, got one that decodes it; use output_type="latent", or propagation="tangents"'
            )
        found = returned(output, self.session.trace)
        scale = found.tangents[-1].double()
        if scale.shape != self._variance.shape or not bool(torch.allclose(scale, scale.flatten()[0])):
            raise UnsupportedPipelineError(
                "expected a pipeline that returns its last sample, scaled, for the recursion of BayesDiff, which has a variance "
                f"for each of its numbers and no covariance to decode; got {tuple(scale.shape)} of "
                f"{tuple(self._variance.shape)}; "
                'use output_type="latent", or propagation="tangents"'
            )
        return Recursed(
            (self._variance * scale.square()).float(),
            self._along[-1],
            self._along if self.settings.trajectory else None,
        )

    def _covariance(self, step: Step, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """E[g] and Cov[x, g] by S draws."""
        self._clamped += bool((variance < 0).any())
        z = self.draws(step.index, mean.shape[1:]).to(mean)
        x = mean + variance.clamp(min=0).sqrt() * z.unsqueeze(1)
        g = torch.stack([self._guided(step, sample) for sample in x])
        if not self.settings.centered:
            return g.mean(0), (x * g).mean(0) - mean * g.mean(0)
        away = (x - x.mean(0)) * (g - g.mean(0))
        return g.mean(0), away.sum(0) / (self.settings.samples - 1)

    def _guided(self, step: Step, sample: Tensor) -> Tensor:
        """g at another sample: every call of the step again, its input moved."""
        outputs: dict[int, Tensor] = {}
        for n, (box, args, kwargs) in zip(step.calls, self._calls, strict=True):
            leaves, spec = tree_flatten((args, kwargs))
            for i, x in enumerate(leaves):
                t = self.session.trace.tangents(x) if isinstance(x, Tensor) else None
                if t is None:
                    continue
                away = sample - step.sample.double()
                rows = away.repeat(len(x) // len(away), *[1] * (away.ndim - 1))
                moved = x.to(torch.float64, copy=True)
                moved[:, : rows.shape[1]] += t[-1][:, : rows.shape[1]].double() * rows
                leaves[i] = moved.to(x.dtype)
            moved_args, moved_kwargs = tree_unflatten(leaves, spec)
            found = self.session.evaluate(box, moved_args, moved_kwargs)
            outputs[n] = (found if isinstance(found, Tensor) else found[0]).double()
        parts = []
        for sources in step.sources:
            total = sum(s.weight * outputs[s.call][s.row].flatten() for s in sources)
            assert isinstance(total, Tensor)
            parts.append(total if step.places is None else total[step.places])
        return torch.stack(parts).view(step.output.shape)[:, : step.sample.shape[1]]

    def _output_variance(self, step: Step) -> Tensor:
        """Var[g] as if branches were independent."""
        out = []
        for sources in step.sources:
            total = torch.zeros((), dtype=torch.float64)
            for s in sources:
                found = row_features(self.session.network.calls[s.call], s.row)
                if found is None:
                    raise UnsupportedPipelineError(
                        "expected features with a row for each row of the network's output for the recursion of BayesDiff, "
                        "got others"
                    )
                phi, index, scale = found
                row = self.posterior.variance(phi).flatten()[index].double() * scale.double().square()
                total = total + s.weight**2 * row
            out.append(total if step.places is None else total[step.places])
        return torch.stack(out).view(step.output.shape)[:, : step.sample.shape[1]]

    def _differentiated(self, original: Callable[..., Any], given: dict[str, Any]) -> Any:
        """The step itself, on duals: A and B of this step element by element, and proof that no earlier one has a part in it."""
        index, sample, output = len(self._probe.steps), given["sample"], given["model_output"]
        one = torch.ones(sample.shape, dtype=torch.promote_types(sample.dtype, torch.float32), device=sample.device)
        zero = torch.zeros_like(one)
        # The last two deviate in every other step only: what they carry over is memory.
        odd, even = (one, zero) if index % 2 else (zero, one)
        x, g = sample.detach().clone(), output.detach().clone()
        with self._duals, torch.no_grad():
            self._duals.attach(x, torch.stack([one, zero, odd, even]))
            whole = torch.stack([zero, one, odd, even])
            if g.shape != x.shape:  # a learned variance beside the output
                whole = torch.cat(
                    [whole, whole.new_zeros(4, *g.shape[:1], g.shape[1] - x.shape[1], *g.shape[2:])], dim=2
                )
            self._duals.attach(g, whole)
            result = call_step(original, {**given, "sample": x, "model_output": g})
            found = self._duals.tangents(previous_sample(result))
        if found is None:
            found = torch.stack([zero] * 4)
        kept, size = float(found[3 if index % 2 else 2].abs().max()), float(found[:2].abs().max())
        if kept > MEMORY * size:
            raise UnsupportedSchedulerError(
                f"expected a one-step sampler for the recursion of BayesDiff, got {type(self.scheduler).__name__}, to whose "
                f"step {index} earlier ones contribute {kept / size:.2g} of what this one does; use "
                'propagation="tangents", or a sampler such as DDIM or DDPM'
            )
        self._coefficients = (found[0].double(), found[1].double())
        return result

    def _noise_variance(self, step: Step) -> float:
        """s² of this step, measured: two copies of the scheduler step from the same point with known noise."""
        if "generator" not in inspect.signature(self.scheduler.step).parameters:
            return 0.0
        results, noises = [], []
        arguments = {k: v for k, v in step.arguments.items() if k not in ("generator", "return_dict", "variance_noise")}
        # At 0 only the noise is left, which then does not depend on the sample, its batch or its dtype.
        origin = torch.zeros_like(step.sample[:1], dtype=torch.float64)
        for seed in range(2):
            scheduler = copy.deepcopy(self.scheduler)
            drawn, known_draw = (torch.Generator(origin.device).manual_seed(seed) for _ in (0, 1))
            out = scheduler.step(torch.zeros_like(origin), step.timestep, origin, **arguments, generator=drawn)
            results.append(previous_sample(out).double())
            noises.append(randn_tensor(origin.shape, generator=known_draw, device=origin.device, dtype=origin.dtype))
        apart, known = results[0] - results[1], noises[0] - noises[1]
        if float(apart.abs().max()) == 0:
            return 0.0
        scale = float((apart * known).sum() / known.square().sum())
        residual = float((apart - scale * known).abs().max())
        if residual > 1e-3 * float(apart.abs().max()):
            raise UnsupportedSchedulerError(
                f"expected the noise of a sampler's step to be a multiple of one standard normal draw, got "
                f"{type(self.scheduler).__name__} with a residual of {residual:.3g} from {scale:.3g} times it"
            )
        return scale**2
