"""Every operation in one table: values as they are, tangents against central differences of the plain function in float64."""

import contextlib
import copy
import gc
import inspect
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bayesdiff.checks import ArgumentError, ShapeError, UnsupportedPipelineError
from bayesdiff.tracing.derivatives.call import leaves
from bayesdiff.tracing.dual import DualNumbers
from bayesdiff.tracing.escapes import KEPT_ESCAPES

L = 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fixed(like: Tensor, *shape: int, seed: int = 100) -> Tensor:
    """A plain tensor, the same in every call."""
    return random(*shape, seed=seed).to(like.dtype)


def spread(*shape: int, seed: int) -> Tensor:
    """Numbers in a random order, no two of them close to each other or, if they are 24 at most, to 0, 0.1, 0.3, 0.5, 0.7 or 1."""
    n = max(torch.Size(shape).numel(), 24)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: torch.Size(shape).numel()]
    return ((order - n // 2) * (4.8 / n) + 0.07 + 0.02 * seed).double().reshape(shape)


def dual_inputs(shapes: Any, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    xs = [spread(*s, seed=n).to(dtype) for n, s in enumerate(shapes)]
    ts = [random(L, *s, seed=10 + n).to(torch.promote_types(dtype, torch.float32)) for n, s in enumerate(shapes)]
    return xs, ts


def outputs(value: Any) -> list[Tensor]:
    return list(leaves(value))


def differences(f: Callable[..., Any], xs: list[Tensor], ts: list[Tensor], h: float = 5e-4) -> list[Tensor]:
    """Derivatives along each tangent, of fourth order, in float64."""
    xs, ts = [x.double() for x in xs], [t.double() for t in ts]
    with_tangents = (torch.float32, torch.float64, torch.complex64, torch.complex128)

    def at(n: int, step: float) -> list[Tensor]:
        ys = outputs(f(*[x + step * t[n] for x, t in zip(xs, ts, strict=True)]))
        return [y.clone() if y.dtype in with_tangents else torch.zeros(y.shape) for y in ys]

    rows = []
    for n in range(L):
        near, far = zip(at(n, h), at(n, -h), strict=True), zip(at(n, 2 * h), at(n, -2 * h), strict=True)
        rows.append([(8 * (a - b) - (c - d)) / (12 * h) for (a, b), (c, d) in zip(near, far, strict=True)])
    return [torch.stack(r) for r in zip(*rows, strict=True)]


def traced(f: Callable[..., Any], xs: list[Tensor], ts: list[Tensor]) -> tuple[Any, DualNumbers, list[Tensor]]:
    dual = DualNumbers(chunk=2)
    duals = [x.clone() for x in xs]
    for x, t in zip(duals, ts, strict=True):
        dual.attach(x, t)
    with dual:
        out = f(*duals)
    return out, dual, duals


def compare(
    f: Callable[..., Any], shapes: Any, dtype: torch.dtype = torch.float64, tolerance: float | None = None
) -> None:
    xs, ts = dual_inputs(shapes, dtype)
    plain = f(*[x.clone() for x in xs])
    out, dual, _ = traced(f, xs, ts)
    with torch.inference_mode(False), torch.no_grad():
        want = differences(f, [x.detach().clone() for x in xs], ts)
    assert type(out) is type(plain)
    if tolerance is None:
        tolerance = 1e-8 if dtype == torch.float64 else 2e-4
    some = 0.0
    for a, b, w in zip(outputs(out), outputs(plain), want, strict=True):
        assert type(a) is Tensor
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)
        got = dual.tangents(a)
        if got is None:
            assert w.abs().max() == 0
            continue
        assert a.is_floating_point() or a.is_complex()
        assert got.shape == (L, *a.shape)
        assert got.dtype == torch.promote_types(a.dtype, torch.float32)
        assert not got.requires_grad
        assert not got.is_inference()
        scale = w.abs().max().item() if w.numel() else 0.0
        some = max(some, scale)
        torch.testing.assert_close(got.to(w.dtype), w, rtol=0, atol=tolerance * max(scale, 1e-3))
    assert some > 0


@dataclass
class Case:
    name: str
    f: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...] = ((2, 3, 4),)


A, B = (2, 3, 4), (3, 4)


def inplace(f: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def g(x: Tensor) -> Tensor:
        y = x * 1
        f(y)
        return y

    return g


def into(f: Callable[..., Any]) -> Callable[..., Any]:
    """With ``out=``, into one column of a buffer that is full of something else that is dual."""

    def g(*xs: Tensor) -> Any:
        like = f(*xs)
        buffer = xs[0].sum() * torch.ones(2, *like.shape, dtype=like.dtype)
        buffer[0] = 7
        f(*xs, out=buffer[1])
        return buffer

    return g


def buffers(x: Tensor, y: Tensor) -> Tensor:
    buffer = torch.zeros(4, *x.shape, dtype=x.dtype)
    buffer[0] = x
    buffer[1].copy_(y * x)
    buffer[2] += x
    view = buffer[2:]
    view.mul_(2)
    view[1] = view[0] * y
    x.mul_(buffer[3])
    return torch.cat([buffer.flatten(), x.flatten(), view.flatten()])


def reused(x: Tensor) -> Tensor:
    """A loop with one buffer that is read after each write."""
    buffer, total = torch.empty_like(x), torch.zeros_like(x)
    for n in range(3):
        torch.mul(x, n + 1, out=buffer)
        total += buffer * buffer
        x = buffer.clone()
    return total


def base_after_view(x: Tensor) -> Tensor:
    y = x * 2
    row = y[1]
    row *= y[0]
    y.t_() if y.ndim == 2 else y.transpose_(0, 1)
    y[:, 0].add_(1).mul_(y[:, 1])
    return y + 0


def expanded(x: Tensor) -> Tensor:
    y = x[:1].expand(5, *x.shape[1:])
    return torch.cat([y, y * x.sum()]).contiguous()


def deep(x: Tensor) -> Tensor:
    history = [x * 2, x[0]]
    copied = copy.deepcopy(history)
    history[0].zero_()
    return copied[0] * copied[1] + copy.copy(x)


def set_data(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    z.data = y * 2
    return z.detach() * x.data


def thresholded(x: Tensor) -> Tensor:
    """Dynamic thresholding, as diffusers does it."""
    flat = (2 * x).reshape(len(x), -1)
    s = torch.quantile(flat.abs(), 0.8, dim=1)
    s = torch.clamp(s, min=1, max=10).unsqueeze(1)
    return (torch.clamp(flat, -s, s) / s).reshape(x.shape)


def complex_parts(x: Tensor, y: Tensor) -> Any:
    z = torch.complex(x, y)
    w = torch.view_as_real(z * z)
    w[..., 0] += x
    back = torch.view_as_complex(w)
    return back.conj().imag * 2, back.conj() * z, back.real.clone(), back.abs(), torch.view_as_real(back) + 0


def words(text: str) -> list[str]:
    return text.split()


UNARY = words(
    """
    neg abs sqrt square exp log sin cos tanh sigmoid reciprocal rsqrt log1p expm1 erf frac sinc positive nan_to_num
    floor sign round
    """
)
LINEAR = words(
    """
    cumsum(0) flip(0) flip([0,-1]) roll(1,-1) roll(2) roll((1,2),(0,1)) tril() triu(1) repeat(2,1,1,2) tile(2,2)
    sum() sum(1) sum((0,-1),keepdim=True) mean() mean(-1) mean(dim=(0,2)) clone() contiguous() reshape(-1)
    flatten(1) double() to(torch.float64) permute(2,0,1).contiguous() permute(2,0,1).reshape(4,-1)
    permute(1,2,0).clone() diff() trace_() index_select(1,torch.tensor([2,0])) repeat_interleave(2,1) rot90()
    diag_embed() t3() type(torch.float64) expand(5,2,3,4).clone() masked_fill(mask_,2.0) unfold(2,2,1).clone()
    view(6,4)+0 split(2,dim=-1)[0].contiguous() movedim(0,-1).contiguous(memory_format=torch.contiguous_format)
    """
)
NONLINEAR = words(
    """
    std() std(1) var((0,1)) var(-1,unbiased=False) norm() norm(2,-1) norm(dim=(1,2),keepdim=True) softmax(-1)
    log_softmax(1) logsumexp(0) prod(1) amax(-1) max() min(dim=1) max(1,True) sort() sort(0,descending=True)
    topk(2,1) median() median(-1) kthvalue(2,1) cummax(1) cumprod(-1) quantile(0.3) quantile(0.6,dim=1,keepdim=True)
    quantile(torch.tensor([.1,.9],dtype=x.dtype),dim=-1) renorm(2,0,1.0) pow(2) abs().pow(3.5) pow(1) pow(0)+x
    clamp(-0.5,0.5) clamp(min=0.1) clamp(max=0.1) clamp(0.5,-0.5)+x clip(-1,1) clamp_min(0) clamp_max(0) msort()
    aminmax() logcumsumexp(0) cov2() mode(1) nanmedian(-1) nansum(1) remainder(0.7) fmod(0.7) floor_divide(0.5)+x
    """
)


def expression(text: str) -> Callable[[Tensor], Any]:
    def f(x: Tensor) -> Any:
        if text == "trace_()":
            return x[0, :3, :3].trace()
        if text == "t3()":
            return x.transpose(0, 2) * 1
        if text == "cov2()":
            return torch.cov(x[0])
        return eval(f"x.{text}", {"x": x, "torch": torch, "mask_": fixed(x, *x.shape) > 0})

    return f


CASES = [
    *(
        Case(
            f"x.{n}",
            lambda x, n=n: (
                getattr(torch, n)(x.abs() + 0.3 if n in ("sqrt", "log", "rsqrt", "log1p", "reciprocal") else x) + 2 * x
            ),
        )
        for n in UNARY
    ),
    *(Case(f"x.{text}", expression(text)) for text in LINEAR + NONLINEAR),
    Case("arithmetic with numbers", lambda x: 1 - (2 * x + 3) / 4 - x / 2 + (-x) * 0.3 + 2 / (x * x + 1)),
    Case("__r…__", lambda x: (1 - x) * (2 + x) * (3 * x) + 2.0 ** (x * 0.1)),
    Case("dual and dual", lambda x, y: x + y - x * y + x / (y * y + 1), (A, A)),
    Case("broadcast", lambda x, y: x * y + y / (x * x + 1) - (y - x) + (x[:, :1] + y), (A, B)),
    Case(
        "broadcast to more dimensions",
        lambda x, y: y + fixed(y, *A) * y - fixed(y, *A) + x[0, 0, 0] * fixed(y, *A),
        (A, B),
    ),
    Case(
        "dual and plain", lambda x: (x + fixed(x, *B)) * fixed(x, *A) / fixed(x, *A) - fixed(x, 1, 1, 4) / (x * x + 1)
    ),
    Case("plain ∘ dual", lambda x: fixed(x, *A) - x + fixed(x, *B) / (x * x + 1)),
    Case("0-dim", lambda x: x.sum() * fixed(x, *A) + x[0, 0, 0] + torch.tensor(2.0, dtype=torch.float64) * x.mean()),
    Case(
        "alpha", lambda x, y: torch.add(x, y, alpha=2) - torch.sub(x, y, alpha=0.5) + torch.rsub(x, y, alpha=3), (A, A)
    ),
    Case("alpha plain", lambda x: torch.add(x, fixed(x, *A), alpha=2) - torch.sub(fixed(x, *A), x, alpha=0.5)),
    Case("functions", lambda x, y: torch.multiply(torch.subtract(x, other=y), torch.divide(x, 3)), (A, A)),
    Case("named arguments", lambda x: torch.sum(input=x, dim=1) + torch.mul(input=x, other=2).mean(dim=1)),
    Case("rounding_mode", lambda x: torch.div(x, 0.3, rounding_mode="floor") + x),
    Case("addcmul", lambda x, y: torch.addcmul(x, y, x, value=0.3) + x.addcmul(fixed(x, *A), y), (A, A)),
    Case(
        "addcdiv",
        lambda x, y: torch.addcdiv(x, y, x * x + 1, value=0.3) + fixed(x, *A).addcdiv(y, fixed(x, *A)),
        (A, A),
    ),
    Case("lerp", lambda x, y: torch.lerp(x, y, 0.3) + x.lerp(y, x) + torch.lerp(fixed(x, *A), y, fixed(x, *A)), (A, A)),
    Case("pow with dual exponent", lambda x, y: (x * x + 1) ** y + torch.pow(fixed(x, *A).abs(), y) + 2**y, (A, A)),
    Case(
        "binary",
        lambda x, y: torch.maximum(x, y) + torch.atan2(x, y) + torch.hypot(x, y) * torch.minimum(x, y.new_tensor(0.1)),
        (A, A),
    ),
    Case(
        "clamp with tensors",
        lambda x, y: torch.clamp(x, fixed(x, *A) - 1, fixed(x, *A)) + x.clamp(min=y) + x.clamp(max=y),
        (A, B),
    ),
    Case(
        "clamp between duals",
        lambda x, y: torch.clamp(x, -y.abs(), y.abs()) + torch.clamp(fixed(x, *A), y - 0.3, y.abs()),
        (A, B),
    ),
    Case(
        "clamp keeps NaN away",
        lambda x: torch.where(x > 0, torch.log(x.clamp(min=1e-3)), 0.0) + torch.clamp(x, -0.5, 0.5),
    ),
    Case(
        "activations",
        lambda x: F.relu(x) + F.silu(x) * F.gelu(x) + F.elu(x) + F.softplus(x) + F.hardtanh(x) + F.leaky_relu(x, 0.1),
    ),
    Case(
        "activations in place",
        lambda x: F.relu(x * 1, True) + F.silu(x * 2, inplace=True) + F.hardtanh(x * 1, -0.5, 0.5, True),
    ),
    Case(
        "where", lambda x, y: torch.where(x > 0, x, y) + torch.where(x > 1, x, 0.0) + torch.where(y > 0, 1.0, y), (A, B)
    ),
    Case("x.where", lambda x, y: x.where(x > 0, y) + x.where(fixed(x, *A) > 0, fixed(x, *B)), (A, B)),
    Case(
        "masked_fill by dual",
        lambda x, y: x.masked_fill(fixed(x, *A) > 0, y.sum()) + fixed(x, *A).masked_fill(x > 0, y[0, 0]),
        (A, B),
    ),
    Case(
        "cat", lambda x, y: torch.cat([x, fixed(x, 1, 3, 4), y[None]], dim=0) * torch.cat([y[None], x, x[:1]]), (A, B)
    ),
    Case(
        "cat, last",
        lambda x: torch.cat((fixed(x, *A), x, torch.zeros(0, dtype=x.dtype)), -1) + torch.concat([x, x], axis=2),
    ),
    Case("stack", lambda x: torch.stack([x, fixed(x, *A)], -1) + torch.stack([x, x], dim=3)),
    Case("hstack", lambda x: (torch.hstack([x, fixed(x, *A)]), torch.vstack([x, x]), torch.dstack([fixed(x, *A), x]))),
    Case(
        "index",
        lambda x: (x[0] + 0, x[..., 1] * 2, x[:, None, 1:] + 0, x[1, 2, 3] * 1, x[:, ::2] + 0, x[-1, ..., 0] + 0),
    ),
    Case(
        "index by tensor",
        lambda x: (x[:, torch.tensor([2, 0])], x[torch.tensor(1)], x[..., torch.tensor([[0, 3]])], x[[1, 0]]),
    ),
    Case(
        "index by tensors",
        lambda x: (x[torch.tensor([0, 1]), :, torch.tensor([1, 2])], x[torch.tensor([0, 1]), torch.tensor([1, 2])]),
    ),
    Case(
        "index mixed",
        lambda x: (
            x[0, :, torch.tensor([1, 2])],
            x[torch.tensor([1]), ..., torch.tensor([3])],
            x[:, [0, 2], 1:],
            x[None, [1]],
        ),
    ),
    Case("index by numpy", lambda x: (x[np.array([1, 0])], x[np.int64(1)] + 0, x[:, np.array([True, False, True])])),
    Case(
        "index by mask",
        lambda x: (x[fixed(x, *A) > 0], x[:, fixed(x, 3) > 0], x[torch.tensor([True, False]), :, 1], x[True]),
    ),
    Case(
        "gather",
        lambda x: (
            x.gather(1, torch.tensor([[[0, 1, 2, 0]], [[1, 1, 0, 2]]]))
            + torch.gather(x, 2, torch.zeros(2, 3, 1).long())
        ),
    ),
    Case(
        "take",
        lambda x: (
            x.take(torch.tensor([1, 5]))
            + x.masked_select(fixed(x, *A) > 0)[:2]
            + x.take_along_dim(torch.tensor([[[0]]]), 0).sum()
        ),
    ),
    Case(
        "scatter",
        lambda x, y: (
            x.scatter(1, torch.zeros(2, 1, 4).long(), x.exp()) + x.scatter(0, torch.ones(1, 3, 4).long(), 5.0) * y
        ),
        (A, B),
    ),
    Case(
        "index_…",
        lambda x, y: (
            x.index_add(0, torch.tensor([1]), y[None], alpha=2),
            x.index_fill(1, torch.tensor([0]), 2.0) * 2,
            x.index_copy(0, torch.tensor([0]), y[None]),
            x.index_put((torch.tensor([1]),), y),
        ),
        (A, B),
    ),
    Case(
        "…_scatter",
        lambda x, y: (
            x.select_scatter(y, 0, 1) + x.slice_scatter(y[None] * 2, 0, 1) + fixed(x, *A).select_scatter(y, 0, 0)
        ),
        (A, B),
    ),
    Case(
        "pad",
        lambda x: (
            F.pad(x, (1, 2)),
            F.pad(x, (1, 0, 2, 1), value=3.0),
            F.pad(x, (1, 1), mode="reflect"),
            F.pad(x, (1, 2), mode="circular"),
        ),
    ),
    Case(
        "pad images",
        lambda x: (F.pad(x, (1, 1, 2, 2), mode="reflect"), F.pad(x, (1, 1, 0, 0), "replicate")),
        ((2, 3, 4, 4),),
    ),
    Case(
        "matmul",
        lambda x, y: (x @ y.mT, y @ x.mT, fixed(x, 5, 3) @ x, torch.matmul(y, y.mT), x @ fixed(x, 4), y[0] @ x.mT),
        (A, B),
    ),
    Case(
        "mm, bmm",
        lambda x, y: (
            torch.mm(y, fixed(x, 4, 2)),
            torch.bmm(x, fixed(x, 2, 4, 2)),
            torch.bmm(x, x.mT),
            torch.mv(y, fixed(x, 4)),
        ),
        (A, B),
    ),
    Case(
        "einsum",
        lambda x, y: (
            torch.einsum("bij,kj->bik", x, y),
            torch.einsum("bij,jk->bik", x, fixed(x, 4, 2)),
            torch.einsum("bij->j", x),
        ),
        (A, B),
    ),
    Case(
        "products",
        lambda x, y: (
            torch.tensordot(x, y, 2),
            torch.outer(y[0], y[1]),
            torch.dot(y[0], fixed(y, 4)),
            torch.kron(y, y),
            torch.inner(y, y),
        ),
        (A, B),
    ),
    Case(
        "baddbmm",
        lambda x, y: (
            torch.baddbmm(x, x @ y.mT, fixed(x, 2, 3, 4), beta=0.3, alpha=2) + torch.addmm(y, y @ y.mT, fixed(x, 3, 4))
        ),
        (A, B),
    ),
    Case(
        "linear",
        lambda x, y: (
            F.linear(x, fixed(x, 5, 4), fixed(x, 5)),
            F.linear(x, y, bias=y[:, 0]),
            F.linear(fixed(x, 2, 4), y, fixed(y, 3)),
        ),
        (A, B),
    ),
    Case(
        "conv",
        lambda x, w: (
            F.conv2d(x, fixed(x, 5, 3, 3, 3), fixed(x, 5), padding=1),
            F.conv2d(x, w),
            F.conv2d(x[0], fixed(x, 5, 3, 3, 3), bias=fixed(x, 5)),
            F.conv2d(fixed(x, *x.shape), w, fixed(x, 4), 2),
            F.conv_transpose2d(x, fixed(x, 3, 2, 2, 2), fixed(x, 2), stride=2),
        ),
        ((2, 3, 6, 6), (4, 3, 3, 3)),
    ),
    Case("conv1d", lambda x: F.conv1d(x, fixed(x, 2, 3, 2), fixed(x, 2)) + F.avg_pool1d(x, 2, 1)[:, :2]),
    Case(
        "interpolate",
        lambda x: (
            F.interpolate(x, scale_factor=2),
            F.interpolate(x, (3, 5), mode="bilinear"),
            F.interpolate(x, size=(12, 12), mode="bicubic", antialias=True),
            F.interpolate(x, scale_factor=0.5, mode="area"),
        ),
        ((2, 3, 6, 6),),
    ),
    Case(
        "images",
        lambda x: (
            F.avg_pool2d(x, 2),
            F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2),
            F.pixel_unshuffle(x, 2),
            F.max_pool2d(x, 2),
            F.unfold(x, 2),
            F.avg_pool2d(x[0], 2),
            F.adaptive_avg_pool2d(x, 2),
            F.grid_sample(x, fixed(x, 2, 3, 3, 2), align_corners=False),
        ),
        ((2, 3, 6, 6),),
    ),
    Case(
        "normalize",
        lambda x: (
            F.layer_norm(x, (4,), fixed(x, 4), fixed(x, 4)),
            F.group_norm(x, 3),
            F.normalize(x, dim=1),
            F.instance_norm(x),
        ),
    ),
    Case(
        "losses",
        lambda x, y: (
            F.mse_loss(x, fixed(x, *A)),
            F.l1_loss(x[0], y),
            F.cosine_similarity(x[0], y),
            F.huber_loss(x[0], y),
        ),
        (A, B),
    ),
    Case("attention", lambda x: F.scaled_dot_product_attention(x, x * 2, x + fixed(x, *A))),
    Case(
        "linalg",
        lambda x: (
            torch.linalg.norm(x),
            torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True),
            torch.linalg.matrix_norm(x),
            torch.linalg.inv(x @ x.mT + 3 * torch.eye(3, dtype=x.dtype)),
            torch.linalg.solve(x @ x.mT + 3 * torch.eye(3, dtype=x.dtype), x),
            torch.linalg.svdvals(x),
            torch.norm(x, dim=1),
        ),
    ),
    Case("std_mean", lambda x: torch.std_mean(x, dim=1)),
    Case(
        "fft",
        lambda x: (
            torch.fft.fftn(x),
            torch.fft.irfft(torch.fft.rfft(x) * fixed(x, 3)),
            torch.fft.fftshift(torch.fft.fft2(x)).abs(),
            torch.fft.ifft(x).real * 1,
            torch.fft.fft(x).conj() * 2,
        ),
    ),
    Case("complex", complex_parts, (A, A)),
    Case("polar", lambda x, y: torch.polar(x.abs(), y) + (x + 1j * y) * 2j, (A, A)),
    Case(
        "chunks",
        lambda x: (
            [p * 2 for p in x.chunk(2)]
            + list(x.unbind(1))
            + list(x.split([1, 3], dim=2))
            + list(torch.tensor_split(x, 2))
        ),
    ),
    Case(
        "views",
        lambda x: (
            x.squeeze() + 0,
            x.unsqueeze(0),
            x.T.mT.mH,
            x.view(2, 12)[:, ::3] * 1,
            x.narrow(1, 0, 2),
            x.swapaxes(0, 1) * 2,
            x.diagonal(0, 1, 2) + 0,
            x.as_strided((2, 2), (1, 3)) + 0,
        ),
    ),
    Case("view of a view", lambda x: x[1].t()[1:, ::2].unflatten(0, (3, 1)).flatten() * x.view(-1)[3::4]),
    Case(
        "like",
        lambda x: (
            torch.zeros_like(x)
            + torch.ones_like(x) * x
            + x.new_zeros(4)
            + x.new_full((4,), 2.0)
            + torch.empty_like(x).fill_(1)
        ),
    ),
    Case(
        "full",
        lambda x: (
            torch.full_like(x, 2.0) * x,
            x.new_full((2,), x.sum()),
            torch.full((3,), x[0, 0, 0], dtype=x.dtype),
            torch.full_like(x, x.mean()),
        ),
    ),
    Case(
        "tensor of tensors",
        lambda x: (
            torch.tensor([x[0, 0, 0], x[1, 0, 0] * 2], dtype=x.dtype),
            torch.as_tensor(x) * 2,
            torch.stack([torch.as_tensor(v) for v in x]),
            torch.tensor([[x.sum(), 2.0]]),
        ),
    ),
    Case(
        "comparisons",
        lambda x: (
            x > 0,
            x.argmax(),
            x.long(),
            x.isnan(),
            x.int() + x,
            x.sign(),
            torch.round(x),
            x.ceil(),
            x * (x > 0),
            x.bool(),
        ),
    ),
    Case(
        "dtypes up",
        lambda x: (
            x.double() * 2,
            x.to(torch.float64),
            torch.zeros(2, dtype=torch.float64).type_as(x) * x[..., :2],
            x.to(fixed(x, 1)) * 2,
            x.to("cpu"),
            x.cpu().contiguous(),
        ),
    ),
    Case("float32 and float64", lambda x: x * random(*A) + x.double()),
    Case("copies", deep),
    Case("x.data", set_data, (A, A)),
    Case("buffers", buffers, (A, A)),
    Case("one buffer", reused),
    Case("base after view", base_after_view, ((3, 3),)),
    Case("base after view, 3", base_after_view, (A,)),
    Case("expand", expanded),
    Case("thresholding", thresholded, ((4, 3, 2, 2),)),
    Case(
        "meshgrid",
        lambda x: (
            [g * 2 for g in torch.meshgrid(x[0, 0], x[1, 1], indexing="ij")] + list(torch.broadcast_tensors(x, x[0]))
        ),
    ),
    Case(
        "cartesian",
        lambda x: (torch.cartesian_prod(x[0, 0], x[1, 0]), torch.block_diag(x[0], x[1]), torch.atleast_3d(x[0]) * 1),
    ),
    Case(
        "aten",
        lambda x: torch.ops.aten.add(x, 1) + torch.ops.aten.mul.Tensor(x, x) + torch.ops.aten._softmax(x, -1, False),
    ),
    # in place
    Case("x += …", inplace(lambda y: (y.__iadd__(1), y.__imul__(y), y.__isub__(y[0] * 1), y.__itruediv__(3)))),
    Case("x **= 2", inplace(lambda y: (y.__ipow__(2), y.pow_(2)))),
    Case("add_, mul_", inplace(lambda y: y.add_(y, alpha=2).mul_(fixed(y, *B)).sub_(y[0] * 1).div_(3).neg_())),
    Case("plain += dual", lambda x: fixed(x, *A).add_(x).mul_(x[0])),
    Case("exp_, sqrt_", inplace(lambda y: y.square_().add_(1).sqrt_().log_().exp_().abs_().sin_().tanh_())),
    Case("clamp_", inplace(lambda y: (y.clamp_(-1, 1), y[0].clamp_min_(0), y[1].clamp_(max=y.sum())))),
    Case("addcmul_", inplace(lambda y: y.addcmul_(y, y, value=0.1).addcdiv_(y, y * y + 1).lerp_(y * y, 0.3))),
    Case("copy_", inplace(lambda y: (y[0].copy_(y[1] * 2), y[1].copy_(fixed(y, *B)), y[:, 0].copy_(y[:, 1, :1])))),
    Case(
        "fill_, zero_",
        inplace(
            lambda y: (
                y[0, 0].fill_(y.sum()),
                y[0, 1].fill_(3.0),
                y[1, 0].zero_(),
                y[1, 1].normal_(generator=torch.Generator().manual_seed(0)),
            )
        ),
    ),
    Case("masked_fill_", inplace(lambda y: y.masked_fill_(y > 0.5, 0.5).masked_fill_(y < -1, y.mean()))),
    Case(
        "index_put_",
        inplace(
            lambda y: (
                y.index_put_((torch.tensor([0]),), y[1] * 2),
                y.index_add_(0, torch.tensor([0]), y[1:] * 1),
                y.index_fill_(2, torch.tensor([1]), 2.0),
            )
        ),
    ),
    Case(
        "scatter_",
        inplace(
            lambda y: (
                y.scatter_(1, torch.zeros(2, 1, 4).long(), y.exp()),
                y.scatter_add_(0, torch.zeros(1, 3, 4).long(), y * 2),
                y.masked_scatter_(y > 1, y.exp()),
            )
        ),
    ),
    Case("softmax out of place, relu_", inplace(lambda y: (F.relu_(y[0]), torch.relu_(y[1]), y.cumsum_(0), y.tril_()))),
    Case("round_", inplace(lambda y: (y[0, 0].round_(), y[1, :2].sign_()))),
    Case(
        "setitem",
        inplace(
            lambda y: (
                y.__setitem__(0, y[1] * 2),
                y.__setitem__((1, 0), 0),
                y.__setitem__((Ellipsis, 1), y[..., 2]),
                y.__setitem__((0, slice(None), 3), y[0, 0, 0]),
            )
        ),
    ),
    Case(
        "setitem by mask",
        inplace(
            lambda y: (
                y.__setitem__(y > 1, 1.0),
                y.__setitem__(y < -0.5, y[0, 0, 0] * 2),
                y.__setitem__(fixed(y, *A) > 1, fixed(y, *A)[fixed(y, *A) > 1]),
            )
        ),
    ),
    Case(
        "setitem by tensor",
        inplace(
            lambda y: (
                y.__setitem__(torch.tensor([1]), y[:1] * 2),
                y.__setitem__((slice(None), [0, 2]), y[:, 1:] * 3),
                y.__setitem__((torch.tensor(0), 1), 4.0),
            )
        ),
    ),
    Case(
        "setitem by tensors",
        inplace(
            lambda y: (
                y.__setitem__((torch.tensor([0, 1]), slice(None), torch.tensor([1, 2])), y[:, :, 0] * 2),
                y.__setitem__((torch.tensor([0, 1]), Ellipsis, torch.tensor([1, 2])), 1),
            )
        ),
    ),
    Case(
        "setitem of a plain buffer",
        lambda x: inplace(
            lambda b: (
                b.__setitem__(0, x),
                b.__setitem__((1, b[1] > 0), x[x.shape[0] - 1, 0, 0]),
                b.__setitem__(2, x[None]),
            )
        )(fixed(x, 4, *A)),
    ),
    Case(
        "setitem of float64 by float32",
        lambda x: inplace(lambda b: (b.__setitem__(0, x), b.__setitem__(torch.tensor([1]), x.to(b.dtype))))(
            torch.zeros(2, *A, dtype=torch.float64)
        ),
    ),
    # out=
    Case("add, out=", into(lambda x, **k: torch.add(x, 2, **k))),
    Case("mul, out=", into(lambda x, y, **k: torch.mul(x, y, **k)), (A, A)),
    Case("cat, out=", into(lambda x, y, **k: torch.cat([x, y], **k)), (A, A)),
    Case("matmul, out=", into(lambda x, **k: torch.matmul(x, fixed(x, 4, 2), **k))),
    Case("plain, out=", lambda x: inplace(lambda y: torch.mul(fixed(x, *B), 2, out=y[0]))(x)),
    Case("out= of an argument", inplace(lambda y: torch.mul(y, y, out=y))),
    Case("out= is resized", lambda x: torch.add(x, 1, out=torch.empty(0, dtype=x.dtype))),
    Case(
        "sort, out=", lambda x: torch.sort(x, out=(torch.empty(A, dtype=x.dtype), torch.empty(A, dtype=torch.long)))[0]
    ),
]


CONTEXTS = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": contextlib.nullcontext}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_values_and_tangents(case: Case, dtype: torch.dtype, context: str) -> None:
    with CONTEXTS[context]():
        compare(case.f, case.shapes, dtype)


HALF: list[tuple[str, Callable[..., Any]]] = [
    ("copies", lambda x, w: (x * 1, x.clone(), x.reshape(-1), x.permute(1, 2, 0).contiguous(), x[torch.tensor([1])])),
    (
        "casts",
        lambda x, w: (
            x.float(),
            x.double(),
            x.to(torch.float16),
            x.to(torch.bfloat16),
            x.half().float(),
            x.type_as(w.half()),
        ),
    ),
    ("by numbers", lambda x, w: (x + 1, x * 0.3, x / 3, 1 - x, 2 / x, x**2, x**0.5 if bool(x.min() > 0) else x**3)),
    (
        "by plain",
        lambda x, w: (
            x * w,
            x / w,
            w / x,
            w - x,
            torch.addcmul(w, x, w),
            torch.lerp(x, w, 0.3),
            torch.where(w > 0, x, w),
        ),
    ),
    ("by itself", lambda x, w: (x * x, w / x.sum(), x.sum() * w, torch.addcdiv(w, x, x))),
    (
        "functions",
        lambda x, w: (x.exp(), x.sin(), x.tanh(), x.square(), x.abs(), F.silu(x), x.sigmoid(), x.abs().sqrt()),
    ),
    (
        "sums",
        lambda x, w: (
            x.sum(1),
            x.mean(),
            x.norm(),
            x.std(1),
            x.softmax(-1),
            x.cumsum(0),
            x.prod(-1),
            torch.softmax(x, 0, torch.float32),
        ),
    ),
    (
        "chosen",
        lambda x, w: (
            x.sort(-1),
            x.max(1),
            x.clamp(-0.5, 0.5),
            torch.cat([x, w]),
            x.topk(2),
            torch.stack([w, x]),
            x.float().quantile(0.3),
        ),
    ),
    (
        "products",
        lambda x, w: (
            x @ w.mT,
            w @ x.mT,
            torch.einsum("bij,bkj->bik", x, w),
            F.linear(x, w[0], w[0, :, 0]),
            F.conv1d(x, w[:, :, :2]),
        ),
    ),
    (
        "norms",
        lambda x, w: (
            F.layer_norm(x, (4,)),
            F.group_norm(x, 1),
            F.pad(x, (1, 1)),
            x.masked_fill(w > 0, 3.0),
            x.logsumexp(1),
        ),
    ),
    ("in place", inplace(lambda y: y.mul_(2).add_(1).__setitem__(0, y[1] * 3))),
]


class Uncast(TorchFunctionMode):
    """All stays in float64: what would not round."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("float", "half", "to", "type_as"):
            dtypes = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.dtype)]
            if args[0].dtype == torch.float64 and all(d.is_floating_point for d in dtypes):
                return args[0]
        elif func.__name__ == "softmax":
            args = [a for a in args if not isinstance(a, torch.dtype)]
        return func(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
@pytest.mark.parametrize(("name", "f"), HALF, ids=[n for n, _ in HALF])
def test_half_precision_has_tangents_in_float32(name: str, f: Callable[..., Any], dtype: torch.dtype) -> None:
    """Exact where each output is one operation away, else to the rounding of the values between."""
    weights = fixed(torch.empty(0, dtype=dtype), *A)
    doubles = weights.double()

    def g(x: Tensor) -> list[Tensor]:
        out = f(x) if name == "in place" else f(x, weights if x.dtype == dtype else doubles)
        return [y for y in outputs(out) if y.is_floating_point()]

    def exact(x: Tensor) -> list[Tensor]:
        with Uncast():
            return g(x)

    xs, ts = dual_inputs([A], dtype)
    out, dual, _ = traced(g, xs, ts)
    tolerance = (
        5e-6 if name in ("casts", "copies", "functions", "by numbers", "by plain", "chosen", "products") else 2e-2
    )
    for a, b, want in zip(out, g(xs[0].clone()), differences(exact, xs, ts), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
        got = dual.tangents(a)
        assert got is not None
        assert got.dtype == torch.promote_types(a.dtype, torch.float32)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * want.abs().max().item())


def start(
    *shape: int, dtype: torch.dtype = torch.float64, dual: DualNumbers | None = None
) -> tuple[DualNumbers, Tensor, Tensor]:
    dual = dual or DualNumbers()
    x, t = spread(*shape, seed=0).to(dtype), random(L, *shape, seed=10).to(torch.promote_types(dtype, torch.float32))
    dual.attach(x, t)
    return dual, x, t


# ------------------------------------------------------------------------------------------------------------ the API


def test_attach_drop_and_what_has_none() -> None:
    dual, x, t = start(*A)
    assert torch.equal(dual.tangents(x), t)
    assert torch.equal(dual.tangents(x[1].mT), t[:, 1].mT)
    assert torch.equal(dual.unclamped(x), t)
    assert dual.tangents(x.clone()) is None  # outside
    dual.attach(x[0], t[:, 1])  # a part of it
    assert torch.equal(dual.tangents(x[0]), t[:, 1])
    assert torch.equal(dual.tangents(x[1]), t[:, 1])
    dual.attach(x, t[:2])  # all of it, with another L
    assert dual.tangents(x).shape == (2, *A)
    dual.drop(x)
    assert dual.tangents(x) is None
    with dual:
        assert dual.tangents(x * 2) is None
    assert dual.escapes == []


def test_what_is_attached_is_not_written_to() -> None:
    dual, x, t = start(*A)
    kept = t.clone()
    with dual:
        x.mul_(2)
        x[0] = 0
    assert torch.equal(t, kept)
    assert torch.equal(dual.tangents(x)[:, 1], 2 * t[:, 1])
    dual, x, _ = start(*A)
    dual.attach(x, t)
    with dual:
        x[0] = 0
    assert torch.equal(t, kept)
    dual.attach(x, t[:1].expand(L, *A))
    with dual:
        x[0] = x[1]
        y = x.clone()
        y[1] = y[0] * 2
    assert torch.equal(t, kept)
    assert torch.equal(dual.tangents(y)[2, 1], 2 * t[0, 1])


@pytest.mark.parametrize("shape", [(L, 2, 3), (2, 3, 4), (L, 2, 3, 4, 1)])
def test_attach_checks_the_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"expected tangents \(L, \*\(2, 3, 4\)\)"):
        DualNumbers().attach(torch.zeros(A), torch.zeros(shape))


def test_attach_checks_the_tensor() -> None:
    dual = DualNumbers()
    with pytest.raises(ArgumentError, match=r"real floating point, got torch\.int64"):
        dual.attach(torch.zeros(2, dtype=torch.long), torch.zeros(3, 2))
    with pytest.raises(ArgumentError, match="expanded"):
        dual.attach(torch.zeros(1).expand(2), torch.zeros(3, 2))
    dual, x, t = start(*A)
    with pytest.raises(ShapeError, match="expected 3 tangents"):
        dual.attach(x[0], t[:2, 0])


def test_arguments_must_agree_in_length() -> None:
    dual, x, _ = start(*A)
    y = torch.zeros(A, dtype=torch.float64)
    dual.attach(y, torch.ones(2, *A))
    with dual:
        for f in (
            torch.add,
            lambda a, b: a.mul_(b),
            lambda a, b: torch.mul(a, b, out=torch.empty_like(a)),
            torch.atan2,
        ):
            with pytest.raises(ShapeError, match=r"same number of tangents for all arguments of \w+, got \[2, 3\]"):
                f(x, y)
        with pytest.raises(ShapeError, match="expected 3 tangents"):
            x[0] = y[0]
        with pytest.raises(ShapeError, match="expected 3 tangents"):
            x[torch.tensor([0])] = y[:1]
        y.copy_(x)  # all of it is new
        assert dual.tangents(y).shape == (L, *A)
        dual.attach(y, torch.ones(2, *A))
        torch.mul(x, 2, out=y)
        assert dual.tangents(y).shape == (L, *A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_strided_tensor_has_its_own_tangents(dtype: torch.dtype) -> None:
    big = torch.zeros(5, 8, dtype=dtype)
    part = big[1:4, ::2]
    dual = DualNumbers()
    t = random(L, 3, 4).to(dtype)
    dual.attach(part, t)
    whole = dual.tangents(big)
    assert torch.equal(whole[:, 1:4, ::2], t)
    assert whole.count_nonzero() == t.count_nonzero()
    last = torch.zeros(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)
    t = random(L, 2, 3, 4, 5).to(dtype)
    dual.attach(last, t)
    with dual:
        y = last * 2
    assert y.stride() == last.stride()
    assert torch.equal(dual.tangents(y), 2 * t)


def test_parameters_about_and_no_graph() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    dual, x, _ = start(*A, dtype=torch.float32)
    with dual:
        y = layer(x).sin() * layer.weight.sum()
        y[0] = layer.bias
        z = y.detach() * 2
    assert y.requires_grad
    assert layer.weight.grad is None
    for v in (y, z):
        assert not dual.tangents(v).requires_grad
        assert dual.tangents(v).grad_fn is None
    y.sum().backward()  # the user's own graph is whole
    assert layer.weight.grad is not None


def test_autocast() -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    dual, x, t = start(*A, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(x)
        with dual:
            y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, plain)
    torch.testing.assert_close(dual.tangents(y), t @ layer.weight.T)


# ---------------------------------------------------------------------------------------------------- past the clamps


UNCLAMPED = {
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clip": lambda x: torch.clip(x, -0.5, 0.5),
    "clamp_": lambda x: (x * 1).clamp_(-0.5, 0.5),
    "clamp_min": lambda x: x.clamp_min(0.0),
    "clamp_max": lambda x: torch.clamp_max(x, 0.0),
    "clamp with tensors": lambda x: x.clamp(torch.zeros(3, 4), torch.ones(4)),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.5),
    "hardtanh in place": lambda x: F.hardtanh(x * 1, -0.5, 0.5, True),
    "a chain": lambda x: (x.clamp(-1, 1) * 2).clamp(-0.5, 0.5) / 2,
    "scaled": lambda x: -(1 - (x.clamp(-1, 1) * torch.tensor(2.0) - 1) / torch.ones(4)) / 2,
    "copies": lambda x: x.clamp(-1, 1).contiguous().double().float().clone().to("cpu").reshape(-1).view(A),
    "permuted": lambda x: x.clamp(-1, 1).permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "cat": lambda x: torch.cat([x[:1].clamp(0, 0.1), x[1:].clamp(-1, 0)]),
    "stack": lambda x: torch.stack([x[0].clamp(0, 0.1), x[1]]),
    "copy_": lambda x: torch.zeros(A).copy_(x.clamp(-1, 0)),
    "buffer": lambda x: fill(torch.zeros(A), x),
    "index": lambda x: x.clamp(-1, 0)[torch.tensor([1, 0])].flip(0),
}


def fill(buffer: Tensor, x: Tensor) -> Tensor:
    buffer[0] = x[0].clamp(-0.1, 0.1)
    buffer[torch.tensor([1])] = x[1].clamp(0, 0.1)
    return buffer


@pytest.mark.parametrize("name", UNCLAMPED)
def test_unclamped(name: str) -> None:
    f = UNCLAMPED[name]
    dual, x, t = start(*A, dtype=torch.float32)
    with dual:
        y = f(x)
    torch.testing.assert_close(dual.unclamped(y), t)
    assert (dual.tangents(y) == 0).any()
    moved = (f(x + 1e-3 * t[0]) - f(x - 1e-3 * t[0])) / 2e-3
    torch.testing.assert_close(dual.tangents(y)[0], moved, rtol=1e-2, atol=1e-3)


def test_unclamped_is_dropped_by_anything_else() -> None:
    dual, x, _ = start(*A)
    with dual:
        c = x.clamp(-0.5, 0.5)
        for y in (c + x, c * c, c.square(), c.sum(0), c @ c.mT, torch.where(c > 0, c, 0.0), c.exp()):
            assert torch.equal(dual.unclamped(y), dual.tangents(y))
        d = c.clone()
        d[0] = d[1] * d[1]
        assert torch.equal(dual.unclamped(d)[:, 0], dual.tangents(d)[:, 0])
        assert torch.equal(dual.unclamped(d)[:, 1], dual.unclamped(c)[:, 1])
        d.mul_(d)
        assert torch.equal(dual.unclamped(d), dual.tangents(d))


def test_pixels() -> None:
    """What diffusers does with a finished image."""
    dual, x, t = start(2, 3, 4, 4, dtype=torch.float32)
    with dual, torch.no_grad():
        image = (x / 2 + 0.5).clamp(0, 1)
        array = image.cpu().permute(0, 2, 3, 1).float().numpy()
    (escape,) = dual.escapes
    assert escape.how == "numpy"
    assert escape.array is array
    assert np.array_equal(escape.value, array)
    assert escape.where == f"test_dual.py:{test_pixels.__code__.co_firstlineno + 5} in test_pixels"
    torch.testing.assert_close(escape.unclamped, (t / 2).permute(0, 1, 3, 4, 2))
    inside = ((x / 2 + 0.5 >= 0) & (x / 2 + 0.5 <= 1)).permute(0, 2, 3, 1)
    torch.testing.assert_close(escape.tangents, (t / 2).permute(0, 1, 3, 4, 2) * inside)


# ------------------------------------------------------------------------------------------------------------- escapes


def test_numbers_escape() -> None:
    dual, x, t = start(*A)
    with dual:
        _ = x[0, 0, 0].item(), float(x.sum()), int(x[0, 0, 0]), bool(x[1, 0, 0]), x[0, 0].tolist(), x[0, 0, 0] in x
        _ = (
            torch.equal(x, x),
            torch.allclose(x, x),
            f"{x[0, 0, 0]:.2f}",
            repr(x),
            len(x),
            x.shape,
            x.numel(),
            bool(x.max() > 0),
        )
    hows = ["item", "__float__", "__int__", "__bool__", "tolist", "__contains__", "equal", "allclose"]
    assert [e.how for e in dual.escapes] == hows
    assert torch.equal(dual.escapes[0].tangents, t[:, 0, 0, 0])
    assert dual.escapes[0].array == x[0, 0, 0].item()
    assert torch.equal(dual.escapes[1].tangents, t.sum((1, 2, 3)))
    assert dual.escapes[4].tangents.shape == (0, 4)
    assert all(e.where.endswith("in test_numbers_escape") for e in dual.escapes)


def test_few_numbers_are_kept_and_all_arrays() -> None:
    dual, x, _ = start(*A)
    with dual:
        x[0].numpy()
        for _ in range(2 * KEPT_ESCAPES):
            x[0, 0, 0].item()
        np.asarray(x)
    assert len(dual.escapes) == KEPT_ESCAPES + 2
    assert [dual.escapes[n].how for n in (0, 1, -1)] == ["numpy", "item", "__array__"]
    assert dual.escapes[1].value.untyped_storage().nbytes() == 8  # not all of x


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("back", [torch.from_numpy, torch.as_tensor, torch.asarray, torch.from_dlpack])
def test_a_shared_array_comes_back_with_its_tangents(back: Callable[..., Tensor], context: str) -> None:
    dual, x, t = start(*A)
    with dual, CONTEXTS[context]():
        array = (x * 2).numpy()
        y = back(array)
        z = back(array[1].T[::2]) + 1
        assert torch.equal(dual.tangents(y), 2 * t)
        torch.testing.assert_close(dual.tangents(z), 2 * t[:, 1].mT[:, ::2])
        y[0] = 0  # written through one, read through another
        assert dual.tangents(back(array))[:, 0].abs().sum() == 0
        assert dual.tangents(back(array.copy())) is None
    assert torch.equal(dual.escapes[0].tangents, 2 * t)  # as it was then


def test_memory_of_an_array_is_used_again() -> None:
    dual, x, _ = start(*A)
    with dual:
        for _ in range(5):
            array = (x * 2).numpy()
            kept = torch.from_numpy(array) * 1
            other = torch.from_numpy(np.zeros(A)) * 1
            assert dual.tangents(kept) is not None
            assert dual.tangents(other) is None
            dual.escapes.clear()
            del array, kept, other
    assert len(dual.shadows.handed) < 4
    fresh = torch.zeros(A, dtype=torch.float64)
    ((_, size, entry), *_) = dual.shadows.handed
    assert entry.ref.expired()
    dual.shadows.handed = [(fresh.data_ptr(), size, entry)]
    assert dual.tangents(fresh) is None  # at the very same place


def test_an_array_changed_in_numpy_is_refused() -> None:
    dual, x, _ = start(*A)
    with dual:
        array = x.numpy()
        array *= 2
        y = torch.from_numpy(array)
        with pytest.raises(UnsupportedPipelineError, match="changed in place"):
            torch.add(y, 1)
        x[0] = 1  # through torch it is seen
        assert (torch.from_numpy(array) + 1).sum() != 0


# --------------------------------------------------------------------------------------------- refused, and not refused


LIBRARY = torch.library.Library("bayesdiff_tests", "DEF")
LIBRARY.define("opaque(Tensor x) -> Tensor")
LIBRARY.impl("opaque", torch.exp, "CPU")
LIBRARY.define("writes(Tensor(a!) x) -> ()")
LIBRARY.impl("writes", lambda x: [None, x.mul_(2)][0], "CPU")
LIBRARY.define("composite(Tensor x) -> Tensor")
LIBRARY.impl("composite", lambda x: x.sin() * 2, "CompositeImplicitAutograd")


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x: F.dropout(x, 0.5), r"torch.nn.functional.dropout of float64\[2, 3, 4\].*random"),
        (lambda x: F.gumbel_softmax(x), "random"),
        (lambda x: F.rrelu(-x, training=True), "random"),
        (lambda x: nn.BatchNorm1d(3).double()(x), "running averages"),
        (lambda x: torch.normal(x, 1.0, out=torch.empty(A, dtype=x.dtype)), "drawn twice"),
        (lambda x: torch.ops.bayesdiff_tests.opaque(x), "custom operator"),
        (lambda x: torch.ops.bayesdiff_tests.writes.default(x), "changes an argument"),
        (lambda x: x.requires_grad_().sum().backward(), "gradients of gradients"),
        (lambda x: torch.autograd.grad(x.requires_grad_().square().sum(), x), "grad"),
        (lambda x: x.apply_(lambda v: v), "apply_"),
        (lambda x: x.resize_(100), "memory's size"),
        (lambda x: x.unique(), "unique of"),
        (lambda x: torch._foreach_add_([x], 1.0), "_foreach_add_"),
        (lambda x: nn.init.normal_(x), "normal_.*changes an argument"),
        (lambda x: torch.vmap(lambda v: v * 2)(x), "torch.func"),
        (lambda x: torch.func.jvp(torch.sin, (x,), (x,)), "torch.func"),
        (lambda x: x.view(torch.int64).view(torch.float64)[0].view(torch.float32) * 2, "read as torch.float32"),
        (
            lambda x: F.ctc_loss(x.log_softmax(-1), torch.ones(3, 1).long(), (2, 2, 2), (1, 1, 1)),
            "ctc_loss.*propagation='ensemble'",
        ),
    ],
)
def test_refused(f: Callable[..., Any], message: str) -> None:
    dual, x, _ = start(*A)
    with pytest.raises(UnsupportedPipelineError, match=message), dual:
        f(x)


def test_operators_raise_our_error() -> None:
    """torch's operators turn a TypeError into NotImplemented."""
    dual, x, _ = start(*A)
    with pytest.raises(UnsupportedPipelineError, match="read as"), dual:
        2.0 ** x.view(torch.float32)


def test_a_composite_operator() -> None:
    dual, x, t = start(*A)
    with dual:
        y = torch.ops.bayesdiff_tests.composite(x)
    torch.testing.assert_close(dual.tangents(y), 2 * x.cos() * t)


def test_what_numpy_computed_has_no_tangents() -> None:
    dual, x, _ = start(*A)
    with dual:
        for y in (x * np.ones(4), torch.as_tensor(np.sin(x))):
            assert dual.tangents(y) is None
    assert [e.how for e in dual.escapes] == ["__array__", "__array__"]


def test_empty_and_infinite() -> None:
    dual, x, t = start(*A)
    with dual:
        empty = torch.cat([x[x > 100], x[:0].flatten()]) * 2
        total = empty.sum() + x[:0].softmax(0).prod()
        inside = torch.where(x > 0, x, torch.log(x.relu()))  # 0 · ∞ is not selected
        clamped = (1 / (x - x)).clamp(max=1.0)
    assert dual.tangents(empty).shape == (L, 0)
    assert dual.tangents(total).shape == (L,)
    assert torch.equal(dual.tangents(inside)[:, x > 0], t[:, x > 0])
    assert dual.tangents(clamped).abs().sum() == 0


def test_foreach() -> None:
    dual, x, t = start(*A)
    with dual:
        y, z = torch._foreach_mul([x, torch.ones(2, dtype=torch.float64)], 2.0)
    assert torch.equal(dual.tangents(y), 2 * t)
    assert dual.tangents(z).abs().sum() == 0


def test_random_like_draws_once_and_has_no_tangents() -> None:
    dual, x, _ = start(*A)
    torch.manual_seed(0)
    plain = [
        torch.randn_like(x),
        torch.rand_like(x),
        torch.bernoulli(x.sigmoid()),
        torch.randint_like(x, 5),
        torch.empty_like(x).normal_(),
    ]
    torch.manual_seed(0)
    with dual:
        out = [
            torch.randn_like(x),
            torch.rand_like(x),
            torch.bernoulli(x.sigmoid()),
            torch.randint_like(x, 5),
            torch.empty_like(x).normal_(),
        ]
    for a, b in zip(plain, out, strict=True):
        assert torch.equal(a, b)
        assert dual.tangents(b) is None


def test_torch_normal() -> None:
    dual, x, t = start(*A)
    torch.manual_seed(0)
    with dual:
        y, z = torch.normal(x, 0.5), torch.normal(x, x.abs())
    assert torch.equal(dual.tangents(y), t)
    torch.testing.assert_close(dual.tangents(z), t + (z - x) / x * t)


def test_numbers_of_a_dual_are_constants() -> None:
    dual, x, t = start(*A)
    with dual:
        y = x * x.max().item()
    torch.testing.assert_close(dual.tangents(y), t * x.max())


# --------------------------------------------------------------------------------------------------- paused and resumed


def seen(dual: DualNumbers, x: Tensor) -> bool:
    return dual.tangents(x + 1) is not None


def test_paused_and_resumed() -> None:
    dual, x, _ = start(*A)
    assert not seen(dual, x)
    with dual:
        assert seen(dual, x)
        with dual.resumed():
            assert seen(dual, x)
        with dual.paused():
            assert not seen(dual, x)
            with dual.paused():
                assert not seen(dual, x)
            assert not seen(dual, x)
            with dual.resumed():
                assert seen(dual, x)
                with dual.paused():
                    assert not seen(dual, x)
                    with dual.resumed():
                        assert seen(dual, x)
                assert seen(dual, x)
            assert not seen(dual, x)
        assert seen(dual, x)
    assert not seen(dual, x)
    with dual.paused():
        assert not seen(dual, x)
    assert not seen(dual, x)


def test_exceptions_fly() -> None:
    dual, x, _ = start(*A)
    with dual:
        with contextlib.suppress(ValueError), dual.paused():
            raise ValueError
        assert seen(dual, x)
        with dual.paused():
            with contextlib.suppress(ValueError), dual.resumed():
                raise ValueError
            assert not seen(dual, x)
        with contextlib.suppress(ValueError), dual.paused(), dual.resumed(), dual.paused():
            raise ValueError
        assert seen(dual, x)
        with pytest.raises(RuntimeError):
            x @ x
        assert seen(dual, x)
    assert torch.overrides._get_current_function_mode_stack() == []


class Counting(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Counting.calls += 1
        return func(*args, **(kwargs or {}))


def test_paused_below_another_mode() -> None:
    dual, x, _ = start(*A)
    with dual, torch.device("cpu"), Counting() as top:
        before = torch.overrides._get_current_function_mode_stack()
        with dual.paused():
            Counting.calls = 0
            assert not seen(dual, x)
            assert Counting.calls > 0  # the other is still there
            with dual.resumed():
                assert seen(dual, x)
            with torch.device("cpu"):
                assert not seen(dual, x)
        assert torch.overrides._get_current_function_mode_stack() == before
        assert before[-1] is top
        assert seen(dual, x)


def test_compiled_code_runs_when_paused() -> None:
    dual, x, t = start(*A, dtype=torch.float32)
    compiled = torch.compile(lambda v: v.sin() * 2, backend="aot_eager")
    with dual, torch.no_grad():
        y = x * 2
        with dual.paused():
            f = compiled(y)
        dual.attach(f, t)
        z = f + y
    torch.testing.assert_close(dual.tangents(z), 3 * t)
    torch.testing.assert_close(f, (2 * x).sin() * 2)


def test_two_at_once() -> None:
    """One inside the other: each has its own."""
    outer, x, t = start(*A)
    inner = DualNumbers()
    inner.attach(x, 2 * t)
    with outer, inner:
        y = x.sin() * x
        y[0] = x[1]
    torch.testing.assert_close(2 * outer.tangents(y), inner.tangents(y))


def test_threads() -> None:
    """Each thread its own mode; derivatives without a rule at the same time."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for n in range(20):
                compare(
                    lambda x: (x.softmax(-1).cumsum(0).std(1), x.sin() * x, x.sort(-1), x.quantile(0.3)),
                    [(2 + seed, 3, 4 + n % 2)],
                )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_another_thread_is_not_traced() -> None:
    dual, x, _ = start(*A)
    found: list[bool] = []
    with dual:
        thread = threading.Thread(target=lambda: found.append(seen(dual, x)))
        thread.start()
        thread.join()
    assert found == [False]


# -------------------------------------------------------------------------------------------------------------- memory


def test_entries_are_forgotten() -> None:
    dual, x, _ = start(*A)
    most = 0
    with dual, torch.no_grad():
        for n in range(1000):
            y = x * 0.9 + 0.1
            y[0] = y[1].sin()
            x = torch.cat([y[1:], y[:1]])
            most = max(most, len(dual.shadows.entries))
            if n % 100 == 0:
                x = x.clone().sort().values
    assert most < 20
    gc.collect()
    shadows = [e.shadow.data for e in dual.shadows.entries.values()]
    assert sum(s.numel() for s in shadows) <= 20 * L * x.numel()


def test_many_entries_are_kept_and_forgotten() -> None:
    dual, x, _ = start(4)
    with dual:
        kept = [x * n for n in range(500)]
        assert len(dual.shadows.entries) >= 501
        assert all(torch.equal(dual.tangents(k), dual.tangents(x) * n) for n, k in enumerate(kept))
        del kept
        for _ in range(20):
            x * 1
    assert len(dual.shadows.entries) < 10


def test_new_memory_never_inherits_tangents() -> None:
    dual, x, _ = start(*A)
    with dual:
        for n in range(300):
            y = x * n
            z = torch.empty(A, dtype=torch.float64)
            assert dual.tangents(z) is None
            assert dual.tangents(z + 1) is None
            del y
            w = torch.ones(A, dtype=torch.float64)
            assert dual.tangents(w) is None
            assert dual.tangents(w * 2) is None


def test_shared_shadows_are_copied_before_a_write() -> None:
    dual, x, t = start(*A)
    with dual:
        y = x + 1  # the same tangents
        z = y - 2
        assert dual.tangents(y).data_ptr() == dual.tangents(x).data_ptr()
        y.mul_(2)
        z[0] = 0
        w = x.clone()
        w[:, 0] = w[:, 1]
    assert torch.equal(dual.tangents(x), t)
    assert torch.equal(dual.tangents(y), 2 * t)
    assert torch.equal(dual.tangents(z)[:, 1], t[:, 1])
    assert dual.tangents(z)[:, 0].abs().sum() == 0
    assert torch.equal(dual.tangents(w)[:, :, 0], t[:, :, 1])


def test_a_part_does_not_keep_the_whole() -> None:
    dual, x, _ = start(100, 4)
    with dual:
        y = x[:1].clone()
        z = x[:, 0].contiguous()
    assert dual.tangents(y).untyped_storage().nbytes() == L * 4 * 8
    assert dual.tangents(z).untyped_storage().nbytes() == L * 100 * 8


def test_in_place_on_the_whole_needs_no_copy() -> None:
    dual, x, _ = start(*A)
    with dual:
        y = x * 2
        y.add_(1)
        first = dual.tangents(y).data_ptr()
        for _ in range(5):
            y[0] = y[1]
            y.add_(1)
    assert dual.tangents(y).data_ptr() == first


# ---------------------------------------------------------------------------------------------------------- schedulers


CLIPPED, THRESHOLDED = {"clip_sample": True}, {"thresholding": True}
SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", CLIPPED | {"beta_schedule": "squaredcos_cap_v2"}),
    ("DDIMScheduler", {"clip_sample": False, "thresholding": True, "prediction_type": "v_prediction"}),
    ("DDPMScheduler", CLIPPED),
    ("DDPMScheduler", {"clip_sample": False, "thresholding": True}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", THRESHOLDED | {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("PNDMScheduler", {}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", THRESHOLDED),
    ("HeunDiscreteScheduler", {}),
    ("LCMScheduler", THRESHOLDED),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("SASolverScheduler", {}),
]


def sample(name: str, settings: dict[str, Any], x: Tensor) -> Tensor:
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(6)
    accepted = inspect.signature(scheduler.step).parameters
    extra = {"generator": torch.Generator().manual_seed(0)} if "generator" in accepted else {}
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = torch.sin(1.3 * seen + float(t) / 500) * 0.5 + 0.2 * seen * torch.cos(
            seen.mean((1, 2, 3), keepdim=True)
        )
        x = scheduler.step(output, t, x, **extra).prev_sample
    return x


@pytest.mark.parametrize(("name", "settings"), SCHEDULERS, ids=[f"{n}-{'-'.join(k)}" for n, k in SCHEDULERS])
def test_schedulers(name: str, settings: dict[str, Any]) -> None:
    """The whole chain, network included, as it is; in float64 against differences of the plain chain."""
    x, t = random(2, 3, 4, 4, seed=1), random(L, 2, 3, 4, 4, seed=11)
    single = x.float()
    out, dual, _ = traced(lambda v: sample(name, settings, v), [single], [t.float()])
    assert torch.equal(out, sample(name, settings, single))
    assert dual.tangents(out).dtype == torch.float32
    assert dual.escapes == []
    assert len(dual.shadows.entries) < 40
    with Uncast():
        (want,) = differences(lambda v: sample(name, settings, v), [x], [t], h=3e-6)
        out, dual, _ = traced(lambda v: sample(name, settings, v), [x], [t])
    torch.testing.assert_close(dual.tangents(out), want, rtol=0, atol=1e-7 * max(want.abs().max().item(), 1e-2))


# ---------------------------------------------------------------------------------------------------- random programs


def program(seed: int, x: Tensor) -> Tensor:
    """Thirty random operations on (3, 3) tensors that are views and buffers of each other."""
    rng = np.random.default_rng(seed)
    pool = [
        x * 1,
        fixed(x, 3, 3),
        torch.zeros(4, 3, 3, dtype=x.dtype)[1],
        torch.stack([x, x]).mean((0, 1)).expand(3, 3).clone(),
    ]

    def pick() -> Tensor:
        return pool[rng.integers(len(pool))]

    def new() -> Tensor:
        kind, a, b, n = rng.integers(14), pick(), pick(), int(rng.integers(3))
        if kind == 0:
            return a + b
        if kind == 1:
            return torch.sin(a * b)
        if kind == 2:
            return torch.cat([a[n:], b[:n]])
        if kind == 3:
            return a.mT
        if kind == 4:
            return a.clone().t()
        if kind == 5:
            return torch.stack([a, b, a], dim=n).select(n, int(rng.integers(3)))
        if kind == 6:
            return a + 1
        if kind == 7:
            return (a * 0.5).detach()
        if kind == 8:
            pool.append(a + x)  # numpy sees a dual: what shares memory with a plain tensor is not known
            return torch.from_numpy(pool[-1].numpy())
        if kind == 9:
            return torch.zeros(5, 5, dtype=x.dtype)[1:4, :3]
        if kind == 10:
            return a[[2, 0, 1]].flip(n % 2)
        if kind == 11:
            return a[n].expand(3, 3).contiguous() * b
        if kind == 12:
            return copy.deepcopy(a)
        return torch.matmul(a, b).tanh()

    def change() -> None:
        kind, a, b, n = rng.integers(12), pick(), pick().clone(), int(rng.integers(3))
        if kind == 0:
            a.add_(b)
        elif kind == 1:
            a.mul_(b).sin_()
        elif kind == 2:
            a[n] = b[0]
        elif kind == 3:
            a[:, n] = 0.3
        elif kind == 4:
            a.copy_(b)
        elif kind == 5:
            torch.add(a, b, out=a)
        elif kind == 6:
            a[b > 0.2] = 0.1
        elif kind == 7:
            a[torch.tensor([n, (n + 1) % 3]), :] = b[:2]
        elif kind == 8:
            a[n].zero_()
        elif kind == 9:
            a.clamp_(-0.9, 0.9)
        elif kind == 10:
            a.index_put_((torch.tensor([n]), torch.tensor([0])), b[0, :1])
        else:
            torch.mul(b, 0.5, out=b)
            a.lerp_(b, 0.3)

    for _ in range(30):
        if rng.random() < 0.5:
            pool.append(new())
        else:
            change()
        while len(pool) > 7:
            del pool[rng.integers(len(pool))]
    return torch.stack(pool)


@pytest.mark.parametrize("context", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed: int, context: str) -> None:
    xs, ts = dual_inputs([(3, 3)], torch.float64)
    with CONTEXTS[context]():
        out, dual, _ = traced(lambda x: program(seed, x), xs, ts)
        assert torch.equal(out, program(seed, xs[0].clone()))
        (want,) = differences(lambda x: program(seed, x), xs, ts, h=1e-5)
    got = dual.tangents(out)
    if got is None:
        assert want.abs().max() == 0
        return
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7 * max(1.0, want.abs().max().item()))


# --------------------------------------------------------------------------------------------------------------- speed


def step(x: Tensor, e: Tensor) -> Tensor:
    """A step of DDIM: twelve operations."""
    clean = (x - 0.3 * e) / 0.95
    clean = clean.clamp(-1, 1)
    noise = (x - 0.95 * clean) / 0.3
    return (0.97 * clean + 0.24 * noise).to(x.dtype)


def test_a_step_is_fast(capsys: pytest.CaptureFixture[str]) -> None:
    dual = DualNumbers()
    x, e = torch.randn(8, 1, 28, 28), torch.randn(8, 1, 28, 28)
    dual.attach(x, torch.randn(64, 8, 1, 28, 28))
    dual.attach(e, torch.randn(64, 8, 1, 28, 28))
    plain = torch.randn(3)
    best = {}
    with dual, torch.no_grad():
        for name, f, repeats in (
            ("a step with 64 tangents", lambda: step(x, e), 30),
            ("a plain operation", lambda: plain + 1, 3000),
            ("a view", lambda: x[0], 3000),
            ("x.shape", lambda: x.shape, 3000),
        ):
            times = []
            for _ in range(7):
                begin = time.thread_time()
                for _ in range(repeats):
                    f()
                times.append((time.thread_time() - begin) / repeats)
            best[name] = min(times)
    with capsys.disabled():
        print("\n" + ", ".join(f"{k}: {1e6 * v:.1f} µs" for k, v in best.items()))
    assert best["a step with 64 tangents"] < 5e-3
    assert best["a plain operation"] < 100e-6
    assert best["x.shape"] < 50e-6
