"""The calibration experiments run, small; the sampler of the Tweedie check is right where the answer is known."""

from __future__ import annotations

import json

import pytest
import torch

from bayesdiff.diffusion.parametrization import alpha_sigma
from experiments import pages
from experiments.calibration import __main__ as calibration
from experiments.calibration import tables
from experiments.tweedie_check import __main__ as tweedie_check
from tests.calibration.gaussian import SHAPE, made

#: Settings are too small for good maps.
pytestmark = pytest.mark.filterwarnings("ignore:the network's response is not well known", "ignore:A, the covariance")


def test_calibration(tmp_path):
    calibration.main(model="fashion-ddpm", images=20, heldout=12, probes=1, timesteps="100,800", out=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert {r["method"] for r in results["bars"]} >= {"weights only", "tweedie", "log-linear, quantiles"}
    assert results["fitted_on"] == results["judged_on"] == 6
    assert (tmp_path / "calibration.png").exists()


def test_the_worst_bin_decides(tmp_path):
    class Report:
        levels = (0.5, 0.9)

        @staticmethod
        def of(method):
            scores = {"nll": 1.0, "crps": 1.0, "ence": 1.0, "coverage_error": [0.01, 0.01]}
            return [
                scores | {"coverage": [0.53, 0.91]},
                scores | {"coverage": [0.47, 0.921 if method == "bad" else 0.91]},
            ]

    good, bad = (calibration.within(Report, m) for m in ("good", "bad"))
    assert good["within"]
    assert not bad["within"]
    assert bad["worst_90"] == pytest.approx(2.1)


def test_tweedie_check(tmp_path):
    tweedie_check.main(
        trajectories=1, samples=4, steps=6, ancestral=2, shares="0.5", images=20, out=tmp_path,
    )  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert {r["way"] for r in results["summary"]} == {"identity", "map"}
    assert all(r["std"] > 0 for r in results["rows"])


def test_samples_have_the_spread_of_gaussian_data():
    network, scheduler = made()

    class Exact:
        continuous = False

        def noise(self, t):
            return tuple(float(v) for v in alpha_sigma(scheduler, torch.tensor(t)))

        def __call__(self, x, t, of):
            alpha, sigma = self.noise(t)
            return (x - sigma * network(x, torch.tensor(round(t)))) / alpha

    d, t = Exact(), 400.0
    x = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = network.variance(t).view(SHAPE)
    drawn = tweedie_check.clean_samples(d, x, t, 0, 4000, 100, 0)
    torch.testing.assert_close(drawn.var(0), truth, rtol=0.12, atol=0.003)
    torch.testing.assert_close(drawn.mean(0), d(x, t, 0)[0], rtol=0, atol=0.06)
    torch.testing.assert_close(tweedie_check.identity(d, x, t, 0), truth, rtol=1e-5, atol=1e-7)


def test_the_tables_of_the_page_are_those_of_the_results():
    page = tables.PAGE.read_text(encoding="utf-8")
    assert pages.MARKED.findall(page)
    assert pages.written(page, tables.TABLES) == page
