"""What is known of a network's responses along a run, and how wrong that is."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from bayesdiff.checks import BayesdiffWarning
from bayesdiff.propagation import responder as responders
from bayesdiff.propagation.errors import Errors
from bayesdiff.propagation.measured import Branches, Measured
from bayesdiff.propagation.module import FOLLOWED, Module
from bayesdiff.propagation.plan import Plan
from bayesdiff.propagation.responder import Responder, finish
from bayesdiff.propagation.response import EIGENVALUE_FLOOR, Directions
from bayesdiff.propagation.settings import Tangents
from bayesdiff.propagation.tangents import LARGE, warn

PLACES, NODES, P, K = tuple(map(float, range(12))), (1, 4, 6, 9, 11), 10, 40


@pytest.fixture(params=[True, False], ids=["shared", "apart"])
def measured(request):
    """Responses of slowly changing Jacobians, measured at some places, and these: ``(2, P, P)`` each."""
    return measure(request.param)


def measure(shared, by_sample=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    responder = Responder(Plan(NODES, 4, PLACES), dtype, shared, by_sample)
    root, turn, scale = draw(2, P, P) / P, draw(2, P, P) / (4 * P), torch.arange(1, P + 1, dtype=torch.float64).rsqrt()
    jacobians, deltas = {}, {}
    for n in NODES:
        at = root + n / 12 * turn
        jacobians[n] = at @ at.mT + 0.1 * turn  # not symmetric
        deltas[n] = draw(2, K, P) * scale
        chosen = responder.choose(deltas[n], draw(K))
        strengths = (deltas[n] @ chosen.directions.mT).square().mean(1)
        strengths[:, -1] = chosen.length[:, 0].square() - strengths[:, :-1].sum(1)
        images = chosen.directions @ jacobians[n].mT * chosen.safe.unsqueeze(1)
        kept = Directions(chosen.directions.to(dtype), chosen.length, chosen.probe)
        responder.add(n, Measured(kept, images.to(dtype), None, strengths.sqrt(), Branches.alone(2), (0.5, 2.0)))
    finish([responder])
    return responder, jacobians


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("by_sample", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-3), (torch.float64, 1e-6)])
def test_in_the_span_of_the_measurements_it_is_the_same(monkeypatch, shared, by_sample, dtype, tolerance):
    deltas = torch.randn(2, K, P, generator=torch.Generator().manual_seed(1), dtype=dtype)
    found = []
    for shorter in (0, 1000):  # always, and never
        monkeypatch.setattr(responders, "SHORTER", shorter)
        responder, _ = measure(shared, by_sample, dtype)
        assert bool(responder._spans) == (shorter == 0)
        found.append(torch.stack([responder.denoised(n, deltas) for n in range(12)]))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < tolerance


def test_each_measurement_is_predicted_from_the_others(measured):
    responder, jacobians = measured
    errors = responder.errors()
    assert errors.places == tuple(PLACES[n] for n in NODES)
    dense = {n: r[0](torch.eye(P, dtype=torch.float64).expand(2, P, P)).mT for n, r in responder._responses.items()}
    for n in NODES[1:-1]:
        m = responder.measured[n]
        weights = responder.plan.cubic(n, [o for o in NODES if o != n])
        for b in range(2):
            predicted = sum(w * dense[o][b] for o, w in weights.items())
            directions = m.chosen.directions[b] * m.strengths[b][:, None]
            wrong = sum(float(((predicted - jacobians[n][b]) @ v).square().sum()) for v in directions)
            whole = sum(float((jacobians[n][b] @ v).square().sum()) for v in directions)
            assert float(errors.between[n][b]) == pytest.approx(math.sqrt(wrong / whole), rel=1e-9)
    # What lies at the ends is not between nodes.
    assert torch.equal(errors.between[NODES[0]], errors.between[NODES[1]])
    assert torch.equal(errors.between[NODES[-1]], errors.between[NODES[-2]])


def test_the_last_direction_is_predicted_from_those_beside_it(measured):
    responder, jacobians = measured
    errors = responder.errors()
    for n in NODES:
        m = responder.measured[n]
        for b in range(2):
            *others, v = m.chosen.directions[b]
            j, w = jacobians[n][b], torch.stack(others)
            y = w @ j.T
            values, vectors = torch.linalg.eigh((w @ y.T + y @ w.T) / 2)
            largest = torch.linalg.matrix_norm(y, ord=2)
            predicted = torch.zeros_like(v)
            for value, q in zip(values, vectors.T, strict=True):
                if value > EIGENVALUE_FLOOR * values.max():
                    row = q @ y
                    predicted = predicted + row * (row @ v) / torch.maximum(value, row.square().sum() / largest)
            image = j @ v
            wrong = (image - (image @ v) * v - predicted).norm() * m.strengths[b, -1]
            each = zip(m.chosen.directions[b], m.strengths[b], strict=True)
            whole = math.sqrt(sum(float((j @ d).square().sum() * s**2) for d, s in each))
            assert float(errors.outside[n][b]) == pytest.approx(float(wrong) / whole, rel=1e-6)


def test_between_nodes_responses_are_less_well_known():
    def one(x):
        return torch.tensor([x], dtype=torch.float64)

    errors = Errors((2.0, 6.0), {2: one(0.3), 6: one(0.5)}, {2: one(0.1), 6: one(0.2)})
    assert float(errors(2, 2.0)) == 0.1
    assert float(errors(6, 6.0)) == 0.2
    assert float(errors(4, 4.0)) == pytest.approx(math.hypot(0.4, 0.15))
    assert float(errors(3, 3.0)) == pytest.approx(math.hypot(0.75 * 0.35, 0.125))
    # The other stage at a node's place, which was not measured; and before the first node.
    assert float(errors(5, 2.0)) == pytest.approx(math.hypot(0.3, 0.1))
    assert float(errors(1, 1.0)) == pytest.approx(0.1)


def test_exact_responses_have_no_error():
    responder = Responder(Plan((1, 2, 3), 6, (0.0, 1.0, 2.0, 3.0)), torch.float64, shared=True, by_sample=False)
    assert responder.errors() is None
    for n in (1, 2, 3):
        deltas = torch.randn(1, 6, P, dtype=torch.float64)
        chosen = responder.choose(deltas, torch.randn(6, dtype=torch.float64))
        responder.add(n, Measured(chosen, chosen.directions * n, None, torch.ones(1, 6), Branches.alone(1), (1.0, 1.0)))
    finish([responder])
    errors = responder.errors()
    assert all(float(errors(n, float(n))) == 0 for n in (1, 2, 3))


class _Whole:
    """Rows that are packed already."""

    def __init__(self, rows):
        self.rows, self.returned = rows, self

    def pack(self, values, lead):
        return values[0][:, :FOLLOWED]

    def taken(self, rows):
        return rows

    read = taken


def test_an_error_is_weighed_by_what_the_step_makes_of_it(measured):
    """x' = c x + d f: relative errors add up between nodes, and are independent beyond."""
    responder, _ = measured
    module = Module(lambda n: (0.5, 2.0), responder)
    module.coordinates.interpolated = module.coordinates
    assert module.residual() is None
    generator = torch.Generator().manual_seed(1)
    x, expected, gaps = torch.randn(2, K, P, generator=generator), torch.zeros(2), {}
    module.match = (_Whole(x),)
    errors, steps = responder.errors(), {n: (0.9, -0.05 * n) for n in range(1, 12)}
    for n in range(1, 12):
        f = torch.randn(2, K, P, generator=generator)
        module.sizes[n] = torch.tensor([0.1, 0.2], dtype=torch.float64) * n
        module.follow(n, _Whole(x), None, [f])
        c, d = steps[n]
        after = c * x + d * f
        part, whole = (abs(d), after) if n < 11 else (2.0, 0.5 * x + 2 * f)  # behind the last call, the denoised sample
        weight = part / whole[:, :FOLLOWED].square().sum(2).mean(1).sqrt()
        gap = max(m for m in NODES if m <= n)
        gaps[gap] = gaps.get(gap, 0) + errors(n, float(n)) * module.sizes[n] * weight
        x = after
    expected = torch.stack(list(gaps.values())).square().sum(0).sqrt()
    torch.testing.assert_close(module.residual(), expected.double(), rtol=1e-4, atol=0)


def test_a_large_residual_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn(None, Tangents())
        warn(torch.tensor([0.0, LARGE]), Tangents())
    with pytest.warns(BayesdiffWarning, match=r"1 of 2 samples.*extra_calls than 1.2"):
        warn(torch.tensor([0.1, LARGE * 1.1]), Tangents(extra_calls=1.2))
    with pytest.warns(BayesdiffWarning, match="nan"):
        warn(torch.tensor([float("nan")]), Tangents())


def wild(shared, by_sample, seed=5, finished=True):
    """Of the first sample Jacobians change slowly, of the second from call to call; measured along few directions."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    responder, kept = Responder(Plan(NODES, 4, PLACES), torch.float64, shared, by_sample), draw(3, P)
    for n in NODES:
        roots = torch.stack([kept + 0.02 * draw(3, P), 3 * draw(3, P)])
        jacobians = roots.mT @ roots
        deltas = draw(2, K, P)
        chosen = responder.choose(deltas, draw(K))
        strengths = (deltas @ chosen.directions.mT).square().mean(1).sqrt()
        images = chosen.directions @ jacobians.mT * chosen.safe.unsqueeze(1)
        responder.add(n, Measured(chosen, images, None, strengths, Branches.alone(2), (0.5, 2.0)))
    if finished:
        finish([responder])
    return responder


@pytest.mark.parametrize("by_sample", [True, False])
def test_measurements_know_of_each_other_only_where_they_predict_each_other(monkeypatch, by_sample):
    """Sample by sample the responses with the smaller errors, those that were lent if it is not clear."""
    deltas = torch.randn(2, K, P, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def responses(shared, clearly=0.0):
        monkeypatch.setattr(responders, "CLEARLY", clearly)
        made = wild(shared, by_sample)
        return torch.stack([made.denoised(n, deltas) for n in range(12)], 1), made.missing(made._responses)

    (lent, together), (alone, apart) = responses(True, 0.0), responses(False)
    gain = (apart / together).tolist()
    slow, fast = sorted(range(2), key=lambda b: -gain[b])
    assert gain[fast] < 0.9 * gain[slow]
    found, error = responses(True, (gain[0] * gain[1]) ** 0.5)
    torch.testing.assert_close(found[slow], lent[slow])
    torch.testing.assert_close(found[fast], alone[fast])
    torch.testing.assert_close(error[slow], together[slow])
    torch.testing.assert_close(error[fast], apart[fast])
    assert all(not torch.allclose(lent[b], alone[b]) for b in range(2))


def test_branches_called_apart_decide_together(monkeypatch):
    """Guidance would multiply what lies between a branch that was lent something and one that was not."""
    deltas, seeds = torch.randn(2, K, P, generator=torch.Generator().manual_seed(1), dtype=torch.float64), (5, 6)

    def known(made):
        return torch.stack([made.denoised(n, deltas) for n in range(12)], 1)

    monkeypatch.setattr(responders, "CLEARLY", 0.0)
    alone, lent = ([wild(shared, False, seed) for seed in seeds] for shared in (False, True))
    apart, together = (torch.stack([made.missing(made._responses) for made in some]) for some in (alone, lent))
    each, all_ = apart / together, apart.sum(0) / together.sum(0)
    b = int((each[0] - each[1]).abs().argmax())
    monkeypatch.setattr(responders, "CLEARLY", float(each[:, b].mean()))  # by themselves they would decide differently
    found = [wild(True, False, seed, finished=False) for seed in seeds]
    finish(found)
    expected = alone if all_[b] < each[:, b].mean() else lent
    for made, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(known(made)[b], known(wanted)[b])
    found = [wild(True, False, seed, finished=False) for seed in seeds]
    found[0].shared = False  # one that may not be lent anything: nor do the others choose
    finish(found)
    torch.testing.assert_close(known(found[0]), known(alone[0]))
    torch.testing.assert_close(known(found[1]), known(lent[1]))
