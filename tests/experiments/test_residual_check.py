"""The experiment about the residual, once in the smallest."""

from __future__ import annotations

import json

import bayesdiff as bd
from experiments.residual_check import __main__ as residual_check


def test_residual_check(tmp_path, monkeypatch):
    pipe, data = bd.zoo.load("fashion-ddpm")
    subset = {key: value[:20] for key, value in data.items()}
    posterior = bd.fit(pipe, subset, dataset_size=data.dataset_size, progress=False)
    monkeypatch.setattr(residual_check, "fitted", lambda _: posterior)
    residual_check.main(
        samples=1, draws=4, steps=5, width=8, iterations=[1], networks=1, batch=2, images=10, members=4, out=tmp_path
    )
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    summary = results["summary"]
    assert {r["network"] for r in results["runs"]} <= {"seed 100, 1 iterations", "shipped"}
    assert sum(summary[k] for k in ("bad_warned", "bad_silent", "good_warned", "good_silent")) == summary["samples"]
    assert 0 < summary["ensemble_against_members"] < 3
    assert 0 <= summary["default_worse_silent"] <= summary["default_worse"] <= summary["pairs"]
    assert (tmp_path / "residual_check.png").exists()
