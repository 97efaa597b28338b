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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import (
    AmbiguousHeadError,
    ArgumentError,
    HeadNotFoundError,
)
from bayesdiff.head.geometry import HeadGeometry

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
