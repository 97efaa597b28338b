r"""Sums of squares of many large gradients, in a fixed memory: random signs.

The sandwich needs :math:`\sum_i \bar g_i\bar g_i^\top` over images, and one gradient is C·D numbers (197,000 for Flux). With
signs :math:`\xi_{ir} = \pm 1`, each with probability ½ and independent,

    S_r = Σ_i ξ_ir ḡ_i,   r = 1 … R,        E S_r S_rᵀ = Σ_i ḡ_i ḡ_iᵀ

so a variance :math:`a^\top(\frac1R\sum_r S_rS_r^\top)a` is unbiased, with a relative error of at most √(2/R)
(Achlioptas 2003; the variance of a product of signs is below that of a Gaussian's). R·C·D numbers are kept however many images
there are, sketches of parts of the data add up, and each row is a draw of the score. The deviations of the draws of one image
around their mean are sketched beside them, with signs of their own.

Beside it a few numbers of each image are kept, its mean gradient in random mixtures of the weights: by them images are known
again, so that nobody counts the same draws twice.

Signs come from the gradients themselves, a hash of some of their numbers: so they do not depend on batches or processes, and two
processes never share signs for different images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from bayesdiff.laplace.training import Scores

#: R, unless another is asked for: a standard deviation is then within 4 %.
ROWS = 256
#: Numbers of a gradient that its signs are made of.
HASHED = 64
#: Random mixtures of an image's mean score that it is known by.
MARKS = 8
#: How far apart those of the same draws may be, relative to their size: networks round otherwise in other batches.
ROUNDED = 1e-3
#: Numbers of scores that are worked on at once.
WORKED = 2**22


class Sketch:
    """Means of images, and deviations of their draws.

    Args:
        means: S, ``(R, C, D)`` float64.
        deviations: The same of the deviations.
        counts: m_i, the draws of each image, ``(n,)`` float64 on the CPU.
        marks: What each image is known by (:func:`marks_of`), ``(n, 8)`` float64 on the CPU.
        shared: Σ_i ξ_ir, ``(R,)`` float64: what a score that all images share has in each row.
        sum: Σ_i ḡ_i, ``(C, D)`` float64.
    """

    def __init__(
        self, means: Tensor, deviations: Tensor, counts: Tensor, marks: Tensor, shared: Tensor, sum: Tensor
    ) -> None:
        self.means, self.deviations, self.counts, self.marks = means, deviations, counts, marks
        self.shared, self.sum = shared, sum

    @classmethod
    def empty(cls, rows: int, like: Tensor) -> Sketch:
        """Of no images; ``like`` is (…, C, D)."""
        zeros = like.new_zeros(rows, *like.shape[-2:])
        none, marks = torch.zeros(0, dtype=torch.float64), torch.zeros(0, MARKS, dtype=torch.float64)
        return cls(zeros, zeros.clone(), none, marks, zeros.new_zeros(rows), zeros.new_zeros(zeros.shape[1:]))

    @property
    def rows(self) -> int:
        """R."""
        return len(self.means)

    def add(self, scores: Sequence[Tensor], images: Tensor) -> None:
        """Add all draws of some images; some columns at a time, since scores of a large head are best not copied.

        Args:
            scores: One for each draw, ``(draws, C, D)``, in one or several parts.
            images: The number of the image of each, ``(draws,)``.
        """
        flat = [part.flatten(1) for part in scores]
        _, rows = images.unique(return_inverse=True)
        size = flat[0].shape[1]
        some = torch.linspace(0, size - 1, min(HASHED, size), dtype=torch.float64).round().long()
        hashed = Scores.of(torch.cat([part[:, some] for part in flat]), rows)
        draws = hashed.counts.long()
        of_images, of_draws = _signs(hashed.means, draws.cpu(), self.rows)
        # Of the deviations: those of an image one after the other, in the order of its draws.
        shared = rows[draws[rows] > 1]
        place = torch.empty_like(shared)
        place[shared.argsort(stable=True)] = torch.arange(len(shared), device=shared.device)
        of_images, of_draws = of_images.to(hashed.means), of_draws[place.cpu()].to(hashed.means)
        means, deviations, total = self.means.flatten(1), self.deviations.flatten(1), self.sum.view(-1)  # views
        self.shared += of_images.sum(0)
        width = max(1, WORKED // len(rows))
        for first in range(0, size, width):
            columns = slice(first, first + width)
            exact = Scores.of(torch.cat([part[:, columns] for part in flat]), rows)
            means[:, columns].addmm_(of_images.T, exact.means)
            total[columns] += exact.means.sum(0)
            if len(exact.deviations):
                deviations[:, columns].addmm_(of_draws.T, exact.deviations)
        self.counts = torch.cat([self.counts, hashed.counts.cpu()])
        self.marks = torch.cat([self.marks, marks_of(scores, rows)])

    def merge(self, other: Sketch) -> None:
        """Add that of other images; R must be the same."""
        self.means += other.means.to(self.means)
        self.deviations += other.deviations.to(self.deviations)
        self.shared += other.shared.to(self.shared)
        self.sum += other.sum.to(self.sum)
        self.counts = torch.cat([self.counts, other.counts])
        self.marks = torch.cat([self.marks, other.marks])

    def scores(self, weight: float) -> Scores:
        """As if they were the scores, each times a weight."""
        scale = weight / self.rows**0.5
        mixed = self.shared / self.rows**0.5, weight / max(1, len(self.counts)) * self.sum
        return Scores(scale * self.means, scale * self.deviations, self.counts, mixed)


def _signs(means: Tensor, draws: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The signs of each image, ``(n, R)``, and of the draws of those with several, image by image; int8 on the CPU.

    Args:
        means: Some numbers of each image's mean score, which its signs are made of, ``(n, HASHED)``.
        draws: m_i, ``(n,)``.
        rows: R.
    """
    of_images, of_draws = [], []
    for some, m in zip(means.cpu().contiguous().numpy(), draws.tolist(), strict=True):
        digest = hashlib.sha256(some.tobytes()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        drawn = torch.from_numpy(generator.integers(0, 2, (1 + (m if m > 1 else 0), rows), dtype=np.int8)) * 2 - 1
        of_images.append(drawn[0])
        of_draws.append(drawn[1:])
    return torch.stack(of_images), torch.cat(of_draws)


def marks_of(scores: Sequence[Tensor], rows: Tensor) -> Tensor:
    """What images are known by: :data:`MARKS` random mixtures of each one's mean score, ``(n, 8)`` float64 on the CPU.

    Args:
        scores: One for each draw, ``(draws, C, D)``, in one or several parts.
        rows: The image of each draw, 0 … n − 1, ``(draws,)``.
    """
    size = scores[0][0].numel()
    mix = torch.randn(size, MARKS, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(scores[0].device)
    return Scores.of(torch.cat([part.flatten(1) @ mix for part in scores]), rows).means.cpu()


def known_again(marks: Tensor, others: Tensor, weights: int) -> int:
    """How many images (or draws) are the same in both: to the last bit, or up to rounding if that is a tenth of the fewer.

    Args:
        marks: ``(n, 8)``.
        others: ``(n', 8)``.
        weights: C·D. Few weights do not tell images from each other up to rounding.
    """
    marks, others = (m[m.norm(dim=1) > 0] for m in (marks, others))
    if not len(marks) or not len(others):
        return 0
    exact = len({tuple(m) for m in marks.tolist()} & {tuple(m) for m in others.tolist()})
    if exact or weights < MARKS:
        return exact
    size = marks.norm(dim=1).median()
    nearest = cKDTree((marks / size).numpy()).query((others / size).numpy())[0]
    close = int((torch.from_numpy(nearest) < ROUNDED * (others / size).norm(dim=1)).sum())
    return close if close > min(len(marks), len(others)) / 10 else 0
