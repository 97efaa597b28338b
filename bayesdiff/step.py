"""What was seen of one step of a running pipeline, and what the head's weights do in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesdiff.guidance import Guidance
from bayesdiff.head.fold import Fold
from bayesdiff.head.geometry import HeadGeometry


@dataclass(frozen=True)
class Step:
    r"""One step: the network's branches, their guidance, what the scheduler was given.

    Args:
        index: Its number, from 0.
        output: g, what the scheduler was given, ``(B, C, H, W)``.
        timestep: As the scheduler was given it.
        sample: :math:`x_t`, ``(B, C, H, W)``.
        arguments: The other arguments of ``scheduler.step``.
        guidance: g as a function of the branch outputs.
        branches: φ, what entered the head, by branch.
        outputs: The branch outputs, ``(B, C, H, W)`` each.
        features: ψ, the guided features: weights times branches.
        fold: From the head's output to the network's.
        input_scale: c ``(B,)``, the network's input is c·x.
    """

    index: int
    output: Tensor
    timestep: Any
    sample: Tensor
    arguments: dict[str, Any]
    guidance: Guidance
    branches: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    features: Tensor
    fold: Fold
    input_scale: Tensor

    def kept(self) -> Step:
        """Without the branches, where :meth:`shift` does not need them."""
        return self if self.guidance.amount is not None else replace(self, branches=(), outputs=())

    def of(self, rows: slice) -> Step:
        """The same for some of the samples."""
        if rows == slice(0, len(self.sample)):
            return self
        guidance = replace(
            self.guidance, weights=self.guidance.weights[:, rows],
            amount=None if self.guidance.amount is None else self.guidance.amount[rows],
            slack=None if self.guidance.slack is None else self.guidance.slack[rows],
        )  # fmt: skip
        return replace(
            self, output=self.output[rows], sample=self.sample[rows], guidance=guidance,
            branches=tuple(b[rows] for b in self.branches), outputs=tuple(o[rows] for o in self.outputs),
            features=self.features[rows], input_scale=self.input_scale[rows],
        )  # fmt: skip

    def linear_shift(self, geometry: HeadGeometry, deviations: Tensor, features: Tensor) -> Tensor:
        """δW φ of some features ``(B, …)``, ``(K, B, C, H, W)``, in their dtype."""
        dtype = torch.promote_types(features.dtype, torch.float32)
        shift = geometry.apply(features.to(dtype), deviations.to(features.device, dtype))
        return self.fold(shift, lead=2)[:, :, : self.output.shape[1]]

    def shift(self, geometry: HeadGeometry, deviations: Tensor) -> Tensor:
        """The direct term: δg at the same x, for deviations δW ``(K, C, D)``; ``(K, B, C, H, W)``."""
        guided = self.linear_shift(geometry, deviations, self.features)
        if self.guidance.amount is None:
            return guided
        conditional = self.linear_shift(geometry, deviations, self.branches[self.guidance.conditional])
        return self.guidance.push(self.outputs, guided, conditional)
