r"""Streaming sufficient statistics of the head's linear regression.

The head is linear, so all that any Laplace posterior over it needs are sums over the data: the Gram matrix of the features, the
residual sum of squares, and the gradient of each draw (:mod:`bayesdiff.laplace.draws`). They are kept apart by timestep (in
``num_bins`` equal bins), because the noise variance :math:`\sigma_t^2` that weighs them is estimated from the same pass and spans
orders of magnitude over t. Sums add: over batches, processes and machines.

Where the training loss is not squared error (:mod:`bayesdiff.laplace.loss`), or has weights w that are a function of t,
gradients are :math:`w\psi(r)\varphi^\top`, and a second Gram matrix is kept, that of the loss's curvature :math:`w\psi'(r)`.
Over the output channels its pattern is the mean one, and its size each channel's own. The likelihood's sums stay those of
squares.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import ArgumentError, EmptyDataError, ShapeError, check_finite, check_int
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.head.sums import add_gram, add_weighted_gram, outer_products
from bayesdiff.io import fitting
from bayesdiff.laplace.draws import Draws, plain
from bayesdiff.laplace.loss import Loss, Squares, as_loss, from_dict, to_dict
from bayesdiff.laplace.saved import read_statistics, write_statistics
from bayesdiff.laplace.training import Scores

#: Numbers of features that are worked on at once, in float64.
WORKED = 2**22
_SUMS = ("gram", "squared_residuals", "positions", "curvatures", "squared_scores")


class Statistics:
    r"""Sums over (image, timestep, noise) draws.

    Args:
        geometry: The head's geometry; C outputs, D features.
        num_bins: T, the number of timestep bins.
        device: Where the sums are kept; float64.
        loss: The loss that the network was trained with: a name, or an object of :mod:`bayesdiff.laplace.loss`.
        weighted: Whether each draw comes with a weight of its own, as a function of t gives it.
        sketch: R, to keep random mixtures of the images' gradients instead of all of them (:mod:`bayesdiff.laplace.sketch`):
            memory does not grow with the images, variances have a relative error of √(2/R). Then draws of one image must be added
            before :meth:`settle`, bins have one weight in the loss, and there is no ``"ef"``. None: all are kept.

    Attributes:
        gram: :math:`\sum \varphi\varphi^\top` by bin, ``(T, D, D)``.
        squared_residuals: :math:`\sum r^2` by bin and channel, ``(T, C)``.
        positions: Number of positions (pixels, tokens) summed, by bin, ``(T,)``.
        curvature: :math:`\sum w\psi'(r)\varphi\varphi^\top` by bin, ψ' the mean over channels, ``(T, D, D)``; None where it is
        ``gram``. curvatures: :math:`\sum w\psi'(r)` by bin and channel, ``(T, C)``. squared_scores: :math:`\sum w^2\psi(r)^2`
        by bin and channel, ``(T, C)``.
    """

    def __init__(
        self,
        geometry: HeadGeometry,
        num_bins: int = 10,
        device: torch.device | str = "cpu",
        *,
        loss: str | Loss = "squares",
        weighted: bool = False,
        sketch: int | None = None,
    ) -> None:
        self.geometry = geometry
        self.num_bins = num_bins = check_int("num_bins", num_bins, least=1)
        self.loss, self.weighted = as_loss(loss), bool(weighted)
        d, c = geometry.in_features, geometry.out_channels
        with plain():
            self.gram = torch.zeros(num_bins, d, d, dtype=torch.float64, device=device)
            self.squared_residuals = torch.zeros(num_bins, c, dtype=torch.float64, device=device)
            self.positions = torch.zeros(num_bins, dtype=torch.float64, device=device)
            is_gram = isinstance(self.loss, Squares) and not self.weighted
            self.curvature = None if is_gram else torch.zeros_like(self.gram)
            self.curvatures = torch.zeros_like(self.squared_residuals)
            self.squared_scores = torch.zeros_like(self.squared_residuals)
            self._draws = Draws((c, d), self.gram.device, sketch)

    def __repr__(self) -> str:
        """One line."""
        c, d = self.geometry.out_channels, self.geometry.in_features
        kept = "" if self.sketch is None else f", sketched by {self.sketch}"
        return f"Statistics({c} × {d} weights, {self.num_bins} bins, {self.num_draws} draws of {self.num_images} images{kept})"

    def update(
        self,
        inputs: Tensor,
        residuals: Tensor,
        bins: Tensor,
        images: Tensor,
        rows: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        r"""Add a batch of draws.

        Args:
            inputs: What entered the layer, ``(B, C_in, H, W)`` or ``(B, ..., C_in)``.
            residuals: r = target − prediction, shaped as the layer's output.
            bins: The timestep bin of each draw, ``(B,)`` int64.
            images: The number of the image behind each draw, ``(B,)`` int64. Draws of one image are
                not independent, so their gradients are summed before they are squared.
            rows: Which of the draws each row of the inputs belongs to, int64, where a draw has several: a video's frames.
            weights: w of each draw, ``(B,)``; only, and always, where the statistics are ``weighted``.

        Raises:
            ArgumentError: There are weights and should be none, or the other way round; or the loss cannot be used for such
            draws.
            NonFiniteError: Features or residuals are NaN or infinite.
            ShapeError: The shapes don't fit.
        """
        with plain():
            self._update(inputs, residuals, bins, images, rows, weights)

    def _update(
        self, inputs: Tensor, residuals: Tensor, bins: Tensor, images: Tensor, rows: Tensor | None, weights: Tensor | None
    ) -> None:  # fmt: skip
        count = len(bins) if rows is None else len(rows)
        if not len(inputs) == len(residuals) == count or len(bins) != len(images):
            raise ShapeError(
                "expected one residual, bin and image number for each input, got "
                f"{len(inputs)}, {len(residuals)}, {count if len(bins) == len(images) else len(bins)}, {len(images)}"
            )
        if (weights is None) == self.weighted:
            raise ArgumentError(
                f"expected {'a weight' if self.weighted else 'no weights'} for each draw, as when the statistics "
                "were made, got "
                f"{'none' if weights is None else 'some'}"
            )
        if weights is not None and weights.shape != bins.shape:
            raise ShapeError(f"expected one weight for each of {len(bins)} draws, got {tuple(weights.shape)}")
        hint = "the network overflows in this dtype: use bfloat16 or float32"
        device = self.gram.device
        x, r = check_finite("features", inputs, hint).to(device), check_finite("residuals", residuals, hint).to(device)
        bins, images = (v.to(device, torch.int64, copy=True) for v in (bins, images))
        if len(bins) and not 0 <= int(bins.min()) <= int(bins.max()) < self.num_bins:
            raise ArgumentError(
                f"expected bins from 0 to {self.num_bins - 1}, got {int(bins.min())} to {int(bins.max())}"
            )
        rows = torch.arange(len(bins), device=device) if rows is None else rows.to(device)
        by_row = bins[rows]
        scores = self.gram.new_zeros(len(bins), self.geometry.out_channels, self.geometry.in_features)
        for part in torch.arange(len(x), device=device).split(max(1, WORKED // max(1, x[:1].numel()))):
            of_row = None if weights is None else weights.to(device)[rows[part]]
            scores.index_add_(0, rows[part], self._add_rows(x[part].double(), r[part].double(), by_row[part], of_row))
        self._draws.add(scores, images, bins)

    @property
    def sketch(self) -> int | None:
        """R of sketched gradients, or None."""
        return self._draws.rows

    @property
    def score_bytes(self) -> int:
        """What the gradients of single draws take."""
        return sum(s.numel() * s.element_size() for s in self._draws.scores)

    def settle(self, sketch: int | None = None) -> None:
        """No more draws will come of the images so far: where gradients are sketched, theirs are put into the sketch.

        Args:
            sketch: R, to begin to sketch now.
        """
        self._draws.settle(sketch)

    def _add_rows(self, x: Tensor, r: Tensor, bins: Tensor, weights: Tensor | None) -> Tensor:
        """Add rows of inputs to the sums; their scores. In float64: collinear features leave float32 too few digits."""
        channel = 1 if self.geometry.kind == "conv" else -1
        by_channel = r.movedim(channel, 1).reshape(len(r), self.geometry.out_channels, -1)  # (B, C, P)
        for b in bins.unique().tolist():
            chosen = bins == b
            add_gram(self.geometry, x if bool(chosen.all()) else x[chosen], self.gram[b])
        self.squared_residuals.index_add_(0, bins, by_channel.square().sum(2))
        self.positions.index_add_(0, bins, by_channel.new_full(bins.shape, float(by_channel.shape[2])))
        r = self._add_curvature(x, r, by_channel, bins, None if weights is None else weights.to(r))
        return outer_products(self.geometry, x, r)

    def _add_curvature(self, x: Tensor, r: Tensor, by_channel: Tensor, bins: Tensor, weights: Tensor | None) -> Tensor:
        """Add the curvature of the loss; returns wψ(r), shaped as r. All by row of the inputs."""
        score = self.loss.score(r)
        if self.curvature is None:
            self.curvatures.index_add_(0, bins, by_channel.new_full(by_channel.shape[:2], by_channel.shape[2]).double())
            self.squared_scores.index_add_(0, bins, by_channel.square().sum(2, dtype=torch.float64))
            return score
        slope = self.loss.curvature(by_channel)
        slope = torch.ones_like(by_channel) if slope is None else slope
        square = self.loss.score(by_channel).square()
        if weights is not None:
            slope, square = slope * weights[:, None, None], square * weights.square()[:, None, None]
            score = score * weights.view(-1, *(1,) * (r.ndim - 1))
        self.curvatures.index_add_(0, bins, slope.sum(2, dtype=torch.float64))
        self.squared_scores.index_add_(0, bins, square.sum(2, dtype=torch.float64))
        for b in bins.unique().tolist():
            chosen = bins == b
            add_weighted_gram(self.geometry, x[chosen], slope[chosen].mean(1), self.curvature[b])
        return score

    def merge(self, other: Statistics, *, same_images: bool = False) -> Statistics:
        """Add other statistics; returns self.

        Args:
            other: Of the same head, bins and loss.
            same_images: Whether an image's number means the same image in both: then draws of one image are put together, as they
                are where two fits of the same data drew anew. By default all images are others than ours, whatever their
                numbers, as in fits of parts of the data; they are numbered on from ours.

        Raises:
            ShapeError: They belong to another head or have other bins.
            ArgumentError: They are no statistics, or these very ones; they are of another loss; some draws are the very same
                (the same images with the same seed, which would count twice); or ``same_images``, and gradients are
                sketched; or sketches differ in size.
        """
        if not isinstance(other, Statistics) or other is self:
            what = "these very ones" if other is self else f"{type(other).__name__} (a posterior has .statistics)"
            raise ArgumentError(f"expected the statistics of another fit, got {what}")
        if other.geometry != self.geometry or other.num_bins != self.num_bins:
            raise ShapeError(
                f"expected statistics of {self.geometry} in {self.num_bins} bins, got {other.geometry} in "
                f"{other.num_bins}"
            )
        if (other.loss, other.weighted) != (self.loss, self.weighted):
            raise ArgumentError(
                f"expected statistics of the loss {self.loss}, weighted={self.weighted}, got {other.loss}, "
                f"weighted={other.weighted}"
            )
        self._draws.check_others(other._draws, same_images=same_images)
        with plain():
            self._draws.merge(other._draws, same_images=same_images)
            for name in _SUMS if self.curvature is None else (*_SUMS, "curvature"):
                getattr(self, name).add_(getattr(other, name).to(self.gram))
        return self

    @property
    def num_images(self) -> int:
        """n: how many different images the draws come from."""
        return self._draws.num_images

    @property
    def num_draws(self) -> int:
        """How many (image, timestep, noise) draws were added."""
        return self._draws.num_draws

    @property
    def trained_channels(self) -> int:
        """How many outputs of the head are compared with a target: those whose residuals are not all 0 (a learned variance's)."""
        return int((self.squared_residuals.sum(0) > 0).sum()) or self.geometry.out_channels

    def noise_variance(self) -> Tensor:
        r"""The residual variance of each bin, :math:`\sigma_b^2 = \sum r^2 / (P_b C)`, C the trained channels: ``(T,)``.

        A bin without draws takes the value of the nearest bin that has some.

        Raises:
            EmptyDataError: No draws were added.
        """
        seen = self.positions.nonzero().flatten()
        if not len(seen):
            raise EmptyDataError("expected at least one image to fit to, got none")
        total = self.squared_residuals.sum(1) / (self.positions.clamp(min=1) * self.trained_channels)
        nearest = (torch.arange(self.num_bins, device=seen.device)[:, None] - seen).abs().argmin(1)
        return total[seen[nearest]]

    def pooled_variance(self) -> float:
        r"""The variance of the scores over the curvature, :math:`\sum w^2\psi^2/\sum w\psi'`, over all bins together.

        For squares without weights it is the residual variance. One over it, as the factor of the loss, is the scale at which
        scores that are independent of each other would have the curvature as their covariance: the units of a log-likelihood.
        Outputs that are not compared with a target are left out.
        """
        trained = self.squared_residuals.sum(0) > 0
        curvatures = self.curvatures[:, trained] if bool(trained.any()) else self.curvatures
        return float(self.squared_scores.sum() / curvatures.sum())

    def precision(self, weights: Tensor) -> Tensor:
        r""":math:`\sum_b w_b \sum \varphi\varphi^\top`, ``(D, D)``, without the prior.

        Args:
            weights: :math:`w_b`, one for each bin, ``(T,)``.
        """
        return torch.einsum("bij,b->ij", self.gram, weights.to(self.gram))

    def loss_curvature(self, weights: Tensor) -> Tensor:
        r""":math:`\sum_b w_b \sum w\psi'\varphi\varphi^\top`: ``(D, D)``; ``(C, D, D)`` if channels differ in it.

        Args:
            weights: :math:`w_b`, one for each bin, ``(T,)``.
        """
        if self.curvature is None:
            return self.precision(weights)
        mean = self.curvatures.mean(1, keepdim=True)
        size = torch.where(mean > 0, self.curvatures / mean, 1.0) * weights.to(self.gram)[:, None]  # (T, C)
        if bool((size == size[:, :1]).all()):
            return torch.einsum("bij,b->ij", self.curvature, size[:, 0])
        return torch.einsum("bij,bc->cij", self.curvature, size)

    def scores_by_image(self, weights: Tensor) -> Scores:
        """Means and deviations of each image's draws: see :mod:`bayesdiff.laplace.training`.

        Raises:
            EmptyDataError: No draws were added.
            ArgumentError: The gradients are sketched, and the weights differ between bins.
        """
        return self._draws.by_image(weights)

    def image_scores(self, weights: Tensor) -> Tensor:
        r""":math:`g_i = \sum_{draws} w_b \sum_p w\psi(r)\varphi^\top`, one row for each image: ``(n, C, D)``.

        Raises:
            EmptyDataError: No draws were added.
        """
        return self._draws.summed(weights)

    @property
    def num_batches(self) -> int:
        """How often :meth:`update` was called."""
        return len(self._draws.scores)

    def meta(self) -> dict[str, Any]:
        """What the sums are of, as JSON has it."""
        return {
            "geometry": self.geometry.to_dict(),
            "loss": to_dict(self.loss),
            "weighted": self.weighted,
            "sketch": self.sketch,
        }

    def sums(self) -> dict[str, Tensor]:
        """What is of one size however many draws there are."""
        out = {name: getattr(self, name) for name in _SUMS} | self._draws.sums()
        return out if self.curvature is None else {**out, "curvature": self.curvature}

    def draws_since(self, batch: int) -> dict[str, Tensor]:
        """What is kept of single draws, of all batches from number ``batch`` on; empty if there are none."""
        return self._draws.since(batch)

    @classmethod
    def from_state(
        cls, meta: Mapping[str, Any], sums: Mapping[str, Tensor], draws: Sequence[Mapping[str, Tensor]],
        device: torch.device | str = "cpu",
    ) -> Statistics:  # fmt: skip
        """The statistics that :meth:`meta`, :meth:`sums` and :meth:`draws_since` were taken from, ``draws`` in their order."""
        out = cls(
            HeadGeometry.from_dict(dict(meta["geometry"])), len(sums["positions"]), device, loss=from_dict(meta["loss"]),
            weighted=meta["weighted"],
        )  # fmt: skip
        for name in _SUMS if out.curvature is None else (*_SUMS, "curvature"):
            setattr(out, name, fitting(name, sums[name], getattr(out, name).shape).to(device))
        for name in ("squared_residuals", "positions", "squared_scores"):
            if bool((getattr(out, name) < 0).any()):
                raise ArgumentError(f"expected {name} >= 0, got {float(getattr(out, name).min()):.3g}")
        out._draws.take(meta.get("sketch"), sums, draws, out.num_bins)
        return out

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the sums, so that posteriors can be cut from them later, or merged with those of other processes.

        Raises:
            OutputFolderError: The folder cannot be written.
            EmptyDataError: There are no draws.
        """
        write_statistics(self, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> Statistics:
        """Read what :meth:`save` wrote.

        Raises:
            PosteriorFileError: A file is missing, damaged, truncated or of an unknown version.
        """
        return read_statistics(folder, partial(cls.from_state, device=device))
