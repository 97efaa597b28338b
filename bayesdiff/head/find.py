r"""The output layer ("head") of a denoising network, as a linear map shared over positions.

A diffusion network ends in :math:`f(x_t, t, c) = W\varphi(x_t, t, c)`: :math:`\varphi` are the
features that enter the last layer, W its weights with the bias folded in as the weight of a
constant feature 1. For a ``Conv2d`` :math:`\varphi` at a pixel is the im2col patch, D = C_in·k_h·k_w + 1;
for a ``Linear`` on tokens it is the token, D = C_in + 1. This module finds that layer: by its name in the
families of diffusers, or by what comes out of the network when a layer's output is replaced by numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bayesdiff.checks import AmbiguousHeadError, ArgumentError, HeadNotFoundError, UnsupportedHeadError
from bayesdiff.head.geometry import LAYERS, HeadGeometry
from bayesdiff.head.layer import Head
from bayesdiff.head.numbers import send_numbers, tensor_of

__all__ = ["Head", "check_eval", "denoiser", "find_head", "find_head_by_call"]

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
    "Lumina2Transformer2DModel": "norm_out.linear_2",
    "ZImageTransformer2DModel": "all_final_layer.2-1.linear",
}

#: Where an unknown network may keep it: taken only when exactly one of them is there.
COMMON_PATHS = ("conv_out", "proj_out", "proj_out_2", "final_layer.linear", "out_proj", "head")

#: What the denoising networks of a pipeline are called.
NETWORKS = re.compile(r"(\w+_)?(unet|transformer|refiner)(_\w+)?")
#: How many layers, from the last one called, are looked at.
SEARCHED = 16


def denoiser(pipe_or_model: Any, head: str | None = None) -> nn.Module:
    """The denoising network of a diffusers pipeline (``unet`` or ``transformer``), or the module itself.

    Args:
        pipe_or_model: The pipeline or module.
        head: Path of the output layer. Where it starts with the name of one of the pipeline's networks
            (``"transformer_2.proj_out"``) that network is meant.

    Raises:
        HeadNotFoundError: There is no such network.
        AmbiguousHeadError: There are several: two that take turns, or a refiner.
    """
    return _component(pipe_or_model, head)[0]


def _component(model: Any, head: str | None) -> tuple[nn.Module, str, str]:
    """The network, its name in the pipeline if ``head`` has it ("transformer_2."), and the path inside the network."""
    first, _, rest = (head or "").partition(".")
    if isinstance(model, nn.Module):  # a path of a pipeline's may be asked of the network itself
        foreign = NETWORKS.fullmatch(first) and not hasattr(model, first)
        return (model, f"{first}.", rest) if foreign else (model, "", head or "")
    if first and isinstance(getattr(model, first, None), nn.Module):
        return getattr(model, first), f"{first}.", rest
    names = ["unet", "transformer", *(n for n in getattr(model, "__dict__", ()) if NETWORKS.fullmatch(n))]
    values = {n: getattr(model, n, None) for n in names}
    networks = {n: v for n, v in values.items() if isinstance(v, nn.Module)}
    if not networks:
        raise HeadNotFoundError(
            "expected a torch.nn.Module, or a pipeline with a network named 'unet' or 'transformer', got "
            f"{type(model).__name__}; give the network itself, or its name with the path of its output layer, "
            'head="network.path.to.layer"'
        )
    if len({id(v) for v in networks.values()}) > 1:
        last = list(networks)[-1]
        path = HEAD_PATHS.get(type(networks[last]).__name__, "path.to.layer")
        raise AmbiguousHeadError(
            f"expected a pipeline with one denoising network, got {' and '.join(map(repr, networks))}; say which is meant: "
            f'head="{last}.{path}"'
        )
    return next(iter(networks.values())), "", head or ""


def find_head(model: Any, head: str | None = None, call: Callable[[], Any] | None = None) -> Head:
    """Find the output layer of a denoising network.

    Args:
        model: A ``torch.nn.Module``, or a diffusers pipeline that has one.
        head: Exact module path of the layer (``"conv_out"``), for networks that the package does not know. In a pipeline with
            several networks it starts with the name of one (``"transformer_2.proj_out"``).
        call: Runs the network, ``lambda: network(x, t)``: where the family is unknown the layer is then found by
            :func:`find_head_by_call`.

    Returns:
        The :class:`Head`; ``.path``, ``.layer``, ``.in_features`` (D with bias), ``.out_channels``.

    Raises:
        HeadNotFoundError: No layer at ``head``, or none at the usual places.
        AmbiguousHeadError: The family is unknown and several layers could be it; or there are several networks.
        UnsupportedHeadError: The layer is of another kind than ``Linear`` or ``Conv1d``, ``Conv2d``, ``Conv3d`` (stride,
            dilation and groups 1).
    """
    network, prefix, path = _component(model, head)
    if not path:
        family = next((c.__name__ for c in type(network).__mro__ if c.__name__ in HEAD_PATHS), "")
        known = HEAD_PATHS.get(family, "")
        layer = _module_at(network, known)
        if layer is not None and call is not None:
            try:
                return Head(prefix + known, layer, HeadGeometry.of(layer, known))
            except UnsupportedHeadError:
                layer = None
        if layer is None and call is not None:
            found = find_head_by_call(network, call)
            return replace(found, path=prefix + found.path)
        path = known if layer is not None else _usual_path(network)
    layer = _module_at(network, path)
    if layer is None:
        last = [n for n, m in network.named_modules() if isinstance(m, LAYERS)][-3:]
        raise HeadNotFoundError(
            f"expected a layer at {path!r} in {type(network).__name__}, found none; its last layers are: "
            f"{', '.join(last) or 'none'}"
        )
    return Head(prefix + path, layer, HeadGeometry.of(layer, path))


def _usual_path(network: nn.Module) -> str:
    found = [p for p in COMMON_PATHS if _module_at(network, p) is not None]
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
    return found[0]


@torch.no_grad()
def find_head_by_call(network: nn.Module, call: Callable[[], Any]) -> Head:
    """Find the output layer of any network by running it.

    The linear layers and convolutions are taken in turn, from the last one called backwards, and what they return is
    replaced by numbers. The head is the first whose numbers come out of the network, each at most once, maybe in
    another order or negated. Others than numbers may come out beside them only if they do not depend on the layer.

    Args:
        network: The network.
        call: Runs it and returns its output, the same whenever it is called. It is run once, and about twice for each layer
            that is tried; at most :data:`SEARCHED` are.

    Raises:
        HeadNotFoundError: No layer's numbers came out.
        AmbiguousHeadError: Those of several did, in different places.
        UnsupportedHeadError: The layer is of another kind, or is passed several times in one call of the network.
    """
    names: dict[nn.Module, str] = {
        m: n for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))
    }
    called: list[nn.Module] = []
    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_hook(lambda layer, _, __: called.append(layer)).remove)
        plain = tensor_of(call())
    tried = list(dict.fromkeys(reversed(called)))[:SEARCHED]
    found: list[nn.Module] = []
    for layer in tried:
        numbers = send_numbers(layer, call)
        reached = numbers.index >= 0
        if not numbers.complete and not (numbers.distinct and torch.equal(numbers.output != plain, reached)):
            continue
        if len(numbers.sizes) > 1:
            raise UnsupportedHeadError(
                f"expected one pass through {names[layer]!r} in a network call, got {len(numbers.sizes)}"
            )
        found.append(layer)
        if numbers.complete:
            break
    if len(found) > 1:
        raise AmbiguousHeadError(
            f"expected one output layer in {type(network).__name__}, found {', '.join(names[f] for f in found)}; name "
            f'the right one with head="{names[found[0]]}"'
        )
    if not tried:
        raise HeadNotFoundError(
            f"expected {type(network).__name__} to end in a torch.nn.Linear or a convolution, got none called: layers that make "
            "their weights themselves (normalised, generated) have no posterior"
        )
    if not found:
        raise HeadNotFoundError(
            f"expected a layer of {type(network).__name__} whose output the network returns as it is, reordered or negated, "
            f"found none among the last {len(tried)} of {len(set(called))} that were called "
            f'({", ".join(names[t] for t in tried[:3])}, …); name it with head="path.to.layer"'
        )
    path = names[found[0]]
    return Head(path, found[0], HeadGeometry.of(found[0], path))


def _module_at(network: nn.Module, path: str) -> nn.Module | None:
    """The submodule at an exact path, or None."""
    return dict(network.named_modules(remove_duplicate=False)).get(path) if path else None


def check_eval(network: nn.Module, called: str = "the network") -> None:
    """Raise :class:`ArgumentError` when dropout or batch statistics would make the network random."""
    for name, module in network.named_modules():
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        random |= getattr(module, "dropout_prob", 0) > 0  # diffusers' LabelEmbedding
        if module.training and (random or isinstance(module, nn.modules.batchnorm._BatchNorm)):
            raise ArgumentError(
                f"expected a network in evaluation mode, got {type(module).__name__} at {name!r} in training mode; "
                f"call .eval() on {called} first"
            )
