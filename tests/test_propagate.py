"""The denoiser's response from few calls, and where it is measured."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from bayesdiff import UncertaintyPipeline, fit, zoo
from bayesdiff.propagate import interpolation, plan
from bayesdiff.response import Response

B, P = 2, 40


def matrices(rank=None, seed=0):
    """One positive semidefinite matrix a sample, with eigenvalues that fall as a denoiser's do."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(B, P, P, generator=generator, dtype=torch.float64)).Q
    values = 2.0 / torch.arange(1, P + 1, dtype=torch.float64) ** 2
    if rank is not None:
        values[rank:] = 0
    return (q * values) @ q.mT


def draws(k, seed=1):
    return torch.randn(B, k, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measure(jacobian, deltas, p):
    calls = []

    def product(v):
        calls.append(1)
        return torch.einsum("bij,bj->bi", jacobian, v)

    mixture = torch.randn(deltas.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    response = Response.measure(product, deltas, p, mixture)
    assert len(calls) == min(p, *deltas.shape[1:])
    assert torch.allclose(response.directions @ response.directions.mT, torch.eye(len(calls)).double(), atol=1e-12)
    return response


def test_as_many_calls_as_draws_are_exact_for_any_jacobian():
    jacobian = torch.randn(B, P, P, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    deltas = draws(6)
    torch.testing.assert_close(measure(jacobian, deltas, 6)(deltas), deltas @ jacobian.mT)
    torch.testing.assert_close(measure(jacobian, deltas, 50)(deltas), deltas @ jacobian.mT)
    assert not torch.allclose(measure(jacobian, deltas, 5)(deltas), deltas @ jacobian.mT)


def test_what_was_measured_is_kept_and_nystrom_extends_it():
    jacobian = matrices(rank=3)
    response = measure(jacobian, draws(6) + 4 * draws(6) @ jacobian, 6)  # directions that J acts on, but not only
    v = response.directions
    torch.testing.assert_close(response(v), v @ jacobian.mT)
    other = draws(50, seed=9)
    truth = other @ jacobian.mT

    def error(r):
        return float((r(other) - truth).norm() / truth.norm())

    without = dataclasses.replace(response, extension=torch.zeros_like(response.extension))
    assert error(response) < 0.5 * error(without)


def test_a_small_eigenvalue_does_not_blow_up_the_extension():
    """An antisymmetric matrix has M = 0 up to rounding; 1/M must not be taken for a response."""
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(B, P, P, generator=generator, dtype=torch.float64)
    jacobian = (a - a.mT) / 2 + 1e-6 * torch.eye(P, dtype=torch.float64)
    response = measure(jacobian, draws(6), 6)
    other = draws(5, seed=9)
    size = torch.linalg.matrix_norm(jacobian, 2).max()
    assert float(response(other).norm()) < 3 * float(size * other.norm())


def test_isotropic_part_is_read_off_the_last_direction():
    jacobian = 0.7 * torch.eye(P, dtype=torch.float64).expand(B, P, P)
    other = draws(3, seed=9)
    torch.testing.assert_close(measure(jacobian, draws(20), 4)(other), 0.7 * other)


def test_more_directions_are_better():
    jacobian, deltas = matrices(), draws(30)
    truth = deltas @ jacobian.mT
    errors = [float((measure(jacobian, deltas, p)(deltas) - truth).norm() / truth.norm()) for p in (2, 12, 24, 30)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


@pytest.mark.parametrize("k", [1, 5])
def test_no_deviation_has_no_response(k):
    response = measure(matrices(), torch.zeros(B, k, P, dtype=torch.float64), 3)
    out = response(torch.zeros(B, k, P, dtype=torch.float64))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 8, 20, 25, 50, 51, 1000])
@pytest.mark.parametrize("extra_calls", [0.5, 1.2, 2.5, 10])
@pytest.mark.parametrize("stages", [1, 2])
def test_the_plan_keeps_to_its_budget(num_steps, extra_calls, stages):
    steps, p = plan(num_steps, extra_calls, stages=stages)
    last = num_steps - 1
    assert steps == sorted(set(steps))
    assert all(1 <= n <= last for n in steps)
    if last:
        assert (steps[0], steps[-1]) == (1 if len(steps) > 1 else last, last)
        assert p == 1 or len(steps) * p <= extra_calls * num_steps
        assert len(steps) * (p + 1) + len(steps) > extra_calls * num_steps or len(steps) == last  # and spends it
    assert all(n % stages == 1 % stages for n in steps[:-1])
    gaps = [b - a for a, b in itertools.pairwise(steps)][:-1]
    assert all(b <= a + stages for a, b in itertools.pairwise(gaps))  # denser late, up to rounding


def test_the_plan_by_hand():
    assert plan(50, 2.5) == ([1, 8, 15, 21, 27, 32, 37, 41, 45, 47, 49], 11)
    assert plan(25, 1.2)[1] == 6
    assert plan(4, 2.5) == ([1, 2, 3], 3)  # few steps: all of them
    assert plan(20, 2.5, refresh=1, num_directions=16) == (list(range(1, 20)), 16)
    assert len(plan(50, 2.5, refresh=5)[0]) == 10
    assert plan(25, 2.5, refresh=1, stages=2)[0] == list(range(1, 25))
    assert plan(1, 2.5)[0] == []


@pytest.mark.parametrize("nodes", [[1], [1, 4], [1, 3, 4], [1, 5, 9, 12, 14, 15]])
def test_interpolation_reproduces_polynomials(nodes):
    """Cubics where there are four nodes; lines beyond the last."""
    for degree in range(min(3, len(nodes) - 1) + 1):
        for n in range(1, nodes[-1] + 1):
            weights = interpolation(nodes, n)
            assert sum(w * m**degree for m, w in weights.items()) == pytest.approx(n**degree)
            if n in nodes:
                assert weights == {n: 1}
    beyond = interpolation(nodes, nodes[-1] + 2)
    assert sum(w * m for m, w in beyond.items()) == pytest.approx(nodes[-1] + 2 * (len(nodes) > 1))


@pytest.fixture(scope="module")
def shipped():
    pipe, data = zoo.load("fashion-ddpm")
    few = data.subset(slice(200))
    posterior = fit(
        pipe, few, dataset_size=data.dataset_size, generator=torch.Generator().manual_seed(0), progress=False
    )
    return pipe, posterior


def run(shipped, *, seed=5, **kwargs):
    pipe, posterior = shipped
    up = UncertaintyPipeline(pipe, posterior, generator=torch.Generator().manual_seed(seed), **kwargs)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    return up(["sneaker", "bag", "coat"], num_inference_steps=20, generator=generators)


def agreement(std, reference):
    both = torch.stack([std.flatten(), reference.flatten()]).double()
    return float(torch.corrcoef(both)[0, 1]), float(std.mean() / reference.mean())


def test_few_calls_on_a_trained_model(shipped):
    """Everything but the linearisation taken away, the same draws: what is left is the error of few calls."""
    exact = run(shipped, num_tangents=16, refresh=1, num_directions=16)
    assert exact.calls == 20 + 19 * 16
    fast = run(shipped, num_tangents=16)
    assert fast.calls == 20 + 7 * 7
    correlation, ratio = agreement(fast.std, exact.std)
    assert correlation > 0.94
    assert 0.85 < ratio < 1.15
    more = run(shipped, num_tangents=16, refresh=2, num_directions=12)
    closer, _ = agreement(more.std, exact.std)
    assert closer > 0.97


def test_many_draws_cost_no_network_calls(shipped):
    few, many = run(shipped, num_tangents=16), run(shipped, num_tangents=96)
    assert few.calls == many.calls
    correlation, _ = agreement(few.std, many.std)
    assert correlation > 0.9  # other draws: √(2/16)/2 = 18 % of noise in each std


def test_tangents_agree_with_an_ensemble_of_a_trained_model(shipped):
    """Other draws, whole nonlinear trajectories: 1/√(2·39) = 11 % of noise in each of the reference's std."""
    reference = run(shipped, propagation="ensemble", num_tangents=40, seed=77)
    correlation, ratio = agreement(run(shipped, refresh=2, num_directions=12).std, reference.std)
    assert correlation > 0.95
    assert 0.85 < ratio < 1.15
