"""What members of an ensemble are compared by: values before the last clamp."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bayesdiff.tracing.before_clamp import BeforeClamp


def x():
    return 2 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


PAST = {
    "clamp": (lambda v: v.clamp(-1, 1), lambda v: v),
    "clip": (lambda v: v.clip(min=0), lambda v: v),
    "in-place": (lambda v: v.clone().clamp_(0, 1), lambda v: v),
    "scaled": (lambda v: (v / 2 + 0.5).clamp(0, 1), lambda v: v / 2 + 0.5),
    "scaled-behind": (lambda v: v.clamp(-1, 1) / 2 + 0.5, lambda v: v / 2 + 0.5),
    "permuted": (lambda v: v.clamp(-1, 1).permute(0, 2, 3, 1), lambda v: v.permute(0, 2, 3, 1)),
    "cast": (lambda v: v.clamp(0, 1).double().cpu(), lambda v: v.double()),
    "indexed": (lambda v: v.clamp(0, 1)[1:], lambda v: v[1:]),
    "stacked": (lambda v: torch.stack(list(v.clamp(0, 1))), lambda v: v),
    "twice": (lambda v: (2 * v.clamp(-2, 2)).clamp(-1, 1), lambda v: 2 * v),
}  # fmt: skip


@pytest.mark.parametrize("name", PAST)
def test_values_past_a_clamp(name):
    function, expected = PAST[name]
    with BeforeClamp() as trace:
        out = function(x())
        found = trace.unclamped(out)
    assert torch.equal(out, function(x()))
    assert found.shape == (1, *out.shape)
    torch.testing.assert_close(found[0].double(), expected(x()).double())
    assert not torch.allclose(found[0].double(), out.double())


def test_arrays():
    with BeforeClamp() as trace:
        array = x().clamp(0, 1).permute(0, 2, 3, 1).numpy()
    (escape,) = trace.escapes
    assert escape.array is array
    np.testing.assert_array_equal(escape.unclamped[0].numpy(), x().permute(0, 2, 3, 1).numpy())


OTHER = {
    "no-clamp": lambda v: 2 * v,
    "a-sampler's-clamp": lambda v: v.clamp(-1, 1) + 0.1 * x(),
    "bent-behind": lambda v: v.clamp(-1, 1).tanh(),
    "written-over": lambda v: v.clamp(0, 1).fill_(0.5),
}


@pytest.mark.parametrize("name", OTHER)
def test_where_a_clamp_is_not_the_last_values_are_as_they_are(name):
    with BeforeClamp() as trace:
        out = OTHER[name](x())
        found = trace.unclamped(out)
    assert found is None or torch.equal(found[0], out)
