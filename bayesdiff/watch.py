"""A running pipeline, watched: what its network and its scheduler are given, call by call.

While the user's pipeline runs its own loop, a hook on the head sees the features of every network call,
one on the network its arguments, and a wrapper on ``scheduler.step`` what comes of them. From these follow,
without a line per model, the guidance (:mod:`bayesdiff.guidance`) and the input scaling (network input =
c · sample, repeated for each branch). Every relation is solved for and its residual must vanish; what is
not of this form is refused with the residual. Hooks and wrapper come off in every case.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import UnsupportedPipelineError
from bayesdiff.guidance import ROUNDING, branch_weights, combine
from bayesdiff.head import Fold, Head
from bayesdiff.propagate import Step

#: δx ``(B, C, H, W)`` to Jδx, by one evaluation of the network.
Respond = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """One call of the network: its arguments, what entered its head, the head's output, its own output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    features: Tensor
    head_output: Tensor
    output: Tensor


def _tensor(output: Any) -> Tensor:
    """The tensor in whatever a diffusers network returns."""
    if isinstance(output, Tensor):
        return output
    return output[0]


class Watch:
    """Watch one run of a pipeline. A context manager.

    Args:
        pipe: The pipeline; its scheduler's ``step`` is wrapped while the context is open.
        network: Its denoising network.
        head: The network's head.
        on_start: Called with the scheduler before its first step, if given.
        on_step: Called with each :class:`Step` and its ``respond``, if given; without it only calls are counted and
            the last sample is kept.

    Attributes:
        calls: Network calls so far, ours included.
        own_calls: The pipeline's own calls among them.
        sample: What the last step returned.
        fold: From the head's output to the network's, known after the first call.
    """

    def __init__(
        self,
        pipe: Any,
        network: nn.Module,
        head: Head,
        on_step: Callable[[Step, Respond], None] | None = None,
        on_start: Callable[[Any], None] | None = None,
    ) -> None:
        self.pipe, self.network, self.head = pipe, network, head
        self.on_step, self.on_start = on_step, on_start
        self.calls = self.own_calls = self.steps = 0
        self.sample: Tensor | None = None
        self.fold: Fold | None = None
        self._pending: list[Call] = []
        self._features: list[Tensor] = []
        self._head_outputs: list[Tensor] = []
        self._paused = False
        self._stack = ExitStack()

    def __enter__(self) -> Watch:
        with ExitStack() as stack:
            stack.callback(self.head.layer.register_forward_hook(self._see_head).remove)
            stack.callback(self.network.register_forward_hook(self._see_network, with_kwargs=True).remove)
            scheduler = self.pipe.scheduler
            step = scheduler.step
            self._signature = inspect.signature(step)

            @functools.wraps(step)  # pipelines look at the signature to see what step takes
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                return self._see_step(scheduler, step, *args, **kwargs)

            before = scheduler.__dict__.get("step")
            scheduler.step = wrapper

            def restore() -> None:
                del scheduler.__dict__["step"]
                if before is not None:
                    scheduler.__dict__["step"] = before

            stack.callback(restore)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._pending.clear()

    def _see_head(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not self._paused and self.on_step is not None:
            self._features.append(args[0].detach())
            self._head_outputs.append(output.detach())

    def _see_network(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.calls += 1
        if self._paused:
            return
        self.own_calls += 1
        if self.on_step is None:
            return
        if len(self._features) != 1:
            raise UnsupportedPipelineError(
                f"expected one pass through the head {self.head.path!r} in a network call, got {len(self._features)}"
            )
        self._pending.append(
            Call(args, kwargs, self._features.pop(), self._head_outputs.pop(), _tensor(output).detach())
        )

    def _see_step(self, scheduler: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs).arguments
        arguments = {k: v for k, v in bound.items() if k not in ("model_output", "timestep", "sample")}
        arguments |= arguments.pop("kwargs", {})
        if self.on_step is not None:
            seen = self._step(bound["model_output"], bound["timestep"], bound["sample"], arguments)
        if self.steps == 0 and self.on_start is not None:
            self.on_start(scheduler)
        result = step(*args, **kwargs)
        self.sample = _tensor(result if isinstance(result, tuple) else result.prev_sample).detach()
        if self.on_step is not None:
            self._paused = True
            try:
                self.on_step(*seen)
            finally:
                self._paused = False
        self.steps += 1
        return result

    def _step(self, output: Tensor, timestep: Any, sample: Tensor, arguments: dict[str, Any]) -> tuple[Step, Respond]:
        """Solve for how the pipeline made ``output`` from ``sample``."""
        previous = self.sample
        calls, self._pending = self._pending, []
        if not calls:
            raise UnsupportedPipelineError("expected a network call before every scheduler step, got none")
        if previous is not None:
            moved = _largest(sample - previous)
            if moved > ROUNDING * torch.finfo(sample.dtype).eps * _largest(sample):
                raise UnsupportedPipelineError(
                    "expected each step to start from what the last one returned, got a sample that the pipeline has "
                    f"changed by up to {moved:.3g} in between (inpainting, for example, mixes in known pixels)"
                )
        if self.fold is None:
            self.fold = self._read_fold(calls[0])
        batch, channels = len(sample), output.shape[1]
        features: list[Tensor] = []
        outputs: list[Tensor] = []
        for call in calls:
            if len(call.output) % batch:
                raise UnsupportedPipelineError(
                    f"expected network calls of a multiple of {batch} rows, got {len(call.output)}"
                )
            features += call.features.split(len(call.features) * batch // len(call.output))
            outputs += [o[:, :channels] for o in call.output.split(batch)]
        scale = self._input_scale(calls, sample)
        weights = branch_weights(outputs, output)
        reference = combine(weights, outputs)

        def respond(delta: Tensor) -> Tensor:
            """J δx = (g(x + hδx) − g(x))/h, h such that the step is no smaller than rounding allows."""
            dims = tuple(range(1, delta.ndim))
            eps = torch.finfo(calls[0].output.dtype).eps
            size = delta.double().square().mean(dims, keepdim=True).sqrt()
            least = eps**0.5 * sample.double().square().mean(dims, keepdim=True).sqrt()
            h = torch.where(size > 0, torch.clamp(least / size, min=1.0), torch.ones_like(size))
            shifted = [o for call in calls for o in self._again(call, scale * h * delta)]
            return (combine(weights, [o[:, :channels] for o in shifted]).double() - reference.double()) / h

        seen = Step(
            self.steps, output.detach(), timestep, sample.detach(), arguments, combine(weights, features), self.fold, scale
        )  # fmt: skip
        return seen, respond

    def _input(self, call: Call) -> tuple[str | int, Tensor]:
        """The network's noisy input among the arguments of a call, and where it is."""
        if call.args:
            return 0, call.args[0]
        for name in ("sample", "hidden_states"):
            if name in call.kwargs:
                return name, call.kwargs[name]
        raise UnsupportedPipelineError(
            f"expected the network's input first or named 'sample' or 'hidden_states', got {list(call.kwargs)}"
        )

    def _input_scale(self, calls: list[Call], sample: Tensor) -> float:
        """c with network input = c · sample in every branch."""
        x = sample.double()
        scale: float | None = None
        for call in calls:
            _, z = self._input(call)
            blocks = z.unflatten(0, (-1, len(sample)))[:, :, : sample.shape[1]].double()
            if blocks.shape[1:] != x.shape:
                raise UnsupportedPipelineError(
                    f"expected network inputs shaped as the sample {tuple(sample.shape)}, got {tuple(z.shape)}"
                )
            if scale is None:
                scale = float((blocks[0] * x).sum() / x.square().sum())
            worst = _largest(blocks - scale * x)
            eps = max(torch.finfo(z.dtype).eps, torch.finfo(sample.dtype).eps)
            if not worst <= ROUNDING * eps * scale * _largest(x):
                raise UnsupportedPipelineError(
                    f"expected the network's input to be a multiple of the sample, got a residual of {worst:.3g} from "
                    f"{scale:.4g} times it"
                )
        if scale is None:
            raise UnsupportedPipelineError("expected a network call before every scheduler step, got none")
        # What differs from 1 by rounding is 1.
        return 1.0 if abs(scale - 1) < torch.finfo(sample.dtype).eps else scale

    def _again(self, call: Call, shift: Tensor) -> tuple[Tensor, ...]:
        """The pipeline's own call again, its sample shifted in every branch: one output per branch."""
        where, z = self._input(call)
        batch, channels = shift.shape[:2]
        moved = z.unflatten(0, (-1, batch)).to(torch.float64, copy=True)  # the pipeline's own stays as it is
        moved[:, :, :channels] += shift
        moved = moved.flatten(0, 1).to(z.dtype)
        args, kwargs = list(call.args), dict(call.kwargs)
        if isinstance(where, int):
            args[where] = moved
        else:
            kwargs[where] = moved
        with torch.no_grad():
            return _tensor(self.network(*args, **kwargs)).split(batch)

    def _read_fold(self, call: Call) -> Fold:
        if call.head_output.shape == call.output.shape and torch.equal(call.head_output, call.output):
            return Fold(None)
        self._paused = True
        try:
            with torch.no_grad():
                return Fold.read(self.head, lambda: _tensor(self.network(*call.args, **call.kwargs)))
        finally:
            self._paused = False


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())
