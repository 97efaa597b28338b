"""Values as they were before the last clamp: what members of an ensemble are compared by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesdiff.tracing.derivatives import operation
from bayesdiff.tracing.dual import DualNumbers


class BeforeClamp(DualNumbers):
    """:meth:`unclamped` of a tensor is its value before the clamp, ``(1, *shape)``, carried through copies, casts and scales.

    The same mechanism as for tangents, with values in their place: both go linearly from a clamp to what is returned.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note what a clamp is given."""
        if not operation(func).clamp:
            return super().__torch_function__(func, types, args, kwargs)
        kwargs = kwargs or {}
        given = args[0] if args else kwargs.get("input")
        before = given.detach().clone() if isinstance(given, Tensor) and given.is_floating_point() else None
        out = func(*args, **kwargs)
        if before is not None and isinstance(out, Tensor) and out.shape == before.shape:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                self._write(out, torch.zeros(1, *out.shape, dtype=before.dtype), before[None])
        return out
