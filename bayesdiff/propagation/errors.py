"""How wrong responses are, as far as measurements tell: each predicted from the others, its last direction from its own."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.propagation.measured import Measured
from bayesdiff.propagation.response import Directions, Response


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


def missed(
    measured: Measured, others: Sequence[Sequence[tuple[float, Response]]], groups: Sequence[slice], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Squared sizes of what other responses miss of a measurement, and of the measurement, ``(B,)`` float64 each.

    Along every direction as much counts as lies there, along the last as much as the others leave.

    Args:
        measured: It.
        others: Weights and responses, of each group of samples.
        groups: The samples that are worked on together.
        dtype: To work in.
    """
    assert measured.images is not None
    strengths = measured.strengths.to(measured.images.device, dtype).unsqueeze(2)
    directions, images = measured.chosen.directions.to(dtype), measured.images.to(dtype)
    weighted, wanted = directions * strengths, images / measured.chosen.safe.unsqueeze(1).to(images) * strengths
    found = torch.cat([Response.weighted(pairs, weighted[g]) for pairs, g in zip(others, groups, strict=True)])
    return _squared(found - wanted), _squared(wanted)


def outside(measured: Measured) -> Tensor:
    """Of what the other directions predict of the last, in all of the measurement, ``(B,)``; 0 where there is no such one."""
    assert measured.images is not None
    if not measured.chosen.probe:
        return torch.zeros(len(measured.images), dtype=torch.float64)
    directions, images = measured.chosen.directions.double(), measured.images.double()
    strengths, unit = measured.strengths.to(images).unsqueeze(2), images / measured.chosen.safe.unsqueeze(1)
    v, image = directions[:, -1:], unit[:, -1:]
    others = Directions(directions[:, :-1], measured.chosen.length, probe=False)
    error = image - (image @ v.mT) @ v
    if others.directions.shape[1]:
        extension = Response.fit(others, images[:, :-1], None).extension
        error = error - (v @ extension.mT) @ extension
    return relative(_squared(error * strengths[:, -1:]), _squared(unit * strengths))


def relative(above: Tensor, below: Tensor) -> Tensor:
    """The ratio of sizes, of their squares; where nothing was measured, the size itself."""
    return (above / torch.where(below > 0, below, 1.0)).sqrt()


def _squared(rows: Tensor) -> Tensor:
    return rows.square().sum((1, 2)).double().cpu()
