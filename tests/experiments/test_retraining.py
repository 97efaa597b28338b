"""Networks trained anew, small."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from experiments.retraining.__main__ import run
from experiments.retraining.analysis import ceiling, jackknife
from experiments.retraining.judge import TIMESTEPS, Points
from experiments.retraining.methods import Base, Sizes, seeded
from experiments.retraining.problems import Sines
from experiments.retraining.train import kept, train, trained

#: Of networks that hardly learnt anything.
pytestmark = pytest.mark.filterwarnings(
    "ignore:A, the covariance of the scores", "ignore:the scores differ no more", "ignore:the network's response"
)

RECIPE = replace(Sines.recipe, networks=6, size=120, steps=40, batch=64, together=3)


def test_a_network_does_not_depend_on_what_is_trained_beside_it(tmp_path):
    problem = Sines(replace(RECIPE, steps=8))
    together, alone = trained(problem, [0, 2]), trained(problem, [2])
    for name, value in alone[0].items():
        torch.testing.assert_close(together[1][name], value, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(together[0][name], value)
    assert train(problem, tmp_path, rounds=1) == 3
    first = (tmp_path / "network-00.safetensors").stat().st_mtime_ns
    assert train(problem, tmp_path) == 0
    assert (tmp_path / "network-00.safetensors").stat().st_mtime_ns == first
    torch.testing.assert_close(kept(tmp_path, problem, 2), alone[0], rtol=1e-4, atol=1e-5)


def test_retraining(tmp_path):
    problem = Sines(RECIPE)
    train(problem, tmp_path / "work")
    train(problem.of_one_data_set(3), tmp_path / "work" / "same_data")
    sizes = Sizes(images=60, draws=8, refits=4, subset=40, subsets=1, pairs=60, whole=False)
    rows = run(problem, tmp_path / "work", tmp_path / "out", sizes, (12, 6, 4), 1, (100, 1), 3)
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["settings"]["training_draws"] == 40 * 64 / 120
    at = {(r["place"], r["method"]): r for r in rows}
    for place in [*(f"t={t}" for t in TIMESTEPS), "sample"]:
        for method in ("sandwich", "GGN", "random subset", "bootstrap refits of the head", "sandwich × loss gap"):
            row = at[place, method]
            assert row["ratio"] >= 0
            assert row.get("log_correlation_se", 1) > 0, (place, method, row)
    assert at["t=500", "other networks, same data"]["ratio"] > 0.3
    assert at["t=500", "sandwich"]["ratio"] < 1  # an untrained network spreads more than its head
    assert (tmp_path / "out" / "retraining.png").stat().st_size > 10_000
    again = run(
        problem, tmp_path / "work", tmp_path / "out", sizes, (12, 6, 4), 1, (100, 1), 3
    )  # what was judged is kept
    assert again == rows


def test_gradients_and_draws_of_all_weights(tmp_path):
    """Against autograd, one row and one output at a time; and draws have the covariance H⁻¹."""
    problem = Sines(RECIPE)
    train(problem, tmp_path, rounds=1)
    base = Base(problem, tmp_path, 0, Sizes(images=20, pairs=20))
    x, t, _, given = Points(problem, 3, 1, 2).noisy(500)
    indices = base.random_indices(30, 0)
    found = base._gradients(x, t, given, torch.eye(10).expand(3, 10, 10), indices)
    weights = {k: v.clone().requires_grad_() for k, v in base.weights.items()}
    output = functional_call(base.network, weights, (x, t))[0]
    for row, j in ((0, 0), (2, 7)):
        grads = torch.autograd.grad(output[row, j], list(weights.values()), retain_graph=True)
        expected = torch.cat([g.flatten() for g in grads])[indices]
        torch.testing.assert_close(found[row, j], expected, rtol=1e-4, atol=1e-6)
    curvature = base.curvature(indices, 5) * problem.recipe.size * problem.recipe.training_draws
    drawn = torch.stack([torch.cat([w.flatten() for w in d.values()])[indices] for d in base.subset(indices, 30, 5)])
    covariance = (drawn - base._flat()[indices]).double()
    covariance = covariance.T @ covariance / 30  # 30 orthogonal draws of 30 numbers: exact
    eigenvalues = torch.linalg.eigvalsh(torch.linalg.inv(covariance) - curvature)
    assert float(eigenvalues.std() / eigenvalues.mean().abs()) < 0.1  # what is left is τ I


def test_error_bars():
    values = torch.randn(12, 300, generator=seeded(0), dtype=torch.float64) * torch.linspace(1, 3, 300)
    errors = jackknife(values, lambda v: {"mean": float(v.mean())})
    by_network = values.mean(1)
    assert math.isclose(errors["mean"], float(by_network.std() / 12**0.5), rel_tol=1e-9)
    found = ceiling(values, seeded(1))
    assert 0.2 < found["log_correlation"] < found["perfect_log_correlation"] < 1
