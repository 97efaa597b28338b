r"""What a layer does with its input, as features: geometry of the linear map :math:`W\varphi`.

Sums over features, Gram matrices among them, are :mod:`bayesdiff.head.sums`.
"""

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

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: By the number of spatial dimensions.
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SIDES = {1: "length", 2: "height, width", 3: "frames, height, width"}

Method = TypeVar("Method", bound=Callable[..., Any])


def as_given(method: Method) -> Method:
    """Let a method, or a function of a geometry, compute in the dtype of its inputs, also under autocast."""

    @functools.wraps(method)
    def run(geometry: HeadGeometry, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(inputs.device.type, enabled=False):
            return method(geometry, inputs, *args, **kwargs)

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
            phi = patches(self.pad(inputs), 2, self.kernel_size)  # (B, C_in, *size', *kernel)
            n = len(self.kernel_size)
            phi = phi.movedim(1, n + 1).flatten(n + 1).flatten(1, n)
        else:
            phi = inputs.flatten(1, -2) if inputs.ndim > 2 else inputs.unsqueeze(1)
        if self.bias:
            phi = torch.cat([phi, phi.new_ones(*phi.shape[:2], 1)], dim=-1)
        return phi

    @as_given
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

    @as_given
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

    def shifts(self, padded: Tensor) -> list[Tensor]:
        """Views of the padded input, one ``(B, C_in, *size')`` for each entry of the kernel."""
        views = patches(padded, 2, self.kernel_size)
        entries: Any = itertools.product([...], *map(range, self.kernel_size))
        return [views[entry] for entry in entries]


def patches(padded: Tensor, first: int, sizes: tuple[int, ...]) -> Tensor:
    """A view: patches along the dimensions from ``first`` on, their entries as further dimensions at the end."""
    for dimension, size in enumerate(sizes, start=first):
        padded = padded.unfold(dimension, size, 1)
    return padded
