"""Networks as black boxes: called once for their values, then answering from a record.

A function that samples is run several times (:mod:`bayesdiff.propagation.tangents`). In the first run every module that it calls
does its work, and what it returns is recorded. In all later runs each call returns the record, and whoever runs the function
says what else is done at it: attach tangents, measure a response, move the value a little. The runs must agree: a call whose
inputs differ from those of the first run is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from bayesdiff.checks import NotRepeatableError, UnsupportedPipelineError, check_finite
from bayesdiff.head.find import Head
from bayesdiff.tracing.boxes import Box, methods_of, over
from bayesdiff.tracing.dual import DualNumbers
from bayesdiff.tracing.memory import tidy
from bayesdiff.tracing.record import Call, check_same, scalars_of, sums_of
from bayesdiff.tracing.rerun import Rerun, copied, same_state, tensors
from bayesdiff.tracing.rows import check_rows, first_row_moved, in_lists, in_rows, number_of_rows, other_rows
from bayesdiff.tracing.tail import reading

#: Features of a run that take more bytes than this are kept in half precision; a map then changes by less than half a per cent.
KEPT = 2**26

Handler = Callable[[Box, int, tuple[Any, ...], dict[str, Any], Any], None]


class Session:
    """One function with its network and other modules, run again and again.

    Args:
        run: The function.
        network: The denoising network.
        head: Its output layer.
        components: Other modules that the function may call, by name.
        by_row: Whether to evaluate the network row by row.
    """

    def __init__(
        self,
        run: Rerun,
        network: nn.Module,
        head: Head,
        components: dict[str, nn.Module] | None = None,
        *,
        by_row: bool = False,
    ) -> None:
        self.run, self.head = run, head
        self.network = Box("the network", network)
        self._whole = self.network.original if by_row else None  # until it was compared
        self.by_row = by_row
        if by_row:
            self.network.original = in_rows(self.network.original)
        distinct = {id(module): (name, module) for name, module in (components or {}).items()}
        self.others = [
            Box(name if method == "forward" else f"{name}.{method}", module, method)
            for name, module in distinct.values()
            for method in methods_of(module)
        ]
        #: Evaluations of the network so far, and of the other modules.
        self.evaluations = self.other_evaluations = 0
        #: Whether random numbers were drawn between the network's calls.
        self.noisy = False
        self.trace = DualNumbers()
        self._inside = False
        self._on_network: Handler | None = None
        self._on_component: Handler | None = None
        self._checked = True
        self._recording = self._live = False
        self._states: list[Any] = []
        self._asked = self._behind = False
        self._bytes = 0
        self._coupled: dict[int, bool] = {}

    def record(self) -> Any:
        """The first run: the function as it is.

        Raises:
            UnsupportedPipelineError: It does not call the network.
            NotRepeatableError: The network draws random numbers.
        """
        self._recording = True
        try:
            with self._installed():
                value = self.run()
        finally:
            self._recording = False
        if not self.network.calls:
            raise UnsupportedPipelineError(
                f"expected the function to call {type(self.network.module).__name__}, got no call of it"
            )
        return value

    def replay(
        self, on_network: Handler, on_component: Handler | None = None, function: Callable[..., Any] | None = None,
        *, checked: bool = True, trace: DualNumbers | None = None,
    ) -> Any:  # fmt: skip
        """Another run on the record, traced.

        Args:
            on_network: What is done at each network call: given the box, its number, the arguments and the recorded output
                (a copy, to which tangents may be attached).
            on_component: The same for calls of other modules.
            function: Another function with the same arguments; by default the same.
            checked: Whether inputs must be those of the first run.
            trace: What traces it; by default fresh dual numbers.

        Raises:
            NotRepeatableError: They are not, or the network gives the same call another answer.
        """
        self._on_network, self._on_component, self._checked = on_network, on_component, checked
        for box in (self.network, *self.others):
            box.position = 0
        self.trace = DualNumbers() if trace is None else trace
        with self._installed(), torch.no_grad(), self.trace:
            return self.run(function)

    def release(self) -> None:
        """Forget all runs. They refer to each other, and would stay in memory until Python's collector happens to come."""
        self._on_network = self._on_component = None
        self.trace = DualNumbers()
        self._states.clear()
        for box in (self.network, *self.others):
            box.calls.clear()

    def decoded(self) -> bool:
        """Whether another module was called behind the last network call of the last replay."""
        return self._behind

    def evaluate(self, box: Box, args: tuple[Any, ...], kwargs: dict[str, Any], number: int = 1) -> Any:
        """The module itself, with other arguments; counted as ``number`` evaluations."""
        if box is self.network:
            self.evaluations += number
        else:
            self.other_evaluations += number
        inside, self._inside = self._inside, True
        try:
            with torch.no_grad():
                return box.original(*args, **kwargs)
        finally:
            self._inside = inside

    @contextmanager
    def live(self, trace: DualNumbers) -> Iterator[None]:
        """A context in which the function runs on the modules themselves, network calls counted, traced by ``trace``."""
        self._live = True
        self.network.position = 0
        self.trace = trace
        try:
            with self._installed(), torch.no_grad(), trace:
                yield
        finally:
            self._live = False

    @contextmanager
    def _installed(self) -> Iterator[None]:
        """The boxes put over their modules' methods, and taken off again."""
        with ExitStack() as stack:
            for box in (self.network, *self.others):
                stack.enter_context(over(box, self._call))
            yield

    def _call(self, box: Box, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._inside or (box is not self.network and not tensors((args, kwargs))):
            return box.original(*args, **kwargs)
        if box is self.network:
            tidy(len(box.calls) if self._recording else box.position)
        if self._recording:
            return self._record(box, args, kwargs)
        if self._live:
            box.position += 1
            with self.trace.paused():
                return self.evaluate(box, args, kwargs)
        n, box.position = box.position, box.position + 1
        self._behind |= box is not self.network and self.network.position >= len(self.network.calls)
        if n >= len(box.calls):
            raise NotRepeatableError(
                f"expected {len(box.calls)} calls of {box.name} in every run, as in the first, got another: the function "
                "remembers something between its runs"
            )
        call = box.calls[n]
        self._inside = True
        try:
            with self.trace.paused(), torch.no_grad():  # the function may have turned gradients on
                if self._checked:
                    check_same(box.name, n, call, args, kwargs)
                if box is self.network and not self._asked and n == asked_again(len(box.calls), self.evaluations):
                    self._ask_again(box, call.output, args, kwargs)
                output = copied(call.output)
                handler = self._on_network if box is self.network else self._on_component
                if handler is not None:
                    handler(box, n, args, kwargs, output)
                return output
        finally:
            self._inside = False

    def _record(self, box: Box, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sums, scalars = sums_of(args, kwargs), scalars_of(args, kwargs)
        self._inside = True
        try:
            if box is not self.network:
                given = [t for t in tensors((args, kwargs)) if not t.is_inference()]
                versions = [t._version for t in given]
                output = box.original(*args, **kwargs)
                if versions != [t._version for t in given]:
                    raise UnsupportedPipelineError(
                        f"expected {box.name} to leave what it is given as it is, got one that writes into it: build it with "
                        "inplace=False, or call the operation itself"
                    )
                box.calls.append(Call(copied(output), sums, scalars))
                return output
            before = self.run.states()
            if box.calls:
                self.noisy |= not same_state(self._states, before)
            rows = number_of_rows(args, kwargs) if self.by_row else 1
            with torch.no_grad(), reading(self.head, rows, checked=not box.calls) as read:
                output = box.original(*args, **kwargs)
            self.evaluations += 1
            if self._whole is not None and rows > 1:
                with torch.no_grad():
                    check_rows(output, self._whole(*args, **kwargs), box.module)
                self.evaluations += 1
                self._whole = None
            self._states = self.run.states()
            if not same_state(before, self._states):
                raise NotRepeatableError(
                    f"expected {type(box.module).__name__} to be a function of its inputs, got one that draws random numbers "
                    "(dropout?): call .eval() on it, or remove what is random"
                )
            features, tail, rounding = read.result(output)
            previous = box.calls[-1].tail if box.calls else None
            tail = tail if previous is None else tail.sharing(previous)
            kept = copied(output)
            given, returned = tensors((args, kwargs)), tensors(kept)
            for f in returned:
                check_finite("network outputs", f, "the network overflows in this dtype: use bfloat16 or float32")
            alike = bool(returned) and given[0].shape == returned[0].shape
            agreement = float((given[0].double() * returned[0].double()).sum()) if alike else 0.0
            box.calls.append(Call(kept, sums, scalars, features, 0.0, tail, rounding, agreement))
            self._bytes += features.numel() * features.element_size()
            if self._bytes > KEPT:
                for call in (
                    box.calls if self._bytes - features.numel() * features.element_size() <= KEPT else box.calls[-1:]
                ):
                    call.shrink()
            return output
        finally:
            self._inside = False

    def coupled(self, box: Box, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
        """Whether the rows of a batch act on each other (frames that a decoder sees together, views that attend to each other).

        Asked once of each module, by one evaluation with the first row of its first argument moved: the others must not change.
        """
        if id(box) not in self._coupled:
            self._coupled[id(box)] = False
            moved = first_row_moved(args, kwargs, output)
            if moved is not None:
                again = self.evaluate(box, *moved)
                listed = in_lists(args, kwargs, output)
                pairs = zip(other_rows(output, listed), other_rows(again, listed), strict=True)
                self._coupled[id(box)] = any(not torch.equal(a, b) for a, b in pairs)
        return self._coupled[id(box)]

    def _ask_again(self, box: Box, known: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the record once more, after all others: a network with a memory answers otherwise."""
        self._asked = True
        if first_row_moved(args, kwargs, known) is not None and not self.coupled(box, args, kwargs, known):
            return  # the other rows have answered as before
        again = tensors(self.evaluate(box, args, kwargs))
        for one, other in zip(tensors(known), again, strict=True):
            if not torch.equal(one, other):
                apart = float((one.double() - other.double()).abs().max())
                raise NotRepeatableError(
                    f"expected {type(box.module).__name__} to give the same call the same answer, got a difference of "
                    f"{apart:.3g} (largest output: {float(one.abs().max()):.3g}): it remembers earlier calls (a block cache?) "
                    "or computes with random numbers"
                )


def asked_again(calls: int, evaluations: int) -> int:
    """Which call is made again: one whose distance from now has no small factor.

    A cache that skips every second call, or every third or fifth, would be asked in its own rhythm otherwise, and answer the
    same; so it would if no other call lay between.
    """

    def rhythms(n: int) -> int:
        distance = evaluations - n
        return 100 if distance < 2 else (distance % 2 == 0) * 4 + (distance % 3 == 0) * 2 + (distance % 5 == 0)

    return min(range(calls), key=rhythms)
