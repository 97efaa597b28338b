"""The responses of one network along one run: measured at the planned calls, interpolated at the others.

Rows of a network call that are branches of one sample (classifier-free guidance) share its tangents, so one evaluation of the
whole batch measures all of them. What is extended outside the measured directions is the response of their *combination* with the
guidance weights w, so that its errors are not multiplied by them:

    J_m δ = J δ + (J_m − J)V c,    J = Σ_m w_m J_m,    c = Vᵀδ

Each branch has its own response within the directions, and the combination's outside.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesdiff.propagation.plan import Plan
from bayesdiff.propagation.response import Directions, Response, smoothed
from bayesdiff.propagation.span import Span


@dataclass(frozen=True)
class Branches:
    """Which rows of a call are branches of which sample.

    Args:
        rows: ``(B, M)``, row numbers.
        weights: w, ``(B, M)`` float64, summing to 1.
        share: Of the whole call in what the scheduler is given, ``(B,)`` float64; other calls may have the rest.
    """

    rows: Tensor
    weights: Tensor
    share: Tensor

    @classmethod
    def alone(cls, number: int) -> Branches:
        """Each row a sample of its own."""
        ones = torch.ones(number, dtype=torch.float64)
        return cls(torch.arange(number)[:, None], ones[:, None], ones)

    def first(self, rows: Tensor) -> Tensor:
        """One row of each sample, ``(B, …)`` of ``(R, …)``."""
        return rows if self.rows.shape[1] == 1 and len(self.rows) == len(rows) else rows[self.rows[:, 0]]

    def combine(self, rows: Tensor) -> Tensor:
        """Σ_m w_m of the rows of each sample, ``(B, …)`` of ``(R, …)``."""
        if self.rows.shape[1] == 1:
            return self.first(rows)
        w = self.weights.to(rows.device, rows.dtype)
        return torch.einsum("bm,bm...->b...", w, rows[self.rows])

    def spread(self, samples: Tensor) -> Tensor:
        """What belongs to each sample to all its rows, ``(R, …)`` of ``(B, …)``."""
        if self.rows.shape[1] == 1 and torch.equal(self.rows[:, 0], torch.arange(len(samples))):
            return samples
        out = samples.new_empty(self.rows.numel(), *samples.shape[1:])
        out[self.rows.flatten()] = samples.repeat_interleave(self.rows.shape[1], dim=0)
        return out


@dataclass
class Measured:
    """One measurement.

    Args:
        chosen: V ``(B, p, P)`` and the length of the deviations.
        images: The combination's JV as a denoiser's, ``(B, p, P)``; None where input and output do not match.
        apart: What the rows' own outputs have beyond it, ``(R, p, Q)``; None where that is nothing.
        strengths: How much of the deviations lies along each direction, along a probe all that the others leave, ``(B, p)``.
        branches: Of the call.
        coefficients: (a, b) of the call.
    """

    chosen: Directions
    images: Tensor | None
    apart: Tensor | None
    strengths: Tensor
    branches: Branches
    coefficients: tuple[float, float]


@dataclass(frozen=True)
class Errors:
    """Relative errors of the responses, by node, ``(B,)`` each.

    Args:
        places: Of the nodes, ascending.
        between: Of a node's response, predicted from the others.
        outside: Of what is extended to outside its directions.
    """

    places: tuple[float, ...]
    between: dict[int, Tensor]
    outside: dict[int, Tensor]

    def __call__(self, n: int, place: float) -> Tensor:
        """At call n: at a node that of the extension, in between more, halfway that of predicting a node."""
        if n in self.outside:
            return self.outside[n]
        nodes = list(self.outside)
        last = min(max(bisect.bisect_right(self.places, place), 1), len(nodes) - 1)
        first = last - 1
        width = self.places[last] - self.places[first]
        share = min(max((place - self.places[first]) / width, 0.0), 1.0) if width else 0.0
        # The other stage of a solver, at a node's place, has a response of its own.
        far = 4 * share * (1 - share) if place not in self.places else 1.0
        at = [(1 - share) * e[nodes[first]] + share * e[nodes[last]] for e in (self.between, self.outside)]
        return (at[0].square() * far**2 + at[1].square()).sqrt()


class Responder:
    """The responses of one module along one run.

    Args:
        plan: Where they are measured.
        dtype: That they are applied in.
        shared: Whether measurements know of each other; not so where calls lie off one smooth trajectory.
        by_sample: Whether to work on each sample by itself, so that its numbers do not depend on the batch to the last bit.
    """

    def __init__(self, plan: Plan, dtype: torch.dtype, shared: bool, by_sample: bool) -> None:
        self.plan, self.dtype, self.shared, self.by_sample = plan, dtype, shared, by_sample
        self.measured: dict[int, Measured] = {}
        self._responses: dict[int, list[Response]] = {}
        self._known: list[Tensor | None] = []
        self._second = False
        self._spans: list[Span] = []
        self._width = 0  # of coordinates

    def groups(self, batch: int) -> list[slice]:
        """The samples that are worked on together: all, or each by itself."""
        return [slice(b, b + 1) for b in range(batch)] if self.by_sample else [slice(0, batch)]

    def choose(self, deltas: Tensor, mixture: Tensor) -> Directions:
        """Directions for δ ``(B, K, P)``, and the weights of the last, ``(K,)``."""
        number = self.plan.num_directions
        parts = [Directions.choose(deltas[g], number, mixture) for g in self.groups(len(deltas))]
        return Directions(
            torch.cat([p.directions for p in parts]), torch.cat([p.length for p in parts]), parts[0].probe
        )

    def add(self, n: int, measured: Measured) -> None:
        """The measurement at call n, in the first pass."""
        self.measured[n] = measured
        self.refit(n)

    def refit(self, n: int) -> None:
        """Fit the response at n, from itself and what came before."""
        measured = self.measured[n]
        if measured.images is None:
            return
        groups = self.groups(len(measured.images))
        known = self._known or [None] * len(groups)
        fitted = [
            Response.fit(_part(measured.chosen, g), measured.images[g].double(), k if self.shared else None)
            for g, k in zip(groups, known, strict=True)
        ]
        self._known = [r.extension for r in fitted]
        self._responses[n] = [r.to(self.dtype) for r in fitted]
        if measured.chosen.probe:  # fitted again when all are known; until then the last two are used
            for older in list(self._responses)[:-2]:
                del self._responses[older]

    def finish(self) -> None:
        """All measurements are made: extend each by what the others know; from now on interpolate."""
        self._second = True
        nodes = [n for n, m in self.measured.items() if m.images is not None]
        if not nodes or not any(self.measured[n].chosen.probe for n in nodes):
            return
        batch, _, size = self.measured[nodes[0]].chosen.directions.shape
        number = sum(self.measured[n].chosen.directions.shape[1] for n in nodes)
        if 2 * number < size:
            self._project(nodes, batch)
        self._responses = {n: [] for n in nodes}
        for group in self.groups(batch):
            pairs = []
            for m in (self.measured[n] for n in nodes):
                assert m.images is not None
                chosen = _part(m.chosen, group)
                pairs.append((replace(chosen, directions=chosen.directions.double()), m.images[group].double()))
            found = smoothed(pairs) if self.shared and len(nodes) > 1 else [Response.fit(*pair) for pair in pairs]
            for n, response in zip(nodes, found, strict=True):
                self._responses[n].append(response.to(self.dtype))

    def _project(self, nodes: list[int], batch: int) -> None:
        """From now on all algebra is done in coordinates of what was measured; the vectors themselves are not kept."""
        slices: dict[int, tuple[slice, slice]] = {}
        parts: list[Tensor] = []
        place = 0
        for n in nodes:
            m = self.measured[n]
            assert m.images is not None
            p = m.images.shape[1]
            slices[n] = slice(place, place + p), slice(place + p, place + 2 * p)
            parts += [m.chosen.directions, m.images]
            place += 2 * p
        self._spans = [Span.of([part[g] for part in parts]) for g in self.groups(batch)]
        self._width = max(s.coordinates.shape[2] for s in self._spans)
        coordinates = torch.cat([_padded(s.coordinates, self._width) for s in self._spans])
        for n, (directions, images) in slices.items():
            m = self.measured[n]
            m.chosen, m.images = replace(m.chosen, directions=coordinates[:, directions]), coordinates[:, images]

    def _into(self, g: int, deltas: Tensor) -> Tensor:
        """Coordinates of δ of one group, ``(B, K, r)``; δ itself where there are none."""
        return _padded(self._spans[g].into(deltas), self._width) if self._spans else deltas

    def errors(self) -> Errors | None:
        """How wrong the responses are for the deviations, as far as measurements can tell; None with fewer than two.

        Each is predicted from the others: along every direction as much as lies there, along the last as much as the others
        leave. Nothing is interpolated beyond the first and last nodes, so with three or more these are not predicted, and have
        their neighbours' errors.
        """
        nodes = sorted(self._responses)
        if len(nodes) < 2:
            return None
        inner = nodes[1:-1] or nodes
        between = {n: self._between(n, [m for m in nodes if m != n]) for n in inner}
        between = {n: between[min(max(n, inner[0]), inner[-1])] for n in nodes}
        return Errors(tuple(self.plan.places[n] for n in nodes), between, {n: self._outside(n) for n in nodes})

    def _between(self, n: int, others: list[int]) -> Tensor:
        """Of what the others predict of the measurement at n, relative, ``(B,)``."""
        m = self.measured[n]
        assert m.images is not None
        strengths = m.strengths.to(m.images.device, self.dtype).unsqueeze(2)
        directions, images = m.chosen.directions.to(self.dtype), m.images.to(self.dtype)
        weighted, wanted = directions * strengths, images / m.chosen.safe.unsqueeze(1).to(images) * strengths
        weights = self.plan.cubic(n, others)
        found = torch.cat([
            Response.weighted([(w, self._responses[o][g]) for o, w in weights.items()], weighted[group])
            for g, group in enumerate(self.groups(len(weighted)))
        ])  # fmt: skip
        return _ratio(found - wanted, wanted)

    def _outside(self, n: int) -> Tensor:
        """Of what the other directions at n predict of the last, in all of the measurement, ``(B,)``."""
        m = self.measured[n]
        assert m.images is not None
        if not m.chosen.probe:
            return torch.zeros(len(m.images), dtype=torch.float64)
        directions, images = m.chosen.directions.double(), m.images.double()
        strengths, unit = m.strengths.to(images).unsqueeze(2), images / m.chosen.safe.unsqueeze(1)
        v, image = directions[:, -1:], unit[:, -1:]
        others = Directions(directions[:, :-1], m.chosen.length, probe=False)
        error = image - (image @ v.mT) @ v
        if others.directions.shape[1]:
            extension = Response.fit(others, images[:, :-1], None).extension
            error = error - (v @ extension.mT) @ extension
        return _ratio(error * strengths[:, -1:], unit * strengths)

    def weights(self, n: int) -> dict[int, float]:
        """Of the measurements, at call n."""
        nodes = sorted(self.measured)
        if not nodes:
            return {}
        return self.plan.cubic(n, nodes) if self._second else self.plan.line(n, nodes)

    def denoised(self, n: int, deltas: Tensor) -> Tensor:
        """Jδ of the combination's denoiser, ``(B, K, P)``; 0 before the first measurement, as at pure noise."""
        if not self._responses:
            return torch.zeros_like(deltas)
        parts = []
        for g, group in enumerate(self.groups(len(deltas))):
            pairs = [(w, self._responses[m][g]) for m, w in self.weights(n).items()]
            if not self._spans:
                parts.append(Response.weighted(pairs, deltas[group]))
                continue
            inside = self._into(g, deltas[group])
            gain = sum(w * r.gain for w, r in pairs)
            response = Response.weighted(pairs, inside) - gain * inside
            span = self._spans[g]
            parts.append(span.out_of(response[..., : span.basis.shape[1]], gain * deltas[group]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def diagonals(self) -> dict[int, Tensor]:
        """The diagonal of the combination's response at each measurement, ``(B, P)``, once all are made."""
        parts = next(iter(self._responses.values()), [])
        spans: Sequence[Span | None] = self._spans or [None] * len(parts)
        return {
            n: torch.cat([r.diagonal(None if s is None else s.basis) for r, s in zip(parts, spans, strict=True)])
            for n, parts in self._responses.items()
        }

    def apart(self, n: int, deltas: Tensor, branches: Branches) -> Tensor | None:
        """What the rows' own outputs have beyond the combination's, ``(R, K, Q)``."""
        found = [(w, self.measured[m].chosen.directions, self.measured[m].apart) for m, w in self.weights(n).items()]
        if all(own is None for _, _, own in found):
            return None
        total: Tensor | None = None
        coordinates = torch.cat([self._into(g, deltas[group]) for g, group in enumerate(self.groups(len(deltas)))])
        for w, directions, own in found:
            if own is not None:
                part = w * (branches.spread(coordinates @ directions.to(deltas).mT) @ own)
                total = part if total is None else total + part
        return total


def _padded(coordinates: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(coordinates, (0, width - coordinates.shape[-1]))


def combine(responders: list[Responder]) -> None:
    """Branches that were called apart: their combination is what is extended, as within one call."""
    if len(responders) < 2 or any(set(r.measured) != set(responders[0].measured) for r in responders):
        return
    for n in responders[0].measured:
        parts = [r.measured[n] for r in responders]
        same = all(
            p.images is not None and torch.equal(p.chosen.directions, parts[0].chosen.directions)
            and p.coefficients == parts[0].coefficients
            and (p.apart is None or p.apart.shape[-1] == p.images.shape[-1]) for p in parts
        )  # fmt: skip
        shares = (
            torch.stack([p.branches.share for p in parts]) if len({len(p.branches.share) for p in parts}) == 1 else None
        )
        total = None if shares is None else shares.sum(0)
        if not same or shares is None or total is None or bool((total.abs() < 1e-3 * shares.abs().amax(0)).any()):
            continue
        images = torch.stack([p.images for p in parts if p.images is not None])
        weights = (shares / total).to(images)[..., None, None]
        common = (weights * images).sum(0)
        (_, b), size = parts[0].coefficients, parts[0].chosen.safe.unsqueeze(1).to(images)
        for r, p, own in zip(responders, parts, images, strict=True):
            difference = (own - common) / (b * size)
            apart = p.branches.spread(difference)
            p.images = common
            p.apart = apart if p.apart is None else p.apart + apart
            r.refit(n)


def _part(chosen: Directions, group: slice) -> Directions:
    return Directions(chosen.directions[group].double(), chosen.length[group], chosen.probe)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    size = below.square().sum((1, 2)).double().cpu()
    return (above.square().sum((1, 2)).double().cpu() / torch.where(size > 0, size, 1.0)).sqrt()
