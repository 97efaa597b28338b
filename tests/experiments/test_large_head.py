"""The stages of experiments/large_head, on a small head."""

from __future__ import annotations

import pytest

from experiments.large_head.measure import run

SHAPE = [60, 3, 9, 4]


@pytest.mark.filterwarnings("ignore::bayesdiff.checks.ProjectionWarning")
@pytest.mark.parametrize(
    "settings", [{"training_draws": 2}, {"training_draws": 2, "structure": "kron"}, {"covariance": "ggn"}]
)
def test_stages(tmp_path, settings):
    task = {"folder": str(tmp_path), "shape": SHAPE}
    fitted = run({**task, "stage": "fit", "rows": 64})
    assert fitted["file_mb"] > 0.8 * 8e-6 * (10 * 9**2 + 2 * 64 * 3 * 9)
    assert run({**task, "stage": "build", "settings": settings, "name": "p"})["seconds"] > 0
    assert run({**task, "stage": "load", "name": "p"})["peak_gb"] > 0.1
    compared = run({**task, "stage": "compare", "settings": settings, "rows": 64})
    assert compared["stated"] == (2 / 64) ** 0.5
    assert compared["error"] < (1e-12 if "covariance" in settings else 2 * compared["stated"])
