r"""What the scores of m draws an image say about a training that drew each image M times.

Image i has the mean score :math:`\bar g_i = \frac1{m_i}\sum_j g_{ij}` of its draws (t, ε). With A the covariance of an image's
expected score and B that of a draw around it,

    E ḡ_i ḡ_iᵀ = A + B/m_i,      B̂ = Σ_ij (g_ij − ḡ_i)(g_ij − ḡ_i)ᵀ / Σ_i (m_i − 1)

(the analysis of variance of one-way random effects; Searle, Casella & McCulloch 1992). A network trained on N images with M
draws each summed N·M scores, whose covariance is N M² (A + B/M), and with T = Σ_i (ḡ_i − ḡ)(ḡ_i − ḡ)ᵀ/(n − 1), ḡ their mean,

    A + B/M  ≈  T − (1/m − 1/M) B̂,      Â = T − B̂/m,      1/m the mean of the 1/m_i

without bias. About their mean and not about 0: at the minimum of the loss ḡ vanishes, and what a network that is not quite
there has left to go is the same in every refit (the empirical Fisher is by its definition about 0). For M ≤ m this is a sum of
squares, and for M = m the plain sandwich. For M > m it is Â + B̂/M, and Â, a difference, is indefinite: then it is projected
onto the positive semidefinite matrices, in the span of the scores and in the metric of the features, so that no units matter
(Amemiya 1985); and scaled to the mean predictive variance that it had. What a projection cuts is one side of a noise around 0,
and without the scale every variance is too large: on the shipped model, 400 images, m = 4 and M = 8.5, by 40 %. (To project the
sum and not Â is as good in size and has more noise.) Where that mean is below 0, A is 0.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesdiff.checks import ArgumentError, ProjectionWarning, TrainingDrawsWarning, check_int

#: Draws of each image where M is given and nothing else is said; M, rounded up, if that is less: then nothing is projected.
DRAWS = 10
#: Relative size of what counts as rounding: of a negative eigenvalue, and of a direction that no feature has.
ROUNDING = 1e-10


@dataclass(frozen=True, eq=False)
class Scores:
    r"""The scores of all draws, by image.

    Args:
        means: :math:`\bar g_i`, ``(n, C, D)``.
        deviations: :math:`g_{ij} - \bar g_i` of images with at least two draws, ``(Q, C, D)``.
        counts: :math:`m_i`, ``(n,)`` float64.
        mixed: Where rows are random mixtures of all images (:mod:`bayesdiff.laplace.sketch`), R of them, with the same sums of
            squares on average: what one score that all images share has in each of them, ``(R,)``, and the mean of the images'
            scores, ``(C, D)``.
    """

    means: Tensor
    deviations: Tensor
    counts: Tensor
    mixed: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, scores: Tensor, rows: Tensor) -> Scores:
        """From one score for each draw, ``(draws, C, D)`` or some of its numbers ``(draws, K)``, and its image, 0 … n − 1."""
        counts = rows.bincount().double()
        means = scores.new_zeros(len(counts), *scores.shape[1:]).index_add_(0, rows, scores)
        means /= counts.view(-1, *(1,) * (scores.ndim - 1))
        several = counts[rows] > 1
        return cls(means, scores[several] - means[rows[several]], counts)

    def centred(self) -> Scores:
        """About their mean, times √(n/(n − 1)); those of one image, which tells no spread, stay about 0."""
        n = len(self.counts)
        if n == 1:
            return self
        shared, mean = (self.means.new_ones(n), self.means.mean(0)) if self.mixed is None else self.mixed
        size = math.sqrt(n / (n - 1))
        means = torch.addr(self.means.flatten(1), shared, mean.flatten(), beta=size, alpha=-size).view_as(self.means)
        return replace(self, means=means, mixed=self.mixed and (torch.zeros_like(shared), mean))

    def summed(self) -> Tensor:
        """Σ_j g_ij of each image, ``(n, C, D)``; in mixtures an image counts as one with the mean number of draws."""
        counts = self.counts if self.mixed is None else self.counts.mean()
        return self.means * counts.to(self.means)[..., None, None]

    @property
    def degrees(self) -> float:
        """Σ (m_i − 1), the degrees of freedom of B̂."""
        return float((self.counts - 1).sum())

    @property
    def inverse_draws(self) -> float:
        """1/m, the mean of 1/m_i."""
        return float((1 / self.counts).mean())

    @property
    def total(self) -> Tensor:
        """A factor F, FᵀF = T, ``(n, C, D)``."""
        return self.means / math.sqrt(len(self.counts))

    @property
    def within(self) -> Tensor:
        """A factor F, FᵀF = B̂, ``(Q, C, D)``.

        Raises:
            ArgumentError: No image has two draws.
        """
        check_several(self.degrees)
        return self.deviations / math.sqrt(self.degrees)


def check_several(degrees: float) -> None:
    """Raise :class:`ArgumentError` where no image has two draws."""
    if not degrees:
        raise ArgumentError(
            "expected at least two draws of some images, to tell the variance between images from that between draws, got one "
            "of each: fit with draws_per_image=2 or more"
        )


def score_factor(scores: Scores, training_draws: float, precision: Tensor) -> tuple[Tensor, float]:
    r"""A factor G of the covariance of an image's mean score over M draws: :math:`G^\top G = A + B/M`.

    Args:
        scores: Of m draws.
        training_draws: M.
        precision: The metric of the features, ``(D, D)``, positive semidefinite.

    Returns:
        G ``(R, C, D)``, and the share that was cut: the sum of the negative eigenvalues, over that of the positive ones.

    Raises:
        ArgumentError: No image has two draws, and M is not 1.
    """
    lack = scores.inverse_draws - 1 / training_draws
    if abs(lack) <= ROUNDING:
        return scores.total, 0.0
    join = torch.cat if scores.mixed is None else _joined
    if lack < 0:
        return join([scores.total, math.sqrt(-lack) * scores.within]), 0.0
    between, share = between_factor(scores, precision)
    return join([between, scores.within / math.sqrt(training_draws)]), share


def _joined(factors: list[Tensor]) -> Tensor:
    """A factor of the sum of two squares in as many rows as one has, on average over a random rotation of the first.

    Rows of a sketch are draws, and the sum of two independent draws has the sum of their covariances.
    """
    first, second = factors
    rows = max(len(first), len(second))
    if not len(first):
        return second
    generator = torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(rows, len(first), generator=generator, dtype=torch.float64)).Q.to(first)
    out = (turned @ first.flatten(1)).unflatten(1, first.shape[1:])
    out[: len(second)] += second
    return out


def between_factor(scores: Scores, precision: Tensor) -> tuple[Tensor, float]:
    r"""A factor of A, projected and scaled as above.

    Args:
        scores: Of m draws.
        precision: The metric of the features, ``(D, D)``, positive semidefinite.

    Returns:
        G ``(R, C, D)`` with :math:`G^\top G = A`, and the share that was cut.

    Raises:
        ArgumentError: No image has two draws.
    """
    root, inverse = _roots(precision)
    check_several(scores.degrees)
    total, within = 1 / len(scores.counts), scores.inverse_draws / scores.degrees
    # Scaled in the small matrix: scores of a large head are not copied more than is needed.
    rows = torch.cat([scores.means @ (math.sqrt(total) * inverse), scores.deviations @ (math.sqrt(within) * inverse)])
    signs = torch.cat([rows.new_ones(len(scores.means)), -rows.new_ones(len(scores.deviations))])
    factor, positive, negative = positive_part(rows.flatten(1), signs)
    mean = positive - negative  # the trace
    share = negative / positive if positive else 1.0
    if mean <= 0:
        warnings.warn(
            "the scores differ no more between images than by the noise of their draws: A is taken for 0; more images, or "
            "more draws_per_image, would tell",
            ProjectionWarning,
            stacklevel=2,
        )
        return rows[:0].clone(), share
    if share > ROUNDING:
        warnings.warn(
            "A, the covariance of the scores between images, is indefinite as estimated from "
            f"{1 / scores.inverse_draws:.3g} draws of each: negative eigenvalues with {100 * share:.2g} % of the sum of the "
            "positive ones were cut, and the rest was scaled to keep the mean predictive variance; more images, or as many "
            "draws_per_image as training_draws, make this less",
            ProjectionWarning,
            stacklevel=2,
        )
    return (factor * math.sqrt(mean / positive)).unflatten(1, rows.shape[1:]) @ root, share


def positive_part(rows: Tensor, signs: Tensor) -> tuple[Tensor, float, float]:
    r"""The positive part of :math:`X^\top\mathrm{diag}(s)X`, in the span of X's rows or of its columns, whichever are fewer.

    Args:
        rows: X, ``(R, K)`` float64.
        signs: s, ``(R,)``.

    Returns:
        A factor F ``(R', K)`` with FᵀF the projection; the sum of the positive eigenvalues; minus the sum of the negative ones.
    """
    if len(rows) >= rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows.T @ (signs[:, None] * rows))
        above = values > 0
        factor = values[above].sqrt()[:, None] * vectors.T[above]
    else:  # X = U Λ^½ Q, Q with orthonormal rows: the matrix is Qᵀ (Λ^½ Uᵀ diag(s) U Λ^½) Q
        size, u = torch.linalg.eigh(rows @ rows.T)
        kept = size > ROUNDING**1.5 * size[-1]
        size, u = size[kept].sqrt(), u[:, kept]
        values, vectors = torch.linalg.eigh(size[:, None] * (u.T @ (signs[:, None] * u)) * size)
        above = values > 0
        factor = values[above].sqrt()[:, None] * (vectors.T[above] / size) @ u.T @ rows
    return factor, float(values[above].sum()), -float(values[~above].sum())


def _roots(precision: Tensor) -> tuple[Tensor, Tensor]:
    """P^½ and P^−½, symmetric; directions that no feature has are left out of both, as they are of the scores."""
    values, vectors = torch.linalg.eigh(precision)
    kept = values > ROUNDING**1.5 * values[-1]
    values, vectors = values[kept].sqrt(), vectors[:, kept]
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def shares_by_bin(origins: Tensor, num_timesteps: int) -> list[dict[str, float]]:
    """The rows of :meth:`bayesdiff.LaplacePosterior.shares`.

    Args:
        origins: What A and B/M contribute to each bin, ``(T, 2)``.
        num_timesteps: That the bins divide.
    """
    width = num_timesteps / len(origins)
    rows = []
    for b, (between, within) in enumerate(origins.tolist()):
        total = between + within
        if total == 0:  # no draws
            continue
        rows.append({
            "t_low": b * width, "t_high": (b + 1) * width, "between": between, "within": within,
            "share_between": between / total, "share_within": within / total,
        })  # fmt: skip
    return rows


def choose_draws(draws_per_image: int | None, training_draws: float | None) -> int:
    """m: as given; else ten, or M rounded up if that is less, at least two; one where M is not given, or one.

    Raises:
        ArgumentError: m or M is out of range, or m is too few to tell A and B apart.
    """
    if training_draws is not None:
        training_draws = check_training_draws(training_draws)
    if draws_per_image is None:
        m = 1 if training_draws in (None, 1) else max(2, min(DRAWS, math.ceil(training_draws)))
    else:
        m = check_int("draws_per_image", draws_per_image, least=1)
    if training_draws is None:
        warnings.warn(
            f"how many draws (t, ε) each image had in the network's training is not given: it is taken to be {m}, "
            "as many as here. Uncertainty falls with them; training_draws = steps · batch size / number of images",
            TrainingDrawsWarning,
            stacklevel=3,
        )
    elif m == 1 and training_draws != 1:
        raise ArgumentError(
            f"expected draws_per_image >= 2 where training_draws is {training_draws}: one draw of an image does "
            "not tell the variance between images from that between draws"
        )
    return m


def check_training_draws(value: object) -> float:
    """M as a float of at least 1.

    Raises:
        ArgumentError: It is something else.
    """
    try:
        number = math.nan if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not 1 <= number < math.inf or isinstance(value, bool):
        raise ArgumentError(
            f"expected training_draws >= 1, steps · batch size / number of images, got {value!r}; where the "
            "training ended before every "
            "image was seen, dataset_size is the number of images seen, and training_draws 1"
        )
    return number
