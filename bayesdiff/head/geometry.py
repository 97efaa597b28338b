r"""What a layer does with its input, as features: geometry of the linear map :math:`W\varphi`."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesdiff.checks import ShapeError, UnsupportedHeadError

#: Squares of features that are held at once.
SQUARES = 2**18
#: Rows of a factor that are applied at once.
ROWS = 256
#: Numbers of features that are written out at once.
WRITTEN = 2**23

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: By the number of spatial dimensions.
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SIDES = {1: "length", 2: "height, width", 3: "frames, height, width"}

Method = TypeVar("Method", bound=Callable[..., Any])


def _as_given(method: Method) -> Method:
    """Let a method compute in the dtype of its inputs, also under autocast."""

    @functools.wraps(method)
    def run(self: HeadGeometry, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(inputs.device.type, enabled=False):
            return method(self, inputs, *args, **kwargs)

    return cast("Method", run)


@dataclass(frozen=True)
class HeadGeometry:
    r"""How features come from a layer's input, and outputs from features.

    Args:
        kind: ``"conv"``: input ``(B, C_in, *size)``, output ``(B, C, *size')``, with one, two or three spatial
            dimensions; ``"linear"``: input ``(B, ..., C_in)``, output ``(B, ..., C)``.
        in_channels: C_in.
        out_channels: C.
        bias: Whether the last feature is the constant 1.
        kernel_size: One number for each spatial dimension, (k_h, k_w) for images; (1, 1) for a linear layer.
        padding: Before and after each dimension, the last dimension first, as :func:`torch.nn.functional.pad` takes it:
            (left, right, top, bottom) for images.
        padding_mode: As in ``nn.Conv2d``.
    """

    kind: Literal["conv", "linear"]
    in_channels: int
    out_channels: int
    bias: bool
    kernel_size: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0, 0, 0)
    padding_mode: PaddingMode = "zeros"

    @classmethod
    def of(cls, layer: nn.Module, name: str = "head") -> HeadGeometry:
        """The geometry of a layer.

        Raises:
            UnsupportedHeadError: The layer is not a ``Linear``, ``Conv1d``, ``Conv2d`` or ``Conv3d`` with the forward of its
                class, or is a convolution with stride, dilation or groups other than 1.
        """
        kind = next((k for k in LAYERS if isinstance(layer, k)), None)
        if kind is None or type(layer).forward is not kind.forward:
            advice = ", whose forward is its own" if kind else ""
            if hasattr(layer, "base_layer") or hasattr(layer, "lora_A"):
                advice += "; merge its adapter into the weights and unload it first"
            raise UnsupportedHeadError(
                f"expected an nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d at {name!r}, got {type(layer).__module__}."
                f"{type(layer).__qualname__}{advice}"
            )
        if isinstance(layer, nn.Linear):
            return cls("linear", layer.in_features, layer.out_features, layer.bias is not None)
        layer = cast("nn.Conv2d", layer)
        for setting in ("stride", "dilation", "groups"):
            value = getattr(layer, setting)
            if any(v != 1 for v in (value if isinstance(value, tuple) else (value,))):
                raise UnsupportedHeadError(
                    f"expected a {kind.__name__} with {setting} 1 at {name!r}, got {setting}={value}"
                )
        if layer.padding == "same":
            sides = [((k - 1) // 2, k - 1 - (k - 1) // 2) for k in layer.kernel_size]
        elif layer.padding == "valid":
            sides = [(0, 0)] * len(layer.kernel_size)
        else:
            sides = [(int(p), int(p)) for p in layer.padding]
        return cls(
            "conv", layer.in_channels, layer.out_channels, layer.bias is not None, tuple(layer.kernel_size),
            tuple(p for side in reversed(sides) for p in side), layer.padding_mode,
        )  # fmt: skip

    @property
    def taps(self) -> int:
        """Entries of the kernel, by input channel."""
        return math.prod(self.kernel_size)

    @property
    def num_weights(self) -> int:
        """Features without the constant one: C_in times the entries of the kernel."""
        return self.in_channels * self.taps

    @property
    def in_features(self) -> int:
        """D, the constant feature included."""
        return self.num_weights + int(self.bias)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeadGeometry:
        """The inverse of :meth:`to_dict`.

        Raises:
            ShapeError: The values are not those of a layer.
            TypeError, AttributeError: They are not those of :meth:`to_dict`.
        """
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        out = cls(**plain)
        out._check_values()
        return out

    def _check_values(self) -> None:
        def whole(values: Any, least: int) -> bool:
            return isinstance(values, tuple) and all(type(v) is int and least <= v < 2**31 for v in values)

        sizes = (self.in_channels, self.out_channels)
        known = self.kind in ("conv", "linear") and self.padding_mode in ("zeros", "reflect", "replicate", "circular")
        lengths = (
            whole(self.kernel_size, 1) and whole(self.padding, 0) and len(self.padding) == 2 * len(self.kernel_size)
        )
        if not (
            known and lengths and len(self.kernel_size) in CONVOLUTIONS and whole(sizes, 1) and type(self.bias) is bool
        ):
            raise ShapeError(f"expected the geometry of a linear layer or a convolution, got {self}")
        if self.kind == "linear" and self.taps != 1:
            raise ShapeError(f"expected a linear layer without a kernel, got {self}")

    def check(self, inputs: Tensor) -> None:
        """Raise :class:`ShapeError` unless ``inputs`` can enter the layer."""
        if self.kind == "conv":
            n = len(self.kernel_size)
            if inputs.ndim != n + 2 or inputs.shape[1] != self.in_channels:
                raise ShapeError(
                    f"expected features (batch, {self.in_channels}, {SIDES[n]}), got {tuple(inputs.shape)}"
                )
        elif inputs.ndim < 2 or inputs.shape[-1] != self.in_channels:
            raise ShapeError(f"expected features (batch, ..., {self.in_channels}), got {tuple(inputs.shape)}")

    def output_shape(self, inputs: Tensor) -> tuple[int, ...]:
        """The shape of the layer's output."""
        if self.kind == "linear":
            return (*inputs.shape[:-1], self.out_channels)
        pads = [a + b for a, b in zip(self.padding[::2], self.padding[1::2], strict=True)][::-1]
        size = [s + p - k + 1 for s, p, k in zip(inputs.shape[2:], pads, self.kernel_size, strict=True)]
        return (len(inputs), self.out_channels, *size)

    def pad(self, inputs: Tensor) -> Tensor:
        """``inputs`` with the layer's padding: ``(B, C_in, *size)``, larger on each side."""
        if not any(self.padding):
            return inputs
        return F.pad(inputs, self.padding, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def design(self, inputs: Tensor) -> Tensor:
        r"""The features :math:`\varphi` written out: layer input to ``(B, P, D)``.

        For small problems and references; the methods below never form it.
        """
        self.check(inputs)
        if self.kind == "conv":
            phi = _patches(self.pad(inputs), 2, self.kernel_size)  # (B, C_in, *size', *kernel)
            n = len(self.kernel_size)
            phi = phi.movedim(1, n + 1).flatten(n + 1).flatten(1, n)
        else:
            phi = inputs.flatten(1, -2) if inputs.ndim > 2 else inputs.unsqueeze(1)
        if self.bias:
            phi = torch.cat([phi, phi.new_ones(*phi.shape[:2], 1)], dim=-1)
        return phi

    @_as_given
    def apply(self, inputs: Tensor, weights: Tensor) -> Tensor:
        r""":math:`W_k\varphi` for K sets of weights at once, in one convolution or matrix product.

        Args:
            inputs: What enters the layer.
            weights: ``(K, C', D)``; C' need not be the layer's own C.

        Returns:
            ``(K, B, C', *size')`` for a convolution, ``(K, B, ..., C')`` for a linear layer.
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
            out = CONVOLUTIONS[len(self.kernel_size)](self.pad(inputs), kernel, bias)  # (B, K·C', *size')
            return out.unflatten(1, (k, c)).movedim(1, 0)
        out = F.linear(inputs, kernel, bias)  # (B, ..., K·C')
        return out.unflatten(-1, (k, c)).movedim(-2, 0)

    @_as_given
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
        taps = self.taps
        entries = rows[:, : self.num_weights].view(len(rows), self.in_channels, taps)
        used = entries.ne(0).any(2).any(0).nonzero().flatten()
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

        For a convolution the patches overlap: along the first spatial dimension ("rows") the product of two entries
        depends on where the patch is only through its border rows. So the sum over all patches whose rows are inside is
        done once for each offset between two entries, and only the border rows apart: k_1 times less work than
        multiplying out the im2col matrix.
        """
        d = self.in_features
        total = torch.zeros(d, d, dtype=torch.float64, device=inputs.device)
        self.add_gram(inputs, total)
        return total

    @_as_given
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
            if flat.dtype == block.dtype:
                block.addmm_(flat.T, flat)
            else:
                block += flat.T @ flat
            first, count = flat.sum(0, dtype=torch.float64), len(flat)
            shift = mean.double()
        else:
            positions = (0, *range(2, x.ndim))
            mean = x.mean(positions)
            padded = self.pad(x) - mean.view(-1, *(1,) * (x.ndim - 2))
            windows = self._shifts(padded.sum(0, keepdim=True, dtype=torch.float64))
            shape = (self.in_channels, self.kernel_size[0], self.taps // self.kernel_size[0])
            block.unflatten(1, shape).unflatten(0, shape).add_(self._patch_products(padded))
            first = torch.stack([w.sum(positions) for w in windows], dim=1).flatten()
            count = len(x) * windows[0][0, 0].numel()
            shift = mean.double().repeat_interleave(len(windows))
        everything = first + count * shift  # Σ φ
        block.addr_(shift, first).addr_(everything, shift)
        if self.bias:
            total[:n, n] += everything
            total[n, :n] += everything
            total[n, n] += count

    @_as_given
    def add_weighted_gram(self, inputs: Tensor, weights: Tensor, total: Tensor) -> None:
        r"""Add :math:`\sum_{b,p} k_{bp}\varphi_{bp}\varphi_{bp}^\top` to ``total`` in place, in float64.

        The features are written out, a chunk of rows at a time, where the weight is not 0.

        Args:
            inputs: What enters the layer.
            weights: k ≥ 0, ``(B, P)``, P the positions of an output.
            total: ``(D, D)`` float64.
        """
        rows = max(1, WRITTEN // (weights.shape[1] * self.in_features))
        for x, k in zip(inputs.split(rows), weights.split(rows), strict=True):
            phi, flat = self.design(x).flatten(0, 1), k.flatten().double()
            used = flat != 0
            phi = phi[used].double()
            total += phi.T @ (phi * flat[used, None])

    def _patch_products(self, padded: Tensor) -> Tensor:
        """Σ over patches of patch ⊗ patch for a padded convolution input: ``(C_in, k_1, R, C_in, k_1, R)``, R entries a row."""
        k1, taps = self.kernel_size[0], self.taps // self.kernel_size[0]
        height = padded.shape[2] - k1 + 1
        # rows[r]: all patches of the padded row r in the other dimensions, (Hp, B·P', C_in·R).
        rows = _patches(padded, 3, self.kernel_size[1:]).movedim(2, 0)
        n = len(self.kernel_size)
        rows = rows.movedim(2, n + 1).flatten(n + 1).flatten(1, n)
        q = self.in_channels * taps

        def product(first: int, last: int, offset: int) -> Tensor:  # Σ over rows first … last−1
            if first >= last:
                return rows.new_zeros(q, q)
            a = rows[first:last].flatten(0, 1)
            return a.T @ (a if offset == 0 else rows[first + offset : last + offset].flatten(0, 1))

        blocks = padded.new_zeros(k1, q, k1, q)
        for offset in range(k1):
            # Rows that every position of the patch shares; none in an input lower than the kernel.
            inner = (k1 - 1 - offset, height) if height > k1 - 1 - offset else None
            common = product(*inner, offset) if inner else None
            for i in range(k1 - offset):
                if common is None or inner is None:
                    block = product(i, i + height, offset)
                else:
                    block = common + product(i, inner[0], offset) + product(inner[1], i + height, offset)
                blocks[i, :, i + offset, :] = block
                if offset:
                    blocks[i + offset, :, i, :] = block.T
        # (k_1, C_in, R, k_1, C_in, R) to the order of the layer's weights, (C_in, k_1, R).
        return blocks.view(k1, self.in_channels, taps, k1, self.in_channels, taps).permute(1, 0, 2, 4, 3, 5)

    @_as_given
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
        out = torch.stack(grads, dim=-1).flatten(2)  # (B, C, D − 1)
        return torch.cat([out, r.sum(-1, keepdim=True)], dim=-1) if self.bias else out

    def _shifts(self, padded: Tensor) -> list[Tensor]:
        """Views of the padded input, one ``(B, C_in, *size')`` for each entry of the kernel."""
        patches = _patches(padded, 2, self.kernel_size)
        entries: Any = itertools.product([...], *map(range, self.kernel_size))
        return [patches[entry] for entry in entries]


def _patches(padded: Tensor, first: int, sizes: tuple[int, ...]) -> Tensor:
    """A view: patches along the dimensions from ``first`` on, their entries as further dimensions at the end."""
    for dimension, size in enumerate(sizes, start=first):
        padded = padded.unfold(dimension, size, 1)
    return padded
