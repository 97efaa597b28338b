"""Where along a run to measure the network's response, along how many directions, and what lies in between.

A run calls its network N times, at noise levels that its timesteps name. The place of a call on the trajectory is the rank u of
its level: a solver of two stages comes to one level twice, once by prediction and once corrected, and both have one place.
Responses are interpolated over u.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: d: calls between measurements shrink towards the end, where deviations grow, n ∝ 1 − (1 − u)^d for even u.
DENSITY = 1.5
#: By default there is a measurement in every so many calls at least, and in solvers of several stages in every so many.
WIDEST, WIDEST_OF_STAGES = 5, 2
#: R in √B, as long as so many directions are left: by default, and where the sampler adds noise (such a trajectory is rough,
#: and so is the response along it).
SHARE, SHARE_WITH_NOISE = (1.3, 5), (1.6, 3)
#: No more evaluations than this are planned: what is left to gain is less than the noise of the draws.
MOST = 1024


@dataclass(frozen=True)
class Plan:
    """Which calls are measured.

    Args:
        nodes: Their numbers, ascending.
        num_directions: p, network evaluations at each.
        places: u of every call of the run.
    """

    nodes: tuple[int, ...]
    num_directions: int
    places: tuple[float, ...]

    def line(self, n: int, known: Sequence[int]) -> dict[int, float]:
        """Weights of the line through the last two of the known nodes, at call n; a node's own response at that node."""
        if n in known:
            return {n: 1.0}
        known = self._distinct(known)
        return _line(known[-2:], [self.places[m] for m in known[-2:]], self.places[n])

    def cubic(self, n: int, known: Sequence[int]) -> dict[int, float]:
        """Weights of the cubic through the four known nodes around call n (Lagrange); a line beyond the last."""
        if n in known:
            return {n: 1.0}
        known = self._distinct(known)
        places = [self.places[m] for m in known]
        if self.places[n] >= places[-1]:
            return _line(known[-2:], places[-2:], self.places[n])
        first = min(max(bisect.bisect_right(places, self.places[n]) - 2, 0), max(len(known) - 4, 0))
        chosen = range(first, min(first + 4, len(known)))
        at = self.places[n]
        weights = {
            known[i]: math.prod((at - places[j]) / (places[i] - places[j]) for j in chosen if j != i) for i in chosen
        }
        return {m: w for m, w in weights.items() if w}

    def _distinct(self, known: Sequence[int]) -> list[int]:
        """One node for each place, the last, their places ascending."""
        return [m for _, m in sorted({self.places[m]: m for m in known}.items())]


def _line(nodes: Sequence[int], places: Sequence[float], at: float) -> dict[int, float]:
    if len(nodes) < 2 or at == places[-1]:
        return dict.fromkeys(nodes[-1:], 1.0)
    share = (at - places[1]) / (places[1] - places[0])
    return {nodes[0]: -share, nodes[1]: 1 + share}


def ranks(levels: Sequence[float] | None, number: int) -> tuple[float, ...]:
    """u of each call: the rank of its level in the order in which levels come; without levels, its number."""
    if levels is None or len(set(levels)) < 2:
        return tuple(map(float, range(number)))
    falling = levels[0] > levels[-1]
    order = {level: float(i) for i, level in enumerate(sorted(set(levels), reverse=falling))}
    return tuple(order[level] for level in levels)


def spread(places: Sequence[int], number: int, density: float) -> list[int]:
    """Some of the places, the last among them: n ∝ 1 − (1 − u)^density for even u; with fewer than four, not the first."""
    if number >= len(places):
        return list(places)
    u = np.linspace(0 if number > 3 else 1 / number, 1, number)
    return [places[int(n)] for n in np.unique(((len(places) - 1) * (1 - (1 - u) ** density)).round())]


def candidates(places: Sequence[float], stages: int = 1, entered: int = 1) -> list[int]:
    """Calls that may be measured, their u ascending; not those before ``entered``, which have no tangents.

    Of calls at one level the first, which a two-stage solver predicts (with those that it corrects maps are a third too dark).
    Where levels do not tell stages apart, one call in so many, and the last.
    """
    first: dict[float, int] = {}
    for n, u in enumerate(places):
        if n >= entered:
            first.setdefault(u, n)
    distinct = len(first) >= len(places) - entered
    kept = [n for n in first.values() if not distinct or stages == 1 or n % stages == 1 or n == len(places) - 1]
    kept.sort(key=lambda n: (places[n], n))
    # Where a sampler goes back to more noise, calls and levels come in different orders: only what ascends in both is kept.
    ascending: list[int] = []
    for n in kept:
        if not ascending or n > ascending[-1]:
            ascending.append(n)
    return ascending


def plan(
    places: Sequence[float], extra_calls: float, refresh: int | None = None, num_directions: int | None = None,
    stages: int = 1, noisy: bool = False, entered: int = 1,
) -> Plan:  # fmt: skip
    r"""At which calls to measure the response, and along how many directions.

    A budget of B = ``extra_calls`` × N, 1,024 at most, is spent at R ≈ 1.3 √B calls as long as p = 5 is left, or 1.6 √B and p = 3
    where the sampler adds noise, else at √B, as in solvers of several stages. But R is no less than a fifth of the calls, or
    half of them in solvers of several stages; no less than four, which a cubic needs, where p = 3 can be had; and all of them
    where they are five or fewer. R is one more where that wastes less of B.

    Args:
        places: u of the N calls.
        extra_calls: Evaluations of all measurements together, in the N of the plain run.
        refresh: r; given, one call in r is measured on average; with 1 every one.
        num_directions: p; given, it is not chosen.
        stages: Calls that make one step of the solver.
        noisy: Whether the sampler adds noise.
        entered: The first call whose input has tangents. Before the network's first measurement its response is taken for 0, as
            it is at pure noise; of a module that has tangents in its first call, that is measured.

    Returns:
        Calls from ``entered`` to the last, denser late, and p ≥ 1.
    """
    number_of_calls = len(places)
    if refresh == 1:
        return Plan(tuple(range(entered, number_of_calls)), num_directions or max(1, int(extra_calls)), tuple(places))
    able = candidates(places, stages, entered)
    last = len(able)
    if last < 1:
        return Plan((), num_directions or 1, tuple(places))
    budget = min(extra_calls * number_of_calls, MOST)
    repeated = len(set(places)) < number_of_calls
    if refresh is not None:
        number = math.ceil((number_of_calls - entered) / refresh)
    elif last <= 5 and budget >= 3 * last:
        number = last
    else:
        several = stages > 1 or repeated
        share, least = (1.0, 1) if several else SHARE_WITH_NOISE if noisy else SHARE
        widest = WIDEST_OF_STAGES if several else WIDEST
        number = max(round(budget**0.5), math.ceil(last / widest), 4 if budget >= 12 else 1)
        number = max(number, min(round(share * budget**0.5), int(budget / least)))
        number = max(number, number + 1, key=lambda r: r * int(budget / r))
    nodes = spread(able, min(number, last), DENSITY)
    if entered == 0 and nodes[0] > 0:
        nodes = [0, *nodes]
    return Plan(tuple(nodes), num_directions or max(1, int(budget / len(nodes))), tuple(places))
