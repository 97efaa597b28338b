"""Coordinates in the span of some vectors, against a QR decomposition in float64."""

from __future__ import annotations

import pytest
import torch

from bayesdiff.propagation.span import Span


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 6, 50), (1, 12, 8), (2, 60, 20_000)])
def test_coordinates_keep_all_inner_products(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if shape[1] > 3:
        rows[:, 2] = rows[:, 0] - 2 * rows[:, 1]  # a dependent one
    span = Span.of(rows.split(4, dim=1))
    tolerance = {"rtol": 0, "atol": 1e-9 if dtype == torch.float64 else 1e-2}
    torch.testing.assert_close(span.coordinates @ span.coordinates.mT, rows.double() @ rows.double().mT, **tolerance)
    other = torch.randn(shape[0], 4, shape[2], generator=generator, dtype=torch.float64).to(dtype)
    inside = span.into(other)
    back = span.out_of(inside, torch.zeros_like(other))
    _, s, vh = torch.linalg.svd(rows.double(), full_matrices=False)
    basis = torch.where((s > 1e-4 * s[:, :1]).unsqueeze(2), vh, 0.0)
    wanted = other.double() @ basis.mT @ basis
    torch.testing.assert_close(back.double(), wanted, rtol=0, atol=1e-6 if dtype == torch.float64 else 1e-3)


def test_nothing_spans_nothing() -> None:
    span = Span.of([torch.zeros(2, 3, 5)])
    assert float(span.into(torch.ones(2, 1, 5)).abs().sum()) == 0.0
    added = torch.ones(2, 1, 5)
    assert torch.equal(span.out_of(span.into(added), added), torch.ones(2, 1, 5))


def test_small_vectors_are_kept_beside_large_ones() -> None:
    """Directions have the length 1, images that of the deviations: a tight posterior's must not be taken for rounding."""
    rows = torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(0))
    rows[:, 3:] *= 1e-6
    span = Span.of(rows.split(4, dim=1))
    back = span.out_of(span.coordinates.float(), torch.zeros_like(rows))
    assert float(((back - rows).norm(dim=2) / rows.norm(dim=2)).max()) < 3e-3
