"""What M draws of each image in the training make of the posterior: A and B, against loops over images and draws."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from bayesdiff.checks import ArgumentError, ProjectionWarning, ShapeError, TrainingDrawsWarning
from bayesdiff.head.find import Head
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics
from bayesdiff.laplace.training import (
    Scores,
    between_factor,
    check_training_draws,
    choose_draws,
    positive_part,
    score_factor,
)
from tests import cases, references

BINS = 3
CASES = [
    c for c in cases.layer_cases() if c.name in ("conv3x3", "conv3x3-one-channel", "linear-tokens", "linear-vector")
]
#: Four images with three, two, … draws: as unequal as a merge makes them. 12 draws, the rest are images with one.
UNEQUAL = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layout(case, unequal=False):
    n = len(case.inputs)
    images = torch.tensor(UNEQUAL) if unequal else torch.arange(n) // 4
    images = torch.cat([images, images.max() + 1 + torch.arange(n) // 2])[:n] if unequal else images
    return torch.arange(n) % BINS, images


def residuals(case, unequal=False):
    """With a part that all draws of an image have in common: else A is 0."""
    images = layout(case, unequal)[1]
    common = torch.randn(len(images), generator=generator(8), dtype=torch.float64)[images]
    return case.residuals.double() + common.view(-1, *(1,) * (case.residuals.ndim - 1))


def statistics(case, unequal=False):
    bins, images = layout(case, unequal)
    out = Statistics(HeadGeometry.of(case.layer), BINS)
    out.update(case.inputs.double(), residuals(case, unequal), bins, images)
    return out


def posterior(case, unequal=False, **settings):
    head = Head("head", case.layer, HeadGeometry.of(case.layer))
    return LaplacePosterior.from_statistics(statistics(case, unequal), head, **{"prior_precision": 0.7, **settings})


def dense(case, fitted, size, m_training, structure="full", unequal=False):
    """H⁻¹ N M² (A + B/M) H⁻¹ over all C·D weights, by loops."""
    _, images = layout(case, unequal)
    weights = fitted.weights[layout(case)[0]]
    scores = references.draw_scores(case.layer, case.inputs, residuals(case, unequal), weights)
    total, within, between = references.between_and_within(scores, images.tolist())
    c, d = fitted.mean.shape
    # The scale of the likelihood is n·m draws there; here N·M.
    inverse = references.dense_posterior(
        case.layer, case.inputs, residuals(case, unequal), layout(case)[0], images, 1 / fitted.weights,
        prior_precision=1e-12, structure="full", covariance="ggn",
        scale=size * m_training / len(images),
    )  # fmt: skip
    precision = torch.linalg.inv(inverse)
    n = len(images.unique())
    shortage = float((1 / images.bincount().double()).mean()) - 1 / m_training
    between = None if shortage <= 1e-12 else references.projected(between, precision)
    meat = total - shortage * within if between is None else between + within / m_training
    meat = size * m_training**2 * meat
    assert n == fitted.num_images
    if structure == "kron":
        meat = references.nearest_kronecker(meat, c, d)
    if structure == "diag":
        precision, meat = precision.diagonal().diag(), meat.diagonal().diag()
    h = torch.linalg.inv(precision + 0.7 * torch.eye(c * d).double())
    return h @ meat @ h


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("m_training", [1, 2.5, 4, 9, 100])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore::bayesdiff.checks.ProjectionWarning")
def test_the_covariance_equals_loops_over_images_and_draws(case, m_training, structure):
    fitted = posterior(case, training_draws=m_training, dataset_size=50, structure=structure)
    expected = dense(case, fitted, 50, m_training, structure)
    variance = references.dense_variance(case.layer, case.inputs, expected)
    torch.testing.assert_close(
        fitted.variance(case.inputs.double()), variance, rtol=2e-6, atol=1e-6 * float(variance.mean())
    )
    low = fitted.recut(structure="lowrank", rank=10_000)
    full = fitted.recut(structure="full")
    torch.testing.assert_close(low.variance(case.inputs.double()), full.variance(case.inputs.double()))


@pytest.mark.parametrize("m_training", [1.2, 30])
@pytest.mark.filterwarnings("ignore::bayesdiff.checks.ProjectionWarning")
def test_images_may_have_unequally_many_draws(m_training):
    case = CASES[1]
    fitted = posterior(case, True, training_draws=m_training, dataset_size=50)
    variance = references.dense_variance(case.layer, case.inputs, dense(case, fitted, 50, m_training, unequal=True))
    torch.testing.assert_close(fitted.variance(case.inputs.double()), variance, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "lowrank"])
@pytest.mark.parametrize("covariance", ["sandwich", "ggn", "ef"])
def test_as_many_draws_as_the_training_had_is_the_plain_covariance(structure, covariance):
    case = CASES[0]
    settings = {"structure": structure, "covariance": covariance, "dataset_size": 40}
    plain, told = posterior(case, **settings), posterior(case, training_draws=4, **settings)
    torch.testing.assert_close(told.variance(case.inputs), plain.variance(case.inputs))
    assert told.log_marginal_likelihood() == pytest.approx(plain.log_marginal_likelihood())
    assert (plain.training_draws, told.training_draws, told.draws_per_image) == (None, 4, 4)


def known(n, m, d=6, seed=0):
    """A linear model whose images have an effect of their own: scores with a known A and B, and both."""
    root_a = torch.randn(d, d, generator=generator(100), dtype=torch.float64) * torch.linspace(0.2, 2, d).double()
    root_a = root_a + 2 * torch.eye(d, dtype=torch.float64)
    root_b = torch.randn(d, d, generator=generator(101), dtype=torch.float64) * torch.linspace(3, 1, d).double()
    g = generator(seed)
    effects = torch.randn(n, 1, d, generator=g, dtype=torch.float64) @ root_a
    scores = effects + torch.randn(n, m, d, generator=g, dtype=torch.float64) @ root_b
    rows = torch.arange(n).repeat_interleave(m)
    return Scores.of(scores.flatten(0, 1)[:, None], rows), root_a.T @ root_a, root_b.T @ root_b


@pytest.mark.parametrize("m_training", [1, 3, 8, 1e9])
def test_known_a_and_b(m_training):
    """Of 40,000 images, an entry is known to about 1 %."""
    scores, a, b = known(40_000, 3)
    eye = torch.eye(6, dtype=torch.float64)
    factor, share = score_factor(scores, m_training, eye)
    got = factor.flatten(1).T @ factor.flatten(1)
    expected = a + b / m_training
    assert float((got - expected).norm() / expected.norm()) < 0.05
    assert share == 0


def test_many_training_draws_leave_a_only_and_few_images_no_bias():
    """Of 40 images A is indefinite, and projected: the mean size is right over many data sets, without the scale it is not."""
    eye = torch.eye(6, dtype=torch.float64)
    sizes, cut = [], []
    for seed in range(300):
        scores, a, _ = known(40, 2, seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ProjectionWarning)
            factor, share = between_factor(scores, eye)
        sizes.append(float(factor.square().sum()))
        cut.append(share)
    sizes = torch.tensor(sizes)
    error = float(sizes.std()) / math.sqrt(len(sizes))
    assert abs(float(sizes.mean()) - float(a.trace())) < 4 * error + 0.01 * float(a.trace())
    assert 0.02 < sum(cut) / len(cut) < 0.5
    unscaled = float((sizes / (1 - torch.tensor(cut))).mean())
    assert unscaled > float(a.trace()) + 6 * error


def test_a_projection_is_told():
    scores, _, _ = known(20, 2)
    with pytest.warns(ProjectionWarning, match=r"indefinite as estimated from 2 draws of each: .* \d+ % of"):
        _, share = score_factor(scores, 8, torch.eye(6).double())
    assert 0 < share < 1
    same = Scores(torch.zeros_like(scores.means), scores.deviations, scores.counts)
    with pytest.warns(ProjectionWarning, match="A is taken for 0"):
        factor, _ = score_factor(same, 8, torch.eye(6).double())
    torch.testing.assert_close(factor, same.within / math.sqrt(8))


def test_units_of_features_do_not_matter():
    scores, _, _ = known(20, 2)
    change = torch.randn(6, 6, generator=generator(3), dtype=torch.float64)
    metric = torch.diag(torch.arange(1, 7).double())
    moved = Scores(scores.means @ change, scores.deviations @ change, scores.counts)
    with pytest.warns(ProjectionWarning):
        one, _ = between_factor(scores, metric)
    with pytest.warns(ProjectionWarning):
        other, _ = between_factor(moved, change.T @ metric @ change)
    one = (one @ change).flatten(1)
    torch.testing.assert_close(one.T @ one, other.flatten(1).T @ other.flatten(1))


@pytest.mark.parametrize("rows", [5, 30])
def test_the_positive_part_in_the_span_or_over_the_columns(rows):
    x = torch.randn(rows, 12, generator=generator(), dtype=torch.float64)
    signs = torch.where(torch.arange(rows) % 3 == 0, -1.0, 1.0).double()
    factor, positive, negative = positive_part(x, signs)
    values, vectors = torch.linalg.eigh(x.T @ torch.diag(signs) @ x)
    expected = (vectors * values.clamp(min=0)) @ vectors.T
    torch.testing.assert_close(factor.T @ factor, expected)
    assert positive == pytest.approx(float(values.clamp(min=0).sum()))
    assert negative == pytest.approx(-float(values.clamp(max=0).sum()))


def test_shares():
    case = CASES[1]
    with pytest.warns(ProjectionWarning):
        fitted = posterior(case, training_draws=8, dataset_size=50)
    _, images = layout(case)
    bins = layout(case)[0]
    scores = references.draw_scores(case.layer, case.inputs, residuals(case), fitted.weights[bins])
    _, within, between = references.between_and_within(scores, images.tolist())
    h = torch.linalg.inv(fitted.precision + 0.7 * torch.eye(len(fitted.precision)).double())
    phi = references.im2col(case.layer, case.inputs)
    for b, row in enumerate(fitted.shares()):
        own = phi[bins == b].flatten(0, 1)
        expected = [
            float(torch.einsum("pi,ij,pj->p", own, 50 * 64 * h @ s @ h, own).mean()) for s in (between, within / 8)
        ]
        assert [row["between"], row["within"]] == pytest.approx(expected, rel=1e-6)
        assert row["share_between"] + row["share_within"] == pytest.approx(1)
        assert (row["t_low"], row["t_high"]) == pytest.approx((b * 1000 / BINS, (b + 1) * 1000 / BINS))
    with pytest.raises(ArgumentError, match="draws_per_image >= 2"):
        fitted.recut(covariance="ggn", training_draws=None).shares()


def test_files_keep_what_the_training_was(tmp_path):
    case = CASES[0]
    fitted = posterior(case, training_draws=3, dataset_size=50)
    fitted.save(tmp_path)
    loaded = LaplacePosterior.load(tmp_path)
    assert (loaded.training_draws, loaded.draws_per_image, loaded.dataset_size) == (3, 4, 50)
    assert loaded.shares() == fitted.shares()
    assert torch.equal(loaded.variance(case.inputs), fitted.variance(case.inputs))


def test_one_draw_does_not_tell():
    case = CASES[0]
    single = Statistics(HeadGeometry.of(case.layer), BINS)
    n = len(case.inputs)
    single.update(case.inputs, case.residuals, torch.arange(n) % BINS, torch.arange(n))
    head = Head("head", case.layer, single.geometry)
    one = LaplacePosterior.from_statistics(single, head, training_draws=1)
    torch.testing.assert_close(
        one.variance(case.inputs), LaplacePosterior.from_statistics(single, head).variance(case.inputs)
    )
    for bad in (lambda: one.recut(training_draws=2), lambda: choose_draws(1, 2.0)):
        with pytest.raises(ArgumentError, match="draws_per_image"):
            bad()
    with pytest.raises(ArgumentError, match="tell A from B"):
        one.shares()


def test_how_many_draws():
    with pytest.warns(TrainingDrawsWarning, match="taken to be 1, as many as here"):
        assert choose_draws(None, None) == 1
    with pytest.warns(TrainingDrawsWarning, match="taken to be 3"):
        assert choose_draws(3, None) == 3
    assert [choose_draws(None, m) for m in (1, 1.5, 2.5, 8.53, 1000)] == [1, 2, 3, 9, 10]
    assert choose_draws(12, 8.53) == 12
    for bad in (0, 0.5, -1, float("nan"), float("inf"), "many", True):
        with pytest.raises(ArgumentError, match="training_draws >= 1"):
            check_training_draws(bad)
    with pytest.raises(ArgumentError, match="draws_per_image >= 1"):
        choose_draws(0, 4)


def parts(case, numbers):
    """The draws of a case as fits of their own, each with images numbered from 0."""
    out = []
    for part in numbers:
        s = Statistics(HeadGeometry.of(case.layer), BINS)
        part = torch.tensor(part)
        s.update(case.inputs[part].double(), case.residuals[part].double(), part % BINS, torch.arange(len(part)) // 2)
        out.append(s)
    return out


def test_merging_fits_of_other_images():
    """Two fits number their images from 0; merged, they are all the images."""
    case = CASES[0]
    one, other = parts(case, [list(range(8)), list(range(8, 16))])
    merged = one.merge(other)
    whole = Statistics(merged.geometry, BINS)
    whole.update(case.inputs.double(), case.residuals.double(), torch.arange(16) % BINS, torch.arange(16) // 2)
    assert (merged.num_images, merged.num_draws) == (8, 16)
    head = Head("head", case.layer, merged.geometry)
    for m in (None, 2, 1.5):
        cut = [LaplacePosterior.from_statistics(s, head, training_draws=m) for s in (merged, whole)]
        torch.testing.assert_close(cut[0].variance(case.inputs), cut[1].variance(case.inputs))


def test_merging_fits_of_the_same_images():
    """With fresh draws they are more draws of each image."""
    case = CASES[0]
    one, other = parts(case, [list(range(8)), list(range(8, 16))])
    merged = one.merge(other, same_images=True)
    whole = Statistics(merged.geometry, BINS)
    whole.update(case.inputs.double(), case.residuals.double(), torch.arange(16) % BINS, torch.arange(16) % 8 // 2)
    assert (merged.num_images, merged.num_draws) == (4, 16)
    head = Head("head", case.layer, merged.geometry)
    cut = [LaplacePosterior.from_statistics(s, head, training_draws=3) for s in (merged, whole)]
    torch.testing.assert_close(cut[0].variance(case.inputs), cut[1].variance(case.inputs))
    again = parts(case, [list(range(8)), list(range(8))])
    with pytest.raises(ArgumentError, match="seed of its own"):
        again[0].merge(again[1], same_images=True)


def test_what_cannot_be_merged():
    case = CASES[0]
    geometry = HeadGeometry.of(case.layer)
    with pytest.raises(ShapeError):
        Statistics(geometry, 2).merge(Statistics(geometry, 3))
    for settings in ({"loss": "l1"}, {"weighted": True}):
        with pytest.raises(ArgumentError, match="statistics of the loss"):
            Statistics(geometry).merge(Statistics(geometry, **settings))
    own = Statistics(geometry)
    with pytest.raises(ArgumentError, match="these very ones"):
        own.merge(own)
    with pytest.raises(ArgumentError, match="got str"):
        own.merge("statistics")


def test_a_step_that_all_images_ask_for_is_no_spread():
    """Of scores with any common part the covariance is the same; of one image there is none, and its score stays."""
    scores, _, _ = known(50, 4)
    moved = Scores(scores.means + 7, scores.deviations, scores.counts)
    torch.testing.assert_close(moved.centred().means, scores.centred().means)
    torch.testing.assert_close(scores.centred().summed(), 4 * scores.centred().means)
    total = scores.centred().total.flatten(1)
    torch.testing.assert_close(total.T @ total, scores.means[:, 0].T.cov())
    alone = Scores(scores.means[:1], scores.deviations[:4], scores.counts[:1])
    assert torch.equal(alone.centred().means, alone.means)
