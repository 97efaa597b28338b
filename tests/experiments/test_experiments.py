"""The experiments run, small, and record what they did."""

from __future__ import annotations

import json

import pytest
import torch

import bayesdiff
from bayesdiff.diffusion.noising import draw
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.head.sums import outer_products
from bayesdiff.io import environment
from bayesdiff.laplace.loss import L1, Huber
from experiments.common import Only, agreement, record, results_folder, table
from experiments.draws_check import __main__ as draws_check
from experiments.fit_overhead import __main__ as fit_overhead
from experiments.guidance_check import __main__ as guidance_check
from experiments.linearity_check import __main__ as linearity_check
from experiments.mc_vs_analytic import __main__ as mc_vs_analytic
from experiments.mc_vs_analytic.heads import Shape, fitted
from experiments.posterior_check import __main__ as posterior_check
from experiments.posterior_check import subject as judged
from experiments.posterior_check.refits import least_squares, m_estimates, resample
from experiments.propagation import __main__ as propagation
from experiments.propagation import references
from experiments.refresh_check import __main__ as refresh_check
from experiments.zoo_maps import __main__ as zoo_maps
from tests import cases
from tests.fitting.test_by_pipe import MADE, RECIPES, data_of, double

#: Settings are too small for good maps.
pytestmark = pytest.mark.filterwarnings("ignore:the network's response is not well known")


def test_agreement():
    reference = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    same = agreement(2 * reference, reference)
    assert same["correlation"] == pytest.approx(1)
    assert same["log_correlation"] == pytest.approx(1)
    assert same["ratio"] == pytest.approx(2)
    assert same["relative_l2"] == pytest.approx(1)
    assert agreement(-reference, reference)["correlation"] == pytest.approx(-1)
    assert "log_correlation" not in agreement(reference - 0.2, reference)


def test_table_and_record(tmp_path):
    text = table([{"a": "x", "b": 1.234}, {"a": "long", "b": None}], {"a": "", "b": ".1f"})
    assert [line.split() for line in text.splitlines()] == [["a", "b"], ["x", "1.2"], ["long"]]
    folder = results_folder("x", tmp_path / "new")
    record(folder, {"seed": 0}, [1.0])
    result = json.loads((folder / "results.json").read_text())
    assert result["settings"] == {"seed": 0}
    assert result["environment"]["versions"] == environment("cpu")["versions"]


@pytest.mark.parametrize("loss", ["squares", "huber"])
def test_posterior_check(tmp_path, loss):
    posterior_check.main(
        refits_number=24, images=24, test_images=3, training_draws=2, loss=loss, iterations=4, settle=loss != "squares",
        density="logit-normal" if loss != "squares" else "uniform", out=tmp_path,
    )  # fmt: skip
    result = json.loads((tmp_path / "results.json").read_text())
    chosen = [r for r in result["results"]["agreement"] if r["posterior"] == posterior_check.SHOWN]
    assert [r["t"] for r in chosen] == list(posterior_check.TIMESTEPS)
    assert all(r["log_correlation"] > 0.4 for r in chosen)  # few images, few refits
    assert all(s["share_within"] > 0 for s in result["results"]["shares"])
    assert (tmp_path / "posterior_check.png").stat().st_size > 10_000


def test_no_two_checks_share_a_folder():
    """Another model, loss, weighting or density does not replace the results of the first."""
    name = posterior_check.folder_name
    assert name("fashion-ddpm") == "posterior_check"
    assert name("earth-sd3", density="logit-normal") == name("earth-sd3") == "posterior_check_earth_sd3"
    assert name("fashion-ddpm", "l1") == "posterior_check_l1"
    assert name("fashion-ddpm", density="logit-normal") == "posterior_check_logit_normal"
    assert name("fashion-ddpm", loss_weights="noise") == "posterior_check_noise"
    assert name("fashion-4step", settle=True) == "posterior_check_fashion_4step_settled"
    assert name("fashion-ddpm", "l1", settle=True, draws=8) == "posterior_check_l1_8_draws"


def test_posterior_check_at_the_timesteps_of_a_distilled_model(tmp_path):
    posterior_check.main(
        refits_number=8, images=16, test_images=2, training_draws=2, pool=3, density="249,999", out=tmp_path
    )
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["settings"]["draws_of_judge"] == 3
    assert {r["t"] for r in result["results"]["agreement"]} == {249, 999}


def test_only_these_timesteps_are_drawn():
    only = Only((249, 499, 749, 999), 1000)
    t, _ = draw(cases.scheduler(num_train_timesteps=1000), (1,), 0, 0, 40, 2, only)
    assert t.unique().tolist() == [249, 499, 749, 999]


@pytest.mark.parametrize("name", ["sd-ddim-guided", "sd3"])
def test_the_judge_sees_the_gradients_of_the_training_loss(name):
    """φ and residuals of models with prompts and a VAE, against autograd through the training step written out by hand."""
    recipe, path, given = RECIPES[name]
    pipe, data = double(MADE[name]()), data_of(name)
    network = bayesdiff.head.find.denoiser(pipe)
    subject = judged.Subject(pipe, data, given)
    t = torch.tensor([30, 500, 950])
    noise = torch.randn((3, *subject.shape), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x, r = subject.observe(torch.tensor([0, 1, 2]), t, noise)
    scores = outer_products(subject.head.geometry, x, r)
    layer = network.get_submodule(path).requires_grad_()
    output, target = recipe(pipe, data["images"], t, noise)
    for i in range(3):
        loss = (target[i] - output[i]).square().sum() / 2
        weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias], retain_graph=True)
        torch.testing.assert_close(-scores[i], torch.cat([weight.flatten(1), bias[:, None]], 1), rtol=1e-5, atol=1e-6)


def test_draws_of_the_judge_do_not_depend_on_the_batch(monkeypatch):
    """Of the encoder's posterior, too: each draw has its own sample of it."""
    pipe, data = double(MADE["sd-ddim-guided"]()), data_of("sd-ddim-guided")
    subject = judged.Subject(pipe, data)
    ones = torch.ones(10, dtype=torch.float64)
    ((first, x, r, w),) = subject.draws(7, 2, None, None, ones)
    assert first == 0
    assert len(x) == len(r) == len(w) == 6
    monkeypatch.setattr(judged, "BATCH", 2)
    parts = list(subject.draws(7, 2, None, None, ones))
    assert [p[0] for p in parts] == [0, 2, 4]
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), x)
    torch.testing.assert_close(torch.cat([p[2] for p in parts]), r)
    t, noise = draw(pipe.scheduler, subject.shape, 7, 0, 3, 2)
    rows = torch.arange(3).repeat_interleave(2)
    assert not torch.allclose(subject.observe(rows, t, noise)[0], x)  # the means


def few_draws(geometry):
    """20 draws of 40 positions, and their weights, in two parts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 40, geometry.in_channels, generator=generator)
    r = torch.randn(20, 40, geometry.out_channels, generator=generator) + x[..., :1]
    w = torch.rand(20, generator=generator, dtype=torch.float64) + 0.1
    return x, r, w, [(0, x[:7], r[:7], w[:7]), (7, x[7:], r[7:], w[7:])]


def test_refits_are_least_squares():
    """Against torch's solve on the rows repeated as often as they were drawn."""
    geometry = HeadGeometry("linear", 3, 2, bias=True)
    x, r, w, parts = few_draws(geometry)
    counts = resample(5, 4, 3, 6, torch.Generator().manual_seed(1))
    assert counts.shape == (6, 20)
    assert bool((counts.sum(1) == 15).all())
    # Three draws of every image that is there, as often as it is.
    assert bool((counts.view(6, 5, 4).sum(2) % 3 == 0).all())
    weight = torch.randn(2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    heads, _ = least_squares(geometry, parts, counts, weight, 0.3)
    same, moved = m_estimates(geometry, parts, counts, weight, 0.3, Huber(1e6), 12)
    assert moved < 1e-4
    phi = geometry.design(x).double().flatten(0, 1)
    target = (r.double() + geometry.design(x).double() @ weight.T).flatten(0, 1)
    for k in range(6):
        by_row = (counts[k] * w).repeat_interleave(40)[:, None]
        gram = phi.T @ (by_row * phi) + 0.3 * torch.eye(4).double()
        expected = torch.linalg.solve(gram, phi.T @ (by_row * target)).T
        torch.testing.assert_close(weight + heads[k], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(same[k], heads[k], rtol=2e-3, atol=2e-3)  # features are kept in half precision


@pytest.mark.parametrize("loss", [Huber(0.3), L1()])
def test_refits_under_other_losses_are_minima(loss):
    """No step along any weight makes the loss smaller."""
    geometry = HeadGeometry("linear", 3, 2, bias=True)
    x, r, w, parts = few_draws(geometry)
    x = x.half().float()
    counts = resample(5, 4, 3, 3, torch.Generator().manual_seed(1))
    heads, _ = m_estimates(geometry, parts, counts, torch.zeros(2, 4).double(), 0.3, loss, 40)

    def total(k, head):
        left = r.double() - geometry.design(x).double() @ head.T
        rho = left.abs() if isinstance(loss, L1) else torch.nn.functional.huber_loss(
            left, torch.zeros_like(left), delta=0.3, reduction="none"
        )  # fmt: skip
        return float((counts[k] * w) @ rho.sum((1, 2))) + 0.15 * float(head.square().sum())

    for k in range(3):
        best = total(k, heads[k])
        for index in range(8):
            for step in (-0.03, 0.03):
                other = heads[k].clone()
                other.view(-1)[index] += step
                assert total(k, other) > best


@pytest.mark.parametrize(
    "shape", [Shape("conv", "conv", 6, 2, 8), Shape("tokens", "linear", 10, 3, 40)], ids=lambda s: s.name
)
def test_mc_vs_analytic(shape):
    rows = mc_vs_analytic.measure_shape(shape, *fitted(shape, 2), torch.device("cpu"), torch.float32)
    by_method = {r["method"]: r for r in rows}
    assert by_method["closed form, full"]["error"] < 1e-5
    assert by_method["closed form, diag"]["error"] > 1e-3
    for n in mc_vs_analytic.DRAWS:
        row = by_method[f"batched MC, n = {n}"]
        assert 0.5 < row["mc_error"] / row["theory"] < 2
    # laplace-torch draws from the very posterior that we draw from.
    assert 0.5 < by_method["laplace-torch, MC n = 100"]["mc_error"] / by_method["batched MC, n = 100"]["mc_error"] < 2


def test_links_in_the_experiment():
    shape = Shape("conv", "conv", 6, 2, 16)
    rows = mc_vs_analytic.measure_links(shape, *fitted(shape, 2), torch.device("cpu"))
    exact = [r for r in rows if r["approximation"] == "exact"]
    assert len(exact) == 3
    assert all(r["std_error"] < 1e-6 for r in exact)
    assert all(r["std_error"] > 1e-4 for r in rows if r["approximation"] == "mc, n = 100")


def test_the_clock_of_a_fit():
    network = cases.tiny_unet(channels=1)
    data = {"images": torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1}
    clock = fit_overhead.timed_fit(network, cases.scheduler(), data, 2, structure="full", covariance="ggn")
    assert 0 < clock.network < clock.whole_pass < clock.total
    assert not network._forward_hooks
    assert not network._forward_pre_hooks


@pytest.fixture(scope="module")
def small_posterior():
    pipe, data = bayesdiff.zoo.load("fashion-ddpm")
    return bayesdiff.fit(
        pipe, data.subset(slice(60)), dataset_size=data.dataset_size, generator=torch.Generator().manual_seed(0),
        progress=False,
    )  # fmt: skip


def test_propagation(tmp_path, monkeypatch, small_posterior):
    monkeypatch.setattr(references, "fitted", lambda _: small_posterior)
    monkeypatch.setattr(propagation, "MEMBERS", (2, 6))
    propagation.main(trajectories=24, samples=3, repeats=1, draws=16, only=["tcd-4"], out=tmp_path)
    kept = sorted((tmp_path / "references").iterdir())
    assert [path.name for path in kept] == ["tcd-4.safetensors"]
    result = json.loads((tmp_path / "results.json").read_text())
    rows = {(r["sampling"], r["method"], r["detail"]): r for r in result["results"]}
    for budget, k in zip(propagation.BUDGETS, ("2.2", "3.3", "5.6"), strict=True):
        row = rows["tcd-4", "tangents", f"K = 16, {k}×"]
        assert row["calls_ratio"] <= budget + 1 / 4  # one call asks whether the network repeats itself
        assert row["negative"] == 0
    assert row["correlation"] > 0.6
    assert rows["tcd-4", "ensemble", "M = 6"]["calls_ratio"] == 7
    assert rows["tcd-4", "bayesdiff", "S = 10, every 1"]["negative"] > 0
    assert (tmp_path / "propagation.png").stat().st_size > 10_000
    # Other ways to sample are kept, if their settings are the same.
    written = json.loads((tmp_path / "results.json").read_text())
    settings = {k: written["settings"][k] for k in ("trajectories", "samples", "repeats", "draws", "seed", "model")}
    assert propagation.kept(tmp_path, settings, ["ddim-50"]) == (written["results"], written["settings"]["commands"])
    assert list(written["settings"]["commands"]) == ["tcd-4"]
    assert propagation.kept(tmp_path, settings, ["tcd-4"]) == ([], {})
    assert propagation.kept(tmp_path, settings | {"draws": 17}, ["ddim-50"]) == ([], {})
    assert propagation.kept(tmp_path / "none", settings, []) == ([], {})
    # A reference that fits is not made again.
    times = [path.stat().st_mtime_ns for path in kept]
    monkeypatch.setattr(references.Setting, "pipe", None)
    (sampling,) = (s for s in references.SAMPLINGS if s.name == "tcd-4")
    found = references.reference(tmp_path, references.Setting(3, 24, 0), sampling)
    assert found.shape == (3, 1, 28, 28)
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_linearity_check(tmp_path, monkeypatch, small_posterior):
    monkeypatch.setattr(references, "fitted", lambda _: small_posterior)
    linearity_check.main(
        trajectories=16, samples=2, draws=8, only=["tcd-4"], references=tmp_path / "kept", out=tmp_path / "out"
    )
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [r["image"] for r in rows] == ["all", "0", "1"]
    assert all(r["correlation"] > 0.6 and 0.4 < r["ratio"] < 2.5 for r in rows)
    assert (tmp_path / "kept" / "references" / "tcd-4.safetensors").exists()


def test_subsets_of_an_ensemble():
    members = torch.randn(8, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors = (members - members.mean(0)) / 7**0.5
    output = bayesdiff.UncertaintyOutput(None, None, None, [], 9, 1, None, factors=factors)
    maps = propagation.subsets(output, 4)
    torch.testing.assert_close(maps[1], members[4:].std(0).float())
    assert len(propagation.subsets(output, 3)) == 2


def test_guidance_check(tmp_path, monkeypatch, small_posterior):
    monkeypatch.setattr(guidance_check, "fitted", lambda _: small_posterior)
    guidance_check.main(draws=400, samples=1, steps=2, out=tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [r["s"] for r in rows] == [s for s in guidance_check.SCALES for _ in range(2)]
    assert all(abs(r["closed_over_brute"] - 1) < 0.15 for r in rows)  # one sample's draws err together
    assert all(r["correlation"] > 0.97 for r in rows)
    assert all(r["independent_over_brute"] > 10 for r in rows if r["s"] >= 7.5)


def test_refresh_check(tmp_path, monkeypatch, small_posterior):
    monkeypatch.setattr(refresh_check, "fitted", lambda _: small_posterior)
    monkeypatch.setattr(refresh_check, "PLANS", {("ddim", 8): ((2, 2), (7, 6))})
    monkeypatch.setattr(refresh_check, "DENSITIES", (1.0, 1.5))
    refresh_check.main(samples=1, draws=6, out=tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    exact = [r for r in rows if (r["R"], r["p"]) == (7, 6)]
    assert len(exact) == 1
    assert exact[0]["relative_l2"] < 1e-4  # as many calls as draws, in every step
    assert len(rows) == 6
    (default,) = (r for r in rows if r["default"])
    plan = default["R"], default["p"]
    of_plan = {(r["density"], r["nystrom"], r["shared"]): r["relative_l2"] for r in rows if (r["R"], r["p"]) == plan}
    assert len(of_plan) == 4
    assert len(set(of_plan.values())) == 4  # every switch does something


def test_draws_check(tmp_path, monkeypatch, small_posterior):
    monkeypatch.setattr(draws_check, "fitted", lambda _: small_posterior)
    draws_check.main(samples=1, steps=2, draws=[40], repeats=2, out=tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    independent, orthogonal = rows
    assert (independent["orthogonal"], orthogonal["orthogonal"]) == (False, True)
    assert orthogonal["theory"] < independent["theory"] == pytest.approx((2 / 40) ** 0.5)
    assert orthogonal["variance_error"] < 3 * orthogonal["theory"]


@pytest.mark.filterwarnings("ignore:A, the covariance of the scores")
def test_maps_of_a_model_without_a_decoder(tmp_path):
    """What a decoder would say is none, not NaN."""
    zoo_maps.main(model="fashion-4step", members=4, images=16, repeats=1, out=tmp_path)
    halves, default, fewer = json.loads((tmp_path / "results.json").read_text())["results"]
    assert default["decoder_residual"] is None
    assert default["decoder_calls"] == fewer["decoder_calls"] == 0
    assert default["calls_ratio"] < 4
    assert -1 < halves["correlation"] < 1
    assert 0.5 < default["correlation"] < 1
