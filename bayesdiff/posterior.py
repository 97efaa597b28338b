r"""The Laplace posterior over a head's weights: exact, because the problem is linear regression.

With features :math:`\varphi` (D of them), noise variance :math:`\sigma_t^2` and prior precision
:math:`\tau`, the generalised Gauss–Newton (GGN) precision of each output channel's weights is

    Λ_τ = Σ φφᵀ/σ_t² + τ I          Σ_ggn = Λ_τ⁻¹ ⊗ I_C

(MacKay 1992; Daxberger et al. 2021). It takes every pixel for an independent observation, which pixels
of one image are not. The robust ("sandwich") covariance of an M-estimator (Huber 1967, White 1980; clustered
by image, Liang & Zeger 1986) is

    Σ_sandwich = H_τ⁻¹ (Σ_i g_i g_iᵀ) H_τ⁻¹     H_τ = Σ w_t φφᵀ + τ I     g_i = Σ_{draws, positions of i} w_t r φᵀ

with r the residuals and :math:`w_t` the weights of the loss that the network was *trained* with, because that loss
is what the pretrained weights minimise, and the formula holds at a minimum. Most networks are trained
with equal weights over t; then :math:`w_t = 1/\bar\sigma^2`, the pooled residual variance. With
:math:`w_t = 1/\sigma_t^2` (``loss_weights="noise"``) the pretrained weights are no minimum, and the sandwich is
too large (docs/design.md has the figures).

Either covariance is used whole (``structure="full"``) or with each of its matrices cut to its diagonal
(``"diag"``). The mean is always the pretrained network's own weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from scipy.optimize import brentq
from torch import Generator, Tensor

from bayesdiff.checks import (
    ArgumentError,
    BayesdiffWarning,
    HeadMismatchError,
    NotPositiveDefiniteError,
    PosteriorFileError,
    check_choice,
    check_finite,
    check_int,
    check_output_folder,
    check_positive,
)
from bayesdiff.curvature import Statistics
from bayesdiff.gaussian import Gaussian
from bayesdiff.head import Head, HeadGeometry, find_head
from bayesdiff.io import atomic_path
from bayesdiff.rng import normal

STRUCTURES = ("full", "diag")
COVARIANCES = ("sandwich", "ggn")
FORMAT = 1


def fingerprint(weight: Tensor) -> str:
    """SHA-256 of a head's weights ``(C, D)`` as float64 bytes."""
    return hashlib.sha256(weight.detach().cpu().double().contiguous().numpy().tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class LaplacePosterior:
    r"""A Gaussian over the weights of a head, :math:`\mathcal N(W, \Sigma)`.

    Made by :func:`bayesdiff.fit`, by :meth:`from_statistics` or by :meth:`load`.

    Args:
        mean: W, the network's own weights, bias as the last column, ``(C, D)`` float64.
        geometry: How features come from the layer's input.
        structure: ``"full"`` or ``"diag"``.
        covariance: ``"sandwich"`` or ``"ggn"``.
        precision: Λ (``"ggn"``) or H (``"sandwich"``) without the prior: ``(D, D)``; its diagonal ``(D,)`` for
            ``"diag"``.
        spectrum: The eigenvalues of Λ, or its diagonal for ``"diag"``, ``(D,)``: all that the evidence needs.
        scores: For ``"sandwich"`` a matrix G with :math:`G^\top G = \sum_i g_i g_i^\top`, ``(R, C, D)``
            (R = 1 and the diagonal's square root for ``"diag"``); empty for ``"ggn"``.
        prior_precision: τ.
        weights: The weight of each timestep bin in the precision and in :math:`g_i`, ``(T,)``.
        noise_variance: :math:`\sigma_b^2` by timestep bin, ``(T,)``.
        log_likelihood: :math:`\log p(\text{data}\mid W)`, in nats.
        num_timesteps: Training timesteps that the bins divide.
        num_images: n, the images that the statistics come from.
        dataset_size: N, the images that the posterior speaks for; statistics are scaled by N/n.
        head_path: Where the head is in the network.
    """

    mean: Tensor
    geometry: HeadGeometry
    structure: str
    covariance: str
    precision: Tensor
    spectrum: Tensor
    scores: Tensor
    prior_precision: float
    weights: Tensor
    noise_variance: Tensor
    log_likelihood: float
    num_timesteps: int
    num_images: int
    dataset_size: int
    head_path: str
    statistics: Statistics | None = field(default=None, repr=False)
    _factor: Tensor = field(init=False, repr=False)
    _cache: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("structure", self.structure, STRUCTURES)
        check_choice("covariance", self.covariance, COVARIANCES)
        check_positive("prior_precision", self.prior_precision)
        object.__setattr__(self, "_factor", self._covariance_factor())

    @classmethod
    def from_statistics(
        cls,
        statistics: Statistics,
        head: Head,
        *,
        structure: str = "full",
        covariance: str = "sandwich",
        prior_precision: float | None = None,
        loss_weights: str | Tensor = "uniform",
        dataset_size: int | None = None,
        num_timesteps: int = 1000,
    ) -> LaplacePosterior:
        r"""Cut a posterior from statistics; no pass over the data.

        Args:
            statistics: The sums.
            head: The head that they belong to.
            structure: ``"full"`` or ``"diag"``.
            covariance: ``"sandwich"`` or ``"ggn"``.
            prior_precision: τ > 0; by default the value that maximises the evidence (MacKay 1992).
            loss_weights: For the sandwich, the weights over t of the loss that the network was trained
                with: ``"uniform"``, ``"noise"`` (:math:`1/\sigma_t^2`), or a tensor with one for each bin.
            dataset_size: N, the number of images that the network was trained on: statistics are
                scaled by N/n. By default n: the posterior of a network trained on the n images given.
            num_timesteps: Training timesteps that the bins of the statistics divide.

        Raises:
            EmptyDataError: The statistics are empty.
            ArgumentError: An argument is out of range, or the residuals vanish.
            NotPositiveDefiniteError: Λ + τI has no Cholesky factor in float64.
        """
        check_choice("structure", structure, STRUCTURES)
        check_choice("covariance", covariance, COVARIANCES)
        noise = statistics.noise_variance()
        if not bool((noise > 0).all()):
            raise ArgumentError("expected residuals that do not vanish, got a noise variance of 0 in some timestep bin")
        n = statistics.num_images
        size = n if dataset_size is None else check_int("dataset_size", dataset_size, least=1)
        if size < n:
            raise ArgumentError(f"expected dataset_size >= the {n} images fitted to, got {size}")
        scale = size / n
        weights = 1 / noise
        if covariance == "sandwich":
            weights = _loss_weights(loss_weights, noise, statistics.pooled_variance())
        fisher = scale * statistics.precision(1 / noise)
        precision = scale * statistics.precision(weights)
        scores = statistics.image_scores(weights) * math.sqrt(scale)
        if structure == "diag":
            spectrum, precision = fisher.diagonal().clone(), precision.diagonal().clone()
            scores = scores.square().sum(0, keepdim=True).sqrt()
        else:
            spectrum = torch.linalg.eigvalsh(fisher)
            if len(scores) > scores[0].numel():
                # More images than weights: the triangular factor has the same Gram matrix and fewer rows.
                scores = torch.linalg.qr(scores.flatten(1), mode="r").R.unflatten(1, scores.shape[1:])
        if covariance == "ggn":
            scores = scores[:0]
        mean = head.weight().cpu()
        count = statistics.positions * statistics.geometry.out_channels
        squares = statistics.squared_residuals.sum(1)
        log_likelihood = -0.5 * scale * float((squares / noise + count * torch.log(2 * math.pi * noise)).sum())
        spectrum = spectrum.cpu()
        if prior_precision is None:
            prior_precision = evidence_prior_precision(spectrum, mean)
        return cls(
            mean, statistics.geometry, structure, covariance, precision.cpu(), spectrum, scores.cpu(),
            float(prior_precision), weights.cpu(), noise.cpu(), log_likelihood, num_timesteps, n, size, head.path, statistics,
        )  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights that the posterior was fitted around."""
        return fingerprint(self.mean)

    def check(self, model: Any, head: str | None = None) -> Head:
        """Find the head of a network or pipeline and make sure that the posterior is of its weights.

        The network may have been cast to a lower precision since.

        Raises:
            HeadMismatchError: They are other weights, or a layer of another shape.
        """
        found = find_head(model, head or self.head_path)
        weight = found.weight().cpu()
        if found.geometry != self.geometry:
            raise HeadMismatchError(
                f"expected a head with {self.geometry}, got {found.geometry}: the posterior is of another network"
            )
        # A network that was cast to half precision since still has our weights, rounded.
        dtype: torch.dtype = found.layer.weight.dtype  # type: ignore[assignment]
        if not torch.equal(self.mean.to(dtype).double(), weight):
            raise HeadMismatchError(
                f"expected the head's weights to have the fingerprint {self.fingerprint[:12]}…, got "
                f"{fingerprint(weight)[:12]}… (largest difference {(weight - self.mean).abs().max():.3g}): the posterior "
                "was fitted to another network; fit it again with bayesdiff.fit"
            )
        return found

    def _cholesky(self) -> Tensor:
        """L with LLᵀ = Λ + τI (``"full"``), float64."""
        d = len(self.precision)
        factor, info = torch.linalg.cholesky_ex(
            self.precision + self.prior_precision * torch.eye(d, dtype=torch.float64)
        )
        if int(info) != 0:
            least = torch.linalg.eigvalsh(self.precision)[0].item()
            raise NotPositiveDefiniteError(
                f"expected a positive definite precision, but its least eigenvalue is {least:.3g} and the prior precision "
                f"{self.prior_precision:.3g} does not mend it; give a larger prior_precision, or more images"
            )
        return factor

    def _covariance_factor(self) -> Tensor:
        """full: F with Σ_c = F_cᵀF_c, ``(1 or C, R, D)``; diag: the variances, ``(1 or C, D)``."""
        if self.structure == "diag":
            inverse = 1 / (self.precision + self.prior_precision)
            return inverse[None] if self.covariance == "ggn" else self.scores[0].square() * inverse.square()
        chol = self._cholesky()
        if self.covariance == "ggn":
            eye = torch.eye(len(chol), dtype=torch.float64)
            return torch.linalg.solve_triangular(chol, eye, upper=False)[None]  # L⁻¹
        deviations = self._score_deviations(chol).movedim(1, 0)  # (C, R, D)
        if deviations.shape[1] > deviations.shape[2]:
            deviations = torch.linalg.qr(deviations, mode="r").R
        return deviations

    def _score_deviations(self, chol: Tensor) -> Tensor:
        """G Λ_τ⁻¹, ``(R, C, D)``: a square root of the joint sandwich covariance over all channels."""
        flat = self.scores.flatten(0, 1)
        return torch.cholesky_solve(flat.T, chol).T.unflatten(0, self.scores.shape[:2])

    def _placed(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        """``tensor`` on the device and in the working dtype of ``like``, kept for the next call."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (name, like.device, dtype)
        if key not in self._cache:
            self._cache[key] = tensor.to(like.device, dtype)
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
        self.geometry.check(features)
        check_finite("features", features)
        factor = self._placed("factor", self._factor, features)
        x = features.to(factor.dtype)
        c = self.geometry.out_channels
        channel = 1 if self.geometry.kind == "conv" else -1
        if self.structure == "diag":
            out = self.geometry.squared(x, factor)
            if len(factor) == c:
                return out
            shape = list(out.shape)
            shape[channel] = c
            return out.expand(shape).contiguous()
        parts = [self.geometry.squared_norm(x, f) for f in factor]
        return torch.stack(parts * c if len(parts) == 1 else parts, dim=channel)

    def predict(
        self,
        features: Tensor,
        link_approx: str = "linearized",
        n_samples: int = 100,
        *,
        link: str = "identity",
        generator: Generator | None = None,
    ) -> Gaussian:
        r"""The predictive distribution of the network's output at one step.

        Args:
            features: As they enter the layer.
            link_approx: ``"linearized"``: mean Wφ and variance φᵀΣφ, exact for the identity link;
                ``"mc"``: mean and variance over ``n_samples`` weight draws, with a relative error of
                √(2/(n−1)) in the variance.
            n_samples: Number of draws for ``"mc"``, at least 2.
            link: ``"identity"``.
            generator: For ``"mc"``.

        Returns:
            A :class:`Gaussian` shaped as the layer's output.

        Raises:
            ArgumentError: Another link or approximation.
            ShapeError: The features don't fit the layer.
            NonFiniteError: They are NaN or infinite.
        """
        check_choice("link", link, ("identity",))
        if link_approx == "probit":
            raise ArgumentError(
                'expected link_approx "linearized" or "mc" for the identity link, got "probit": the probit approximation '
                "is for sigmoid links; the linearized variance is exact here"
            )
        check_choice("link_approx", link_approx, ("linearized", "mc"))
        if link_approx == "linearized":
            variance = self.variance(features)
            mean = self._placed("mean", self.mean, features)
            return Gaussian(self.geometry.apply(features.to(mean.dtype), mean.unsqueeze(0))[0], variance)
        check_int("n_samples", n_samples, least=2)
        self.geometry.check(features)
        check_finite("features", features)
        dtype = torch.promote_types(features.dtype, torch.float32)
        weights = self.sample(n_samples, generator).to(features.device, dtype)
        draws = self.geometry.apply(features.to(dtype), weights)
        return Gaussian(draws.mean(0), draws.var(0))

    def deviations(self, n: int, generator: Generator | None = None) -> Tensor:
        r"""n draws of :math:`\delta W \sim \mathcal N(0, \Sigma)`: ``(n, C, D)`` float64, on the CPU.

        Under the full sandwich the draws carry the covariance between output channels too.
        """
        check_int("n", n, least=1)
        c, d = self.mean.shape
        if self.structure == "diag":
            return normal((n, c, d), generator) * self._factor.sqrt()
        if self.covariance == "ggn":
            return normal((n, c, d), generator) @ self._factor[0]
        root = self._score_deviations(self._cholesky()).flatten(1)  # (R, C·D)
        return (normal((n, len(root)), generator) @ root).unflatten(1, (c, d))

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """n draws of the head's weights, bias as the last column: ``(n, C, D)`` float64, on the CPU."""
        return self.mean + self.deviations(n, generator)

    def log_marginal_likelihood(self) -> float:
        r"""The Laplace evidence, in nats.

            log p(data | W) − ½ [C log det(Λ_τ) − C D log τ + τ ‖W‖²]

        (MacKay 1992, eq. 4.7, in the form of Immer et al. 2021). It treats pixels as independent, as the GGN
        does, whichever covariance is used for prediction.
        """
        c, d = self.mean.shape
        log_det = float(torch.log(self.spectrum.clamp(min=0) + self.prior_precision).sum())
        scatter = self.prior_precision * float(self.mean.square().sum())
        return self.log_likelihood - 0.5 * (c * (log_det - d * math.log(self.prior_precision)) + scatter)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``posterior.json`` and a safetensors file; what was there stays whole until the new is.

        Raises:
            OutputFolderError: The folder cannot be written.
        """
        path = check_output_folder(folder)
        tensors = {
            "mean": self.mean, "precision": self.precision, "spectrum": self.spectrum, "scores": self.scores,
            "weights": self.weights, "noise_variance": self.noise_variance,
        }  # fmt: skip
        payload = save({k: v.contiguous() for k, v in tensors.items()})
        digest = hashlib.sha256(payload).hexdigest()
        # The name carries the content, so posterior.json, replaced last, always names a complete file.
        final = path / f"posterior-{digest[:16]}.safetensors"
        with atomic_path(final) as temporary:
            Path(temporary).write_bytes(payload)
        meta = {
            "format": FORMAT,
            "tensors": final.name,
            "sha256": digest,
            "fingerprint": self.fingerprint,
            "head": self.head_path,
            "geometry": self.geometry.to_dict(),
            "structure": self.structure,
            "covariance": self.covariance,
            "prior_precision": self.prior_precision,
            "log_likelihood": self.log_likelihood,
            "num_timesteps": self.num_timesteps,
            "num_images": self.num_images,
            "dataset_size": self.dataset_size,
        }
        with atomic_path(path / "posterior.json") as temporary:
            Path(temporary).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        for old in path.glob("posterior-*.safetensors"):
            if old != final:
                old.unlink()

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
        path = Path(folder)
        try:
            meta = json.loads((path / "posterior.json").read_text(encoding="utf-8"))
            if meta["format"] != FORMAT:
                raise PosteriorFileError(f"expected posterior format {FORMAT}, got {meta['format']!r} in {path}")
            file = path / meta["tensors"]
            if hashlib.sha256(file.read_bytes()).hexdigest() != meta["sha256"]:
                raise PosteriorFileError(
                    f"expected {file} to have the checksum that posterior.json records, got another: the file is damaged "
                    "or truncated; save the posterior again"
                )
            tensors = load_file(file)
            posterior = cls(
                tensors["mean"], HeadGeometry.from_dict(meta["geometry"]), meta["structure"], meta["covariance"],
                tensors["precision"], tensors["spectrum"], tensors["scores"], meta["prior_precision"],
                tensors["weights"], tensors["noise_variance"], meta["log_likelihood"], meta["num_timesteps"], meta["num_images"],
                meta["dataset_size"], meta["head"],
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            if isinstance(error, PosteriorFileError):
                raise
            raise PosteriorFileError(
                f"expected a posterior saved by LaplacePosterior.save in {str(path)!r}, got {type(error).__name__}: {error}"
            ) from error
        if posterior.fingerprint != meta["fingerprint"]:
            raise PosteriorFileError(
                f"expected the fingerprint {meta['fingerprint']} in {path}, got {posterior.fingerprint}"
            )
        if model is not None:
            posterior.check(model)
        return posterior


def _loss_weights(choice: str | Tensor, noise: Tensor, pooled: float) -> Tensor:
    """The weight of each timestep bin in the training loss, in units of 1/(residual variance)."""
    if isinstance(choice, str):
        check_choice("loss_weights", choice, ("uniform", "noise"))
        return 1 / noise if choice == "noise" else torch.full_like(noise, 1 / pooled)
    weights = torch.as_tensor(choice).to(noise)
    if weights.shape != noise.shape or not bool((weights >= 0).all()) or not bool(torch.isfinite(weights).all()):
        raise ArgumentError(
            f"expected loss_weights 'uniform', 'noise', or {len(noise)} finite numbers >= 0, one for each timestep bin, "
            f"got {choice}"
        )
    return weights / pooled


def evidence_prior_precision(spectrum: Tensor, weight: Tensor) -> float:
    r"""The prior precision τ that maximises the evidence.

    At the maximum :math:`\tau\lVert W\rVert^2 = \gamma(\tau) = C\sum_d \lambda_d/(\lambda_d+\tau)` (MacKay 1992,
    eq. 4.9): the left side grows with τ, the right falls, so there is one root, found by bracketing in log τ.

    Args:
        spectrum: Eigenvalues λ of the precision without the prior (its diagonal for ``"diag"``), ``(D,)``.
        weight: W, ``(C, D)``.

    Returns:
        τ; 1 with a :class:`BayesdiffWarning` when W or the spectrum vanishes and no root exists.
    """
    values = spectrum.double().clamp(min=0)  # eigenvalues of a Gram matrix: below 0 only by rounding
    norm = float(weight.double().square().sum())
    if norm == 0 or float(values.max()) == 0:
        warnings.warn(
            "the evidence has no maximum in the prior precision (zero weights or features): using 1.0",
            BayesdiffWarning,
            stacklevel=2,
        )
        return 1.0
    c = weight.shape[0]

    def slope(log_tau: float) -> float:
        tau = math.exp(log_tau)
        return tau * norm - c * float((values / (values + tau)).sum())

    # γ ≤ C·D bounds the root from above; there γ(τ) ≥ γ(τ_max) bounds it from below.
    high = math.log(c * len(values) / norm)
    low = math.log(max(c * float((values / (values + math.exp(high))).sum()) / norm, 1e-300)) - 1e-9
    return math.exp(brentq(slope, low, high + 1e-9, xtol=1e-12))
