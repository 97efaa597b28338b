"""Whether a network is a function: the same call twice gives the same answer.

Dropout that is called by hand, noise from a source of its own, and caches that reuse blocks of an earlier call all make another
network of it than the one whose posterior is asked for. So a fit makes its first call twice, and once more before some later
ones: a cache that skips every second call, or every fifth, answers then with what a later call had left in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import NotRepeatableError
from bayesdiff.tracing.rerun import copied, tensors

#: Before which calls of a fit its first is made again: at no regular distance.
ASKED = (3, 5, 8, 12)


class Repeats:
    """Makes a network's first call again and again.

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._calls = 0
        self._again: Callable[[], list[Tensor]] | None = None
        self._known: list[Tensor] = []

    def before(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call follows.

        Raises:
            NotRepeatableError: The first one, made again, gives another answer than it gave.
        """
        self._calls += 1
        if self._again is None:
            kept = copied((args, kwargs))

            def again() -> list[Tensor]:
                mine, named = copied(kept)
                with torch.no_grad():
                    return tensors(copied(call(*mine, **named)))

            self._again, self._known = again, again()
        elif self._calls in ASKED:
            self._compare(self._again())
        if self._calls > ASKED[-1]:
            self._again, self._known = list, []

    def after(self, output: Any) -> None:
        """The call has been made.

        Raises:
            NotRepeatableError: The first gave another answer than before.
        """
        if self._calls == 1:
            self._compare(tensors(output))

    def _compare(self, found: list[Tensor]) -> None:
        for one, other in zip(self._known, found, strict=True):
            if not torch.equal(one.nan_to_num(), other.detach().nan_to_num()):
                apart = float((one.double() - other.double()).abs().nan_to_num().max())
                raise NotRepeatableError(
                    f"expected {type(self.network).__name__} to give the same call the same answer, got a difference of "
                    f"{apart:.3g} (largest output: {float(one.abs().nan_to_num().max()):.3g}): it draws random numbers "
                    "(dropout?), or remembers earlier calls (a block cache?); turn that off, or call .eval() on it"
                )
