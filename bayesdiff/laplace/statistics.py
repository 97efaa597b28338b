r"""Streaming sufficient statistics of the head's linear regression.

The head is linear and the loss is squared error, so all that any Laplace posterior over it needs are
sums over the data: the Gram matrix of the features, the residual sum of squares, and the gradient of
each image. They are kept apart by timestep (in ``num_bins`` equal bins), because the noise variance
:math:`\sigma_t^2` that weighs them is estimated from the same pass and spans orders of magnitude over t.
Sums add: over batches, processes and machines.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import EmptyDataError, ShapeError, check_finite, check_int
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.io import read_folder, write_folder

FORMAT = 1


class Statistics:
    r"""Sums over (image, timestep, noise) draws.

    Args:
        geometry: The head's geometry; C outputs, D features.
        num_bins: T, the number of timestep bins.
        device: Where the sums are kept; float64.

    Attributes:
        gram: :math:`\sum \varphi\varphi^\top` by bin, ``(T, D, D)``.
        squared_residuals: :math:`\sum r^2` by bin and channel, ``(T, C)``.
        positions: Number of positions (pixels, tokens) summed, by bin, ``(T,)``.
    """

    def __init__(self, geometry: HeadGeometry, num_bins: int = 10, device: torch.device | str = "cpu") -> None:
        self.geometry = geometry
        self.num_bins = check_int("num_bins", num_bins, least=1)
        d, c = geometry.in_features, geometry.out_channels
        self.gram = torch.zeros(num_bins, d, d, dtype=torch.float64, device=device)
        self.squared_residuals = torch.zeros(num_bins, c, dtype=torch.float64, device=device)
        self.positions = torch.zeros(num_bins, dtype=torch.float64, device=device)
        self._scores: list[Tensor] = []  # (B, C, D): Σ_p r φᵀ of one draw
        self._score_images: list[Tensor] = []
        self._score_bins: list[Tensor] = []

    def update(
        self, inputs: Tensor, residuals: Tensor, bins: Tensor, images: Tensor, rows: Tensor | None = None
    ) -> None:
        r"""Add a batch of draws.

        Args:
            inputs: What entered the layer, ``(B, C_in, H, W)`` or ``(B, ..., C_in)``.
            residuals: r = target − prediction, shaped as the layer's output.
            bins: The timestep bin of each draw, ``(B,)`` int64.
            images: The number of the image behind each draw, ``(B,)`` int64. Draws of one image are
                not independent, so their gradients are summed before they are squared.
            rows: Which of the draws each row of the inputs belongs to, int64, where a draw has several: a video's frames.

        Raises:
            NonFiniteError: Features or residuals are NaN or infinite.
            ShapeError: The shapes don't fit.
        """
        count = len(bins) if rows is None else len(rows)
        if not len(inputs) == len(residuals) == count or len(bins) != len(images):
            raise ShapeError(
                "expected one residual, bin and image number for each input, got "
                f"{len(inputs)}, {len(residuals)}, {count if len(bins) == len(images) else len(bins)}, {len(images)}"
            )
        hint = "the network overflows in this dtype: use bfloat16 or float32"
        dtype, device = torch.promote_types(inputs.dtype, torch.float32), self.gram.device
        x = check_finite("features", inputs, hint).to(device, dtype)
        r = check_finite("residuals", residuals, hint).to(device, dtype)
        bins, images = bins.to(device), images.to(device)
        channel = 1 if self.geometry.kind == "conv" else -1
        by_channel = r.movedim(channel, 1).reshape(len(r), self.geometry.out_channels, -1)  # (B, C, P)
        rows = torch.arange(len(bins), device=device) if rows is None else rows.to(device)
        by_row = bins[rows]
        for b in by_row.unique().tolist():
            chosen = by_row == b
            self.geometry.add_gram(x if bool(chosen.all()) else x[chosen], self.gram[b])
        self.squared_residuals.index_add_(0, by_row, by_channel.square().sum(2, dtype=torch.float64))
        ones = torch.full((len(by_row),), float(by_channel.shape[2]), dtype=torch.float64, device=device)
        self.positions.index_add_(0, by_row, ones)
        scores = self.geometry.outer(x, r).double()
        self._scores.append(scores.new_zeros(len(bins), *scores.shape[1:]).index_add_(0, rows, scores))
        self._score_images.append(images)
        self._score_bins.append(bins)

    def merge(self, other: Statistics) -> Statistics:
        """Add the statistics of other images (their numbers must differ from ours); returns self.

        Raises:
            ShapeError: They belong to another head or have other bins.
        """
        if other.geometry != self.geometry or other.num_bins != self.num_bins:
            raise ShapeError(
                f"expected statistics of {self.geometry} in {self.num_bins} bins, got {other.geometry} in "
                f"{other.num_bins}"
            )
        self.gram += other.gram.to(self.gram)
        self.squared_residuals += other.squared_residuals.to(self.gram)
        self.positions += other.positions.to(self.gram)
        device = self.gram.device
        self._scores += [s.to(device) for s in other._scores]
        self._score_images += [s.to(device) for s in other._score_images]
        self._score_bins += [s.to(device) for s in other._score_bins]
        return self

    @property
    def num_images(self) -> int:
        """n: how many different images the draws come from."""
        return int(torch.cat(self._score_images).unique().numel()) if self._score_images else 0

    @property
    def num_draws(self) -> int:
        """How many (image, timestep, noise) draws were added."""
        return sum(len(s) for s in self._scores)

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
        """The residual variance over all bins together."""
        return float(self.squared_residuals.sum() / (self.positions.sum() * self.trained_channels))

    def precision(self, weights: Tensor) -> Tensor:
        r""":math:`\sum_b w_b \sum \varphi\varphi^\top`, ``(D, D)``, without the prior.

        Args:
            weights: :math:`w_b`, one for each bin, ``(T,)``.
        """
        return torch.einsum("bij,b->ij", self.gram, weights.to(self.gram))

    def image_scores(self, weights: Tensor) -> Tensor:
        r""":math:`g_i = \sum_{draws} w_b \sum_p r\varphi^\top`, one row for each image: ``(n, C, D)``.

        Raises:
            EmptyDataError: No draws were added.
        """
        if not self._scores:
            raise EmptyDataError("expected at least one image to fit to, got none")
        images, rows = torch.cat(self._score_images).unique(return_inverse=True)
        by_draw = weights.to(self.gram)[torch.cat(self._score_bins)]
        out = self.gram.new_zeros(len(images), self.geometry.out_channels, self.geometry.in_features)
        return out.index_add_(0, rows, torch.cat(self._scores) * by_draw[:, None, None])

    @property
    def num_batches(self) -> int:
        """How often :meth:`update` was called."""
        return len(self._scores)

    def meta(self) -> dict[str, Any]:
        """What the sums are of, as JSON has it."""
        return {"geometry": self.geometry.to_dict()}

    def sums(self) -> dict[str, Tensor]:
        """What is of one size however many draws there are."""
        return {"gram": self.gram, "squared_residuals": self.squared_residuals, "positions": self.positions}

    def draws_since(self, batch: int) -> dict[str, Tensor]:
        """What is kept of single draws, of all batches from number ``batch`` on; empty if there are none."""
        if batch >= len(self._scores):
            return {}
        lists = {"scores": self._scores, "images": self._score_images, "bins": self._score_bins}
        return {name: torch.cat(values[batch:]) for name, values in lists.items()}

    @classmethod
    def from_state(
        cls, meta: Mapping[str, Any], sums: Mapping[str, Tensor], draws: Sequence[Mapping[str, Tensor]],
        device: torch.device | str = "cpu",
    ) -> Statistics:  # fmt: skip
        """The statistics that :meth:`meta`, :meth:`sums` and :meth:`draws_since` were taken from, ``draws`` in their order."""
        out = cls(HeadGeometry.from_dict(dict(meta["geometry"])), len(sums["positions"]), device)
        out.gram, out.squared_residuals, out.positions = (
            sums[k].to(device) for k in ("gram", "squared_residuals", "positions")
        )
        out._scores, out._score_images, out._score_bins = (
            [part[k].to(device) for part in draws] for k in ("scores", "images", "bins")
        )
        return out

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the sums, so that posteriors can be cut from them later, or merged with those of other processes.

        Raises:
            OutputFolderError: The folder cannot be written.
            EmptyDataError: There are no draws.
        """
        if not self._scores:
            raise EmptyDataError("expected at least one image to save the sums of, got none")
        tensors = {**self.sums(), **self.draws_since(0)}
        write_folder(folder, "statistics", FORMAT, tensors, self.meta())

    @classmethod
    def load(cls, folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> Statistics:
        """Read what :meth:`save` wrote.

        Raises:
            PosteriorFileError: A file is missing, damaged, truncated or of an unknown version.
        """
        tensors, meta = read_folder(folder, "statistics", FORMAT)
        return cls.from_state(meta, tensors, [tensors], device)
