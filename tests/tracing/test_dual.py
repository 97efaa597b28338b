"""Every operation in one table: values as they are, tangents against central differences of the plain function in float64."""

import contextlib
import copy
import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesdiff.checks import ArgumentError, ShapeError, UnsupportedPipelineError
from bayesdiff.tracing.derivatives import leaves
from bayesdiff.tracing.dual import KEPT_ESCAPES, DualNumbers

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
    return ((order - n // 2) * (4.8 / n) + 0.07 + 0.001 * seed).double().reshape(shape)


def dual_inputs(shapes: Any, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    xs = [spread(*s, seed=n).to(dtype) for n, s in enumerate(shapes)]
    ts = [random(L, *s, seed=10 + n).to(torch.promote_types(dtype, torch.float32)) for n, s in enumerate(shapes)]
    return xs, ts


def outputs(value: Any) -> list[Tensor]:
    return list(leaves(value))


def differences(f: Callable[..., Any], xs: list[Tensor], ts: list[Tensor], h: float = 1e-3) -> list[Tensor]:
    """Derivatives along each tangent, of fourth order, in float64."""
    xs, ts = [x.double() for x in xs], [t.double() for t in ts]

    def at(n: int, step: float) -> list[Tensor]:
        return [y.clone() for y in outputs(f(*[x + step * t[n] for x, t in zip(xs, ts, strict=True)]))]

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


def compare(f: Callable[..., Any], shapes: Any, dtype: torch.dtype = torch.float64, tolerance: float | None = None) -> None:
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


def set_parts(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros(x.shape, dtype=x.dtype).to(torch.promote_types(x.dtype, torch.complex64))
    z.real = x * y
    z.imag = y
    return z * z


UNARY = """neg abs sqrt square exp log sin cos tanh sigmoid reciprocal rsqrt log1p expm1 erf frac sinc positive nan_to_num floor sign
round""".split()
LINEAR = """cumsum(0) flip(0) flip([0,-1]) roll(1,-1) roll(2) roll((1,2),(0,1)) tril() triu(1) repeat(2,1,1,2) tile(2,2) sum() sum(1)
sum((0,-1),keepdim=True) mean() mean(-1) mean(dim=(0,2)) clone() contiguous() reshape(-1) flatten(1) double() to(torch.float64)
permute(2,0,1).contiguous() permute(2,0,1).reshape(4,-1) permute(1,2,0).clone() diff() trace_() index_select(1,torch.tensor([2,0]))
repeat_interleave(2,1) rot90() diag_embed() t3() type(torch.float64) expand(5,2,3,4).clone() masked_fill(mask_,2.0) unfold(2,2,1).clone()
view(6,4)+0 split(2,dim=-1)[0].contiguous() movedim(0,-1).contiguous(memory_format=torch.contiguous_format)""".split()
NONLINEAR = """std() std(1) var((0,1)) var(-1,unbiased=False) norm() norm(2,-1) norm(dim=(1,2),keepdim=True) softmax(-1) log_softmax(1)
logsumexp(0) prod(1) amax(-1) max() min(dim=1) max(1,True) sort() sort(0,descending=True) topk(2,1) median() median(-1) kthvalue(2,1)
cummax(1) cumprod(-1) quantile(0.3) quantile(0.6,dim=1,keepdim=True) quantile(torch.tensor([.1,.9],dtype=x.dtype),dim=-1) renorm(2,0,1.0)
pow(2) pow(3.5).nan_to_num(0) pow(1) pow(0)+x clamp(-0.5,0.5) clamp(min=0.1) clamp(max=0.1) clamp(0.5,-0.5)+x clip(-1,1) clamp_min(0)
clamp_max(0) msort() aminmax() logcumsumexp(0) cov2() mode(1) nanmedian(-1) nansum(1) remainder(0.7) fmod(0.7) floor_divide(0.5)+x""".split()


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
    *(Case(f"x.{n}", lambda x, n=n: getattr(torch, n)(x.abs() + 0.3 if n in ("sqrt", "log", "rsqrt", "log1p") else x) + 2 * x) for n in UNARY),
    *(Case(f"x.{text}", expression(text)) for text in LINEAR + NONLINEAR),
    Case("arithmetic with numbers", lambda x: 1 - (2 * x + 3) / 4 - x / 2 + (-x) * 0.3 + 2 / (x * x + 1)),
    Case("__r…__", lambda x: (1 - x) * (2 + x) * (3 * x) + 2.0 ** (x * 0.1)),
    Case("dual and dual", lambda x, y: x + y - x * y + x / (y * y + 1), (A, A)),
    Case("broadcast", lambda x, y: x * y + y / (x * x + 1) - (y - x) + (x[:, :1] + y), (A, B)),
    Case("broadcast to more dimensions", lambda x, y: y + fixed(y, *A) * y - fixed(y, *A) + x[0, 0, 0] * fixed(y, *A), (A, B)),
    Case("dual and plain", lambda x: (x + fixed(x, *B)) * fixed(x, *A) / fixed(x, *A) - fixed(x, 1, 1, 4) / (x * x + 1)),
    Case("plain ∘ dual", lambda x: fixed(x, *A) - x + fixed(x, *B) / (x * x + 1)),
    Case("0-dim", lambda x: x.sum() * fixed(x, *A) + x[0, 0, 0] + torch.tensor(2.0, dtype=torch.float64) * x.mean()),
    Case("alpha", lambda x, y: torch.add(x, y, alpha=2) - torch.sub(x, y, alpha=0.5) + torch.rsub(x, y, alpha=3), (A, A)),
    Case("alpha plain", lambda x: torch.add(x, fixed(x, *A), alpha=2) - torch.sub(fixed(x, *A), x, alpha=0.5)),
    Case("functions", lambda x, y: torch.multiply(torch.subtract(x, other=y), torch.divide(x, 3)), (A, A)),
    Case("named arguments", lambda x: torch.sum(input=x, dim=1) + torch.mul(input=x, other=2).mean(dim=1)),
    Case("rounding_mode", lambda x: torch.div(x, 0.3, rounding_mode="floor") + x),
    Case("addcmul", lambda x, y: torch.addcmul(x, y, x, value=0.3) + x.addcmul(fixed(x, *A), y), (A, A)),
    Case("addcdiv", lambda x, y: torch.addcdiv(x, y, x * x + 1, value=0.3) + fixed(x, *A).addcdiv(y, fixed(x, *A)), (A, A)),
    Case("lerp", lambda x, y: torch.lerp(x, y, 0.3) + x.lerp(y, x) + torch.lerp(fixed(x, *A), y, fixed(x, *A)), (A, A)),
    Case("pow with dual exponent", lambda x, y: (x * x + 1) ** y + torch.pow(fixed(x, *A).abs(), y) + 2**y, (A, A)),
    Case("binary", lambda x, y: torch.maximum(x, y) + torch.atan2(x, y) + torch.hypot(x, y) * torch.minimum(x, y.new_tensor(0.1)), (A, A)),
    Case("clamp with tensors", lambda x, y: torch.clamp(x, fixed(x, *A) - 1, fixed(x, *A)) + x.clamp(min=y) + x.clamp(max=y), (A, B)),
    Case("clamp between duals", lambda x, y: torch.clamp(x, -y.abs(), y.abs()) + torch.clamp(fixed(x, *A), y - 0.3, y.abs()), (A, B)),
    Case("clamp keeps NaN away", lambda x: torch.where(x > 0, torch.log(x.clamp(min=1e-3)), 0.0) + torch.clamp(x, -0.5, 0.5)),
    Case("activations", lambda x: F.relu(x) + F.silu(x) * F.gelu(x) + F.elu(x) + F.softplus(x) + F.hardtanh(x) + F.leaky_relu(x, 0.1)),
    Case("activations in place", lambda x: F.relu(x * 1, True) + F.silu(x * 2, inplace=True) + F.hardtanh(x * 1, -0.5, 0.5, True)),
    Case("where", lambda x, y: torch.where(x > 0, x, y) + torch.where(x > 1, x, 0.0) + torch.where(y > 0, 1.0, y), (A, B)),
    Case("x.where", lambda x, y: x.where(x > 0, y) + x.where(fixed(x, *A) > 0, fixed(x, *B)), (A, B)),
    Case("masked_fill by dual", lambda x, y: x.masked_fill(fixed(x, *A) > 0, y.sum()) + fixed(x, *A).masked_fill(x > 0, y[0, 0]), (A, B)),
    Case("cat", lambda x, y: torch.cat([x, fixed(x, 1, 3, 4), y[None]], dim=0) * torch.cat([y[None], x, x[:1]]), (A, B)),
    Case("cat, last", lambda x: torch.cat((fixed(x, *A), x, torch.zeros(0, dtype=x.dtype)), -1) + torch.concat([x, x], axis=2)),
    Case("stack", lambda x: torch.stack([x, fixed(x, *A)], -1) + torch.stack([x, x], dim=3)),
    Case("hstack", lambda x: (torch.hstack([x, fixed(x, *A)]), torch.vstack([x, x]), torch.dstack([fixed(x, *A), x]))),
    Case("index", lambda x: (x[0] + 0, x[..., 1] * 2, x[:, None, 1:] + 0, x[1, 2, 3] * 1, x[:, ::2] + 0, x[-1, ..., 0] + 0)),
    Case("index by tensor", lambda x: (x[:, torch.tensor([2, 0])], x[torch.tensor(1)], x[..., torch.tensor([[0, 3]])], x[[1, 0]])),
    Case("index by tensors", lambda x: (x[torch.tensor([0, 1]), :, torch.tensor([1, 2])], x[torch.tensor([0, 1]), torch.tensor([1, 2])])),
    Case("index mixed", lambda x: (x[0, :, torch.tensor([1, 2])], x[torch.tensor([1]), ..., torch.tensor([3])], x[:, [0, 2], 1:], x[None, [1]])),
    Case("index by numpy", lambda x: (x[np.array([1, 0])], x[np.int64(1)] + 0, x[:, np.array([True, False, True])])),
    Case("index by mask", lambda x: (x[fixed(x, *A) > 0], x[:, fixed(x, 3) > 0], x[torch.tensor([True, False]), :, 1], x[True])),
    Case("index nested", lambda x: x[[[0, 1], [1, 0]]]),
    Case("gather", lambda x: x.gather(1, torch.tensor([[[0, 1, 2, 0]], [[1, 1, 0, 2]]])) + torch.gather(x, 2, torch.zeros(2, 3, 1).long())),
    Case("take", lambda x: x.take(torch.tensor([1, 5])) + x.masked_select(fixed(x, *A) > 0)[:2] + x.take_along_dim(torch.tensor([[[0]]]), 0).sum()),
    Case("scatter", lambda x, y: x.scatter(1, torch.zeros(2, 1, 4).long(), x.exp()) + x.scatter(0, torch.ones(1, 3, 4).long(), 5.0) * y, (A, B)),
    Case("index_…", lambda x, y: (x.index_add(0, torch.tensor([1]), y[None], alpha=2), x.index_fill(1, torch.tensor([0]), 2.0) * 2,
                                  x.index_copy(0, torch.tensor([0]), y[None]), x.index_put((torch.tensor([1]),), y)), (A, B)),
    Case("…_scatter", lambda x, y: x.select_scatter(y, 0, 1) + x.slice_scatter(y[None] * 2, 0, 1) + fixed(x, *A).select_scatter(y, 0, 0), (A, B)),
    Case("pad", lambda x: (F.pad(x, (1, 2)), F.pad(x, (1, 0, 2, 1), value=3.0), F.pad(x, (1, 1), mode="reflect"), F.pad(x, (1, 2), mode="circular"))),
    Case("pad images", lambda x: (F.pad(x, (1, 1, 2, 2), mode="reflect"), F.pad(x, (1, 1, 0, 0), "replicate")), ((2, 3, 4, 4),)),
    Case("matmul", lambda x, y: (x @ y.mT, y @ x.mT, fixed(x, 5, 3) @ x, torch.matmul(y, y.mT), x @ fixed(x, 4), y[0] @ x.mT), (A, B)),
    Case("mm, bmm", lambda x, y: (torch.mm(y, fixed(x, 4, 2)), torch.bmm(x, fixed(x, 2, 4, 2)), torch.bmm(x, x.mT), torch.mv(y, fixed(x, 4))), (A, B)),
    Case("einsum", lambda x, y: (torch.einsum("bij,kj->bik", x, y), torch.einsum("bij,jk->bik", x, fixed(x, 4, 2)), torch.einsum("bij->j", x)), (A, B)),
    Case("products", lambda x, y: (torch.tensordot(x, y, 2), torch.outer(y[0], y[1]), torch.dot(y[0], fixed(y, 4)), torch.kron(y, y), torch.inner(y, y)), (A, B)),
    Case("baddbmm", lambda x, y: torch.baddbmm(x, x @ y.mT, fixed(x, 2, 3, 4), beta=0.3, alpha=2) + torch.addmm(y, y @ y.mT, fixed(x, 3, 4)), (A, B)),
    Case("linear", lambda x, y: (F.linear(x, fixed(x, 5, 4), fixed(x, 5)), F.linear(x, y, bias=y[:, 0]), F.linear(fixed(x, 2, 4), y, fixed(y, 3))), (A, B)),
    Case("conv", lambda x, w: (F.conv2d(x, fixed(x, 5, 3, 3, 3), fixed(x, 5), padding=1), F.conv2d(x, w), F.conv2d(x[0], fixed(x, 5, 3, 3, 3), bias=fixed(x, 5)),
                               F.conv2d(fixed(x, *x.shape), w, fixed(x, 4), 2), F.conv_transpose2d(x, fixed(x, 3, 2, 2, 2), fixed(x, 2), stride=2)), ((2, 3, 6, 6), (4, 3, 3, 3))),
    Case("conv1d", lambda x: F.conv1d(x, fixed(x, 2, 3, 2), fixed(x, 2)) + F.avg_pool1d(x, 2, 1)[:, :2]),
    Case("interpolate", lambda x: (F.interpolate(x, scale_factor=2), F.interpolate(x, (3, 5), mode="bilinear"), F.interpolate(x, size=(12, 12), mode="bicubic", antialias=True),
                                   F.interpolate(x, scale_factor=0.5, mode="area")), ((2, 3, 6, 6),)),
    Case("images", lambda x: (F.avg_pool2d(x, 2), F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2), F.pixel_unshuffle(x, 2), F.max_pool2d(x, 2), F.unfold(x, 2),
                              F.avg_pool2d(x[0], 2), F.adaptive_avg_pool2d(x, 2), F.grid_sample(x, fixed(x, 2, 3, 3, 2), align_corners=False)), ((2, 3, 6, 6),)),
    Case("normalize", lambda x: (F.layer_norm(x, (4,), fixed(x, 4), fixed(x, 4)), F.group_norm(x, 3), F.normalize(x, dim=1), F.instance_norm(x))),
    Case("losses", lambda x, y: (F.mse_loss(x, fixed(x, *A)), F.l1_loss(x[0], y), F.cosine_similarity(x[0], y), F.huber_loss(x[0], y)), (A, B)),
    Case("attention", lambda x: F.scaled_dot_product_attention(x, x * 2, x + fixed(x, *A))),
    Case("linalg", lambda x: (torch.linalg.norm(x), torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True), torch.linalg.matrix_norm(x), torch.linalg.inv(x @ x.mT + 3 * torch.eye(3, dtype=x.dtype)),
                              torch.linalg.solve(x @ x.mT + 3 * torch.eye(3, dtype=x.dtype), x), torch.linalg.svdvals(x), torch.norm(x, dim=1))),
    Case("std_mean", lambda x: torch.std_mean(x, dim=1)),
    Case("fft", lambda x: (torch.fft.fftn(x), torch.fft.irfft(torch.fft.rfft(x) * fixed(x, 3)), torch.fft.fftshift(torch.fft.fft2(x)).abs(), torch.fft.ifft(x).real * 1, torch.fft.fft(x).conj() * 2)),
    Case("complex", complex_parts, (A, A)),
    Case("parts are set", set_parts, (A, A)),
    Case("polar", lambda x, y: torch.polar(x.abs(), y) + (x + 1j * y) * 2j, (A, A)),
    Case("chunks", lambda x: [p * 2 for p in x.chunk(2)] + list(x.unbind(1)) + list(x.split([1, 3], dim=2)) + list(torch.tensor_split(x, 2))),
    Case("views", lambda x: (x.squeeze() + 0, x.unsqueeze(0), x.T.mT.mH, x.view(2, 12)[:, ::3] * 1, x.narrow(1, 0, 2), x.swapaxes(0, 1) * 2, x.diagonal(0, 1, 2) + 0, x.as_strided((2, 2), (1, 3)) + 0)),
    Case("view of a view", lambda x: x[1].t()[1:, ::2].unflatten(0, (3, 1)).flatten() * x.view(-1)[3::4]),
    Case("like", lambda x: torch.zeros_like(x) + torch.ones_like(x) * x + x.new_zeros(4) + x.new_full((4,), 2.0) + torch.empty_like(x).fill_(1)),
    Case("full", lambda x: (torch.full_like(x, 2.0) * x, x.new_full((2,), x.sum()), torch.full((3,), x[0, 0, 0]), torch.full_like(x, x.mean()))),
    Case("tensor of tensors", lambda x: (torch.tensor([x[0, 0, 0], x[1, 0, 0] * 2], dtype=x.dtype), torch.as_tensor(x) * 2, torch.stack([torch.as_tensor(v) for v in x]), torch.tensor([[x.sum(), 2.0]]))),
    Case("comparisons", lambda x: (x > 0, x.argmax(), x.long(), x.isnan(), x.int() + x, x.sign(), torch.round(x), x.ceil(), x * (x > 0), x.bool())),
    Case("dtypes up", lambda x: (x.double() * 2, x.to(torch.float64), torch.zeros(2, dtype=torch.float64).type_as(x) * x[..., :2], x.to(fixed(x, 1)) * 2, x.to("cpu"), x.cpu().contiguous())),
    Case("float32 and float64", lambda x: x * random(*A) + x.double()),
    Case("copies", deep),
    Case("x.data", set_data, (A, A)),
    Case("buffers", buffers, (A, A)),
    Case("one buffer", reused),
    Case("base after view", base_after_view, ((3, 3),)),
    Case("base after view, 3", base_after_view, (A,)),
    Case("expand", expanded),
    Case("thresholding", thresholded, ((4, 3, 2, 2),)),
    Case("meshgrid", lambda x: [g * 2 for g in torch.meshgrid(x[0, 0], x[1, 1], indexing="ij")] + list(torch.broadcast_tensors(x, x[0]))),
    Case("cartesian", lambda x: (torch.cartesian_prod(x[0, 0], x[1, 0]), torch.block_diag(x[0], x[1]), torch.atleast_3d(x[0]) * 1)),
    Case("torch.normal", lambda x: torch.normal(x, 0.5, generator=torch.Generator().manual_seed(0)) + torch.normal(x, x.abs(), generator=torch.Generator().manual_seed(1))),
    Case("aten", lambda x: torch.ops.aten.add(x, 1) + torch.ops.aten.mul.Tensor(x, x) + torch.ops.aten._softmax(x, -1, False)),
    # in place
    Case("x += …", inplace(lambda y: (y.__iadd__(1), y.__imul__(y), y.__isub__(y[0]), y.__itruediv__(3)))),
    Case("x **= 2", inplace(lambda y: (y.__ipow__(2), y.pow_(2)))),
    Case("add_, mul_", inplace(lambda y: y.add_(y, alpha=2).mul_(fixed(y, *B)).sub_(y[0] * 1).div_(3).neg_())),
    Case("plain += dual", lambda x: fixed(x, *A).add_(x).mul_(x[0])),
    Case("exp_, sqrt_", inplace(lambda y: y.square_().add_(1).sqrt_().log_().exp_().abs_().sin_().tanh_())),
    Case("clamp_", inplace(lambda y: (y.clamp_(-1, 1), y[0].clamp_min_(0), y[1].clamp_(max=y.sum())))),
    Case("addcmul_", inplace(lambda y: y.addcmul_(y, y, value=0.1).addcdiv_(y, y * y + 1).lerp_(y * y, 0.3))),
    Case("copy_", inplace(lambda y: (y[0].copy_(y[1] * 2), y[1].copy_(fixed(y, *B)), y[:, 0].copy_(y[:, 1, :1])))),
    Case("fill_, zero_", inplace(lambda y: (y[0, 0].fill_(y.sum()), y[0, 1].fill_(3.0), y[1, 0].zero_(), y[1, 1].normal_(generator=torch.Generator().manual_seed(0))))),
    Case("masked_fill_", inplace(lambda y: y.masked_fill_(y > 0.5, 0.5).masked_fill_(y < -1, y.mean()))),
    Case("index_put_", inplace(lambda y: (y.index_put_((torch.tensor([0]),), y[1] * 2), y.index_add_(0, torch.tensor([0]), y[1:] * 1), y.index_fill_(2, torch.tensor([1]), 2.0)))),
    Case("scatter_", inplace(lambda y: (y.scatter_(1, torch.zeros(2, 1, 4).long(), y.exp()), y.scatter_add_(0, torch.zeros(1, 3, 4).long(), y * 2), y.masked_scatter_(y > 1, y.exp())))),
    Case("softmax out of place, relu_", inplace(lambda y: (F.relu_(y[0]), torch.relu_(y[1]), y.cumsum_(0), y.tril_()))),
    Case("round_", inplace(lambda y: (y[0].round_(), y[1].sign_()))),
    Case("setitem", inplace(lambda y: (y.__setitem__(0, y[1] * 2), y.__setitem__((1, 0), 0), y.__setitem__((Ellipsis, 1), y[..., 2]), y.__setitem__((0, slice(None), 3), y[0, 0, 0])))),
    Case("setitem by mask", inplace(lambda y: (y.__setitem__(y > 1, 1.0), y.__setitem__(y < -0.5, y[0, 0, 0] * 2), y.__setitem__(fixed(y, *A) > 1, fixed(y, *A)[fixed(y, *A) > 1])))),
    Case("setitem by tensor", inplace(lambda y: (y.__setitem__(torch.tensor([1]), y[:1] * 2), y.__setitem__((slice(None), [0, 2]), y[:, 1:] * 3), y.__setitem__((torch.tensor(0), 1), 4.0)))),
    Case("setitem by tensors", inplace(lambda y: (y.__setitem__((torch.tensor([0, 1]), slice(None), torch.tensor([1, 2])), y[:, :, 0] * 2), y.__setitem__((torch.tensor([0, 1]), Ellipsis, torch.tensor([1, 2])), 1)))),
    Case("setitem of a plain buffer", lambda x: inplace(lambda b: (b.__setitem__(0, x), b.__setitem__((1, b[1] > 0), x[x.shape[0] - 1, 0, 0]), b.__setitem__(2, x[None])))(fixed(x, 4, *A))),
    Case("setitem of float64 by float32", lambda x: inplace(lambda b: (b.__setitem__(0, x), b.__setitem__(torch.tensor([1]), x.to(b.dtype))))(torch.zeros(2, *A, dtype=torch.float64))),
    # out=
    Case("add, out=", into(lambda x, **k: torch.add(x, 2, **k))),
    Case("mul, out=", into(lambda x, y, **k: torch.mul(x, y, **k)), (A, A)),
    Case("cat, out=", into(lambda x, y, **k: torch.cat([x, y], **k)), (A, A)),
    Case("matmul, out=", into(lambda x, **k: torch.matmul(x, fixed(x, 4, 2), **k))),
    Case("plain, out=", into(lambda x, **k: torch.mul(fixed(x, *A), 2, **k))),
    Case("out= of an argument", inplace(lambda y: torch.mul(y, y, out=y))),
    Case("out= is resized", lambda x: torch.add(x, 1, out=torch.empty(0, dtype=x.dtype))),
    Case("sort, out=", lambda x: torch.sort(x, out=(torch.empty(A, dtype=x.dtype), torch.empty(A, dtype=torch.long)))[0]),
]  # fmt: skip


CONTEXTS = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": contextlib.nullcontext}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_values_and_tangents(case: Case, dtype: torch.dtype, context: str) -> None:
    with CONTEXTS[context]():
        compare(case.f, case.shapes, dtype)
