"""Gradients of single draws: what tells images, and the draws of one image, apart.

Those of one image are not independent, so they are summed before they are squared: each is kept with the number of its image and
its timestep bin. Where they would be too many, images whose draws are all there go into a sketch
(:mod:`bayesdiff.laplace.sketch`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bayesdiff.checks import ArgumentError, EmptyDataError, ShapeError, check_int
from bayesdiff.io import fitting
from bayesdiff.laplace.sketch import MARKS, Sketch, known_again, marks_of
from bayesdiff.laplace.training import Scores

_SKETCH = ("means", "deviations", "counts", "marks", "shared", "sum")
REFIT = "fit with sketch=None for that"


@contextmanager
def plain() -> Iterator[None]:
    """Sums are neither part of a graph nor of inference mode, whatever the network was run under."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Draws:
    r"""The gradients :math:`\sum_p w\psi(r)\varphi^\top` of some draws.

    Args:
        shape: (C, D) of each.
        device: Where they are kept; float64.
        sketch: R, to sketch them; None: all are kept.

    Attributes:
        scores: Of each batch, ``(draws, C, D)``; of those that are not in the sketch.
        images: The number of the image of each, ``(draws,)``.
        bins: The timestep bin of each, ``(draws,)``.
        sketch: Of all others, or None.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device, sketch: int | None = None) -> None:
        self.shape, self.device = shape, device
        self.scores: list[Tensor] = []
        self.images: list[Tensor] = []
        self.bins: list[Tensor] = []
        self.sketch = None if sketch is None else self._started(sketch)

    def _started(self, rows: int) -> Sketch:
        zeros = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        return Sketch.empty(check_int("sketch", rows, least=2), zeros)

    def add(self, scores: Tensor, images: Tensor, bins: Tensor) -> None:
        """Keep those of a batch."""
        self.scores.append(scores)
        self.images.append(images)
        self.bins.append(bins)

    def settle(self, rows: int | None = None) -> None:
        """Put what is kept into the sketch, if there is one; ``rows`` is R, to begin to sketch now."""
        with plain():
            if self.sketch is None and rows is not None:
                self.sketch = self._started(rows)
            if self.sketch is None or not self.scores:
                return
            self.sketch.add(self.scores, torch.cat(self.images))
            self.scores, self.images, self.bins = [], [], []

    @property
    def rows(self) -> int | None:
        """R of the sketch, or None."""
        return None if self.sketch is None else self.sketch.rows

    @property
    def num_images(self) -> int:
        """How many different images they are of."""
        pending = int(torch.cat(self.images).unique().numel()) if self.images else 0
        return pending + (0 if self.sketch is None else len(self.sketch.counts))

    @property
    def num_draws(self) -> int:
        """How many were added."""
        return sum(len(s) for s in self.scores) + (0 if self.sketch is None else int(self.sketch.counts.sum()))

    # ------------------------------------------------------------------------------------------ others

    def check_others(self, other: Draws, *, same_images: bool) -> None:
        """That draws can be added to these.

        Args:
            other: Of the same head.
            same_images: Whether an image's number means the same image in both.

        Raises:
            ArgumentError: ``same_images``, and gradients are sketched; or sketches differ in size; or some draws are the very
                same.
        """
        if same_images and (self.sketch is not None or other.sketch is not None):
            raise ArgumentError(
                "expected statistics that keep all gradients for same_images=True, got sketched ones, whose images cannot be "
                "told apart: fit with sketch=None, or with more draws_per_image at once"
            )
        if None not in (self.rows, other.rows) and self.rows != other.rows:
            raise ArgumentError(f"expected a sketch of {self.rows} rows, as here, got {other.rows}")
        again = known_again(self._marks(same_images), other._marks(same_images), self.shape[0] * self.shape[1])
        if again:
            raise ArgumentError(
                f"expected other draws than here, got {again} of the very same {'draws' if same_images else 'images'}: the same "
                "data fitted with the same seed would count twice; give each fit images of its own, or a generator with a seed "
                "of its own and same_images=True"
            )

    def _marks(self, by_draw: bool) -> Tensor:
        """What each draw, or each image, is known by, ``(n, 8)``."""
        known = torch.zeros(0, MARKS, dtype=torch.float64) if self.sketch is None else self.sketch.marks
        if not self.scores:
            return known
        images = torch.cat(self.images)
        rows = torch.arange(len(images), device=images.device) if by_draw else images.unique(return_inverse=True)[1]
        return torch.cat([known, marks_of(self.scores, rows)])

    def merge(self, other: Draws, *, same_images: bool) -> None:
        """Add others that :meth:`check_others` has nothing against; images are numbered on unless they are the same."""
        rows = self.rows or other.rows
        if rows is not None:
            self.settle(rows)
            assert self.sketch is not None
            if other.sketch is not None:
                self.sketch.merge(other.sketch)
            if other.scores:
                self.sketch.add(other.scores, torch.cat(other.images))
            return
        shift = 0
        if not same_images and self.scores and other.scores:
            shift = 1 + int(torch.cat(self.images).max()) - min(0, int(torch.cat(other.images).min()))
        self.scores += [s.to(self.device) for s in other.scores]
        self.images += [s.to(self.device) + shift for s in other.images]
        self.bins += [s.to(self.device) for s in other.bins]

    # ------------------------------------------------------------------------------------------ scores

    def by_draw(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`g_{ij} = w_b \sum_p w\psi(r)\varphi^\top` of each, ``(draws, C, D)``, and its image's row, ``(draws,)``.

        Raises:
            EmptyDataError: There are none.
            ArgumentError: They are sketched.
        """
        if self.sketch is not None:
            raise ArgumentError(
                f"expected statistics that keep all gradients, got a sketch of {self.rows} rows: {REFIT}"
            )
        if not self.scores:
            raise EmptyDataError("expected at least one image to fit to, got none")
        _, rows = torch.cat(self.images).unique(return_inverse=True)
        by_draw = weights.to(self.device, torch.float64)[torch.cat(self.bins)]
        return torch.cat(self.scores) * by_draw[:, None, None], rows

    def by_image(self, weights: Tensor) -> Scores:
        """Means and deviations of each image's: :meth:`bayesdiff.Statistics.scores_by_image`."""
        if self.sketch is None:
            return Scores.of(*self.by_draw(weights))
        self.settle()
        if not len(self.sketch.counts):
            raise EmptyDataError("expected at least one image to fit to, got none")
        if not bool((weights == weights[0]).all()):
            raise ArgumentError(
                f"expected one weight for all timestep bins, as sketched gradients have, got {len(weights.unique())}: they "
                f'were mixed over the bins, so neither covariance "ef" nor loss_weights by bin can be cut from them; {REFIT}'
            )
        return self.sketch.scores(float(weights[0]))

    def summed(self, weights: Tensor) -> Tensor:
        """The sum of each image's: :meth:`bayesdiff.Statistics.image_scores`."""
        return self.by_image(weights).summed()

    # ------------------------------------------------------------------------------------------ files

    def sums(self) -> dict[str, Tensor]:
        """The sketch, which is of nearly one size however many draws there are."""
        return {} if self.sketch is None else {f"sketch.{name}": getattr(self.sketch, name) for name in _SKETCH}

    def since(self, batch: int) -> dict[str, Tensor]:
        """What is kept, of all batches from number ``batch`` on; empty if there are none."""
        if batch >= len(self.scores):
            return {}
        lists = {"scores": self.scores, "images": self.images, "bins": self.bins}
        return {name: torch.cat(values[batch:]) for name, values in lists.items()}

    def take(
        self, rows: int | None, sums: Mapping[str, Tensor], parts: Sequence[Mapping[str, Tensor]], num_bins: int
    ) -> None:  # fmt: skip
        """Become what :meth:`sums` and :meth:`since` were taken from; ``rows`` is R.

        Raises:
            ShapeError, NonFiniteError, ArgumentError, KeyError: They are not from there.
        """
        if rows is not None:
            counts, many = sums["sketch.counts"], (rows, *self.shape)
            shapes = {
                "means": many, "deviations": many, "counts": (len(counts),), "marks": (len(counts), MARKS), "shared": (rows,),
                "sum": self.shape,
            }  # fmt: skip
            given = {name: fitting(name, sums[f"sketch.{name}"], shape) for name, shape in shapes.items()}
            here = {name: t if name in ("counts", "marks") else t.to(self.device) for name, t in given.items()}
            self.sketch = Sketch(**here)
            if not bool((counts >= 1).all()):
                raise ArgumentError(f"expected counts of at least one draw, got {float(counts.min()):.3g}")
        for part in parts:
            n = len(part["scores"])
            fitting("scores", part["scores"], (n, *self.shape))
            for name in ("images", "bins"):
                fitting(name, part[name], (n,), torch.int64)
            if n and not 0 <= int(part["bins"].min()) <= int(part["bins"].max()) < num_bins:
                raise ShapeError(f"expected bins from 0 to {num_bins - 1}, got others")
            self.add(*(part[name].to(self.device) for name in ("scores", "images", "bins")))
