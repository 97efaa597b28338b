r"""The output layer ("head") of a denoising network, as a linear map shared over positions.

A diffusion network ends in :math:`f(x_t, t, c) = W\varphi(x_t, t, c)`: :math:`\varphi` are the
features that enter the last layer, W its weights with the bias folded in as the weight of a
constant feature 1. For a ``Conv2d`` :math:`\varphi` at a pixel is the im2col patch, D = C_in·k_h·k_w + 1;
for a ``Linear`` on tokens it is the token, D = C_in + 1. This module finds that layer, captures what
enters it, and computes with it: apply other weights, sum outer products of features, and fold the
layer's output into the network's. Nothing here changes the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesdiff.checks import (
    AmbiguousHeadError,
    ArgumentError,
    HeadNotFoundError,
    ShapeError,
    UnsupportedHeadError,
    UnsupportedPipelineError,
)

#: Where the families of diffusers keep their output layer. Exact module paths: a search by name
#: would find DiT's ``proj_out_1`` (a modulation) or the ``proj_out`` in every single block of Flux.
HEAD_PATHS = {
    "UNet2DModel": "conv_out",
    "UNet2DConditionModel": "conv_out",
    "UNet3DConditionModel": "conv_out",
    "UNetMotionModel": "conv_out",
    "UNetSpatioTemporalConditionModel": "conv_out",
    "Kandinsky3UNet": "conv_out",
    "DiTTransformer2DModel": "proj_out_2",
    "Transformer2DModel": "proj_out",
    "PixArtTransformer2DModel": "proj_out",
    "SD3Transformer2DModel": "proj_out",
    "FluxTransformer2DModel": "proj_out",
    "SanaTransformer2DModel": "proj_out",
    "AuraFlowTransformer2DModel": "proj_out",
    "CogVideoXTransformer3DModel": "proj_out",
    "LTXVideoTransformer3DModel": "proj_out",
    "QwenImageTransformer2DModel": "proj_out",
    "WanTransformer3DModel": "proj_out",
    "HunyuanVideoTransformer3DModel": "proj_out",
}

#: Where an unknown network may keep it: taken only when exactly one of them is there.
COMMON_PATHS = ("conv_out", "proj_out", "proj_out_2", "final_layer.linear", "out_proj", "head")

#: Squares of features that are held at once.
SQUARES = 2**18
#: Rows of a factor that are applied at once.
ROWS = 256

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


@dataclass(frozen=True)
class HeadGeometry:
    r"""How features come from a layer's input, and outputs from features.

    Args:
        kind: ``"conv"``: input ``(B, C_in, H, W)``, output ``(B, C, H', W')``;
            ``"linear"``: input ``(B, ..., C_in)``, output ``(B, ..., C)``.
        in_channels: C_in.
        out_channels: C.
        bias: Whether the last feature is the constant 1.
        kernel_size: (k_h, k_w); (1, 1) for a linear layer.
        padding: (left, right, top, bottom), as :func:`torch.nn.functional.pad` takes it.
        padding_mode: As in ``nn.Conv2d``.
    """

    kind: Literal["conv", "linear"]
    in_channels: int
    out_channels: int
    bias: bool
    kernel_size: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    padding_mode: PaddingMode = "zeros"

    @classmethod
    def of(cls, layer: nn.Module, name: str = "head") -> HeadGeometry:
        """The geometry of a layer.

        Raises:
            UnsupportedHeadError: The layer is neither ``Conv2d`` nor ``Linear``, or is a convolution
                with stride, dilation or groups other than 1.
        """
        if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
            return cls("linear", layer.in_features, layer.out_features, layer.bias is not None)
        if isinstance(layer, nn.Conv2d) and type(layer).forward is nn.Conv2d.forward:
            for setting in ("stride", "dilation", "groups"):
                value = getattr(layer, setting)
                if any(v != 1 for v in (value if isinstance(value, tuple) else (value,))):
                    raise UnsupportedHeadError(f"expected a Conv2d with {setting} 1 at {name!r}, got {setting}={value}")
            kh, kw = layer.kernel_size
            if layer.padding == "same":
                pads = ((kw - 1) // 2, kw - 1 - (kw - 1) // 2, (kh - 1) // 2, kh - 1 - (kh - 1) // 2)
            elif layer.padding == "valid":
                pads = (0, 0, 0, 0)
            else:
                ph, pw = (int(p) for p in layer.padding)
                pads = (pw, pw, ph, ph)
            return cls(
                "conv", layer.in_channels, layer.out_channels, layer.bias is not None, (kh, kw), pads,
                layer.padding_mode,
            )  # fmt: skip
        raise UnsupportedHeadError(
            f"expected an nn.Conv2d or nn.Linear at {name!r}, got {type(layer).__module__}.{type(layer).__qualname__}"
        )

    @property
    def num_weights(self) -> int:
        """Features without the constant one: C_in·k_h·k_w."""
        return self.in_channels * self.kernel_size[0] * self.kernel_size[1]

    @property
    def in_features(self) -> int:
        """D, the constant feature included."""
        return self.num_weights + int(self.bias)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeadGeometry:
        """The inverse of :meth:`to_dict`."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)

    def check(self, inputs: Tensor) -> None:
        """Raise :class:`ShapeError` unless ``inputs`` can enter the layer."""
        if self.kind == "conv":
            if inputs.ndim != 4 or inputs.shape[1] != self.in_channels:
                raise ShapeError(
                    f"expected features (batch, {self.in_channels}, height, width), got {tuple(inputs.shape)}"
                )
        elif inputs.ndim < 2 or inputs.shape[-1] != self.in_channels:
            raise ShapeError(f"expected features (batch, ..., {self.in_channels}), got {tuple(inputs.shape)}")

    def output_shape(self, inputs: Tensor) -> tuple[int, ...]:
        """The shape of the layer's output."""
        if self.kind == "linear":
            return (*inputs.shape[:-1], self.out_channels)
        left, right, top, bottom = self.padding
        height = inputs.shape[2] + top + bottom - self.kernel_size[0] + 1
        width = inputs.shape[3] + left + right - self.kernel_size[1] + 1
        return (len(inputs), self.out_channels, height, width)

    def pad(self, inputs: Tensor) -> Tensor:
        """``inputs`` with the layer's padding: ``(B, C_in, H, W)`` to ``(B, C_in, H+.., W+..)``."""
        if not any(self.padding):
            return inputs
        return F.pad(inputs, self.padding, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def design(self, inputs: Tensor) -> Tensor:
        r"""The features :math:`\varphi` written out: layer input to ``(B, P, D)``.

        For small problems and references; the methods below never form it.
        """
        self.check(inputs)
        if self.kind == "conv":
            phi = F.unfold(self.pad(inputs), self.kernel_size).transpose(1, 2)
        else:
            phi = inputs.flatten(1, -2) if inputs.ndim > 2 else inputs.unsqueeze(1)
        if self.bias:
            phi = torch.cat([phi, phi.new_ones(*phi.shape[:2], 1)], dim=-1)
        return phi

    def apply(self, inputs: Tensor, weights: Tensor) -> Tensor:
        r""":math:`W_k\varphi` for K sets of weights at once, in one convolution or matrix product.

        Args:
            inputs: What enters the layer.
            weights: ``(K, C', D)``; C' need not be the layer's own C.

        Returns:
            ``(K, B, C', H', W')`` for a convolution, ``(K, B, ..., C')`` for a linear layer.
        """
        self.check(inputs)
        k, c, d = weights.shape
        if d != self.in_features:
            raise ShapeError(f"expected weights (K, C, {self.in_features}), got {tuple(weights.shape)}")
        flat = weights.reshape(k * c, d)
        bias = flat[:, -1].contiguous() if self.bias else None
        kernel = flat[:, : self.num_weights]
        if self.kind == "conv":
            kernel = kernel.reshape(k * c, self.in_channels, *self.kernel_size)
            out = F.conv2d(self.pad(inputs), kernel, bias)  # (B, K·C', H', W')
            return out.unflatten(1, (k, c)).movedim(1, 0)
        out = F.linear(inputs, kernel, bias)  # (B, ..., K·C')
        return out.unflatten(-1, (k, c)).movedim(-2, 0)

    def squared_norm(self, inputs: Tensor, factors: Tensor, scales: Tensor | None = None) -> Tensor:
        r""":math:`\sum_k v_{ck} (F_c\varphi)_k^2` at every position, a chunk of rows at a time.

        Columns that are zero in all rows of a chunk cost nothing, channel by channel: a triangular factor takes half the time.

        Args:
            inputs: What enters the layer.
            factors: F, ``(1 or C, R, D)``.
            scales: v ≥ 0, ``(C, R)``; None is 1.

        Returns:
            Shaped as the layer's output, but with one channel if there are one factor and no scales. Nonnegative.
        """
        channel = 1 if self.kind == "conv" else -1
        outputs = []
        for i, factor in enumerate(factors):
            v = None if scales is None else (scales if len(factors) == 1 else scales[i : i + 1])
            total: Tensor | None = None
            for first in range(0, len(factor), ROWS):
                squares = self._partial(inputs, factor[first : first + ROWS]).square()
                if v is None:
                    part = squares.sum(channel, keepdim=True)
                else:
                    part = F.linear(squares.movedim(channel, -1), v[:, first : first + ROWS]).movedim(-1, channel)
                total = part if total is None else total + part
            if total is None:
                raise ShapeError("expected a factor with at least one row, got none")
            outputs.append(total)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=channel)

    def _partial(self, inputs: Tensor, rows: Tensor) -> Tensor:
        """Rφ by the input channels for which R has weights only; R ``(r, D)``."""
        taps = self.kernel_size[0] * self.kernel_size[1]
        used = (
            rows[:, : self.num_weights].view(len(rows), self.in_channels, taps).ne(0).any(2).any(0).nonzero().flatten()
        )
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        narrow = replace(self, in_channels=last - first)
        columns = [rows[:, first * taps : last * taps]] + ([rows[:, -1:]] if self.bias else [])
        x = inputs[:, first:last] if self.kind == "conv" else inputs[..., first:last]
        return narrow.apply(x, torch.cat(columns, dim=1)[None])[0]

    def squared(self, inputs: Tensor, variances: Tensor) -> Tensor:
        r""":math:`\sum_d v_{cd}\varphi_d^2`: the layer itself, applied to :math:`\varphi^2`.

        Args:
            inputs: What enters the layer.
            variances: ``(C, D)``, nonnegative.

        Returns:
            Shaped as the layer's output.
        """
        if self.kind == "conv":
            return self.apply(inputs.square(), variances.unsqueeze(0))[0]
        # Some tokens at a time, so that their squares stay in the cache.
        tokens = inputs.reshape(-1, self.in_channels)
        parts = [
            self.apply(t.square(), variances.unsqueeze(0))[0] for t in tokens.split(max(1, SQUARES // self.in_channels))
        ]
        return torch.cat(parts).unflatten(0, inputs.shape[:-1])

    def gram(self, inputs: Tensor) -> Tensor:
        r""":math:`\sum_{b,p}\varphi_{bp}\varphi_{bp}^\top`, ``(D, D)`` float64.

        The products are summed in the dtype of ``inputs`` (float32 at least) after the mean of each channel is
        taken away, and the mean is put back in float64: features after an activation are far from
        centred, and their common part would cost float32 the digits that small eigenvalues need.

        For a convolution the patches overlap: the product of two entries depends on where the patch
        is only through its border rows. So the sum over all patches whose rows are inside is done once
        for each vertical offset between two entries, and only the border rows apart: k_h times less
        work than multiplying out the im2col matrix.
        """
        d = self.in_features
        total = torch.zeros(d, d, dtype=torch.float64, device=inputs.device)
        self.add_gram(inputs, total)
        return total

    def add_gram(self, inputs: Tensor, total: Tensor) -> None:
        """Add :meth:`gram` to ``total`` in place: a D × D matrix of a large head is too large to make anew for each image."""
        self.check(inputs)
        x = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        n = self.num_weights
        block = total[:n, :n]
        if self.kind == "linear":
            flat = x.reshape(-1, self.in_channels)
            mean = flat.mean(0)
            flat = flat - mean
            block += flat.T @ flat
            first, count = flat.sum(0, dtype=torch.float64), len(flat)
            shift = mean.double()
        else:
            mean = x.mean((0, 2, 3))
            padded = self.pad(x) - mean[:, None, None]
            windows = self._shifts(padded.sum(0, keepdim=True, dtype=torch.float64))
            kh, kw = self.kernel_size
            shape = (self.in_channels, kh, kw)
            block.unflatten(1, shape).unflatten(0, shape).add_(self._patch_products(padded))
            first = torch.stack([w.sum((0, 2, 3)) for w in windows], dim=1).flatten()
            count = len(x) * windows[0].shape[2] * windows[0].shape[3]
            shift = mean.double().repeat_interleave(len(windows))
        everything = first + count * shift  # Σ φ
        block.addr_(shift, first).addr_(everything, shift)
        if self.bias:
            total[:n, n] += everything
            total[n, :n] += everything
            total[n, n] += count

    def _patch_products(self, padded: Tensor) -> Tensor:
        """Σ over patches of patch ⊗ patch, ``(C_in, k_h, k_w, C_in, k_h, k_w)``, for a padded convolution input."""
        kh, kw = self.kernel_size
        height = padded.shape[2] - kh + 1
        # rows[r]: all horizontal patches of the padded row r, (Hp, B·W', C_in·k_w).
        rows = padded.unfold(3, kw, 1).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        q = self.in_channels * kw

        def product(first: int, last: int, offset: int) -> Tensor:  # Σ over rows first … last−1
            if first >= last:
                return rows.new_zeros(q, q)
            a = rows[first:last].flatten(0, 1)
            return a.T @ (a if offset == 0 else rows[first + offset : last + offset].flatten(0, 1))

        blocks = padded.new_zeros(kh, q, kh, q)
        for offset in range(kh):
            # Rows that every position of the patch shares; none in an image lower than the kernel.
            inner = (kh - 1 - offset, height) if height > kh - 1 - offset else None
            common = product(*inner, offset) if inner else None
            for i in range(kh - offset):
                if common is None or inner is None:
                    block = product(i, i + height, offset)
                else:
                    block = common + product(i, inner[0], offset) + product(inner[1], i + height, offset)
                blocks[i, :, i + offset, :] = block
                if offset:
                    blocks[i + offset, :, i, :] = block.T
        # (k_h, C_in, k_w, k_h, C_in, k_w) to the order of the layer's weights, (C_in, k_h, k_w).
        return blocks.view(kh, self.in_channels, kw, kh, self.in_channels, kw).permute(1, 0, 2, 4, 3, 5)

    def outer(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        r""":math:`\sum_p r_{bp}\varphi_{bp}^\top`: one gradient of the layer's weights per sample.

        Args:
            inputs: What enters the layer.
            outputs: r, shaped as the layer's output.

        Returns:
            ``(B, C, D)``.
        """
        self.check(inputs)
        if self.kind == "linear":
            phi = self.design(inputs)
            return outputs.reshape(*phi.shape[:2], self.out_channels).transpose(1, 2) @ phi
        r = outputs.flatten(2)  # (B, C, P)
        grads = [r @ x.flatten(2).transpose(1, 2) for x in self._shifts(self.pad(inputs))]
        out = torch.stack(grads, dim=-1).flatten(2)  # (B, C, C_in·k_h·k_w)
        return torch.cat([out, r.sum(-1, keepdim=True)], dim=-1) if self.bias else out

    def _shifts(self, padded: Tensor) -> list[Tensor]:
        """Views of the padded input, one ``(B, C_in, H', W')`` for each of the k_h·k_w kernel entries."""
        kh, kw = self.kernel_size
        height, width = padded.shape[2] - kh + 1, padded.shape[3] - kw + 1
        return [padded[:, :, i : i + height, j : j + width] for i in range(kh) for j in range(kw)]


@dataclass(frozen=True)
class Head:
    """The output layer of a network: where it is, the layer itself, and how it computes.

    Args:
        path: Exact module path inside the network.
        layer: The layer; held, never changed.
        geometry: How its features are formed.
    """

    path: str
    layer: nn.Module
    geometry: HeadGeometry

    @property
    def in_features(self) -> int:
        """D, the constant feature of the bias included."""
        return self.geometry.in_features

    @property
    def out_channels(self) -> int:
        """C."""
        return self.geometry.out_channels

    def weight(self) -> Tensor:
        """W with the bias as its last column: ``(C, D)``, float64, a copy, on the layer's device."""
        weight = self.layer.weight.detach().flatten(1).double()  # type: ignore[operator]
        if self.geometry.bias:
            bias = self.layer.bias.detach().double()  # type: ignore[operator]
            weight = torch.cat([weight, bias.unsqueeze(1)], dim=1)
        return weight.clone()

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """Collect what enters the layer while the context is open; the hook always comes off."""
        captured: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            captured.append(args[0].detach())

        handle = self.layer.register_forward_pre_hook(hook)
        try:
            yield captured
        finally:
            handle.remove()

    @contextmanager
    def shifted(self, delta: Tensor | Callable[[], Tensor]) -> Iterator[None]:
        r"""The network with :math:`W + \delta W` in its head, while the context is open.

        The layer keeps its weights; a hook adds :math:`\delta W\varphi` (in float32 or better) to what
        the layer returns.

        Args:
            delta: ``(C, D)``, or what returns it, asked anew at every call of the layer.
        """

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            dtype = torch.promote_types(output.dtype, torch.float32)
            weights = delta() if callable(delta) else delta
            shift = self.geometry.apply(args[0].to(dtype), weights.to(output.device, dtype).unsqueeze(0))[0]
            return (output.to(dtype) + shift).to(output.dtype)

        handle = self.layer.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def denoiser(pipe_or_model: Any) -> nn.Module:
    """The denoising network of a diffusers pipeline (``unet`` or ``transformer``), or the module itself.

    Raises:
        HeadNotFoundError: There is no such network.
    """
    if isinstance(pipe_or_model, nn.Module):
        return pipe_or_model
    for name in ("unet", "transformer"):
        network = getattr(pipe_or_model, name, None)
        if isinstance(network, nn.Module):
            return network
    raise HeadNotFoundError(
        "expected a torch.nn.Module, or a pipeline with a network named 'unet' or 'transformer', got "
        f"{type(pipe_or_model).__name__}"
    )


def find_head(model: Any, head: str | None = None) -> Head:
    """Find the output layer of a denoising network.

    Args:
        model: A ``torch.nn.Module``, or a diffusers pipeline that has one.
        head: Exact module path of the layer (``"conv_out"``), for networks that the package does not know.

    Returns:
        The :class:`Head`; ``.path``, ``.layer``, ``.in_features`` (D with bias), ``.out_channels``.

    Raises:
        HeadNotFoundError: No layer at ``head``, or none at the usual places.
        AmbiguousHeadError: The family is unknown and several layers could be it.
        UnsupportedHeadError: The layer is of another kind than ``Conv2d`` (stride, dilation and groups 1)
            or ``Linear``.
    """
    network = denoiser(model)
    if head is not None:
        path = head
    else:
        family = next((c.__name__ for c in type(network).__mro__ if c.__name__ in HEAD_PATHS), None)
        if family is not None:
            path = HEAD_PATHS[family]
        else:
            found = [p for p in COMMON_PATHS if isinstance(_module_at(network, p), nn.Module)]
            if not found:
                raise HeadNotFoundError(
                    f"expected an output layer at one of {', '.join(COMMON_PATHS)} in {type(network).__name__}, found "
                    'none; name it with head="path.to.layer"'
                )
            if len(found) > 1:
                raise AmbiguousHeadError(
                    f"expected one output layer in {type(network).__name__}, found {', '.join(found)}; name the right "
                    f'one with head="{found[0]}"'
                )
            path = found[0]
    layer = _module_at(network, path)
    if layer is None:
        last = [n for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))][-3:]
        raise HeadNotFoundError(
            f"expected a layer at {path!r} in {type(network).__name__}, found none; its last layers are: "
            f"{', '.join(last) or 'none'}"
        )
    return Head(path, layer, HeadGeometry.of(layer, path))


def _module_at(network: nn.Module, path: str) -> nn.Module | None:
    """The submodule at an exact path, or None."""
    return dict(network.named_modules(remove_duplicate=False)).get(path) if path else None


class Fold:
    """The permutation from the head's output to the network's, read off by sending numbers through it.

    A transformer's head writes patches, token by token, which the network then folds into an image.
    The fold is linear and the same for all inputs, so it need not be written for each model: with the
    head's output replaced by 0 … n−1, the network's output *is* the permutation.

    Args:
        index: ``(C', H, W)`` int64: which element of a sample's head output each output element is;
            None when the two are the same (every U-Net).
    """

    def __init__(self, index: Tensor | None) -> None:
        self.index = index

    @classmethod
    def read(cls, head: Head, call: Any) -> Fold:
        """Read the fold with one network call.

        Args:
            head: The head.
            call: Runs the network and returns its output ``(B, C', H, W)``.

        Raises:
            UnsupportedPipelineError: What comes out are not the numbers that went in.
        """
        sizes: list[int] = []

        def number(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            sizes.append(output[0].numel())
            numbers = torch.arange(sizes[-1], dtype=torch.float32, device=output.device)
            return numbers.view_as(output[0]).expand_as(output).clone()

        handle = head.layer.register_forward_hook(number)
        try:
            result = call()[0].float()
        finally:
            handle.remove()
        index = result.round().long()
        distinct = index.unique().numel()
        exact = bool((result == index).all()) and int(index.min()) >= 0 and int(index.max()) < sizes[0] <= 2**24
        if len(sizes) != 1 or not exact or distinct != index.numel():
            raise UnsupportedPipelineError(
                f"expected the network's output to be its head's output ({sizes} numbers), permuted, got {distinct} "
                f"distinct values in {index.numel()} places: what follows the layer {head.path!r} is more than a fold"
            )
        return cls(index)

    def __call__(self, output: Tensor, lead: int = 1) -> Tensor:
        """Fold the head's output; ``lead`` dimensions in front are kept: ``(..., C', H, W)``."""
        if self.index is None:
            return output
        return output.flatten(lead)[..., self.index]


def check_eval(network: nn.Module) -> None:
    """Raise :class:`ArgumentError` when dropout or batch statistics would make the network random."""
    for name, module in network.named_modules():
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        random |= getattr(module, "dropout_prob", 0) > 0  # diffusers' LabelEmbedding
        if module.training and (random or isinstance(module, nn.modules.batchnorm._BatchNorm)):
            raise ArgumentError(
                f"expected a network in evaluation mode, got {type(module).__name__} at {name!r} in training mode; "
                "call .eval() on the network first"
            )
