r"""Sums of squares of many large gradients, in a fixed memory: random signs.

The sandwich needs :math:`\sum_i \bar g_i\bar g_i^\top` over images, and one gradient is C·D numbers (197,000 for Flux). With
signs :math:`\xi_{ir} = \pm 1`, each with probability ½ and independent,

    S_r = Σ_i ξ_ir ḡ_i,   r = 1 … R,        E S_r S_rᵀ = Σ_i ḡ_i ḡ_iᵀ

so a variance :math:`a^\top(\frac1R\sum_r S_rS_r^\top)a` is unbiased, with a relative error of at most √(2/R)
(Achlioptas 2003; the variance of a product of signs is below that of a Gaussian's). R·C·D numbers are kept however many images
there are, sketches of parts of the data add up, and each row is a draw of the score. The deviations of the draws of one image
around their mean are sketched beside them, with signs of their own.

Signs come from the gradients themselves, a hash of some of their numbers: so they do not depend on batches or processes, and two
processes never share signs for different images.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from bayesdiff.laplace.training import Scores

#: R, unless another is asked for: a standard deviation is then within 4 %.
ROWS = 256
#: Numbers of a gradient that its signs are made of.
HASHED = 64


class Sketch:
    """Means of images, and deviations of their draws.

    Args:
        means: S, ``(R, C, D)`` float64.
        deviations: The same of the deviations.
        counts: m_i, the draws of each image, ``(n,)`` float64 on the CPU.
    """

    def __init__(self, means: Tensor, deviations: Tensor, counts: Tensor) -> None:
        self.means, self.deviations, self.counts = means, deviations, counts

    @classmethod
    def empty(cls, rows: int, like: Tensor) -> Sketch:
        """Of no images; ``like`` is (…, C, D)."""
        zeros = like.new_zeros(rows, *like.shape[-2:])
        return cls(zeros, zeros.clone(), torch.zeros(0, dtype=torch.float64))

    @property
    def rows(self) -> int:
        """R."""
        return len(self.means)

    def add(self, scores: Tensor, images: Tensor) -> None:
        """Add all draws of some images.

        Args:
            scores: One for each draw, ``(draws, C, D)``.
            images: The number of the image of each, ``(draws,)``.
        """
        _, rows = images.unique(return_inverse=True)
        exact = Scores.of(scores, rows)
        several = exact.counts[rows] > 1
        of_image = rows[several].tolist()
        signs, others = [], [scores.new_zeros(0, self.rows)] * len(exact.means)
        numbers = np.bincount(of_image, minlength=len(exact.means))
        for i, mean in enumerate(exact.means):
            generator = _generator(mean)
            drawn = generator.integers(0, 2, (1 + int(numbers[i]), self.rows), dtype=np.int8)
            both = torch.from_numpy(drawn).to(scores) * 2 - 1
            signs.append(both[0])
            others[i] = both[1:]
        self.means = self.means + _mixed(torch.stack(signs), exact.means)
        if len(exact.deviations):
            place = [iter(o) for o in others]
            self.deviations = self.deviations + _mixed(
                torch.stack([next(place[i]) for i in of_image]), exact.deviations
            )
        self.counts = torch.cat([self.counts, exact.counts.cpu()])

    def merge(self, other: Sketch) -> None:
        """Add that of other images; R must be the same."""
        self.means = self.means + other.means.to(self.means)
        self.deviations = self.deviations + other.deviations.to(self.deviations)
        self.counts = torch.cat([self.counts, other.counts])

    def scores(self, weight: float) -> Scores:
        """As if they were the scores, each times a weight."""
        scale = weight / self.rows**0.5
        return Scores(scale * self.means, scale * self.deviations, self.counts, sketched=True)


def _mixed(signs: Tensor, values: Tensor) -> Tensor:
    return (signs.T @ values.flatten(1)).unflatten(1, values.shape[1:])


def _generator(score: Tensor) -> np.random.Generator:
    flat = score.flatten()
    some = flat[torch.linspace(0, len(flat) - 1, min(HASHED, len(flat)), dtype=torch.float64).round().long()]
    digest = hashlib.sha256(some.cpu().contiguous().numpy().tobytes()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
