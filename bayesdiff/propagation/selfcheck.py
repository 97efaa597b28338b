"""Are the tangents what two runs say? A check that costs no network call.

The function is run twice more, every recorded output of the network moved by ±h δf of the first draw. What the network and the
decoder are then given must differ by 2h δx, as the duals have it. A tangent that was lost where a value left PyTorch, or
that follows the wrong path, shows here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import BayesdiffWarning, UnsupportedPipelineError
from bayesdiff.tracing.network import Box, Session
from bayesdiff.tracing.rerun import tensors

#: h δx is so large, relative to x.
NUDGE = 2e-3
#: With more network calls than this, δf is kept in half precision: three digits are enough for a check that warns at 15 %.
MANY = 100
#: Relative differences that are warned of, and that are refused: clipping alone may leave a few per cent.
DOUBTFUL, WRONG = 0.15, 0.5


class SelfCheck:
    """What one draw moves in a traced run, and whether it does.

    Args:
        session: The run.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._moves: dict[tuple[int, int], list[Tensor | None]] = {}  # δf
        self._expected: dict[tuple[int, int], dict[int, Tensor]] = {}  # δx, by argument
        self._h = 0.0
        self._kept = torch.float32 if len(session.network.calls) < MANY else torch.bfloat16
        self._sign = 0.0
        self._points: dict[tuple[int, int], dict[int, Tensor]] = {}

    def remember(self, box: Box, n: int, args: Any, kwargs: Any, moves: list[Tensor | None] | None) -> None:
        """In the traced run: δx of this call's inputs where it is looked at, and δf of its outputs."""
        self._moves[id(box), n] = [None if t is None else t[0].to(self._kept, copy=True) for t in moves or []]
        if n not in (len(box.calls) // 2, len(box.calls) - 1):
            return
        found = {i: (x, self.session.trace.tangents(x)) for i, x in enumerate(tensors((args, kwargs)))}
        kept = {i: (x, t[0].double()) for i, (x, t) in found.items() if t is not None}
        if kept and all(torch.finfo(x.dtype).bits >= 32 for x, _ in kept.values()):
            self._expected[id(box), n] = {i: t for i, (_, t) in kept.items()}
            sizes = [(float(x.double().square().mean()), float(t.square().mean())) for x, t in kept.values()]
            size, moved = (max(v) ** 0.5 for v in zip(*sizes, strict=True))
            if moved:
                self._h = NUDGE * (size or 1.0) / moved

    def run(self, function: Callable[..., Any] | None = None) -> float:
        """The relative difference; NaN where there is nothing to compare, or half precision hides it.

        Args:
            function: What to run with the arguments of the session's function; by default that function.

        Raises:
            UnsupportedPipelineError: It is too large.
        """
        if not self._h:
            return float("nan")
        trace, ends = self.session.trace, []
        for self._sign in (1.0, -1.0):
            self._points = {}
            self.session.replay(self._nudge, self._nudge, function, checked=False)
            ends.append(self._points)
        above = below = 0.0
        for key, expected in self._expected.items():
            for i, tangent in expected.items():
                found = (ends[0][key][i].double() - ends[1][key][i].double()) / (2 * self._h)
                above += float((found - tangent).square().sum()) / tangent.numel()
                below += float(tangent.square().sum()) / tangent.numel()
        self.session.trace = trace
        apart = (above / below) ** 0.5 if below else 0.0
        left = "; ".join(dict.fromkeys(f"{e.how} at {e.where}" for e in trace.escapes))
        told = (
            f"a relative difference of {apart:.2g} between the tangents and two runs moved to both sides"
            f"{f' (values left PyTorch: {left})' if left else ''}"
        )
        if not apart <= WRONG:
            raise UnsupportedPipelineError(
                f"expected a function that can be differentiated by following its PyTorch code, got {told}; use "
                'propagation="ensemble", which needs no derivative'
            )
        if apart > DOUBTFUL:
            warnings.warn(
                f"the sampler clips or bends: {told}; an ensemble shows what that does", BayesdiffWarning, stacklevel=4
            )
        return apart

    def _nudge(self, box: Box, n: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        key = (id(box), n)
        if key in self._expected:
            self._points[key] = {
                i: x.detach().clone() for i, x in enumerate(tensors((args, kwargs))) if i in self._expected[key]
            }
        outputs = [f for f in tensors(output) if f.is_floating_point()]
        for f, move in zip(outputs, self._moves.get(key, []), strict=False):
            if move is not None:
                f.add_((self._sign * self._h * move.double()).to(f.dtype))
