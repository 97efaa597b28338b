"""What tells a network from others, and from itself with other weights: a few numbers of every one of its tensors.

A posterior is of one network. Its head's weights are compared one by one; those of the body are billions, so of each tensor a
few numbers, evenly spread, are kept. A training step, an adapter that was merged, or another checkpoint changes all of them.
It takes milliseconds, so it is asked at every run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import HeadMismatchError, ShapeError
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.head.layer import Head

#: Numbers of each tensor.
SAMPLES = 8


@dataclass(frozen=True, eq=False, repr=False)
class NetworkIdentity:
    """Of one network at one time.

    Args:
        layout: SHA-256 of the names and shapes of its tensors.
        samples: Numbers of each tensor, ``(tensors, 8)`` float64, in the order of their names; NaN where a tensor was not in
            memory.

    Raises:
        ShapeError: The samples are of another shape or dtype.
    """

    layout: str
    samples: Tensor

    def __post_init__(self) -> None:
        if self.samples.ndim != 2 or self.samples.shape[1] != SAMPLES or self.samples.dtype != torch.float64:
            raise ShapeError(
                f"expected samples of a network as float64 (tensors, {SAMPLES}), got {self.samples.dtype} "
                f"{tuple(self.samples.shape)}"
            )
        if not isinstance(self.layout, str):
            raise ShapeError(f"expected the layout of a network as text, got {self.layout!r}")

    def __repr__(self) -> str:
        """One line."""
        return f"NetworkIdentity({len(self.samples)} tensors, {self.layout[:12]}…)"

    @classmethod
    @torch.no_grad()
    def of(cls, network: nn.Module) -> NetworkIdentity:
        """The identity of a network as it is now."""
        tensors, away = _tensors(network), _on_disk(network)
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for number, tensor in enumerate(tensors.values()):
            if tensor.data_ptr() not in away:
                groups.setdefault((tensor.device, tensor.dtype), []).append(number)
        samples = torch.full((len(tensors), SAMPLES), float("nan"), dtype=torch.float64)
        values = list(tensors.values())
        for (device, dtype), numbers in groups.items():
            if device.type == "meta" or dtype.is_complex:
                continue
            # One transfer for all tensors of a device.
            some = torch.stack([_spread(values[n]) for n in numbers])
            samples[numbers] = some.float().cpu().double() if dtype.itemsize < 4 else some.cpu().double()
        return cls(_layout(tensors), samples)

    @torch.no_grad()
    def check(self, network: nn.Module, what: str = "that the posterior was fitted to") -> None:
        """Make sure that a network is this one; it may have been cast to a lower precision since.

        Args:
            network: The network.
            what: Which network it should be, for the message.

        Raises:
            HeadMismatchError: It has other weights, or other tensors.
        """
        tensors, now = _tensors(network), NetworkIdentity.of(network)
        advice = "fit the posterior again with bayesdiff.fit, or load the weights that it belongs to"
        if now.layout != self.layout or len(now.samples) != len(self.samples):
            raise HeadMismatchError(
                f"expected the network {what}, got {type(network).__name__} with {len(now.samples)} tensors of other names or "
                f"shapes ({len(self.samples)} before; an adapter?): {advice}"
            )
        known = self.samples.clone()
        for number, tensor in enumerate(tensors.values()):
            if tensor.dtype.is_floating_point:
                known[number] = self.samples[number].to(tensor.dtype).double()
        different = (known != now.samples) & ~(known.isnan() | now.samples.isnan())
        if bool(different.any()):
            changed = different.any(1).nonzero().flatten().tolist()
            first = list(tensors)[changed[0]]
            raise HeadMismatchError(
                f"expected the network {what}, got one with other weights: {len(changed)} of {len(tensors)} tensors have "
                f"changed, {first!r} first: {advice}"
            )


def fingerprint(weight: Tensor) -> str:
    """SHA-256 of a head's weights ``(C, D)`` as float64 bytes."""
    return hashlib.sha256(weight.detach().cpu().double().contiguous().numpy().tobytes()).hexdigest()


def check_head(head: Head, geometry: HeadGeometry, mean: Tensor) -> None:
    """Make sure that a head has this geometry and these weights; it may have been cast to a lower precision since.

    Args:
        head: The head.
        geometry: Its own.
        mean: Its weights, bias as the last column, ``(C, D)`` float64.

    Raises:
        HeadMismatchError: It has others.
    """
    if head.geometry != geometry:
        raise HeadMismatchError(
            f"expected a head with {geometry}, got {head.geometry}: the posterior is of another network"
        )
    weight = head.weight().cpu()
    dtype: torch.dtype = head.layer.weight.dtype  # type: ignore[assignment]
    if not torch.equal(mean.to(dtype).double(), weight):
        raise HeadMismatchError(
            f"expected the head's weights to have the fingerprint {fingerprint(mean)[:12]}…, got "
            f"{fingerprint(weight)[:12]}… (largest difference {(weight - mean).abs().max():.3g}): the posterior was fitted to "
            "another network; fit it again with bayesdiff.fit"
        )


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are saved, by their names without what compiling puts before them."""
    found = {
        name.replace("_orig_mod.", ""): value
        for name, value in network.state_dict().items()
        if isinstance(value, Tensor) and value.numel()
    }
    return dict(sorted(found.items()))


def _on_disk(network: nn.Module) -> set[int]:
    """Where tensors lie that are on disk until a layer runs (diffusers' group offloading): memory that nobody wrote to."""
    away: set[int] = set()
    for module in network.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            group: Any = getattr(hook, "group", None)
            if getattr(group, "offload_to_disk_path", None):
                members = [*group.parameters, *group.buffers]
                members += [t for m in group.modules for t in (*m.parameters(), *m.buffers())]
                away.update(t.data_ptr() for t in members)
    return away


def _layout(tensors: dict[str, Tensor]) -> str:
    lines = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def _spread(tensor: Tensor) -> Tensor:
    """Some of its numbers, evenly spread, the last among them."""
    n = tensor.numel()
    index = [round(k * (n - 1) / (SAMPLES - 1)) for k in range(SAMPLES)]
    flat = tensor.flatten() if tensor.is_contiguous() else tensor.reshape(-1)
    return flat[index]
