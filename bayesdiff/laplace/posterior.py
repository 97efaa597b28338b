r"""The Laplace posterior over a head's weights: exact, because the problem is linear regression.

With features :math:`\varphi` (D of them), the posterior of the C × D weights is :math:`\mathcal N(W, \Sigma)`: the mean is
always the pretrained network's own weights, and Σ one of the covariances and structures of :mod:`bayesdiff.laplace.structure`,
cut from one set of sums (:mod:`bayesdiff.laplace.statistics`). How is :mod:`bayesdiff.laplace.cut`; what is predicted from it
:mod:`bayesdiff.laplace.predictive`; what its fields must be :mod:`bayesdiff.laplace.fields`.

The GGN and the empirical Fisher weigh timesteps by 1/σ_t², as the likelihood does. The sandwich is the covariance of the
estimator that was computed, the minimiser of the *training* loss, and its formula holds at that loss's minimum: so it takes the
weights :math:`w_t` of the loss that the network was trained with. Most networks are trained with equal weights over t; then
:math:`w_t = 1/\bar\sigma^2`, the pooled residual variance. With :math:`w_t = 1/\sigma_t^2`
(``loss_weights="noise"``) the pretrained weights are no minimum, and the sandwich is too large (docs/design.md has the figures).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from bayesdiff.checks import ArgumentError, check_finite, check_int, check_positive
from bayesdiff.gaussian import Gaussian
from bayesdiff.head.find import Head, denoiser, find_head
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.head.identity import NetworkIdentity, check_head, fingerprint
from bayesdiff.laplace.covariance import AMPLIFIED, Covariance
from bayesdiff.laplace.cut import cut
from bayesdiff.laplace.evidence import log_evidence
from bayesdiff.laplace.fields import by_channel, check_shapes, settled
from bayesdiff.laplace.heldout import best_prior, log_likelihood
from bayesdiff.laplace.links import Link
from bayesdiff.laplace.links import link as find_link
from bayesdiff.laplace.predictive import predict, variance
from bayesdiff.laplace.saved import read_posterior, write_posterior
from bayesdiff.laplace.statistics import Statistics
from bayesdiff.laplace.structure import TOLERANCE
from bayesdiff.laplace.training import shares_by_bin


@dataclass(frozen=True, eq=False, repr=False)
class LaplacePosterior:
    r"""A Gaussian over the weights of a head, :math:`\mathcal N(W, \Sigma)`.

    Made by :func:`bayesdiff.fit`, by :meth:`from_statistics` or by :meth:`load`.

    Args:
        mean: W, the network's own weights, bias as the last column, ``(C, D)`` float64.
        geometry: How features come from the layer's input.
        structure: ``"full"``, ``"kron"``, ``"diag"`` or ``"lowrank"``.
        covariance: ``"sandwich"``, ``"ggn"`` or ``"ef"``.
        sigma: Σ.
        spectrum: The eigenvalues of the GGN's (or the EF's) precision without the prior by channel, ``(1 or C, D)``: all that the
            evidence needs. Its diagonal for ``"diag"``.
        prior_precision: τ: a number, or one for each channel ``(C,)``.
        weights: The weight of each timestep bin in A and in :math:`g_i`, ``(T,)``.
        noise_variance: :math:`\sigma_b^2` by timestep bin, ``(T,)``.
        log_likelihood: :math:`\log p(\text{data}\mid W)`, in nats.
        num_timesteps: Training timesteps that the bins divide.
        num_images: n, the images that the statistics come from.
        dataset_size: N, the images that the posterior speaks for.
        draws_per_image: m, the draws (t, ε) of each image that the statistics come from, on average.
        training_draws: M, those that the training had; None: not known, taken to be m.
        origins: What A and B/M (:mod:`bayesdiff.laplace.training`) contribute to the mean predictive variance over the features
            of each bin, ``(T, 2)``; see :meth:`shares`. Empty where one draw of each image does not tell.
        cut_share: What was cut to make the covariance of the scores positive semidefinite: the sum of its negative eigenvalues,
            over that of the positive ones, in the metric of the features.
        head_path: Where the head is in the network.
        rank: r of ``"lowrank"``; None: as ``tolerance`` asks.
        tolerance: For ``"lowrank"``, the share of the mean predictive variance that may be left to the diagonal.
        temperature: Σ is multiplied by it (the posterior to the power 1/T; Wenzel et al. 2020).
        network: What tells the network that it was fitted to from others; None: not known.
        amplification: How many times larger the terms of δWφ are than their sum, where features are collinear or far from 0:
            above :data:`~bayesdiff.laplace.covariance.AMPLIFIED` predictions are computed in float64, because float32 would
            keep too few digits.
        precision: A = Σ w φφᵀ, without the prior: ``(D, D)``; its diagonal ``(D,)`` for ``"diag"``. One for each channel,
            ``(C, D, D)`` or ``(C, D)``, where the loss has another curvature in each. Not saved with it.
        statistics: The sums that it was cut from, for :meth:`recut`; not saved with it.
    """

    mean: Tensor
    geometry: HeadGeometry
    structure: str
    covariance: str
    sigma: Covariance = field(repr=False)
    spectrum: Tensor
    prior_precision: float | Tensor
    weights: Tensor
    noise_variance: Tensor
    log_likelihood: float
    num_timesteps: int
    num_images: int
    dataset_size: int
    head_path: str
    draws_per_image: float = 1.0
    training_draws: float | None = None
    origins: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.float64), repr=False)
    cut_share: float = 0.0
    rank: int | None = None
    tolerance: float = TOLERANCE
    temperature: float = 1.0
    network: NetworkIdentity | None = field(default=None, repr=False)
    amplification: float = 1.0
    precision: Tensor | None = field(default=None, repr=False)
    statistics: Statistics | None = field(default=None, repr=False)
    _cache: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, value in settled(self).items():
            object.__setattr__(self, name, value)
        check_shapes(self)

    def channel_precisions(self) -> Tensor:
        """τ by channel, ``(C,)`` float64."""
        return by_channel(self.prior_precision, len(self.mean))

    @property
    def approximation_error(self) -> float:
        """What the structure leaves out: see :class:`bayesdiff.laplace.structure.Covariance`."""
        return self.sigma.approximation_error

    @classmethod
    def from_statistics(
        cls,
        statistics: Statistics,
        head: Head,
        *,
        structure: str = "full",
        covariance: str = "sandwich",
        prior_precision: float | Tensor | str | None = None,
        noise_variance: float | Tensor | str = "residual",
        loss_weights: str | Tensor = "uniform",
        dataset_size: int | None = None,
        training_draws: float | None = None,
        num_timesteps: int = 1000,
        rank: int | None = None,
        tolerance: float = TOLERANCE,
        temperature: float = 1.0,
        network: NetworkIdentity | None = None,
    ) -> LaplacePosterior:
        r"""Cut a posterior from statistics; no pass over the data.

        Args:
            statistics: The sums.
            head: The head that they belong to.
            structure: ``"full"``, ``"kron"``, ``"diag"`` or ``"lowrank"``; see :mod:`bayesdiff.laplace.structure`.
            covariance: ``"sandwich"``, ``"ggn"`` or ``"ef"``.
            prior_precision: τ > 0, or one for each output channel; None or ``"evidence"``: the value that maximises the
                evidence (MacKay 1992); ``"channel"``: one for each channel by evidence.
            noise_variance: :math:`\sigma_b^2`: ``"residual"``, the residual variance of each timestep bin; ``"evidence"``, what
                maximises the evidence; or given, a number or one for each bin.
            loss_weights: For the sandwich, the weights over t of the loss that the network was trained
                with: ``"uniform"``, ``"noise"`` (:math:`1/\sigma_t^2`), or a tensor with one for each bin.
            dataset_size: N, the number of images that the network was trained on: statistics are
                scaled by N/n. By default n: the posterior of a network trained on the n images given.
            training_draws: M ≥ 1, how many draws (t, ε) each of them had in the training, steps · batch size / N on average. By
                default as many as in the statistics. Other than those of the statistics, it needs at least two draws of some
                images.
            num_timesteps: Training timesteps that the bins of the statistics divide.
            rank: r of ``"lowrank"``; by default as many as ``tolerance`` asks.
            tolerance: The share of the mean predictive variance that ``"lowrank"`` may leave to its diagonal.
            temperature: Multiplies the covariance.
            network: What tells the network that the statistics are of from others.

        Raises:
            EmptyDataError: The statistics are empty.
            ArgumentError: An argument is out of range, or the residuals vanish.
            NotPositiveDefiniteError: Λ + τI has no Cholesky factor in float64.

        Warns:
            ProjectionWarning: The covariance over M draws, estimated from fewer, was indefinite.
        """
        return cls._cut(
            statistics, head.weight().cpu(), head.path, structure=structure, covariance=covariance,
            prior_precision=prior_precision, noise_variance=noise_variance, loss_weights=loss_weights,
            dataset_size=dataset_size, training_draws=training_draws, num_timesteps=num_timesteps, rank=rank, tolerance=tolerance,
            temperature=temperature, network=network,
        )  # fmt: skip

    @classmethod
    def _cut(
        cls, statistics: Statistics, mean: Tensor, head_path: str, *, num_timesteps: int, rank: int | None, tolerance: float,
        temperature: float, network: NetworkIdentity | None = None, **settings: Any,
    ) -> LaplacePosterior:  # fmt: skip
        check_positive("temperature", temperature)
        if rank is not None:
            check_int("rank", rank, least=1)
        parts = cut(statistics, mean, rank=rank, tolerance=tolerance, **settings)
        return cls(
            mean, statistics.geometry, settings["structure"], settings["covariance"], num_timesteps=num_timesteps,
            head_path=head_path, rank=rank, tolerance=tolerance, temperature=temperature, statistics=statistics, network=network,
            **parts,
        )  # fmt: skip

    def recut(self, **changes: Any) -> LaplacePosterior:
        """The same posterior with other settings, from the same sums: no pass over the data.

        Args:
            changes: Any keyword of :meth:`from_statistics`. What is not named stays: structure, covariance, prior, noise,
                dataset size, training draws, rank, tolerance, temperature. Where the covariance changes, the weights over t are
                those of its default unless ``loss_weights`` is given.

        Raises:
            ArgumentError: The posterior was loaded from a file, which has no sums; or a setting is out of range, or asks for what
                the sums do not tell (sketched scores: :mod:`bayesdiff.laplace.statistics`).
        """
        if self.statistics is None:
            raise ArgumentError(
                "expected a posterior that still has its statistics, got one that was loaded: keep them with "
                "Statistics.save, and use LaplacePosterior.from_statistics(Statistics.load(…), head, …)"
            )
        covariance = changes.get("covariance", self.covariance)
        own: str | Tensor = "uniform"
        if covariance == "sandwich" == self.covariance and not self.statistics.weighted:
            own = self.weights * self.statistics.pooled_variance()
        settings: dict[str, Any] = {
            "structure": self.structure, "covariance": covariance, "prior_precision": self.prior_precision,
            "noise_variance": self.noise_variance, "loss_weights": own, "dataset_size": self.dataset_size,
            "training_draws": self.training_draws, "num_timesteps": self.num_timesteps, "rank": self.rank,
            "tolerance": self.tolerance,
            "temperature": self.temperature,
        }  # fmt: skip
        unknown = sorted(set(changes) - set(settings))
        if unknown:
            raise ArgumentError(f"expected settings among {', '.join(settings)}, got {', '.join(unknown)}")
        return self._cut(self.statistics, self.mean, self.head_path, network=self.network, **(settings | changes))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights that the posterior was fitted around."""
        return fingerprint(self.mean)

    def __repr__(self) -> str:
        """One line, no tensors."""
        c, d = self.mean.shape
        tau = self.prior_precision if isinstance(self.prior_precision, float) else self.prior_precision.mean().item()
        draws = "not given" if self.training_draws is None else f"{self.training_draws:.4g}"
        return (
            f"LaplacePosterior({self.structure} {self.covariance} of {c} × {d} weights of {self.head_path!r}, "
            f"N = {self.dataset_size}, M {draws}, from {self.num_images} images × {self.draws_per_image:g} draws, τ = {tau:.3g})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what is only kept for the next call."""
        return {**self.__dict__, "_cache": {}}

    def shares(self) -> list[dict[str, float]]:
        """Where the mean predictive variance comes from, by timestep bin.

        Returns:
            One row for each bin that has draws: ``t_low`` and ``t_high``, its timesteps; ``between``, the variance by which
            images were in the data set (A/N), and ``within``, that by their M draws of (t, ε) (B/(NM)), in squared units of the
            network's output, means over the features of the bin and the output channels; ``share_between`` and
            ``share_within``, which sum to 1. They are unbiased estimates of the full sandwich, whatever the structure: what is
            next to nothing between images may come out below 0.

        Raises:
            ArgumentError: There was one draw of each image, or the covariance is not the sandwich.
        """
        if not len(self.origins):
            raise ArgumentError(
                "expected a sandwich fitted with draws_per_image >= 2, to tell A from B, got "
                f"covariance {self.covariance!r} with {self.draws_per_image:g} draws of each image"
            )
        return shares_by_bin(self.temperature * self.origins, self.num_timesteps)

    def check(self, model: Any, head: str | None = None) -> Head:
        """Find the head of a network or pipeline and make sure that the posterior is of its weights.

        Args:
            model: The network or pipeline; it may have been cast to a lower precision since.
            head: Where the head is in it; by default where it was.

        Raises:
            HeadMismatchError: They are other weights, in the head or, where that is known, anywhere in the network; or a layer
                of another shape.
        """
        found = find_head(model, head or self.head_path)
        check_head(found, self.geometry, self.mean)
        if self.network is not None:
            self.network.check(denoiser(model, head or self.head_path))
        return found

    def working(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which features of some dtype are worked with: float32 at least, and float64 where that is not enough."""
        return torch.float64 if self.amplification > AMPLIFIED else torch.promote_types(dtype, torch.float32)

    def placed(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        """``tensor`` on the device and in the working dtype of ``like``, kept for the next call."""
        key = (name, like.device, self.working(like.dtype))
        if key not in self._cache:
            self._cache[key] = tensor.to(*key[1:])
        return self._cache[key]

    def variance(self, features: Tensor) -> Tensor:
        r"""Predictive variance of the network's output: :math:`\varphi^\top\Sigma_c\varphi`, in closed form.

        Half-precision features are computed with in float32; float64 ones in float64.

        Args:
            features: As they enter the layer: ``(B, C_in, H, W)`` for a convolution,
                ``(B, ..., C_in)`` for a linear layer.

        Returns:
            Shaped as the layer's output, in its squared units; nonnegative by construction.

        Raises:
            ShapeError: The features don't fit the layer.
            NonFiniteError: They are NaN or infinite.
        """
        return variance(self, features)

    def weight_variance(self) -> Tensor:
        """The variance of each weight, the diagonal of Σ: ``(C, D)`` float64."""
        return self.temperature * self.sigma.variances()

    def predict(
        self,
        features: Tensor,
        link_approx: str = "linearized",
        n_samples: int = 100,
        *,
        link: str | Link = "identity",
        generator: Generator | None = None,
    ) -> Gaussian:
        r"""The predictive distribution of h(y), y the network's output at one step and h a link.

        Args:
            features: As they enter the layer.
            link_approx: ``"exact"``: the moments in closed form; ``"linearized"``: h(μ) and h'(μ)²σ², with μ = Wφ and
                σ² = φᵀΣφ, which for the identity is exact too; ``"probit"``: for sigmoids; ``"mc"``: over ``n_samples`` weight
                draws. Not every link has every one (:mod:`bayesdiff.laplace.links`).
            n_samples: n, draws for ``"mc"`` (at least 2), and for the Jacobian-vector products of a map that is not elementwise.
            link: ``"identity"``, ``"clamped_pixel"``, ``"sigmoid"``, or a link object.
            generator: For draws.

        Returns:
            A :class:`Gaussian` of the first two moments, shaped as the layer's output (as h of it, for a map that is not
            elementwise), in the units of h.

        Raises:
            ArgumentError: Another link or approximation, or a pair that has no meaning.
            ShapeError: The features don't fit the layer.
            NonFiniteError: They are NaN or infinite.
        """
        return predict(self, features, link_approx, n_samples, find_link(link), generator)

    def deviations(self, n: int, generator: Generator | None = None, *, orthogonal: bool = False) -> Tensor:
        r"""n draws of :math:`\delta W \sim \mathcal N(0, \Sigma)`: ``(n, C, D)`` float64, on the CPU.

        Where Σ has covariances between output channels, the draws have them too.

        Args:
            n: How many.
            generator: Of the draws.
            orthogonal: Make them from orthogonal numbers (:func:`bayesdiff.rng.orthogonal_normal`): each still has mean 0 and
                covariance Σ, and the mean square of anything linear in δW has less noise. With n as large as the rank of Σ (C·D,
                or the number of images) it has none, but for ``"lowrank"`` and a full ``"ef"``. Such draws are not independent,
                so they are not for the moments of what is not linear.
        """
        check_int("n", n, least=1)
        drawn = self.sigma.draw(n, generator, orthogonal) * math.sqrt(self.temperature)
        return check_finite("draws of the weights", drawn, "the covariance is too large even for float64")

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """n draws of the head's weights, bias as the last column: ``(n, C, D)`` float64, on the CPU (see :meth:`deviations`)."""
        return self.mean + self.deviations(n, generator)

    def log_marginal_likelihood(self) -> float:
        """The Laplace evidence, in nats (:func:`bayesdiff.evidence.log_evidence`).

        It treats pixels as independent, as the GGN does; under ``"sandwich"`` it is that of the GGN.
        """
        return log_evidence(self.log_likelihood, self.spectrum, self.channel_precisions(), self.mean)

    def heldout_log_likelihood(self, features: Tensor, residuals: Tensor, timesteps: Tensor) -> float:
        r"""The mean of :math:`\log\mathcal N(r;\,0,\ \sigma_t^2 + \varphi^\top\Sigma\varphi)` over held-out residuals, in nats.

        Args:
            features: As they enter the layer, ``(B, ...)``.
            residuals: r = target − prediction, shaped as the layer's output.
            timesteps: t of each row, ``(B,)``.

        Raises:
            ShapeError: The residuals are not shaped as the output.
        """
        return log_likelihood(self, features, residuals, timesteps)

    def with_heldout_prior(self, features: Tensor, residuals: Tensor, timesteps: Tensor) -> LaplacePosterior:
        """The posterior with the one prior precision that predicts held-out residuals best: the alternative to the evidence.

        Brent's method in log τ, between 1e-4 and 1e8 times the evidence's τ; each trial is a :meth:`recut`. Arguments and errors
        as of :meth:`heldout_log_likelihood` and :meth:`recut`.
        """
        return self.recut(prior_precision=best_prior(self, features, residuals, timesteps))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``posterior.json`` and a safetensors file; what was there stays whole until the new is.

        Raises:
            OutputFolderError: The folder cannot be written.
        """
        write_posterior(self, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: Any = None) -> LaplacePosterior:
        """Read a posterior that :meth:`save` wrote.

        Args:
            folder: The folder.
            model: A network or pipeline to check it against at once; :class:`bayesdiff.UncertaintyPipeline`
                does so in any case.

        Raises:
            PosteriorFileError: A file is missing, damaged, truncated or of an unknown version.
            HeadMismatchError: ``model`` has other weights.
        """
        posterior = read_posterior(folder, cls)
        if model is not None:
            posterior.check(model)
        return posterior
