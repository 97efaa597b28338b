"""What is known of one module's responses in one run: coordinates, measurements, and what their errors make of the map."""

from __future__ import annotations

import bisect

import torch
from torch import Tensor

from bayesdiff.checks import UnsupportedPipelineError
from bayesdiff.propagation.coordinates import Coordinates
from bayesdiff.propagation.entered import Entered, Match
from bayesdiff.propagation.measured import Branches
from bayesdiff.propagation.responder import Responder

#: What errors make of the map is followed along no more draws than these.
FOLLOWED = 32
#: No size that is divided by is less.
TINY = 1e-30


def confirmed(known: Branches | None, rows: Tensor) -> Branches:
    """Which rows of a call are branches of one sample: those that are known, if their tangents are really the same.

    Rows whose tangents are the same as those of a sample belong to it, too, with the weight 0; where nothing is known, with
    equal weights. So a run has the same samples in all its calls, guided or not.
    """
    members: list[list[int]] = [] if known is None else known.rows.tolist()
    if any(not torch.equal(rows[first], rows[m]) for first, *others in members for m in others):
        return Branches.alone(len(rows))
    given = {m for some in members for m in some}
    for r in (r for r in range(len(rows)) if r not in given):
        found = next((some for some in members if _same(rows, some[0], r)), None)
        if found is None:
            members.append([r])
        else:
            found.append(r)
    if len({len(some) for some in members}) != 1 or (known is not None and len(members) != len(known.rows)):
        return Branches.alone(len(rows))
    if known is not None and known.rows.shape[1] == len(members[0]):
        return known
    weights = torch.full((len(members), len(members[0])), 1.0 / len(members[0]), dtype=torch.float64)
    if known is not None:
        weights = torch.nn.functional.pad(known.weights, (0, len(members[0]) - known.weights.shape[1]))
    share = torch.ones(len(members), dtype=torch.float64) if known is None else known.share
    return Branches(torch.tensor(members), weights, share)


def _same(rows: Tensor, one: int, other: int) -> bool:
    """Whether two rows have the same tangents, and some; the first draw's are looked at first."""
    return torch.equal(rows[one, 0], rows[other, 0]) and torch.equal(rows[one], rows[other]) and bool(rows[one].any())


class Module:
    """What is known of one module's responses."""

    def __init__(self, coordinates: Coordinates, responder: Responder) -> None:
        self.coordinates, self.responder = coordinates, responder
        self.match: tuple[Match | None] | None = None  # once it was looked for
        self.sample: tuple[int, ...] | None = None  # its shape, where that is all that is moved
        self.shape: tuple[int, int] | None = None
        self.sizes: dict[int, Tensor] = {}  # in the second pass, of Jδx as part of δf
        self._reach: dict[int, Tensor] = {}  # what an error of size 1 in δf makes of the next δx, relative
        self._last: tuple[int, Tensor, Tensor] | None = None  # δx and δf of the last call

    def same_shape(self, name: str, samples: Tensor) -> None:
        """Refuse calls whose samples are not those of the others: their responses have nothing in common."""
        shape = (len(samples), samples.shape[2])
        self.shape = self.shape or shape
        if self.shape != shape:
            raise UnsupportedPipelineError(
                f"expected {name} to be given the same samples in all its calls, got {self.shape[0]} of {self.shape[1]} numbers "
                f'and {shape[0]} of {shape[1]}; use propagation="ensemble"'
            )

    def note(self, n: int, denoised: Tensor, b: float) -> None:
        """In the second pass: the size of Jδx as part of δf, given what it makes of the denoiser's response."""
        self.sizes[n] = _norm(denoised[:, :FOLLOWED]) / abs(b)

    def due(self, n: int) -> bool:
        """Whether to measure at call n."""
        return n in self.responder.plan.nodes

    def follow(self, n: int, entered: Entered, known: Branches | None, total: list[Tensor]) -> None:
        """In the second pass: how much of δf_n the next δx is made of, δx' ≈ c δx + d δf by least squares."""
        match = self.match[0] if self.match else None
        if match is None:
            return
        rows = match.taken(entered.rows)
        branches = confirmed(known, rows)
        x = branches.first(rows)[:, :FOLLOWED]
        f = branches.combine(match.read(entered.returned.pack([t[:FOLLOWED] for t in total], lead=1)))
        if self._last is not None and self._last[1].shape == x.shape:
            before, *old = self._last
            gram = torch.stack([torch.stack([_inner(u, v) for v in old], 1) for u in old], 1)
            right = torch.stack([_inner(u, x) for u in old], 1).unsqueeze(2)
            self._reach[before] = torch.linalg.lstsq(gram, right).solution[:, 1, 0].abs() / _norm(x).clamp(min=TINY)
        self._last = (n, x.clone(), f)

    def residual(self) -> Tensor | None:
        """The relative error of the map, as if what an error makes of δx were carried on as δx is, ``(B,)``.

        Between two nodes errors add up, those of different gaps are independent.
        """
        errors = self.responder.errors()
        if errors is None or self._last is None:
            return None
        last, x, f = self._last
        a, b = self.coordinates.interpolated(last)
        self._reach[last] = abs(b) / _norm(a * x + b * f).clamp(min=TINY)
        places, nodes = self.responder.plan.places, sorted(errors.outside)
        gaps: dict[int, Tensor] = {}
        for n, size in self.sizes.items():
            if n in self._reach and self._reach[n].shape == size.shape:
                gap = bisect.bisect_right(nodes, n)
                gaps[gap] = gaps.get(gap, torch.zeros_like(size)) + errors(n, places[n]) * size * self._reach[n]
        return torch.stack(list(gaps.values())).square().sum(0).sqrt() if gaps else None


def _inner(u: Tensor, v: Tensor) -> Tensor:
    """Of each sample, ``(B,)`` float64."""
    return torch.einsum("bkp,bkp->bk", u, v).double().sum(1).cpu()


def _norm(u: Tensor) -> Tensor:
    """Of each sample, root mean square over draws, ``(B,)`` float64."""
    return (_inner(u, u) / u.shape[1]).sqrt()
