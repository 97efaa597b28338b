"""``bd.evaluate`` where the truth is known, on the shipped model, and behind the fold of a transformer; what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch

import bayesdiff as bd
from bayesdiff.calibration.evaluation import THEIR_NOISE, THEIRS, WEIGHTS
from bayesdiff.calibration.heldout import HeldOut, Times
from bayesdiff.checks import ArgumentError, EmptyDataError, HeadMismatchError, ShapeError
from bayesdiff.data import open_images
from bayesdiff.data.framing import Framing
from bayesdiff.diffusion.noising import noised
from bayesdiff.diffusion.parametrization import alpha_sigma
from bayesdiff.fitting.source import source_of
from tests.calibration.gaussian import call, made

ALL = {WEIGHTS, THEIRS, THEIR_NOISE, "constant", "tweedie", "log-linear, quantiles", "log-linear, student-t"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def known():
    """Gaussian data, the network that knows them, and a posterior of its head."""
    network, scheduler = made()
    posterior = bd.fit(
        network, network.data(64), scheduler=scheduler, call=call, space="samples", training_draws=1, head="head",
        dataset_size=10**6,
        generator=seeded(), progress=False,
    )  # fmt: skip
    return network, scheduler, posterior


def test_where_the_truth_is_known_tweedie_is_it_and_covers(known):
    network, scheduler, posterior = known
    times = [50.0, 400.0, 900.0]
    report = bd.evaluate(
        posterior, network, network.data(600, seed=2), scheduler=scheduler, call=call, space="samples", progress=False,
        settings=bd.Evaluation(timesteps=times, probes=8, scales=("constant", "tweedie"), shapes=("normal", "quantiles"),
                               batch_size=600),
        generator=seeded(1),
    )  # fmt: skip
    assert report.fitted_on == report.judged_on == 300
    for t, row in zip(times, report.of("tweedie"), strict=True):
        assert row["numbers"] == 300 * 8
        alpha, sigma = alpha_sigma(scheduler, torch.tensor(t))
        truth = network.variance(t) * alpha**2 / sigma**2  # of ε, given x_t
        assert row["spread"] == pytest.approx(float(truth.mean().sqrt()), rel=0.01)  # but for the weights
        for level, covered in zip(report.levels, row["coverage"], strict=True):
            assert covered == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 2400))
        expected = 0.5 * (math.log(2 * math.pi) + 1) + 0.5 * float(truth.log().mean())
        assert row["nll"] == pytest.approx(expected, abs=0.06)
        constant = next(r for r in report.of("constant") if r["t_low"] == t)
        assert constant["nll"] > row["nll"]  # one variance for all is worse than the true ones
        assert constant["squared_residual"] == pytest.approx(float(truth.mean()), rel=0.1)
    quantiles = report.of("constant, quantiles")
    assert all(abs(r["coverage"][2] - 0.9) < 0.03 for r in quantiles)


def test_held_out_rows_are_residuals_and_variances_of_the_head(known):
    network, scheduler, posterior = known
    source = source_of(
        network, head="head", scheduler=scheduler, call=call, pipe_kwargs=None, space="samples", encode="mean"
    )
    x = network.data(5)
    data = open_images(x, None, Framing(value_range="as-is"))
    held = HeldOut(source, data, 3, 4, 8)
    chosen = torch.tensor([True, False, True, True, True])
    rows = list(held.observe(7, Times(200, 201), chosen))
    image = torch.cat([r.image for r in rows])
    assert image.tolist() == [0, 2, 3, 4]
    for r in rows:
        assert bool((r.t == 200).all())
        torch.testing.assert_close(r.residual.shape, r.tweedie.shape)
        alpha, sigma = alpha_sigma(scheduler, torch.tensor(200))
        truth = network.variance(200) * alpha**2 / sigma**2
        torch.testing.assert_close(r.tweedie.flatten(1), truth.expand(len(r.tweedie), -1), rtol=1e-5, atol=1e-7)
        # The residual is what the head's own output misses.
        output = (r.inputs @ posterior.mean.mT).flatten(1)
        for i, n in enumerate(r.image.tolist()):
            g = bd.rng.item_generator(3, 7, n)
            t = Times(200, 201)(g, False)
            noise = torch.randn((2, 2, 2), generator=g)
            _, target = noised(scheduler, x[n : n + 1], noise[None], t[None])
            torch.testing.assert_close(r.residual[i].flatten(), target.flatten() - output[i])
    again = torch.cat([r.residual for r in held.observe(7, Times(200, 201), torch.ones(5, dtype=torch.bool))])
    torch.testing.assert_close(again[image], torch.cat([r.residual for r in rows]))  # whoever is beside them


def test_the_shipped_model(shipped, tmp_path):
    pipe, posterior = shipped
    _, data = bd.zoo.load("fashion-ddpm")
    report = bd.evaluate(
        posterior, pipe, data.heldout.subset(slice(0, 1000, 50)), generator=seeded(), progress=False,
        settings=bd.Evaluation(bins=2, probes=2, positions=40),
    )  # fmt: skip
    assert set(report.methods()) >= ALL
    for method in report.methods():
        for row in report.of(method):
            assert all(math.isfinite(row[k]) for k in ("nll", "crps", "ence", "spread"))
            assert row["coverage"] == sorted(row["coverage"])
            assert row["images"] == 10
    weights, noise, best = (report.of(m) for m in (WEIGHTS, "constant", "log-linear, quantiles"))
    assert all(w["coverage"][-1] < 0.5 for w in weights)  # the weights alone explain next to nothing
    assert all(w["weights_share"] < 0.01 for w in weights)
    assert all(b["crps"] < n["crps"] for b, n in zip(best, noise, strict=True))
    assert "do not test (1)" in str(report)
    assert "10 of the held-out images; all was judged on the other 10" in report.meaning
    report.save(tmp_path)
    written = json.loads((tmp_path / "calibration.json").read_text())
    assert written["rows"][0]["method"] == WEIGHTS
    assert (tmp_path / "calibration.png").stat().st_size > 10_000
    assert "\n" not in repr(report)


def test_posteriors_without_sums_are_evaluated_without_bayesdiffs_settings(known, tmp_path):
    network, scheduler, posterior = known
    posterior.save(tmp_path)
    loaded = bd.LaplacePosterior.load(tmp_path)
    few = bd.Evaluation(bins=1, scales=("constant",), shapes=("normal",))

    def run(settings, seed=1):
        return bd.evaluate(
            loaded, network, network.data(12), scheduler=scheduler, call=call, space="samples", progress=False,
            settings=settings, generator=seeded(seed),
        )  # fmt: skip

    report = run(few)
    assert report.methods() == [WEIGHTS, "constant"]
    assert "could not be cut" in report.notes[0]
    assert run(few).rows == report.rows  # the same seed, the same numbers
    assert run(few, 2).rows != report.rows
    twice = run(bd.Evaluation(bins=1, scales=("constant",), shapes=("normal",), draws=2))
    assert twice.rows[0]["numbers"] == 2 * report.rows[0]["numbers"]


def test_bad_input_is_a_typed_error(known, shipped):
    network, scheduler, posterior = known
    common = {"scheduler": scheduler, "call": call, "space": "samples", "progress": False}
    with pytest.raises(EmptyDataError, match="at least 8 held-out images"):
        bd.evaluate(posterior, network, network.data(7), **common)
    with pytest.raises(ArgumentError, match="a LaplacePosterior"):
        bd.evaluate("posterior", network, network.data(9), **common)
    with pytest.raises(ArgumentError, match=r"bayesdiff\.Evaluation"):
        bd.evaluate(posterior, network, network.data(9), settings={"bins": 3}, **common)
    with pytest.raises(ArgumentError, match="from 0 to 1000"):
        bd.evaluate(posterior, network, network.data(9), settings=bd.Evaluation(timesteps=[1001.0]), **common)
    with pytest.raises((HeadMismatchError, LookupError)):
        bd.evaluate(posterior, shipped[0], network.data(9), progress=False)
    with pytest.raises(ShapeError):
        bd.evaluate(posterior, network, network.data(9)[:, :1], **common)
    for wrong in (
        {"bins": 0},
        {"scales": ["x"]},
        {"shapes": ["x"]},
        {"levels": [1.0]},
        {"timesteps": []},
        {"probes": -1},
    ):
        with pytest.raises(ArgumentError):
            bd.Evaluation(**wrong)
