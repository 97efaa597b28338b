"""Are the tangents what two runs say? A check that costs no network call.

The function is run twice more, every recorded output of the network moved by ±h δf of the first draw. What the network and the
decoder are then given must differ by 2h δx, as the duals have it, and so must what is returned. A tangent that was lost where
a value left PyTorch, or that follows the wrong path, shows here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import BayesdiffWarning, UnsupportedPipelineError
from bayesdiff.propagation.returned import values
from bayesdiff.tracing.before_clamp import BeforeClamp
from bayesdiff.tracing.boxes import Box
from bayesdiff.tracing.dual import DualNumbers
from bayesdiff.tracing.network import Session
from bayesdiff.tracing.rerun import tensors

#: h δx is so large, relative to x.
NUDGE = 2e-3
#: With more network calls than this, δf is kept in half precision: three digits are enough for a check that warns at 15 %.
MANY = 100
#: Relative differences that are warned of, and that are refused: clipping alone may leave a few per cent.
DOUBTFUL, WRONG = 0.15, 0.5
#: Where it is doubtful, h is made so much smaller.
SMALLER = 30


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
        self._sizes = (0.0, 0.0)  # of the first output that moves, and of what moves it
        self._half = False  # whether half precision is on the way
        self._escaped = False  # whether values left PyTorch before the last network call
        self._points: dict[tuple[int, int], dict[int, Tensor]] = {}

    def remember(
        self, box: Box, n: int, args: Any, kwargs: Any, output: Any, moves: list[Tensor | None] | None
    ) -> None:
        """In the traced run: δx of this call's inputs where it is looked at, and δf of its outputs."""
        self._moves[id(box), n] = [None if t is None else t[0].to(self._kept, copy=True) for t in moves or []]
        if box is self.session.network:
            self._escaped = bool(self.session.trace.escapes)
        for f, t in zip([f for f in tensors(output) if f.is_floating_point()], moves or [], strict=False):
            self._half |= torch.finfo(f.dtype).bits < 32
            if t is not None and not self._sizes[1]:
                self._sizes = (_rms(f), _rms(t[0]))
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

    def run(self, result: Tensor, function: Callable[..., Any] | None = None) -> float:
        """The relative difference, the larger of those inside and at the end; NaN where half precision hides it.

        Args:
            result: The first draw's tangent at what is returned, before the last clamp.
            function: What to run with the arguments of the session's function; by default that function.

        Raises:
            UnsupportedPipelineError: It is too large.
        """
        trace = self.session.trace
        if self._half:
            if self._escaped:
                warnings.warn(
                    f"values left PyTorch ({_places(trace)}), and in half precision the self-check cannot tell whether that "
                    "matters", BayesdiffWarning, stacklevel=5,
                )  # fmt: skip
            return float("nan")
        self._h = self._h or NUDGE * (self._sizes[0] or 1.0) / self._sizes[1] if self._sizes[1] else self._h
        if not self._h:
            return 0.0
        apart = self._difference(result, function)
        if (
            apart > DOUBTFUL
        ):  # a clamp that is met within a step is no fault of the tangents: it goes with a smaller one
            self._h /= SMALLER
            apart = min(apart, self._difference(result, function))
        self.session.trace = trace
        left = _places(trace)
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

    def _difference(self, result: Tensor, function: Callable[..., Any] | None) -> float:
        """Of two runs moved to both sides by h, and the tangents."""
        ends, results = [], []
        for self._sign in (1.0, -1.0):
            self._points = {}
            before = BeforeClamp()
            output = self.session.replay(self._nudge, self._nudge, function, checked=False, trace=before)
            results.append(values(output, before))
            ends.append(self._points)
        above = below = 0.0
        for key, expected in self._expected.items():
            for i, tangent in expected.items():
                found = (ends[0][key][i].double() - ends[1][key][i].double()) / (2 * self._h)
                above += float((found - tangent).square().sum()) / tangent.numel()
                below += float(tangent.square().sum()) / tangent.numel()
        apart = (above / below) ** 0.5 if below else 0.0
        size = float(result.double().norm())
        if results[0].shape == result.shape and size:
            moved = (results[0] - results[1]) / (2 * self._h)
            # What rounding leaves of a difference is no fault of the tangents.
            noise = 1e-6 * float(results[0].abs().max()) / self._h * result.numel() ** 0.5
            apart = max(apart, (float((moved - result.double()).norm()) - noise) / size)
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


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean()) ** 0.5


def _places(trace: DualNumbers) -> str:
    return "; ".join(dict.fromkeys(f"{e.how} at {e.where}" for e in trace.escapes))
