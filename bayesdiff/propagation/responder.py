"""The responses of one network along one run: measured at the planned calls, interpolated at the others.

Rows of a network call that are branches of one sample (classifier-free guidance) share its tangents, so one evaluation of the
whole batch measures all of them. What is extended outside the measured directions is the response of their *combination* with the
guidance weights w, so that its errors are not multiplied by them:

    J_m δ = J δ + (J_m − J)V c,    J = Σ_m w_m J_m,    c = Vᵀδ

Each branch has its own response within the directions, and the combination's outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bayesdiff.propagation.errors import Errors, missed, outside, relative
from bayesdiff.propagation.measured import Branches, Measured
from bayesdiff.propagation.plan import Plan
from bayesdiff.propagation.response import Directions, Response, smoothed
from bayesdiff.propagation.span import Span

#: Measurements do not know of each other where this makes the squared error of predicting one from the others so much smaller.
CLEARLY = 0.5
#: Vectors whose numbers are fewer than so many times the vectors are worked on as they are.
SHORTER = 4


#: By node, of each group of samples.
Responses = dict[int, list[Response]]


class Responder:
    """The responses of one module along one run.

    Args:
        plan: Where they are measured.
        dtype: That they are applied in.
        shared: Whether measurements may know of each other; not so where calls lie off one smooth trajectory.
        by_sample: Whether to work on each sample by itself, so that its numbers do not depend on the batch to the last bit.
    """

    def __init__(self, plan: Plan, dtype: torch.dtype, shared: bool, by_sample: bool) -> None:
        self.plan, self.dtype, self.shared, self.by_sample = plan, dtype, shared, by_sample
        self.measured: dict[int, Measured] = {}
        self._responses: Responses = {}
        self._last: list[Response] = []  # fitted
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
        before = [r.extension for r in self._last] if self.shared else []
        if measured.chosen.probe:  # fitted again when all are known; until then the last two are used
            for older in [m for m in self._responses if m != n][:-1]:
                del self._responses[older]
        self._last = [
            self._fit(measured.chosen.part(g), measured.images[g], before[i] if before else None)
            for i, g in enumerate(self.groups(len(measured.images)))
        ]
        self._responses[n] = self._last

    def _fit(self, chosen: Directions, images: Tensor, known: Tensor | None) -> Response:
        """A response to be applied; where vectors are long it is found in the span of what it is made of."""
        parts = [chosen.directions, images, *([] if known is None else [known])]
        if not _worth(sum(part.shape[1] for part in parts), images.shape[2]):
            return Response.fit(chosen, images, known).to(self.dtype, chosen.directions)
        span = Span.of(parts)
        v, y, *e = span.coordinates.split([part.shape[1] for part in parts], dim=1)
        found = Response.fit(replace(chosen, directions=v), y, *e)
        excess, extension = (x.to(span.basis) @ span.basis for x in (found.excess, found.extension))
        return Response(chosen.directions, excess, extension, found.gain.to(self.dtype))

    def extended(self) -> list[Responses]:
        """All measurements are made: the responses by themselves, then, if they may, with what the others know of each.

        Empty where directions leave nothing to extend to. From now on responses are interpolated.
        """
        self._second = True
        nodes = [n for n, m in self.measured.items() if m.images is not None]
        if not nodes or not any(self.measured[n].chosen.probe for n in nodes):
            return []
        self._responses, self._last = {}, []
        batch, _, size = self.measured[nodes[0]].chosen.directions.shape
        if _worth(2 * sum(self.measured[n].chosen.directions.shape[1] for n in nodes), size):
            self._project(nodes, batch)
        shared = self.shared and len(nodes) > 1
        ways: list[Responses] = [{n: [] for n in nodes} for _ in range(1 + shared)]
        for group in self.groups(batch):
            pairs = [
                (m.chosen.part(group), m.images[group])
                for m in (self.measured[n] for n in nodes)
                if m.images is not None
            ]
            alone = (Response.fit(*pair) for pair in pairs)
            for responses, fits in zip(ways, (alone, smoothed(pairs)) if shared else (alone,), strict=True):
                for n, (chosen, _), response in zip(nodes, pairs, fits, strict=True):
                    responses[n].append(response.to(self.dtype, chosen.directions))
        return ways

    def missing(self, responses: Responses) -> Tensor:
        """The squared size of all that they miss when they predict each other, ``(B,)``."""
        return torch.stack([wrong for wrong, _ in self._predicted(responses).values()]).sum(0)

    def use(self, ways: list[Responses], alone: Tensor | None) -> None:
        """The last of the ways; of two the first for some of the samples, ``(B,)``."""
        if alone is None or len(ways) < 2:
            self._responses = ways[-1] if ways else self._responses
            return
        groups = self.groups(len(alone))
        self._responses = {
            n: [a.where(alone[g].to(a.gain.device), b) for a, b, g in zip(ways[0][n], ways[1][n], groups, strict=True)]
            for n in ways[0]
        }

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

        Nothing is interpolated beyond the first and last nodes, so with three or more these are not predicted, and have
        their neighbours' errors.
        """
        nodes = sorted(self._responses)
        if len(nodes) < 2:
            return None
        inner = {n: relative(*sizes) for n, sizes in self._predicted(self._responses).items()}
        between = {n: inner[min(max(n, min(inner)), max(inner))] for n in nodes}
        return Errors(tuple(self.plan.places[n] for n in nodes), between, {n: outside(self.measured[n]) for n in nodes})

    def _predicted(self, responses: Responses) -> dict[int, tuple[Tensor, Tensor]]:
        """By inner node, what the others miss of its measurement, and that (:func:`bayesdiff.propagation.errors.missed`)."""
        nodes = sorted(responses)
        groups = self.groups(len(self.measured[nodes[0]].chosen.length))
        found = {}
        for n in nodes[1:-1] or nodes:
            weights = self.plan.cubic(n, [m for m in nodes if m != n])
            pairs = [[(w, responses[o][g]) for o, w in weights.items()] for g in range(len(groups))]
            found[n] = missed(self.measured[n], pairs, groups, self.dtype)
        return found

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


def finish(responders: list[Responder]) -> None:
    r"""All measurements are made: extend each by what the others know, where that helps; from now on interpolate.

    With :math:`\hat J_n` the response that the others predict at node n, and the directions' strengths s, nothing is lent to a
    sample where

    .. math:: \sum_n \|(\hat J_n^\text{alone} - J_n)V_n s_n\|^2 < \tfrac12 \sum_n \|(\hat J_n^\text{lent} - J_n)V_n s_n\|^2.

    Args:
        responders: Of one module. Branches of a sample that were called apart decide together (the sums are over them, too),
            since guidance would multiply what lies between the one and the other; where samples differ, all are lent.
    """
    ways = [r.extended() for r in responders]
    alone = None
    if all(len(both) == 2 for both in ways):
        missing = [torch.stack([r.missing(way) for way in both]) for r, both in zip(responders, ways, strict=True)]
        if len({m.shape for m in missing}) == 1:
            apart, together = torch.stack(missing).sum(0)
            alone = apart < CLEARLY * together
    for r, both in zip(responders, ways, strict=True):
        r.use(both, alone)


def _worth(number: int, size: int) -> bool:
    """Whether the algebra of so many vectors is less work in their span, found once, than on their own numbers."""
    return SHORTER * number < size
