"""Whether a network is a function: the same call twice gives the same answer.

Dropout that is called by hand, noise from a source of its own, and caches that reuse blocks of an earlier call all make another
network of it than the one whose posterior is asked for. A cache may skip every second call or every tenth, so a fit asks before
its first call, its second, its fourth and its eighth: a rhythm of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import NotRepeatableError
from bayesdiff.tracing.rerun import copied, tensors

#: Before which calls of a fit the network is asked.
ASKED = (1, 2, 4, 8)


class Repeats:
    """Asks a network some of its calls twice.

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._calls = 0
        self._known: list[Tensor] | None = None

    def before(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call follows; some are made now, too, on copies of their arguments."""
        self._calls += 1
        self._known = None
        if self._calls in ASKED:
            args, kwargs = copied((args, kwargs))
            with torch.no_grad():
                self._known = tensors(copied(call(*args, **kwargs)))

    def after(self, output: Any) -> None:
        """The call has been made.

        Raises:
            NotRepeatableError: It gave another answer than before.
        """
        if self._known is None:
            return
        for one, other in zip(self._known, tensors(output), strict=True):
            if not torch.equal(one.nan_to_num(), other.detach().nan_to_num()):
                apart = float((one.double() - other.double()).abs().nan_to_num().max())
                raise NotRepeatableError(
                    f"expected {type(self.network).__name__} to give the same call the same answer, got a difference of "
                    f"{apart:.3g} (largest output: {float(one.abs().nan_to_num().max()):.3g}): it draws random numbers "
                    "(dropout?), or remembers earlier calls (a block cache?); turn that off, or call .eval() on it"
                )
        self._known = None
