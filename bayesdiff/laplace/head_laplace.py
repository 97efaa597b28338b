r"""The laplace-torch face: its class and its calls, on the exact posterior of a diffusion head.

laplace-torch's last-layer classes take neither convolutions nor token outputs, and its GLM predictive makes a Jacobian of
outputs × weights. :class:`HeadLaplace` is a ``ParametricLaplace`` of the head alone, fed with its features, so that scripts
go on as they are:

    la = HeadLaplace(unet.conv_out, structure="full")
    la.fit(loader)                                                     # (features, targets)
    mean, var = la(feats, pred_type="nn", link_approx="mc", n_samples=100)
    mean, var = la(feats, pred_type="glm")                             # the same two numbers, in closed form

The model here is what laplace-torch assumes: one noise σ for all, pixels independent, the GGN. For noise by timestep, for the
sandwich, and for a whole pipeline use :func:`bayesdiff.fit`.
"""

from __future__ import annotations

from typing import Any

import torch
from laplace.baselaplace import ParametricLaplace
from torch import Generator, Tensor, nn
from torch.nn.utils import parameters_to_vector
from tqdm.auto import tqdm

from bayesdiff.checks import (
    ArgumentError,
    EmptyDataError,
    ShapeError,
    check_choice,
    check_finite,
    check_int,
    check_positive,
)
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.head.sums import add_gram
from bayesdiff.laplace.covariance import AMPLIFIED, Covariance, amplification
from bayesdiff.laplace.evidence import evidence_prior_precision
from bayesdiff.laplace.links import Identity
from bayesdiff.laplace.predictive import closed_variance, monte_carlo
from bayesdiff.laplace.statistics import WORKED
from bayesdiff.laplace.structure import build

STRUCTURES = ("full", "diag")
#: What of laplace-torch's settings has a meaning here.
SETTINGS = ("sigma_noise", "prior_precision", "prior_mean", "temperature")
#: Outputs of one sample, or weights, above which a dense covariance between them is refused.
DENSE = 4096


class HeadLaplace(ParametricLaplace):
    r"""Laplace posterior of a ``Conv2d`` or ``Linear`` layer on its features, for regression.

    With H = Σ φφᵀ over all samples and positions, the posterior precision of each output channel's weights is
    :math:`H/(\sigma^2 T) + \tau`, exactly (``"diag"``: its diagonal). The layer is never changed.

    Args:
        model: The layer.
        likelihood: ``"regression"``.
        structure: ``"full"`` or ``"diag"``.
        kwargs: :data:`SETTINGS`, as in laplace-torch; ``prior_precision`` is one number, here and whenever it is set.

    Raises:
        UnsupportedHeadError: The layer is of another kind.
        ArgumentError: Another likelihood or structure; more than one prior precision; a noise, temperature or prior precision
            that is not finite and > 0; another of laplace-torch's arguments, such as ``backend``, that would change nothing.
    """

    def __init__(
        self, model: nn.Module, likelihood: str = "regression", *, structure: str = "full", **kwargs: Any
    ) -> None:
        check_choice("likelihood", likelihood, ("regression",))
        self.structure = check_choice("structure", structure, STRUCTURES)
        self.geometry = HeadGeometry.of(model)
        others = sorted(k for k, v in kwargs.items() if k not in SETTINGS and v is not None and v is not False)
        if others:
            raise ArgumentError(
                f"expected no further arguments than {', '.join(SETTINGS)}, got {', '.join(others)}: the curvature is exact, "
                "from the features alone, and has no backends; leave them out"
            )
        if not all(p.requires_grad for p in model.parameters()):
            raise ArgumentError(
                "expected a layer whose parameters all require gradients (laplace-torch leaves others out)"
            )
        super().__init__(model, likelihood, **kwargs)
        self._covariance: tuple[tuple[Any, ...], Covariance] | None = None
        self.loss, self.n_data = 0.0, 0
        self.n_outputs: float = 0

    def _init_H(self) -> None:
        self.H: Tensor | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """As usual; the noise, the temperature and the prior are looked at first."""
        if name in ("sigma_noise", "temperature", "prior_precision") and not (
            isinstance(value, Tensor) and value.numel() != 1
        ):
            check_positive(name, value.detach() if isinstance(value, Tensor) else value)
        if name == "prior_mean" and not bool(torch.isfinite(torch.as_tensor(value)).all()):
            raise ArgumentError(f"expected a finite prior_mean, got {value}")
        super().__setattr__(name, value)

    @ParametricLaplace.prior_precision.setter
    def prior_precision(self, prior_precision: float | Tensor) -> None:
        if isinstance(prior_precision, Tensor) and prior_precision.numel() != 1:
            raise ArgumentError(
                f"expected one prior_precision for the whole head, got {prior_precision.numel()}: a prior by weight or by "
                "layer would need another D × D matrix for every channel"
            )
        # laplace-torch's own setter, which also takes one number for each layer or weight.
        ParametricLaplace.prior_precision.fset(self, prior_precision)

    def fit(self, train_loader: Any, override: bool = True, progress_bar: bool = False) -> None:
        """Sum over a loader of (features, targets), targets shaped as the layer's output.

        Batches may differ in the size of their images: ``n_outputs`` is the mean over samples.

        Args:
            train_loader: The loader.
            override: Start anew; False adds to what is there.
            progress_bar: Show one.

        Raises:
            EmptyDataError: The loader is empty.
            ShapeError: Targets are not shaped as the layer's output.
            NonFiniteError: Features or targets are NaN or infinite.
        """
        d = self.geometry.in_features
        before = None if override else self.H
        gram = torch.zeros(d, d, dtype=torch.float64, device=self._device)
        loss, count, outputs = 0.0, 0, 0
        for x, y in tqdm(train_loader, disable=not progress_bar, desc="fit"):
            x = check_finite("features", x.detach()).to(self._device)
            y = check_finite("targets", y.detach()).to(self._device)
            self.geometry.check(x)
            with torch.no_grad():
                out = self.model(x.to(self._dtype))
            if y.shape != out.shape:
                raise ShapeError(f"expected targets {tuple(out.shape)}, as the layer's output, got {tuple(y.shape)}")
            for part in x.split(max(1, WORKED // max(1, x[:1].numel()))):
                add_gram(self.geometry, part.double(), gram)
            loss += 0.5 * float((y - out).double().square().sum())
            count, outputs = count + len(x), outputs + y.numel()
        if count == 0:
            raise EmptyDataError("expected at least one batch to fit to, got none")
        check_finite("sums of features", gram, "they are too large even for float64: scale the features")
        total = gram if self.structure == "full" else gram.diagonal().clone()
        self.mean = parameters_to_vector(self.params).detach()
        if before is not None:
            outputs += round(self.n_data * self.n_outputs)
            total, loss, count = total + before, loss + self.loss, count + self.n_data
        self.H, self.loss, self.n_data = total, loss, count
        # laplace-torch's likelihood has n_data · n_outputs Gaussian normalisers.
        self.n_outputs = outputs / count if outputs % count else outputs // count
        self._covariance = None

    def _weight(self) -> Tensor:
        """W with the bias as its last column, ``(C, D)`` float64."""
        return self._to_matrix(self.mean[None].double())[0]

    def _to_matrix(self, flat: Tensor) -> Tensor:
        """Parameters in laplace-torch's order (weight, then bias), ``(n, P)``, to ``(n, C, D)``."""
        c, n = self.geometry.out_channels, self.geometry.num_weights
        weight = flat[:, : c * n].unflatten(1, (c, n))
        return torch.cat([weight, flat[:, c * n :, None]], dim=2) if self.geometry.bias else weight

    def _to_flat(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`_to_matrix`."""
        n = self.geometry.num_weights
        return torch.cat([matrix[:, :, :n].flatten(1), matrix[:, :, n:].flatten(1)], dim=1)

    def _tau(self) -> Tensor:
        return torch.as_tensor(self.prior_precision).detach().double().flatten()

    def _sigma(self) -> Covariance:
        """Σ for the present prior, noise and temperature, made once for each."""
        self._check_H_init()
        factor = float(self._H_factor)
        key = (float(self._tau()), factor, self.n_data)
        if self._covariance is None or self._covariance[0] != key:
            assert self.H is not None
            gram = self.H.detach().cpu()
            empty = gram.new_zeros(0, self.geometry.out_channels, self.geometry.in_features)
            tau = self._tau().to(gram).expand(self.geometry.out_channels)
            self._covariance = key, build(self.structure, "ggn", factor * gram, empty, tau)
        return self._covariance[1]

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        pred_type: str = "glm",
        joint: bool = False,
        link_approx: str = "probit",
        n_samples: int = 100,
        diagonal_output: bool = True,
        generator: Generator | None = None,
        fitting: bool = False,
        **model_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """The predictive mean and variance of the layer's output, without the noise.

        Args:
            x: Features, as they enter the layer.
            pred_type: ``"glm"``: closed form, exact for a linear head; ``"nn"``: over ``n_samples`` weight draws.
            joint: Not supported: samples are predicted one by one.
            link_approx: ``"mc"`` for ``"nn"``; for ``"glm"`` it has no meaning in regression, as in laplace-torch.
            n_samples: Draws for ``"nn"``.
            diagonal_output: True: the variance of each output, shaped as the output. laplace-torch's default is a covariance
                between all outputs of a sample; False gives it, ``(B, outputs, outputs)``, for ``"glm"`` and up to
                :data:`DENSE` outputs.
            generator: For draws.
            fitting: Ignored, as laplace-torch's own grid search is.
            model_kwargs: Refused; the layer takes features only.

        Raises:
            ArgumentError: An argument is not supported.
            ShapeError: The features don't fit the layer.
            NonFiniteError: They are NaN or infinite.
            AttributeError: Not fitted yet (laplace-torch's own error).
        """
        check_choice("pred_type", pred_type, ("glm", "nn"))
        if joint or model_kwargs:
            raise ArgumentError(
                f"expected joint=False and no further arguments, got joint={joint} and {sorted(model_kwargs)}"
            )
        if pred_type == "nn" and link_approx != "mc":
            raise ArgumentError(f'expected link_approx="mc" for pred_type="nn", got "{link_approx}"')
        self.geometry.check(x)
        check_finite("features", x)
        sigma = self._sigma()
        kept = torch.promote_types(x.dtype, torch.float32)
        inputs = x.to(torch.float64 if self._amplified(sigma) else kept)
        weight = self._weight().to(inputs)
        if pred_type == "nn":
            check_int("n_samples", n_samples, least=2)
            mean, variance = monte_carlo(
                self.geometry, inputs, weight, lambda k: sigma.draw(k, generator), n_samples, Identity()
            )
            return mean.to(kept), variance.to(kept)
        mean = self.geometry.apply(inputs, weight[None])[0].to(kept)
        if not diagonal_output:
            return mean, self._joint(inputs).to(kept)
        parts = [None if v is None else v.to(inputs) for v in (sigma.rows, sigma.scales, sigma.diagonal)]
        return mean, closed_variance(self.geometry, inputs, *parts).to(kept)

    def _amplified(self, sigma: Covariance) -> bool:
        """Whether float32 has too few digits for δWφ."""
        assert self.H is not None
        return amplification(sigma, self.H.detach().cpu()) > AMPLIFIED

    def _joint(self, inputs: Tensor) -> Tensor:
        """The covariance between all outputs of each sample, in the order of ``output.flatten(1)``."""
        phi = self.geometry.design(inputs.double())
        c, p = self.geometry.out_channels, phi.shape[1]
        if c * p > DENSE:
            raise ArgumentError(
                f"expected at most {DENSE} outputs for a joint covariance, got {c * p}: use diagonal_output=True, or draws"
            )
        block = self._block_covariance()
        shared = phi @ block @ phi.mT  # (B, P, P), the same for every channel
        joint = torch.einsum("bpq,cd->bcpdq", shared, torch.eye(c).to(shared))
        if self.geometry.kind == "linear":
            joint = joint.permute(0, 2, 1, 4, 3)
        return joint.reshape(len(phi), c * p, c * p).to(inputs)

    def _block_precision(self) -> Tensor:
        """H/(σ²T) + τ of one channel, ``(D, D)`` float64."""
        self._check_H_init()
        assert self.H is not None
        data = self.H if self.H.ndim == 2 else torch.diag(self.H)
        return float(self._H_factor) * data + self._tau().to(data) * torch.eye(len(data)).to(data)

    def _block_covariance(self) -> Tensor:
        return torch.linalg.inv(self._block_precision())

    @property
    def posterior_precision(self) -> Tensor:
        """In laplace-torch's order of parameters: ``(P, P)`` for ``"full"``, ``(P,)`` for ``"diag"``.

        Raises:
            ArgumentError: There are more than :data:`DENSE` weights; all channels have the same D × D block.
        """
        c, d = self.geometry.out_channels, self.geometry.in_features
        block = self._block_precision()
        if self.structure == "diag":
            return self._to_flat(block.diagonal().expand(1, c, d))[0]
        if c * d > DENSE:
            raise ArgumentError(
                f"expected at most {DENSE} weights for a dense precision, got {c * d}: use structure='diag'"
            )
        order = self._to_flat(torch.arange(c * d, device=block.device).view(1, c, d))[0]
        return torch.kron(torch.eye(c).to(block), block)[order][:, order]

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """Differentiable in the prior precision and the noise, as laplace-torch's is."""
        self._check_H_init()
        assert self.H is not None
        values = torch.linalg.eigvalsh(self.H) if self.H.ndim == 2 else self.H
        tau = torch.as_tensor(self.prior_precision).flatten()
        return self.geometry.out_channels * torch.log(self._H_factor * values.clamp(min=0) + tau).sum()

    def square_norm(self, value: Tensor) -> Tensor:
        """Δᵀ P Δ for Δ = value − mean, ``(P,)``."""
        away = self._to_matrix((value - self.mean)[None].double())[0]
        return ((away @ self._block_precision()) * away).sum()

    def sample(self, n_samples: int = 100, generator: Generator | None = None) -> Tensor:
        """Draws of the parameters, ``(n_samples, P)``, in the order of ``parameters_to_vector``."""
        check_int("n_samples", n_samples, least=1)
        draws = self._sigma().draw(n_samples, generator)
        return self.mean + self._to_flat(draws).to(self.mean)

    def functional_samples(
        self, x: Tensor, pred_type: str = "glm", n_samples: int = 100, generator: Generator | None = None
    ) -> Tensor:
        """Draws of the layer's output, ``(n_samples, B, …)``; both types are the same for a linear head."""
        check_choice("pred_type", pred_type, ("glm", "nn"))
        kept = torch.promote_types(x.dtype, torch.float32)
        inputs = check_finite("features", x.detach()).to(torch.float64 if self._amplified(self._sigma()) else kept)
        weights = self._weight() + self._sigma().draw(check_int("n_samples", n_samples, least=1), generator)
        return self.geometry.apply(inputs, weights.to(inputs)).to(kept)

    predictive_samples = functional_samples

    def optimize_prior_precision(
        self, pred_type: str = "glm", method: str = "marglik", prior_structure: str = "scalar", **kwargs: Any
    ) -> None:
        """Set the prior precision that maximises the evidence, by MacKay's fixed point and not by gradient steps.

        Raises:
            ArgumentError: Another method or structure of the prior; a prior mean that is not 0.
        """
        check_choice("method", method, ("marglik",))
        check_choice("prior_structure", prior_structure, ("scalar",))
        self._check_H_init()
        assert self.H is not None
        if bool((torch.as_tensor(self.prior_mean) != 0).any()):
            raise ArgumentError(f"expected prior_mean=0 for the evidence's fixed point, got {self.prior_mean}")
        values = torch.linalg.eigvalsh(self.H) if self.H.ndim == 2 else self.H
        self.prior_precision = evidence_prior_precision(float(self._H_factor) * values.cpu(), self._weight().cpu())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As laplace-torch's, but the layer gets no new attribute."""
        had = hasattr(self.model, "output_size")
        super().load_state_dict(state_dict)
        if not had:
            del self.model.output_size
        self._covariance = None
