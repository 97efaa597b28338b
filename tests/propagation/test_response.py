"""The denoiser's response from few calls."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bayesdiff.propagation import response as responses
from bayesdiff.propagation.response import Directions, Response, reduced, smoothed
from tests import references

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


def measured(jacobian, deltas, p, seed=2):
    """Directions and J along them, as a run has them."""
    mixture = torch.randn(deltas.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = Directions.choose(deltas, p, mixture)
    return chosen, torch.stack([torch.einsum("bij,bj->bi", jacobian, v) for v in chosen.shifts()], dim=1)


def measure(jacobian, deltas, p):
    chosen, images = measured(jacobian, deltas, p)
    number = min(p, *deltas.shape[1:])
    assert len(images[0]) == number
    assert torch.allclose(chosen.directions @ chosen.directions.mT, torch.eye(number).double(), atol=1e-12)
    return Response.fit(chosen, images)


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


def drifting(places=4, asymmetry=0.0):
    """Matrices that turn and grow a little from place to place."""
    base = matrices()
    turn = torch.randn(B, P, P, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    odd = asymmetry * (turn + turn.mT) @ base
    return [
        torch.matrix_exp(0.02 * n * (turn - turn.mT)) @ ((1 + 0.2 * n) * base) @ torch.matrix_exp(-0.02 * n * (turn - turn.mT))
        + 0.05 * torch.eye(P, dtype=torch.float64) + odd
        for n in range(places)
    ]  # fmt: skip


@pytest.mark.parametrize("p", [1, 2, 5, 20])
@pytest.mark.parametrize("asymmetry", [0.0, 0.05])
def test_smoothed_responses_are_the_dense_formulas(p, asymmetry, monkeypatch):
    monkeypatch.setattr(responses, "ROWS_PER_DIRECTION", 1000)
    places = [measured(j, draws(20, seed=n), p, seed=n) for n, j in enumerate(drifting(asymmetry=asymmetry))]
    got = list(smoothed(places))
    settings = {
        "before": responses.BEFORE, "after": responses.AFTER, "floor": responses.EIGENVALUE_FLOOR,
        "regularization": responses.REGULARIZATION,
    }  # fmt: skip
    probe = draws(7, seed=50)
    for b in range(B):
        naive = references.smoothed_responses(
            [(c.directions[b], y[b] / c.length[b], c.probe) for c, y in places], **settings
        )
        for response, jacobian in zip(got, naive, strict=True):
            torch.testing.assert_close(response(probe)[b], probe[b] @ jacobian.T, rtol=1e-8, atol=1e-10)


def test_nystrom_and_the_complement_make_up_the_whole(monkeypatch):
    """J = B: Y M⁺ Yᵀ + S = B for any V, exactly without regularisation."""
    monkeypatch.setattr(responses, "REGULARIZATION", 1e-13)
    jacobian = matrices(rank=5)
    values, vectors = torch.linalg.eigh(jacobian)
    root = values[:, -5:].sqrt().unsqueeze(2) * vectors[:, :, -5:].mT
    v = Directions.choose(draws(20), 4, torch.ones(20)).directions
    y = v @ jacobian
    nystrom = y.mT @ torch.linalg.solve(v @ y.mT, y)
    rest = responses._complement(root, v)
    torch.testing.assert_close(nystrom + rest.mT @ rest, jacobian, rtol=0, atol=1e-9)
    assert float((nystrom - jacobian).norm()) > 0.1


def test_what_is_known_is_not_believed_beyond_what_is_seen():
    jacobian = matrices(rank=5)
    values, vectors = torch.linalg.eigh(jacobian)
    root = values[:, -5:].sqrt().unsqueeze(2) * vectors[:, :, -5:].mT
    chosen, images = measured(jacobian, draws(20), 4)
    other = draws(4, seed=9)
    as_it_is, thrice = (Response.fit(chosen, images, e)(other) for e in (root, 3 * root))
    torch.testing.assert_close(as_it_is, thrice)
    truth = other @ jacobian.mT
    error, alone = (float((x - truth).norm() / truth.norm()) for x in (as_it_is, Response.fit(chosen, images)(other)))
    assert error < 0.6 * alone


def test_rounding_does_not_decide_what_one_direction_extends():
    """M = 0 then, up to rounding, and Y M⁺ Yᵀ = 0."""
    for seed in range(20):
        assert float(Response.fit(*measured(matrices(), draws(9, seed=seed), 1)).extension.abs().max()) == 0


def test_measurements_know_of_each_other():
    """Few directions at each of several places: each response is nearer to its matrix than by its own alone."""
    jacobians = drifting()
    places = [measured(j, draws(30, seed=n), 5, seed=n) for n, j in enumerate(jacobians)]
    other = draws(50, seed=70)

    def errors(fitted):
        return [
            float((r(other) - other @ j.mT).norm() / (other @ j.mT).norm())
            for r, j in zip(fitted, jacobians, strict=True)
        ]

    alone, together = errors([Response.fit(*m) for m in places]), errors(smoothed(places))
    assert all(b < a for a, b in zip(alone, together, strict=True))
    assert sum(together) < 0.85 * sum(alone)
    single = next(smoothed(places[:1]))
    assert torch.equal(single(other), Response.fit(*places[0])(other))
    for r in smoothed(places):
        assert r.extension.shape[1] == responses.ROWS_PER_DIRECTION * 5


@pytest.mark.parametrize("k", [1, 5])
def test_no_deviation_is_known(k):
    zero = torch.zeros(B, k, P, dtype=torch.float64)
    places = [measured(matrices(), zero, 3), measured(matrices(), draws(k), 3)]
    for r in smoothed(places):
        assert bool(torch.isfinite(r(draws(2))).all())


@pytest.mark.parametrize("k", [1, 5])
def test_no_deviation_has_no_response(k):
    response = measure(matrices(), torch.zeros(B, k, P, dtype=torch.float64), 3)
    out = response(torch.zeros(B, k, P, dtype=torch.float64))
    assert torch.equal(out, torch.zeros_like(out))


def test_several_responses_at_once():
    """Their weighted sum, in two products."""
    places = [measured(j, draws(20, seed=n), 5, seed=n) for n, j in enumerate(drifting())]
    fitted, weights, other = list(smoothed(places)), (0.5, -0.2, 0.8, -0.1), draws(6, seed=80)
    expected = sum(w * r(other) for w, r in zip(weights, fitted, strict=True))
    torch.testing.assert_close(Response.weighted(list(zip(weights, fitted, strict=True)), other), expected)


def test_fewer_rows_have_the_same_sum_of_squares():
    """Of any linear map of them: exactly within the principal rows, on average in the mixtures."""
    deltas, jacobian = (
        draws(40)[:1] @ matrices()[:1],
        torch.randn(P, P, generator=torch.Generator().manual_seed(8)).double(),
    )
    generator = torch.Generator().manual_seed(0)
    truth = (deltas @ jacobian).square().sum(1)
    found = torch.stack([(reduced(deltas, 12, generator) @ jacobian).square().sum(1) for _ in range(400)])
    assert reduced(deltas, 12, generator).shape == (1, 12, P)
    error = (found.mean(0) - truth).abs() / found.std(0)
    assert float(error.max()) < 5 / 400**0.5
    assert float((found.std(0) / truth).mean()) < 0.1
    # Where the rest is nothing, nothing is left to chance.
    low = draws(40)[:1] @ matrices(rank=5)[:1]
    torch.testing.assert_close(
        (reduced(low, 12, generator) @ jacobian).square().sum(1), (low @ jacobian).square().sum(1)
    )


@pytest.mark.parametrize("scale", [1e-170, 1.0, 1e160])
@pytest.mark.parametrize("number", [0, 1, 3, 7])
def test_the_largest_singular_value_of_numbers_of_any_size(scale, number):
    rows = scale * torch.randn(2, number, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[1] = 0
    expected = [torch.linalg.matrix_norm(r, ord=2) if number else torch.zeros((), dtype=torch.float64) for r in rows]
    torch.testing.assert_close(responses._largest(rows) / scale, torch.stack(expected)[:, None] / scale)
