r"""Is the error where the uncertainty is? Scores that ask for the order of an uncertainty only, not for its size.

With errors :math:`e_{(1)}, …, e_{(n)}` in the order of rising uncertainty, the *risk* at coverage k/n is the error of the k most
certain, :math:`r_k = \frac1k\sum_{i\le k} e_{(i)}`. The *oracle* has them in the order of the errors themselves, chance has
:math:`r_n` throughout.

    AURC   mean of r_k over k, in units of the error                           (Geifman & El-Yaniv 2017)
    AUSE   mean over k of (r_k − oracle's) / r_n: 0 is the best order          (Ilg et al. 2018)
    AURG   mean over k of (r_n − r_k) / r_n: 0 is chance, negative is worse    (Poggi et al. 2020)

Equal uncertainties have no order: the expectation over all orders of them is taken, so a constant uncertainty is chance, exactly.
Orders need all numbers: the states are lists, 16 bytes a pair. ``torchmetrics`` has the AUROC and more of the kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import pearson_corrcoef
from torchmetrics.utilities import dim_zero_cat

from bayesdiff.checks import ArgumentError, EmptyDataError, ShapeError, check_choice, check_finite


class _Ranked(Metric):
    """A metric of pairs."""

    full_state_update = False
    is_differentiable = False
    uncertainty: list[Tensor]
    error: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("uncertainty", [], dist_reduce_fx="cat")
        self.add_state("error", [], dist_reduce_fx="cat")

    def _add(self, uncertainty: Tensor, error: Tensor) -> None:
        for name, value in (("uncertainty", uncertainty), ("error", error)):
            if not isinstance(value, Tensor):
                raise ArgumentError(f"expected the {name} as a tensor, got {type(value).__name__}")
            check_finite(name, value)
        if uncertainty.shape != error.shape:
            raise ShapeError(
                f"expected an uncertainty for each error, got {tuple(uncertainty.shape)} and {tuple(error.shape)}"
            )
        self.uncertainty.append(uncertainty.detach().double().flatten())
        self.error.append(error.detach().double().flatten())

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """All of them.

        Raises:
            EmptyDataError: None.
        """
        if len(self.uncertainty) == 0:  # a list, or one tensor once processes were synchronised
            raise EmptyDataError(f"expected pairs before {type(self).__name__} is computed, got none; update it first")
        return dim_zero_cat(self.uncertainty), dim_zero_cat(self.error)


def risk(order: Tensor, error: Tensor) -> Tensor:
    r"""Mean error of the k that come first, for k = 1 … n; of equals in order, the expectation over all orders of them.

    Args:
        order: ``(n,)``, small first.
        error: ``(n,)``.

    Returns:
        r, ``(n,)``.
    """
    _, group, counts = torch.unique(order, return_inverse=True, return_counts=True)
    mean = torch.zeros(len(counts), dtype=error.dtype, device=error.device).index_add_(0, group, error) / counts
    total = mean.repeat_interleave(counts).cumsum(0)
    return total / torch.arange(1, len(total) + 1, dtype=error.dtype, device=error.device)


class RiskCoverage(_Ranked):
    """AURC, the area under the risk–coverage curve; least if uncertainty has the errors' own order.

    ``update(uncertainty, error)`` takes two tensors of one shape. ``compute`` returns ``aurc``, ``oracle`` (the least that these
    errors allow) and ``chance`` (their mean), in units of the error, float64.
    """

    higher_is_better = False

    def update(self, uncertainty: Tensor, error: Tensor) -> None:
        """Add uncertainties and errors, of one shape."""
        self._add(uncertainty, error)

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        uncertainty, error = self._pairs()
        return {
            "aurc": risk(uncertainty, error).mean(), "oracle": risk(error, error).mean(), "chance": error.mean(),
        }  # fmt: skip

    def curve(self) -> tuple[Tensor, Tensor]:
        """Coverage k/n and risk r_k, ``(n,)`` each."""
        values = risk(*self._pairs())
        return torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device) / len(values), values


class Sparsification(_Ranked):
    """AUSE and AURG: what is left of the error while the least certain are taken away, beside the oracle and chance.

    ``update(uncertainty, error)`` takes two tensors of one shape, errors ≥ 0. ``compute`` returns ``ause`` and ``aurg``, in
    parts of the mean error, float64.

    Args:
        error: ``"mae"`` for the mean of what remains, ``"rmse"`` for the root of its mean square.
        kwargs: Of ``torchmetrics.Metric``.
    """

    def __init__(self, error: str = "mae", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind = check_choice("error", error, ("mae", "rmse"))

    def update(self, uncertainty: Tensor, error: Tensor) -> None:
        """Add uncertainties and errors ≥ 0, of one shape.

        Raises:
            ArgumentError: An error is negative.
        """
        if isinstance(error, Tensor) and bool((error < 0).any()):
            raise ArgumentError(f"expected errors >= 0, got {float(error.min()):.3g}; take absolute values")
        self._add(uncertainty, error)

    def compute(self) -> dict[str, Tensor]:
        """See the class.

        Raises:
            ArgumentError: All errors are 0.
        """
        curve, oracle = self.curves()
        return {"ause": (curve - oracle).mean(), "aurg": (1 - curve).mean()}

    def curves(self) -> tuple[Tensor, Tensor]:
        """r_k / r_n and the oracle's, ``(n,)`` each: k = n is the whole."""
        uncertainty, error = self._pairs()
        if not bool(error.sum() > 0):
            raise ArgumentError("expected some error > 0, got none")
        error = error.square() if self.kind == "rmse" else error
        found = [risk(order, error) for order in (uncertainty, error)]
        if self.kind == "rmse":
            found = [f.sqrt() for f in found]
        return found[0] / found[0][-1], found[1] / found[1][-1]


class Spearman(_Ranked):
    """Spearman's rank correlation of uncertainty and error: ``torchmetrics``' Pearson correlation of average ranks.

    Its own ``SpearmanCorrCoef`` sums the ranks of equals in 32 bits, which overflows from 46,341 equals on: maps have them.
    """

    higher_is_better = True

    def update(self, uncertainty: Tensor, error: Tensor) -> None:
        """Add uncertainties and errors, of one shape."""
        self._add(uncertainty, error)

    def compute(self) -> Tensor:
        """The correlation; NaN if either is constant."""
        return pearson_corrcoef(*(_ranks(v) for v in self._pairs()))


def _ranks(values: Tensor) -> Tensor:
    """Average ranks about their mean, float64."""
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[group] - (len(values) + 1) / 2
