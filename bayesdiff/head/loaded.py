"""Weights that lie elsewhere, or in another dtype, until a layer runs: offloaded, or stored in float8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bayesdiff.checks import UnsupportedHeadError
from bayesdiff.head.geometry import CONVOLUTIONS, HeadGeometry

FUNCTIONS = (nn.functional.linear, *CONVOLUTIONS.values())


class _Noting(TorchFunctionMode):
    """Notes what a linear layer or a convolution with weights of some shape is computed with."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.seen = shape, list[tuple[Tensor, Tensor | None]]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in FUNCTIONS and args[1].shape == self.shape:
            x, weight = args[:2]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            self.seen.append((weight.detach().clone(), None if bias is None else bias.detach().clone()))
            args = (x.to(weight.device, weight.dtype), *args[1:])
        return func(*args, **kwargs)


def weights_in_use(layer: nn.Module, geometry: HeadGeometry, path: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that a layer computes with, in the dtype and on the device in which it does.

    Libraries that keep weights elsewhere (accelerate, diffusers) replace the layer's ``forward`` to fetch them. Such a layer
    is run once on zeros, as they run it, and what it hands to the convolution or matrix product is noted.

    Raises:
        UnsupportedHeadError: They cannot be had.
    """
    weight: Any = layer.weight
    bias: Any = layer.bias
    error: Exception | None = None
    if "forward" in vars(layer):
        pads = [max(p) for p in zip(geometry.padding[::2], geometry.padding[1::2], strict=True)][::-1]
        size = [max(k, p + 1) for k, p in zip(geometry.kernel_size, pads, strict=True)]
        shape = (1, geometry.in_channels, *(size if geometry.kind == "conv" else ()))
        device = "cpu" if weight.is_meta else weight.device
        try:
            with torch.no_grad(), _Noting(weight.shape) as noting:
                layer.forward(torch.zeros(shape, dtype=_working(weight.dtype), device=device))
            weight, bias = noting.seen[0] if noting.seen else (weight, bias)
            if geometry.bias and bias is None:
                bias = weight.new_zeros(len(weight))
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as raised:
            error = raised
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point() or error is not None:
        raise UnsupportedHeadError(
            f"expected the weights of {path!r} in floating point and in memory, got {getattr(weight, 'dtype', type(weight))} on "
            f"{getattr(weight, 'device', 'no device')}{f' ({error})' if error else ''}: load this layer without offloading "
            "and quantization, or use enable_model_cpu_offload()"
        ) from error
    return weight.detach(), bias.detach() if geometry.bias else None


def placement(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a network takes its inputs, and in which dtype: those of its weights, unless they are only stored so."""
    parameters = list(network.parameters())
    dtypes = [getattr(network, "dtype", None), *(p.dtype for p in parameters)]
    dtype = next((d for d in dtypes if isinstance(d, torch.dtype) and d == _working(d)), torch.float32)
    hooks = (getattr(m, "_hf_hook", None) for m in network.modules())
    devices = [getattr(h, "execution_device", None) for h in hooks] + [p.device for p in parameters if not p.is_meta]
    return torch.device(next((d for d in devices if d is not None), "cpu")), dtype


def _working(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself if a network can compute in it, float32 for one that is only for storage."""
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32
