"""How well variances agree with those over retrained networks, with error bars, beside what retraining itself can show."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from experiments.common import agreement

SPLITS = 40

#: In the order in which they are shown.
METHODS = (
    "other networks, same data",
    "sandwich", "sandwich, as shipped", "sandwich × loss gap", "sandwich, held-out images", "GGN", "diagonal EF", "random subset",
    "bootstrap refits of the head", "head refitted on the others' data", "all weights, GGN",
)  # fmt: skip


def jackknife(networks: Tensor, statistic: Callable[[Tensor], dict[str, float]]) -> dict[str, float]:
    """Standard errors of a statistic of some networks, each left out in turn: √((n − 1)/n Σ(θ_i − θ̄)²)."""
    n = len(networks)
    rows = [statistic(torch.cat([networks[:i], networks[i + 1 :]])) for i in range(n)]
    out = {}
    for key in rows[0]:
        values = torch.tensor([r[key] for r in rows], dtype=torch.float64)
        out[key] = float(((n - 1) / n * (values - values.mean()).square().sum()).sqrt())
    return out


def ceiling(networks: Tensor, generator: Generator) -> dict[str, float]:
    """Half of the networks against the others: mean and standard deviation over random halves; and what a perfect map would have.

    If two halves agree to r, all of them agree with the truth to √(2r/(1 + r)) (Spearman and Brown).
    """
    found = []
    for _ in range(SPLITS):
        order = torch.randperm(len(networks), generator=generator)
        a, b = order.chunk(2)
        found.append(agreement(networks[a].var(0), networks[b].var(0)))
    r = torch.tensor([f["log_correlation"] for f in found], dtype=torch.float64)
    c = torch.tensor([f["correlation"] for f in found], dtype=torch.float64)
    mean, plain = float(r.mean()), float(c.mean())
    return {
        "log_correlation": mean, "log_correlation_sd": float(r.std()), "correlation": plain, "correlation_sd": float(c.std()),
        "perfect_log_correlation": (2 * max(mean, 0) / (1 + max(mean, 0))) ** 0.5,
        "perfect_correlation": (2 * max(plain, 0) / (1 + max(plain, 0))) ** 0.5,
    }  # fmt: skip


def rows_of(networks: dict[str, Tensor], maps: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """One row for each place and method.

    Standard errors are over networks (jackknife) and over the networks whose posterior it is, added in squares.

    Args:
        networks: Outputs and samples of the networks by place.
        maps: Of each base network, variances by ``method|place``.
    """
    rows = []
    for place, values in networks.items():
        halves = ceiling(values, torch.Generator().manual_seed(0))
        rows.append({"place": place, "method": "half of the networks against the others", **halves})
        for method in METHODS:
            predicted = [m[f"{method}|{place}"] for m in maps if f"{method}|{place}" in m]
            if not predicted:
                continue

            def statistic(some: Tensor, predicted: list[Tensor] = predicted) -> dict[str, float]:
                reference = some.var(0)
                found = [judged(p, reference) for p in predicted]
                return {k: sum(f[k] for f in found) / len(found) for k in found[0]}

            whole, errors = statistic(values), jackknife(values, statistic)
            each = [judged(p, values.var(0)) for p in predicted]
            row: dict[str, Any] = {"place": place, "method": method}
            for key, value in whole.items():
                over = torch.tensor([e[key] for e in each], dtype=torch.float64)
                between = float(over.std() / len(over) ** 0.5) if len(over) > 1 else 0.0
                error = (errors[key] ** 2 + between**2) ** 0.5
                if math.isfinite(value) and math.isfinite(error):  # a map that is 0 somewhere has no logarithm
                    row |= {key: value, f"{key}_se": error}
            rows.append(row)
    return rows


def judged(predicted: Tensor, reference: Tensor) -> dict[str, float]:
    """Ratio of mean variances, correlations, and the rank correlation of a sample's sum."""
    found = agreement(predicted, reference)
    sums = torch.stack([x.double().flatten(1).sum(1) for x in (predicted, reference)])
    ranks = sums.argsort(1).argsort(1).double()
    keep = {k: found[k] for k in ("ratio", "correlation")}
    keep["log_correlation"] = found.get("log_correlation", float("nan"))
    return {**keep, "rank_of_sums": float(torch.corrcoef(ranks)[0, 1])}
