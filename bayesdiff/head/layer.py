r"""The output layer itself: what enters it, its weights, the network with others, and whether it computes :math:`W\varphi`.

Nothing here changes the network: hooks come off, also on errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from bayesdiff.checks import UnsupportedHeadError
from bayesdiff.head.geometry import LAYERS, HeadGeometry
from bayesdiff.head.loaded import weights_in_use

#: Rounding errors may be this many times as large as they should be.
ROUNDING = 4.0


@dataclass(frozen=True)
class Head:
    """The output layer of a network: where it is, the layer itself, and how it computes.

    Args:
        path: Exact module path inside the network; in a pipeline with several networks it starts with the network's name.
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
        """W with the bias as its last column, as the layer uses it: ``(C, D)``, float64, a copy.

        Raises:
            UnsupportedHeadError: The weights cannot be had: see :func:`bayesdiff.head.loaded.weights_in_use`.
        """
        return _matrix(*weights_in_use(self.layer, self.geometry, self.path))

    @contextmanager
    def capture(self, outputs: list[Tensor] | None = None) -> Iterator[list[Tensor]]:
        """Collect what enters the layer while the context is open; the hooks always come off.

        Args:
            outputs: Collects what the layer returns, after all other hooks on it.
        """
        captured: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            captured.append((args[0] if args else kwargs["input"]).detach())

        with ExitStack() as stack:
            stack.callback(self.layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if outputs is not None:
                collect = self.layer.register_forward_hook(
                    lambda _, __, output: outputs.append(output.detach().clone())
                )
                stack.callback(collect.remove)
            yield captured

    @contextmanager
    def shifted(self, delta: Tensor | Callable[[], Tensor]) -> Iterator[None]:
        r"""The network with :math:`W + \delta W` in its head, while the context is open.

        The layer keeps its weights; a hook adds :math:`\delta W\varphi` (in float32 or better) to what
        the layer returns.

        Args:
            delta: ``(C, D)``, or what returns it, asked anew at every call of the layer.
        """

        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
            dtype = torch.promote_types(output.dtype, torch.float32)
            weights = delta() if callable(delta) else delta
            inputs = (args[0] if args else kwargs["input"]).to(output.device, dtype)
            shift = self.geometry.apply(inputs, weights.to(inputs).unsqueeze(0))[0]
            return (output.to(dtype) + shift).to(output.dtype)

        handle = self.layer.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def check_linear(self, inputs: Tensor, output: Tensor) -> None:
        r"""Make sure that the layer returns :math:`W\varphi`, and nothing that a hook or a patch makes of it.

        With s the root of the sum of squares of the D terms of :math:`W\varphi`, the difference may be
        :math:`4(\epsilon(|W\varphi| + s) + \epsilon' D s)`: ε of the coarsest dtype in use, ε' of that in which is summed.
        What is not finite is not compared.

        Args:
            inputs: What entered the layer, from :meth:`capture`.
            output: What the layer returned, from the same.

        Raises:
            UnsupportedHeadError: It does not.
            ShapeError: The inputs don't fit the layer.
        """
        stored, bias = weights_in_use(self.layer, self.geometry, self.path)
        x = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
        weight = _matrix(stored, bias).to(x)
        expected = self.geometry.apply(x, weight[None])[0]
        if output.shape != expected.shape:
            self._refuse(f"is {tuple(output.shape)}, not {tuple(expected.shape)}")
        terms = self.geometry.apply(x.square(), weight.square()[None])[0].sqrt()
        eps, summed, tiny = _rounding(inputs, output, stored)
        difference = (output.to(expected) - expected).abs()
        allowed = ROUNDING * (eps * (expected.abs() + terms) + summed * self.in_features * terms) + tiny
        if bool((difference > allowed).any()):
            size = expected.square().nanmean().sqrt()
            share = float(difference.square().nanmean().sqrt() / size)
            self._refuse(
                f"differs from it by up to {float(difference.nan_to_num().max()):.3g} ({share:.2g} of its size)"
            )

    def _refuse(self, why: str) -> NoReturn:
        raise UnsupportedHeadError(
            f"expected {self.path!r} to compute Wφ, but its output {why}; on it: {', '.join(self._patches()) or 'nothing seen'}; "
            'take that off, or name another layer with head="path.to.layer"'
        )

    def _patches(self) -> list[str]:
        """What may change the layer's output, by name."""
        hooks = {"forward hook": self.layer._forward_hooks, "forward pre-hook": self.layer._forward_pre_hooks}
        found = [
            f"the {kind} {getattr(hook, '__qualname__', type(hook).__qualname__)}"
            for kind, those in hooks.items()
            for hook in those.values()
            if not str(getattr(hook, "__module__", "")).startswith("bayesdiff.")
        ]
        kind = next(k for k in LAYERS if isinstance(self.layer, k))
        for method in ("forward", "_conv_forward", "__call__"):
            if method in vars(self.layer) or getattr(type(self.layer), method, None) is not getattr(kind, method, None):
                found.append(f"an overridden {method!r}")
        return found


def _matrix(weight: Tensor, bias: Tensor | None) -> Tensor:
    """W with the bias as its last column, ``(C, D)`` float64."""
    columns = [weight.flatten(1).double()] + ([] if bias is None else [bias.double().unsqueeze(1)])
    return torch.cat(columns, dim=1)


def _rounding(inputs: Tensor, output: Tensor, weight: Tensor) -> tuple[float, float, float]:
    """ε of the numbers that a layer multiplies, ε of those that it sums, and the smallest that has all its digits."""
    device, precision = inputs.device.type, torch.get_float32_matmul_precision()
    dtypes = {inputs.dtype, output.dtype, weight.dtype}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    if dtypes != {torch.float64} and (device != "cpu" or precision != "highest"):
        # TensorFloat-32, cuDNN's default, has the mantissa of float16.
        dtypes.add(torch.bfloat16 if precision == "medium" else torch.float16)
    numbers = [torch.finfo(d) for d in dtypes]
    summed = min(torch.finfo(torch.float32).eps, max(n.eps for n in numbers))
    return max(n.eps for n in numbers), summed, max(n.tiny for n in numbers)
