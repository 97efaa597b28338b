"""The closed-form variance of every step: what the scheduler is given, under the posterior of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.propagation.measured import Branches
from bayesdiff.tracing.boxes import Box
from bayesdiff.tracing.network import Session
from bayesdiff.tracing.record import Call
from bayesdiff.tracing.rerun import tensors
from bayesdiff.tracing.step import Step, call_step

#: A sum of weights that is less than this share of the largest is taken for 0.
LEAST = 1e-3
#: Direct terms are added to others so many bytes of a sample at a time.
TOGETHER = 2**23


class Direct:
    """The direct term of a network call: δWφ at its output tensors.

    Args:
        session: The recorded run.
        geometry: Of the head.
        deviations: δW, ``(K, C, D)``.
        by_sample: Whether to work on each row by itself.
        working: The dtype to work in, for features of some dtype.
    """

    def __init__(
        self, session: Session, geometry: HeadGeometry, deviations: Tensor, *, by_sample: bool = False,
        working: Callable[[torch.dtype], torch.dtype] = lambda dtype: torch.promote_types(dtype, torch.float32),
    ) -> None:  # fmt: skip
        self.session, self.geometry, self.deviations, self.by_sample = session, geometry, deviations, by_sample
        self.working = working
        self._placed: Tensor | None = None

    def __call__(self, n: int, draws: slice = slice(None)) -> list[Tensor | None]:
        """Of call n: ``(K, …)`` for every output tensor, None where the head has no part in it; of some of the draws."""
        call = self.session.network.calls[n]
        assert call.tail is not None
        x = call.features
        kept = torch.promote_types(x.dtype, torch.float32)
        x = x.to(self.working(x.dtype))
        if self._placed is None or self._placed.dtype != x.dtype or self._placed.device != x.device:
            self._placed = self.deviations.to(x)
        rows = [
            self.geometry.apply(row, self._placed[draws]).to(kept) for row in (x.split(1) if self.by_sample else [x])
        ]
        return call.tail(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))

    def onto(self, n: int, total: list[Tensor], draws: slice) -> None:
        """Add it to ``(K, …)`` for every output tensor of floating point, in place, some draws at a time."""
        floating = [f.is_floating_point() for f in tensors(self.session.network.calls[n].output)]
        some = max(1, TOGETHER // (4 * sum(t[0, :1].numel() for t in total)))  # the same in any batch
        start = draws.start or 0
        for first in range(0, len(total[0]), some):
            last = min(first + some, len(total[0]))
            found = [d for d, f in zip(self(n, slice(start + first, start + last)), floating, strict=True) if f]
            for t, part in zip(total, found, strict=True):
                if part is not None:
                    t[first:last].add_(part)


def step_variance(
    step: Step, calls: list[Call], posterior: LaplacePosterior, *, by_sample: bool = False
) -> Tensor | None:
    r"""Var[g] = ψᵀΣψ of the guided features ψ = Σ_m w_m φ_m, shaped as g; None where g is no weighted sum of rows.

    The bias is a weight of the feature 1, which is Σw in ψ: so ψ is taken relative to Σw, and Σw must not be 0.
    """
    if not step.exact:
        return None
    features, maps, totals = [], [], []
    for sources in step.sources:
        psi, where = None, None
        total = sum(s.weight for s in sources)
        if abs(total) < LEAST * max(abs(s.weight) for s in sources):
            return None
        for s in sources:
            found = row_features(calls[s.call], s.row)
            if found is None:
                return None
            phi, index, scale = found
            # Branches of the same place only: ψ is one vector for each number of g.
            if where is not None and not (torch.equal(where[0], index) and torch.equal(where[1], scale)):
                return None
            where = (index, scale)
            part = s.weight / total * phi.to(torch.promote_types(phi.dtype, torch.float32))
            psi = part if psi is None else psi + part
        assert psi is not None
        assert where is not None
        features.append(psi)
        maps.append(where)
        totals.append(total)
    if by_sample:
        variances = [posterior.variance(f) for f in features]
    else:
        variances = list(posterior.variance(torch.cat(features)).split([len(f) for f in features]))
    out = []
    for variance, (index, scale), total in zip(variances, maps, totals, strict=True):
        row = variance.flatten()[index] * (total * scale.to(variance)).square()
        out.append(row if step.places is None else row[step.places])
    return torch.stack(out).view(step.output.shape)


def row_features(call: Call, row: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """What of a call's features belongs to one row of its output: φ, and for each number of the row its place in h and its scale.

    None where the head's rows are not those of the output, or multiples of them.
    """
    assert call.tail is not None
    part = call.tail.parts[call.tail.main()]
    assert part is not None
    listed = len(call.tail.parts) > 1
    if listed:
        part = call.tail.parts[row]
        if part is None:
            return None
    rows = len(call.tail.parts) if listed else part.shape[0]
    features = call.features
    if len(features) % rows:
        return None
    block = len(features) // rows
    phi = features[row * block : (row + 1) * block]
    size = part.head_size // rows
    if part.index is None:
        return phi, torch.arange(size, device=phi.device), part.scale
    index = part.index if listed else part.index.view(rows, -1)[row]
    scale = part.scale if part.scale.numel() == 1 or listed else part.scale.view(rows, -1)[row]
    index = index - row * size
    return (phi, index, scale) if bool(((index >= 0) & (index < size)).all()) else None


def branches(steps: list[Step]) -> dict[int, Branches]:
    """By network call, which of its rows are branches of which sample, with which weights."""
    found: dict[int, Branches] = {}
    for step in steps:
        for n in step.calls if step.exact else ():
            mine = [[s for s in sources if s.call == n] for sources in step.sources]
            if len({len(m) for m in mine}) != 1 or not mine[0]:
                continue
            rows = torch.tensor([[s.row for s in m] for m in mine])
            weights = torch.tensor([[s.weight for s in m] for m in mine], dtype=torch.float64)
            total = weights.sum(1, keepdim=True)
            if len(rows.unique()) == rows.numel() and bool(
                (total.abs() > LEAST * weights.abs().amax(1, keepdim=True)).all()
            ):
                found[n] = Branches(rows, weights / total, total[:, 0])
    return found


class DrawnVariance:
    """Var[g] of every step from the K draws of the weights, where there is no closed form: a run on the record.

    Args:
        session: The recorded run.
        direct: From the number of a network call to δWφ at its output tensors, ``(K, …)`` each.
    """

    def __init__(self, session: Session, direct: Callable[[int], list[Tensor | None]]) -> None:
        self.session, self.direct = session, direct
        #: By step, shaped as g.
        self.variances: list[Tensor] = []

    def on_network(self, box: Box, n: int, args: Any, kwargs: Any, output: Any) -> None:
        """Give the output its direct term."""
        for f, t in zip(tensors(output), self.direct(n), strict=True):
            if t is not None and f.is_floating_point():
                self.session.trace.attach(f, t)

    def on_step(self, original: Callable[..., Any], given: dict[str, Any]) -> Any:
        """Take the mean square, then the step, untraced."""
        with self.session.trace.paused():
            output = given["model_output"]
            found = self.session.trace.tangents(output)
            self.variances.append(torch.zeros_like(output) if found is None else found.square().mean(0))
            return call_step(original, given)
