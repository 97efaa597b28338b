"""Where the network's response is measured along a run, and what is interpolated in between."""

from __future__ import annotations

import itertools

import pytest

from bayesdiff.propagation.plan import candidates, plan, ranks, spread

PLACES = {n: tuple(map(float, range(n))) for n in (1, 2, 3, 4, 7, 8, 10, 16, 20, 25, 50, 51, 1000)}


def heun(steps):
    """The places of a two-stage solver's calls: each level but the first twice, the last step has one stage."""
    return tuple(float(u) for u in [0, *(u for n in range(1, steps) for u in (n, n))])


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 8, 20, 25, 50, 51, 1000])
@pytest.mark.parametrize("extra_calls", [0.5, 1.2, 2.5, 10])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("two_stages", [False, True])
def test_the_plan_keeps_to_its_budget(number, extra_calls, two_stages, noisy):
    places = heun(max(1, number // 2)) if two_stages else PLACES[number]
    found = plan(places, extra_calls, stages=1 + two_stages, noisy=noisy)
    nodes, p = found.nodes, found.num_directions
    able = candidates(places, 1 + two_stages)
    assert found.places == places
    assert list(nodes) == sorted(set(nodes))
    assert set(nodes) <= set(able)
    assert p >= 1
    if not able:
        assert nodes == ()
        return
    assert nodes[-1] == able[-1]
    assert (nodes[0] == able[0]) == (len(nodes) > 3 or len(nodes) == len(able))
    assert p == 1 or len(nodes) * p <= extra_calls * len(places)
    gaps = [b - a for a, b in itertools.pairwise(places[n] for n in nodes)][:-1]
    assert all(b <= a + 1 for a, b in itertools.pairwise(gaps))  # denser late, up to rounding


def test_what_is_asked_for_is_done():
    places = PLACES[20]
    everywhere = plan(places, 2.5, refresh=1, num_directions=16)
    assert (everywhere.nodes, everywhere.num_directions) == (tuple(range(1, 20)), 16)
    assert plan(heun(10), 2.5, refresh=1, stages=2).nodes == tuple(range(1, 19))
    assert len(plan(PLACES[50], 2.5, refresh=5).nodes) == 10
    assert plan(PLACES[50], 2.5, num_directions=3).num_directions == 3
    assert plan(PLACES[1], 2.5).nodes == ()


def test_few_calls_are_all_measured():
    assert plan(PLACES[4], 2.5).nodes == (1, 2, 3)
    assert plan(PLACES[4], 2.5).num_directions >= 3


def test_more_is_measured_where_noise_is_added():
    quiet, noisy = (plan(PLACES[25], 1.2, noisy=n) for n in (False, True))
    assert len(noisy.nodes) > len(quiet.nodes)
    assert noisy.num_directions < quiet.num_directions


def test_places_are_ranks_of_levels():
    assert ranks([999.0, 500.0, 500.0, 1.0], 4) == (0, 1, 1, 2)
    assert ranks([0.1, 0.5, 0.9], 3) == (0, 1, 2)
    assert ranks(None, 3) == ranks([5.0, 5.0, 5.0], 3) == (0, 1, 2)
    # A sampler that goes back to more noise comes to one place again.
    assert ranks([900.0, 500.0, 700.0, 100.0], 4) == (0, 2, 1, 3)


def test_candidates():
    """Not the first call, which has no tangents; of calls at one level the first."""
    assert candidates(PLACES[4]) == [1, 2, 3]
    assert candidates(PLACES[1]) == []
    assert candidates(heun(4)) == [1, 3, 5]
    # Levels that do not tell stages apart: one call in two, and the last.
    assert candidates(PLACES[8], stages=2) == [1, 3, 5, 7]
    assert candidates(PLACES[7], stages=2) == [1, 3, 5, 6]
    # Only what ascends both in place and in time.
    back = candidates(ranks([900.0, 500.0, 700.0, 100.0], 4))
    assert back in ([1, 3], [2, 3])


def test_measurements_are_denser_late():
    assert spread(range(1, 50), 5, 1.0) == [1, 13, 25, 37, 49]
    late = spread(range(1, 50), 5, 1.5)
    assert (late[0], late[-1]) == (1, 49)
    gaps = [b - a for a, b in itertools.pairwise(late)]
    assert gaps == sorted(gaps, reverse=True)
    assert spread([3, 4], 5, 1.5) == [3, 4]
    assert spread(range(1, 50), 1, 1.5) == [49]


@pytest.mark.parametrize("nodes", [[1], [1, 4], [1, 3, 4], [1, 5, 9, 12, 14, 15]])
def test_interpolation_reproduces_polynomials(nodes):
    """Cubics where there are four nodes; lines beyond the last."""
    along = plan(PLACES[16], 2.5)
    for degree in range(min(3, len(nodes) - 1) + 1):
        for n in range(1, nodes[-1] + 1):
            weights = along.cubic(n, nodes)
            assert sum(w * m**degree for m, w in weights.items()) == pytest.approx(n**degree)
            if n in nodes:
                assert weights == {n: 1}
    if nodes[-1] < 15:
        beyond = along.cubic(nodes[-1] + 1, nodes)
        assert sum(w * m for m, w in beyond.items()) == pytest.approx(nodes[-1] + (len(nodes) > 1))


def test_extrapolation_is_along_the_last_two():
    along = plan(PLACES[16], 2.5)
    assert along.line(5, [1]) == {1: 1.0}
    assert along.line(9, [1, 4, 7]) == pytest.approx({4: -2 / 3, 7: 5 / 3})
    assert along.line(4, [1, 4, 7]) == {4: 1.0}


def test_calls_at_one_level_have_one_place():
    along = plan(heun(10), 10.0, stages=2)
    nodes = list(along.nodes)
    for n in range(1, len(heun(10)), 2):
        if n + 1 not in nodes and n not in nodes:
            assert along.cubic(n, nodes) == along.cubic(n + 1, nodes)
    assert sum(along.cubic(8, nodes).values()) == pytest.approx(1)
