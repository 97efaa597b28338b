"""What a run with uncertainty returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bayesdiff.gaussian import Gaussian
from bayesdiff.propagation.denoising import Denoising
from bayesdiff.propagation.returned import main_result


@dataclass(frozen=True, repr=False)
class UncertaintyOutput:
    r"""What :func:`bayesdiff.propagate` and an :class:`UncertaintyPipeline` return.

    Args:
        output: What the function or pipe returned, whole and unchanged.
        variance: Over the posterior of the weights, shaped as the main result (``(B, C, H, W)`` for images,
            ``(B, F, C, H, W)`` for frames: channels where PyTorch has them), float32, in the square of its units (pixels: 0–1),
            before the last clamp. Those of BayesDiff's recursion can be negative.
        calls: Network calls in all, the plain run's included; one on G times the batch counts as G.
        plain_calls: The plain run's own.
        other_calls: Evaluations of other modules (a VAE's decoder, a ControlNet) beyond the plain run's.
        latents: A pipeline's last sample and its variance (0 where that is negative), in the network's space. The mean is the
            pipe's own for tangents, the members' mean for ensembles, the recursion's E[x] for BayesDiff. None outside
            a pipeline.
        steps: For each step of a pipeline's scheduler, what it is given (guided) and its variance, which is the closed form
            wherever that is a weighted sum of the network's outputs, and else an estimate from the draws.
        exact_steps: For each step, whether its variance is the closed form.
        residual: For tangents, an estimate of the relative error that too few network calls make in the map, one number for
            each sample, from how well each measurement of the network's response is predicted by the others; above 0.5 there
            is a warning. None for other methods, and with fewer than two measurements.
        decoder_residual: For tangents behind a decoder, the relative difference between its answer to one more draw and what its
            tangents say, of the worst sample; above 0.5 there is a warning. NaN otherwise.
        selfcheck: For tangents, the relative difference between them and two runs that were moved to both sides.
        trajectory: If asked for, the sample after each step and its variance, in the network's space.
        factors: If asked for, F ``(K, …)`` float32 in the units of the result: the covariance of any two of its numbers is
            :math:`\sum_k F_k F_k'`.
        denoising: For tangents, Var[x_0 | x_t] at each network call, what the *data* leave open whatever the weights, ``(B, …)``
            each in the network's space squared (:class:`bayesdiff.propagation.denoising.Denoising`; :attr:`denoising_std`). None
            for other methods, and where the schedule is not known.
    """

    output: Any
    variance: Tensor
    calls: int
    plain_calls: int
    other_calls: int = 0
    latents: Gaussian | None = None
    steps: list[Gaussian] = field(default_factory=list)
    exact_steps: list[bool] = field(default_factory=list)
    residual: Tensor | None = None
    decoder_residual: float = float("nan")
    selfcheck: float = float("nan")
    trajectory: list[Gaussian] | None = None
    factors: Tensor | None = None
    denoising: Denoising | None = None

    @property
    def images(self) -> Any:
        """The main result: the pipe's images, frames or audio, or what the function returned."""
        return main_result(self.output)

    @property
    def std(self) -> Tensor:
        """Standard deviation, shaped and in the units as :attr:`variance` says; 0 where a variance is negative."""
        return self.variance.clamp(min=0).sqrt()

    @property
    def denoising_std(self) -> Tensor | None:
        r"""The standard deviation of the clean sample given x_t, at every network call: ``(calls, B, …)`` float32.

        By Tweedie's identity of second order, :math:`\mathrm{Var}[x_0|x_t] = (\sigma^2/\alpha)\,\partial D_i/\partial x_i`,
        from the responses that the map measured, in the network's space (latents, or pixels of −1 to 1). It is another
        variance than :attr:`std`: the spread of the data that this :math:`x_t` may have come from, large at much noise and 0
        at the end, not what the weights leave open. Outside the few directions measured it rests on an extension, most of it
        isotropic; under guidance it is that of the guided combination, which is no posterior mean. 0 where it comes out
        negative (:attr:`denoising` has the variances). None where responses were not measured or the schedule is not known.
        """
        if self.denoising is None:
            return None
        return torch.stack([v.clamp(min=0).sqrt() for v in self.denoising])

    def scores(self) -> dict[str, Tensor]:
        r"""Numbers for whole samples, ``(B,)`` each.

        ``total_variance``
            :math:`\sum_p v_p` over all numbers of a sample: the trace of the covariance, BayesDiff's image score.
        ``mean_std``, ``max_std``
            Over pixels and channels, in their units.
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

    def __repr__(self) -> str:
        """One line, no tensors."""
        std = self.std
        residual = "" if self.residual is None else f", residual {float(self.residual.max()):.2g}"
        return (
            f"UncertaintyOutput(std {tuple(std.shape)}, mean {float(std.mean()):.3g}, largest {float(std.max()):.3g}{residual}, "
            f"{self.calls} network calls of which {self.plain_calls} plain)"
        )
