r"""How a network is told the time, where a pipeline tells all its rows the same.

Some pipelines make one number of t, so that rows cannot have timesteps of their own. Then the pipeline is run on one timestep,
and what tells the network of it is replaced: the arguments that change with t, if each is one number and affine in t (t, t/1000,
1 − t/1000), by a number for each row. Where something else changes with t (the residuals of a ControlNet), rows are run one by
one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

#: A number that a network is told may be off an affine map of t by this, relative.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Told:
    """The arguments that change with t.

    Args:
        maps: By their number among the leaves of a call: p and q of p + q t.
    """

    maps: dict[int, tuple[float, float]]

    @classmethod
    def read(cls, calls: list[list[Any]], timesteps: list[float]) -> Told | None:
        """From the arguments of calls with the same x at several timesteps; None where they are not of this form.

        Args:
            calls: The leaves of each call.
            timesteps: t of each.
        """
        if len({len(leaves) for leaves in calls}) != 1 or not calls[0]:
            return None
        maps = {}
        for i, leaves in enumerate(zip(*calls, strict=True)):
            if not all(isinstance(v, Tensor) for v in leaves):
                if any(isinstance(v, Tensor) or v != leaves[0] for v in leaves):
                    return None
                continue
            if any(v.shape != leaves[0].shape for v in leaves):
                return None
            if all(torch.equal(v, leaves[0]) for v in leaves):
                continue
            numbers = [v.flatten().double().cpu() for v in leaves]
            if leaves[0].ndim > 1 or any(bool((v != v[0]).any()) for v in numbers):
                return None
            values = [float(v[0]) for v in numbers]
            q = (values[1] - values[0]) / (timesteps[1] - timesteps[0])
            p = values[0] - q * timesteps[0]
            size = max(map(abs, values))
            coarse = torch.finfo(leaves[0].dtype).eps if leaves[0].is_floating_point() else 0.0
            if any(abs(p + q * t - v) > max(ROUNDING, coarse) * size for t, v in zip(timesteps, values, strict=True)):
                return None
            maps[i] = (0.0 if abs(p) <= ROUNDING * size else p, q)
        return cls(maps) if maps else None

    def replace(self, args: tuple[Any, ...], kwargs: dict[str, Any], t: Tensor) -> tuple[Any, Any]:
        """A call's arguments, with a timestep for each row."""
        leaves, spec = tree_flatten((args, kwargs))
        for i, (p, q) in self.maps.items():
            value = p + q * t.double().to(leaves[i].device)
            leaves[i] = (value if leaves[i].is_floating_point() else value.round()).to(leaves[i].dtype)
        replaced: tuple[Any, Any] = tree_unflatten(leaves, spec)
        return replaced
