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

Differences from the authors' program: it moves the trajectory itself by draws from N(g, Var[g]), while here it is the pipe's own;
its DDPM sampler has slips (an A² without the square, β of the wrong step) that its paper does not.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from bayesdiff.checks import (
    NegativeVarianceWarning,
    NonFiniteError,
    UnsupportedPipelineError,
    UnsupportedSchedulerError,
)
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.linearized_scheduler import LinearizedScheduler, copy_scheduler
from bayesdiff.propagation.tangents import Propagated
from bayesdiff.rng import item_generator
from bayesdiff.step import Step
from bayesdiff.watch import GuidedNetwork

#: How much of a step may come from earlier ones, relative to what comes from this.
MEMORY = 1e-6


class Recursion:
    """Means and variances of the published recursion, beside a running sampler.

    Args:
        posterior: For Var[g].
        scheduler: The sampler, after ``set_timesteps`` and before its first step; copied.
        num_samples: S, network calls in a quantified step.
        skip_interval: Every how many steps one is quantified, counted from the first; the paper's "skip" variant has more than 1.
        centered: The repair.
        seed: Of the draws, which all samples of a batch share.
        batch_invariant: Work on each sample by itself.
    """

    def __init__(
        self,
        posterior: LaplacePosterior,
        scheduler: Any,
        num_samples: int = 10,
        skip_interval: int = 1,
        centered: bool = False,
        seed: int = 0,
        batch_invariant: bool = False,
    ) -> None:
        self.batch_invariant = batch_invariant
        self.posterior, self.centered, self.seed = posterior, centered, seed
        self.num_samples, self.skip_interval = num_samples, skip_interval
        self._linearized = LinearizedScheduler(scheduler, 4)
        self._noisy = (copy_scheduler(scheduler), copy_scheduler(scheduler))
        self._mean: Tensor | None = None
        self._variance: Tensor | None = None
        self._variances: list[Tensor] = []
        self._clamped = 0

    def __enter__(self) -> Recursion:
        self._linearized.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._linearized.__exit__(*exception)

    def draws(self, index: int, shape: torch.Size) -> Tensor:
        """z ``(S, C, H, W)`` float64 of one step: x_i = E[x] + √Var[x] z_i."""
        return torch.randn(self.num_samples, *shape, generator=item_generator(self.seed, index), dtype=torch.float64)

    def advance(self, step: Step, network: GuidedNetwork) -> None:
        """Through one step.

        Raises:
            UnsupportedSchedulerError: The step depends on earlier ones: the recursion is not defined for it.
            UnsupportedPipelineError: Guidance is rescaled: nor for that.
        """
        if step.guidance.amount is not None:
            raise UnsupportedPipelineError(
                "expected guidance without rescaling for the recursion of BayesDiff, got guidance_rescale = "
                f'{float(step.guidance.amount[0]):.3g}; use propagation="tangents"'
            )
        a, b = self._coefficients(step)
        noise = self._noise_variance(step)
        mean = step.sample.double() if self._mean is None else self._mean
        variance = torch.zeros_like(mean) if self._variance is None else self._variance
        if step.index % self.skip_interval:
            g, extra = step.output.double(), torch.zeros_like(mean)
        else:
            covariance = torch.zeros_like(mean)
            g = step.output.double()
            if self._mean is not None:
                g, covariance = self._covariance(step, network, mean, variance)
            extra = 2 * a * b * covariance + b.square() * self._output_variance(step)
        self._mean = a * mean + b * g
        self._variance = a.square() * variance + extra + noise
        self._variances.append(self._variance)

    def finish(self, trajectory: bool = False) -> Propagated:
        """The last mean and variance; elements of the variance may be negative, of which there is a warning.

        Raises:
            NonFiniteError: There was no step, or a moment is NaN or infinite.
        """
        if self._variance is None or self._mean is None:
            raise NonFiniteError("expected at least one step of the sampler, got none")
        if not bool(torch.isfinite(self._variance).all()):
            raise NonFiniteError("expected finite variances, got NaN or infinity: the recursion has diverged")
        negative = float((self._variance < 0).double().mean())
        if negative or self._clamped:
            warnings.warn(
                f"{negative:.1%} of the recursion's variances are negative, and in {self._clamped} steps some were taken "
                'as 0 to draw from; use propagation="tangents"', NegativeVarianceWarning, stacklevel=3,
            )  # fmt: skip
        return Propagated(self._variance, self._mean, tuple(self._variances) if trajectory else None)

    def _covariance(self, step: Step, network: GuidedNetwork, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """E[g] and Cov[x, g] by S draws."""
        self._clamped += bool((variance < 0).any())
        z = self.draws(step.index, mean.shape[1:]).to(mean)
        x = mean + variance.clamp(min=0).sqrt() * z.unsqueeze(1)
        g = torch.stack([network(sample).double() for sample in x])
        if not self.centered:
            return g.mean(0), (x * g).mean(0) - mean * g.mean(0)
        away = (x - x.mean(0)) * (g - g.mean(0))
        return g.mean(0), away.sum(0) / (self.num_samples - 1)

    def _output_variance(self, step: Step) -> Tensor:
        batch = len(step.sample)
        groups = [slice(b, b + 1) for b in range(batch)] if self.batch_invariant else [slice(0, batch)]
        return torch.cat([self._branches_variance(step.of(g)) for g in groups])

    def _branches_variance(self, step: Step) -> Tensor:
        total = torch.zeros_like(step.output, dtype=torch.float64)
        for weight, features in zip(step.guidance.weights, step.branches, strict=True):
            variance = step.fold(self.posterior.variance(features))[:, : step.output.shape[1]].double()
            total = total + weight.to(total).view(-1, 1, 1, 1).square() * variance
        return total

    def _coefficients(self, step: Step) -> tuple[Tensor, Tensor]:
        """A and B of this step, element by element; and proof that no earlier step has a part in it."""
        one, zero = (
            torch.ones_like(step.sample, dtype=torch.float64),
            torch.zeros_like(step.sample, dtype=torch.float64),
        )
        # The last two rows deviate in every other step only: what they carry over is memory.
        odd, even = (one, zero) if step.index % 2 else (zero, one)
        d_sample, d_output = torch.stack([one, zero, odd, even]), torch.stack([zero, one, odd, even])
        result = self._linearized.step(d_output, d_sample, step.output, step.timestep, step.sample, **step.arguments)
        kept = float(result[3 if step.index % 2 else 2].abs().max())
        size = float(result[:2].abs().max())
        if kept > MEMORY * size:
            raise UnsupportedSchedulerError(
                f"expected a one-step sampler for the recursion of BayesDiff, got {type(self._linearized.scheduler).__name__}, "
                f"to whose step {step.index} earlier ones contribute {kept / size:.2g} of what this one does; use "
                'propagation="tangents", or a sampler such as DDIM or DDPM'
            )
        return result[0], result[1]

    def _noise_variance(self, step: Step) -> float:
        """s² of this step, measured: two copies of the scheduler step from the same point with known noise."""
        if "generator" not in inspect.signature(self._noisy[0].step).parameters:
            return 0.0
        results, noises = [], []
        arguments = {k: v for k, v in step.arguments.items() if k not in ("generator", "return_dict", "variance_noise")}
        # At 0 only the noise is left, which then does not depend on the sample, its batch or its dtype.
        origin = torch.zeros_like(step.sample[:1], dtype=torch.float64)
        for seed, scheduler in enumerate(self._noisy):
            drawn, known_draw = (torch.Generator(origin.device).manual_seed(seed) for _ in (0, 1))
            out = scheduler.step(origin, step.timestep, origin, **arguments, generator=drawn)
            results.append((out[0] if isinstance(out, tuple) else out.prev_sample).double())
            noises.append(randn_tensor(origin.shape, generator=known_draw, device=origin.device, dtype=origin.dtype))
        apart, known = results[0] - results[1], noises[0] - noises[1]
        if float(apart.abs().max()) == 0:
            return 0.0
        scale = float((apart * known).sum() / known.square().sum())
        residual = float((apart - scale * known).abs().max())
        if residual > 1e-3 * float(apart.abs().max()):
            raise UnsupportedSchedulerError(
                f"expected the noise of a sampler's step to be a multiple of one standard normal draw, got "
                f"{type(self._linearized.scheduler).__name__} with a residual of {residual:.3g} from {scale:.3g} times it"
            )
        return scale**2
