r"""What a layer does with its input, as features: geometry of the linear map :math:`W\varphi`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesdiff.checks import (
    ShapeError,
    UnsupportedHeadError,
)

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
