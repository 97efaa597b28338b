"""Values as they were before the last clamp: what members of an ensemble are compared by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from bayesdiff.tracing.derivatives.registry import operation
from bayesdiff.tracing.dual import DualNumbers

#: What becomes of a clamped tensor when another tensor is added is a sampler's business: its clamp is not the last.
ADDITIVE = {"add", "sub", "rsub", "subtract", "__add__", "__radd__", "__sub__", "__rsub__"}


class BeforeClamp(DualNumbers):
    """:meth:`unclamped` of a tensor is its value before the clamp, ``(1, *shape)``, taken along by copies, casts and scales.

    The memory of tangents, with values in their place: each operation that would carry tangents past a clamp is done on the
    value before it as well.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note what a clamp is given, and take it along."""
        kwargs, op = kwargs or {}, operation(func)
        if op.kind in ("pass", "escape"):
            return super().__torch_function__(func, types, args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        found = {i: v for i, x in enumerate(leaves) if isinstance(x, Tensor) and (v := self.unclamped(x)) is not None}
        before: Tensor | None = None
        if op.clamp and leaves and isinstance(leaves[0], Tensor) and leaves[0].is_floating_point():
            before = found[0][0].clone() if 0 in found else leaves[0].detach().clone()
        elif found and op.carry and op.kind != "inplace":
            others = [x for i, x in enumerate(leaves) if isinstance(x, Tensor) and i not in found and x.numel() > 1]
            if not (others and op.name in ADDITIVE):
                given = [found[i][0] if i in found else x for i, x in enumerate(leaves)]
                past_args, past_kwargs = tree_unflatten(given, spec)
                before = func(*past_args, **past_kwargs)
        out = func(*args, **kwargs)
        if op.kind == "inplace" and not op.clamp and 0 in found:
            self.drop(leaves[0])
        seen = isinstance(out, Tensor) and not op.clamp and any(_same_memory(out, leaves[i]) for i in found)  # a view
        if isinstance(before, Tensor) and isinstance(out, Tensor) and out.shape == before.shape and not seen:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                past = before.to(torch.promote_types(out.dtype, torch.float32))
                self.shadows.write(out, torch.zeros(1, *out.shape, dtype=past.dtype, device=out.device), past[None])
        return out


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
