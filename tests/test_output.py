"""What a run with uncertainty returns: its scores, and one line."""

from __future__ import annotations

import pytest
import torch

from bayesdiff.output import UncertaintyOutput


def output(**kwargs):
    variance = torch.full((2, 1, 1, 2), 4.0)
    return UncertaintyOutput(
        {"images": [torch.ones(1), torch.zeros(1)]}, **{"variance": variance, "calls": 30, "plain_calls": 10, **kwargs}
    )


def test_scores_by_hand():
    # Two samples of two pixels: orthogonal factors 3 and 4 long; parallel ones.
    factors = torch.tensor([[[[[3.0, 0.0]]], [[[1.0, 0.0]]]], [[[[0.0, 4.0]]], [[[2.0, 0.0]]]]])
    scores = output(factors=factors, variance=factors.square().sum(0)).scores()
    expected = {
        "total_variance": [25, 5],
        "mean_std": [3.5, 5**0.5 / 2],
        "max_std": [4, 5**0.5],
        "top_share": [16 / 25, 1],
        "effective_rank": [25**2 / (9**2 + 16**2), 1],
    }
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        assert scores[name].tolist() == pytest.approx(values, rel=1e-6), name


def test_a_negative_variance_counts_in_the_trace_and_as_a_standard_deviation_of_0():
    found = output(variance=torch.tensor([[[[4.0, -1.0]]]]))
    assert {k: v.item() for k, v in found.scores().items()} == {"total_variance": 3.0, "mean_std": 1.0, "max_std": 2.0}
    assert found.std.flatten().tolist() == [2, 0]


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4), (2, 3, 4, 5, 6)])
def test_scores_of_samples_of_any_rank(shape):
    factors = torch.randn(7, *shape, generator=torch.Generator().manual_seed(0))
    scores = output(factors=factors, variance=factors.square().sum(0)).scores()
    assert all(v.shape == (2,) for v in scores.values())
    assert bool((scores["effective_rank"] > 1).all())
    assert bool((scores["effective_rank"] <= 7).all())


def test_images_are_the_main_result():
    assert output().images == [1, 0]


def test_one_line_and_no_tensors():
    text = repr(output(residual=torch.tensor([0.1, 0.25])))
    assert "\n" not in text
    assert "tensor" not in text
    for part in ("std (2, 1, 1, 2)", "mean 2", "residual 0.25", "30 network calls of which 10 plain"):
        assert part in text
    assert "residual" not in repr(output())
