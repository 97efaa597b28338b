"""Operations that are linear in their dual arguments: sums, matrix products, convolutions; if need be ``vmap(op)``."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesdiff.tracing.derivatives.beside import dim_of, lift, total, zeros
from bayesdiff.tracing.derivatives.call import Call, Rule, Tangents, base_name, leaves
from bayesdiff.tracing.derivatives.general import mapped, swapped


def _reduce(c: Call) -> Tangents:
    x = c.first
    t = c.of(x)
    if t is None or len(c.args) > 3:
        return NotImplemented
    dim, keep = c.get(1, "dim", "axis"), c.get(2, "keepdim", default=False)
    if isinstance(dim, torch.dtype):
        return NotImplemented
    n = x.ndim
    if n == 0:
        return t
    if dim is None or (isinstance(dim, (tuple, list)) and len(dim) == 0):
        dims = list(range(1, n + 1))
    else:
        dims = [dim_of(d, n) for d in dim] if isinstance(dim, (tuple, list)) else [dim_of(dim, n)]
    return (torch.mean if base_name(c.func) == "mean" else torch.sum)(t, dims, keepdim=keep)


def _matmul(c: Call) -> Tangents:
    a, b = c.first, c.get(1, "other", "tensor2", "mat2")
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.ndim < 2 or b.ndim < 2:
        return _product(c)
    ta, tb, n = c.of(a), c.of(b), c.out.ndim
    left = None if ta is None else torch.matmul(lift(ta, n), b.to(ta.dtype) if not b.is_complex() else b)
    right = None if tb is None else torch.matmul(a.to(tb.dtype) if not a.is_complex() else a, lift(tb, n))
    return total([left, right])


def _pad(c: Call) -> Tangents:
    x, pad = c.get(0, "input"), c.get(1, "pad")
    t = c.of(x)
    if t is None:
        return NotImplemented
    if c.get(2, "mode", default="constant") == "constant":
        return F.pad(t, pad)
    return _folded(c)


def _conv(c: Call) -> Tangents:
    """A convolution or a linear layer: without its bias."""
    bias = c.get(2, "bias")
    if c.of(bias) is not None:
        return NotImplemented
    if bias is not None and len(c.args) > 2:
        c = c.replaced(args=(*c.args[:2], None, *c.args[3:]))
    elif bias is not None:
        c = c.replaced(kwargs={**c.kwargs, "bias": None})
    return _folded(c)


def _folded(c: Call) -> Tangents:
    """The operation with L and its batch as one batch; linear in its first argument."""
    x = c.first
    t = c.of(x)
    if t is None or len(c.tangents) > 1 or not c.out.ndim == x.ndim >= 3 or len(c.out) != len(x):
        return _product(c)
    dims = re.search(r"([123])d$", base_name(c.func))
    if dims is not None and x.ndim != int(dims[1]) + 2:  # without a batch
        return _product(c)
    new = {id(x): t.flatten(0, 1)}
    out: Tensor = c.func(*swapped(c.args, new), **swapped(c.kwargs, new))
    return out.unflatten(0, (t.shape[0], -1))


def _product(c: Call) -> Tangents:
    """Linear in each of its arguments, so where one of them is dual, and only once."""
    return _linear(c) if sum(id(x) in c.tangents for x in leaves((c.args, c.kwargs))) == 1 else NotImplemented


def _jointly(c: Call) -> Tangents:
    """``vmap(op)`` where all tensors are linear together: those that are not dual count as 0."""
    values = {id(x): x for x in leaves((c.args, c.kwargs)) if x.is_floating_point() or x.is_complex()}
    tangents = {k: zeros(x, c.length) if (t := c.tangents.get(k)) is None else t for k, x in values.items()}
    return _linear(c.replaced(tangents=tangents))


def _linear(c: Call) -> Tangents:
    """``vmap(op)``; the other arguments are as they are."""
    ids, ts = list(c.tangents), list(c.tangents.values())

    def apply(*parts: Tensor) -> Any:
        new = dict(zip(ids, parts, strict=True))
        out = c.func(*swapped(c.args, new), **swapped(c.kwargs, new))
        return tuple(leaves(out))

    return list(mapped(apply, ts, c.chunk))


RULES: list[tuple[Rule, str]] = [
    (_reduce, "sum mean"),
    (_pad, "pad"),
    (_matmul, "matmul __matmul__ bmm mm"),
    (_folded, "interpolate upsample avg_pool1d avg_pool2d avg_pool3d"),
    (_conv, "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
    (
        _product,
        """
        mv dot inner outer ger tensordot kron einsum vdot vecdot multi_dot chain_matmul cumsum diff tril triu diag
        diag_embed diagflat trace rot90 fliplr flipud repeat_interleave tile take take_along_dim masked_select
        pixel_shuffle pixel_unshuffle channel_shuffle unfold fold adaptive_avg_pool1d adaptive_avg_pool2d
        adaptive_avg_pool3d fft ifft fft2 ifft2 fftn ifftn rfft irfft rfft2 irfft2 rfftn irfftn hfft ihfft fftshift
        ifftshift stft istft view_as_real_copy view_as_complex_copy affine_grid gradient trapezoid trapz grid_sample""",
    ),
    (
        _jointly,
        """
        hstack vstack dstack row_stack column_stack block_diag meshgrid broadcast_tensors complex index_add index_copy
        scatter_add select_scatter slice_scatter diagonal_scatter masked_scatter index_put cartesian_prod atleast_1d
        atleast_2d atleast_3d""",
    ),
]
