"""Streams of items: what they are, and which of them are one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from bayesdiff.checks import ArgumentError
from bayesdiff.rng import base_seed, item_generator, normal, orthogonal_normal

BIG = 2**62 + 12345

#: What callers got when the shipped results were made: (base, index, seed, first two normal numbers).
PUBLISHED = [
    (0, (1,), 5836529245451711556, (0.8435521125793457, 1.344171166419983)),
    (0, (2,), 7971947199917040255, (-0.6435945630073547, -1.1224026679992676)),
    (7, (0,), 7696923348926885464, (-0.29140299558639526, -0.4376707673072815)),
    (BIG, (3,), 6204500373801975775, (0.8056212067604065, 1.1966431140899658)),
    (BIG, (3, 0), 6204500373801975775, (0.8056212067604065, 1.1966431140899658)),
    (0, (4, 9), 4887156969875032456, (-0.33642926812171936, -0.044533584266901016)),
    (BIG, (59_999, 3), 4589961361402814197, (0.11924698948860168, -1.5865052938461304)),
]


def seed(base, *index):
    return item_generator(base, *index).initial_seed()


@pytest.mark.parametrize(("base", "index", "expected", "numbers"), PUBLISHED, ids=lambda v: str(v))
def test_the_streams_of_published_results(base, index, expected, numbers):
    generator = item_generator(base, *index)
    assert generator.initial_seed() == expected
    torch.testing.assert_close(torch.randn(2, generator=generator), torch.tensor(numbers))


def test_nothing_else_decides_a_stream():
    expected = torch.randn(5, generator=item_generator(3, 1, 4))
    torch.manual_seed(1)
    np.random.SeedSequence(9).spawn(2)
    before = torch.random.get_rng_state()
    item_generator(3, 1, 5)
    assert torch.equal(torch.randn(5, generator=item_generator(3, np.int64(1), torch.tensor(4))), expected)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("base", [0, 1, 2**32 - 1, 2**32, BIG])
def test_indices_of_one_length_are_distinct(base):
    values = [*range(60), 2**31, 2**32 - 1]
    for length in (1, 2):
        items = list(itertools.product(values, repeat=length))
        seeds = {seed(base, *item) for item in items}
        assert len(seeds) == len(items)
        low = {s % 2**32 for s in seeds}  # what torch keeps; 3,844 items meet with probability 0.002
        assert len(low) == len(items)


@pytest.mark.parametrize("base", [0, 5, BIG])
def test_lengths_under_one_base_alias_where_it_says_so_and_only_there(base):
    ones = {seed(base, i): i for i in range(200)}
    twos = {(i, j): seed(base, i, j) for i in range(200) for j in range(20)}
    for (i, j), value in twos.items():
        assert ones.get(value) == (i if j == 0 else None)


def test_torch_keeps_32_bits():
    """If it ever keeps more, the docstring of ``item_generator`` may promise more."""
    a, b = (torch.Generator().manual_seed(5 + extra) for extra in (0, 2**32))
    assert torch.equal(torch.randn(8, generator=a), torch.randn(8, generator=b))


@pytest.mark.parametrize(
    ("base", "index", "message"),
    [
        (0, (), "one or two numbers, got 0"),
        (0, (1, 2, 3), "one or two numbers, got 3"),
        (3, (2**35,), r"below 2\*\*32, got 34359738368"),  # as NumPy reads it, (0, 8)
        (3, (1, 2**32), r"below 2\*\*32"),
        (3, (-1,), "an index >= 0, got -1"),
        (3, (1.0,), "an index to be an integer"),
        (-3, (1,), "the base seed >= 0, got -3"),
    ],
)
def test_errors(base, index, message):
    with pytest.raises(ArgumentError, match=message):
        item_generator(base, *index)


def test_base_seeds():
    first = base_seed(torch.Generator().manual_seed(0))
    assert first == base_seed(torch.Generator().manual_seed(0))
    assert 0 <= first < 2**63 - 1
    torch.manual_seed(0)
    assert base_seed(None) == first
    generator = torch.Generator().manual_seed(0)
    assert base_seed(generator) == first != base_seed(generator)


def test_normal_numbers_are_float64_on_the_cpu():
    x = normal((2, 3), torch.Generator().manual_seed(0))
    assert (x.shape, x.dtype, x.device.type) == ((2, 3), torch.float64, "cpu")
    assert normal((1,), None, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 7), (5, 7), (7, 7), (6, 2, 3), (16, 7), (3, 1)])
def test_orthogonal_normal_numbers(shape):
    """Rows of one block are orthogonal, √m long; full blocks have the identity for their second moments."""
    got = orthogonal_normal(shape, torch.Generator().manual_seed(0))
    assert got.shape == shape
    assert got.dtype == torch.float64
    rows = got.flatten(1)
    m = rows.shape[1]
    for block in rows.split(m):
        torch.testing.assert_close(block @ block.T, m * torch.eye(len(block), dtype=torch.float64))
        if len(block) == m:
            torch.testing.assert_close(block.T @ block / m, torch.eye(m, dtype=torch.float64))
    one, other = (torch.Generator().manual_seed(0) for _ in range(2))
    orthogonal_normal(shape, one)
    normal(shape, other)
    assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize("n", [1, 4, 9])
def test_moments_of_orthogonal_normal_numbers(n):
    """E (aᵀz)² = 1; the variance of its mean over n rows is 2(m − n)/(n(m + 2)); the rows are distributed uniformly."""
    m, runs = 9, 20_000
    generator = torch.Generator().manual_seed(1)
    a = torch.nn.functional.normalize(torch.arange(1.0, m + 1, dtype=torch.float64), dim=0)
    blocks = torch.stack([orthogonal_normal((n, m), generator) for _ in range(runs)])
    means = (blocks @ a).square().mean(1)
    expected = 2 * (m - n) / (n * (m + 2))
    assert float(means.mean()) == pytest.approx(1, abs=5 * (expected / runs) ** 0.5 + 1e-12)
    assert float(means.var()) == pytest.approx(expected, rel=0.06, abs=1e-20)
    # A QR factor whose signs are not put right has diagonal elements of one sign.
    assert float(blocks.mean(0).abs().max()) < 5 * runs**-0.5
