"""A running pipeline, watched: what its network and its scheduler are given, call by call.

While the user's pipeline runs its own loop, a hook on the head sees the features of every network call,
one on the network its arguments, and a wrapper on ``scheduler.step`` what comes of them. From these follow,
without a line per model, the guidance (:mod:`bayesdiff.guidance`) and the input scaling (network input =
c · sample, repeated for each branch). Every relation is solved for, for each sample by itself, and its residual must vanish;
what is not of this form is refused with the residual. Hooks and wrapper come off in every case.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import UnsupportedPipelineError
from bayesdiff.guidance import ROUNDING, Guidance, by_sample, solve
from bayesdiff.head.find import Head
from bayesdiff.head.fold import Fold
from bayesdiff.rows import first_tensor, in_rows, repeated, row_of
from bayesdiff.step import Step


@dataclass(frozen=True)
class Call:
    """One call of the network: its arguments, what entered its head, the head's output, its own output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    features: Tensor
    head_output: Tensor
    output: Tensor


class GuidedNetwork:
    """The network as the pipeline used it in one step: g as a function of the sample, all else as it was.

    Args:
        watch: Whose network it is.
        calls: The pipeline's own calls in this step.
        step: What was seen of it.
        outputs: The branch outputs.
    """

    def __init__(self, watch: Watch, calls: list[Call], step: Step, outputs: list[Tensor]) -> None:
        self._watch, self._calls, self._step = watch, calls, step
        #: g at the step's own sample, in float32 or better.
        self.output = step.guidance(outputs)

    def __call__(self, sample: Tensor) -> Tensor:
        """g at another sample: one evaluation of the network, all branches; float32 or better."""
        return self._shifted([sample.double() - self._step.sample.double()])[0]

    def derivatives(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        """J δ = (g(x + hδ) − g(x))/h float64 of G deviations, h such that the step is no smaller than rounding allows.

        One call of the network on G times its batch.
        """
        eps = torch.finfo(self._calls[0].output.dtype).eps
        least = eps**0.5 * by_sample(_mean_square, self._step.sample.double()).sqrt()
        sizes = [by_sample(_mean_square, delta.double()).sqrt() for delta in deltas]
        steps = [torch.where(v > 0, torch.clamp(least / v, min=1.0), torch.ones_like(v)) for v in sizes]
        shifted = self._shifted([h * delta.double() for h, delta in zip(steps, deltas, strict=True)])
        return [(g.double() - self.output.double()) / h for g, h in zip(shifted, steps, strict=True)]

    def _shifted(self, shifts: list[Tensor]) -> list[Tensor]:
        scale, channels = self._step.input_scale, self._step.output.shape[1]
        scaled = torch.stack([scale.to(v).view(-1, *(1,) * (v.ndim - 1)) * v for v in shifts])
        branches = [o[:, :, :channels] for call in self._calls for o in self._watch.again(call, scaled)]
        return [self._step.guidance([o[i] for o in branches]) for i in range(len(shifts))]


def _mean_square(x: Tensor) -> Tensor:
    return x.square().mean()


class Watch:
    """Watch one run of a pipeline. A context manager.

    Args:
        pipe: The pipeline; its scheduler's ``step`` is wrapped while the context is open.
        network: Its denoising network.
        head: The network's head.
        on_step: Called with each :class:`Step` and its :class:`GuidedNetwork`, if given; without it only calls are counted
            and samples are kept.
        on_start: Called with the scheduler and the first :class:`Step`, before it is taken; goes with ``on_step``.
        batch_invariant: Evaluate the network row by row, so that a sample's numbers do not depend on the batch to the last bit.

    Attributes:
        calls: Network calls so far, ours included.
        own_calls: The pipeline's own calls among them.
        sample: What the last step returned.
        on_sample: Called with it after each step, if set.
        fold: From the head's output to the network's, known after the first call.
    """

    def __init__(
        self,
        pipe: Any,
        network: nn.Module,
        head: Head,
        on_step: Callable[[Step, GuidedNetwork], None] | None = None,
        on_start: Callable[[Any, Step], None] | None = None,
        batch_invariant: bool = False,
        on_sample: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.pipe, self.network, self.head = pipe, network, head
        self.on_step, self.on_start, self.on_sample = on_step, on_start, on_sample
        self.batch_invariant = batch_invariant
        self.calls = self.own_calls = self.steps = 0
        self.sample: Tensor | None = None
        self.fold: Fold | None = None
        self._pending: list[Call] = []
        self._features: list[Tensor] = []
        self._head_outputs: list[Tensor] = []
        self._paused = False
        self._rescaling: tuple[Tensor, Tensor] | None = None  # φ of guidance rescale, and how well it is known
        self._stack = ExitStack()

    def __enter__(self) -> Watch:
        with ExitStack() as stack:
            stack.callback(self.head.layer.register_forward_hook(self._see_head).remove)
            stack.callback(self.network.register_forward_hook(self._see_network, with_kwargs=True).remove)
            if self.batch_invariant:
                stack.enter_context(
                    in_rows(self.network, lambda args, kwargs: len(_input(args, kwargs)[1]), self._counted)
                )
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

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Calls of ours: counted, not followed."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """A call of ours that no hook on the network sees."""
        self.calls += 1
        with self._aside():
            yield

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
        passes = len(_input(args, kwargs)[1]) if self.batch_invariant else 1
        if len(self._features) != passes:
            raise UnsupportedPipelineError(
                f"expected {passes} pass(es) through the head {self.head.path!r} in a network call, got "
                f"{len(self._features)}"
            )
        features, head_outputs = (v[0] if passes == 1 else torch.cat(v) for v in (self._features, self._head_outputs))
        self._features.clear()
        self._head_outputs.clear()
        self._pending.append(Call(args, kwargs, features, head_outputs, first_tensor(output).detach()))

    def _see_step(self, scheduler: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs).arguments
        if "model_output" not in bound:  # a step that takes *args and **kwargs
            bound = dict(zip(("model_output", "timestep", "sample"), args, strict=False)) | kwargs
        arguments = {k: v for k, v in bound.items() if k not in ("model_output", "timestep", "sample")}
        arguments |= arguments.pop("kwargs", {})
        if self.on_step is not None:
            seen = self._step(bound["model_output"], bound["timestep"], bound["sample"], arguments)
        if self.on_step is not None and self.on_start is not None and self.steps == 0:
            self.on_start(scheduler, seen[0])
        result = step(*args, **kwargs)
        self.sample = first_tensor(result if isinstance(result, tuple) else result.prev_sample).detach()
        if self.on_sample is not None:
            self.on_sample(self.sample)
        if self.on_step is not None:
            with self._aside():
                self.on_step(*seen)
        self.steps += 1
        return result

    def _step(
        self, output: Tensor, timestep: Any, sample: Tensor, arguments: dict[str, Any]
    ) -> tuple[Step, GuidedNetwork]:
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
        guidance = self._settle(solve(outputs, output))
        step = Step(
            self.steps, output.detach(), timestep, sample.detach(), arguments, guidance, tuple(features), tuple(outputs),
            guidance.combine(features), self.fold, _input_scale(calls, sample),
        )  # fmt: skip
        return step, GuidedNetwork(self, calls, step, outputs)

    def _settle(self, guidance: Guidance) -> Guidance:
        """One step of one sample cannot tell rescaling from any other factor; that φ is the same in all steps can.

        The best determined φ of each sample so far takes the place of this step's.
        """
        if guidance.amount is None or guidance.slack is None:
            return guidance
        amount, slack = guidance.amount, guidance.slack
        if self._rescaling is not None:
            before, uncertain = self._rescaling
            if bool(((amount - before).abs() > slack + uncertain).any()):
                raise UnsupportedPipelineError(
                    f"expected guidance rescaled by the same amount φ in every step, got φ = {before.tolist()} and then "
                    f"{amount.tolist()}: other nonlinear guidance cannot be followed"
                )
            better = slack < uncertain
            amount, slack = torch.where(better, amount, before), torch.where(better, slack, uncertain)
        self._rescaling = (amount, slack)
        return replace(guidance, amount=amount, slack=slack)

    def again(self, call: Call, shifts: Tensor) -> tuple[Tensor, ...]:
        """The pipeline's own call again, its sample shifted in every branch.

        Args:
            call: Of M branches.
            shifts: ``(G, B, C, H, W)``; one network call for all, counted as G.

        Returns:
            M outputs, ``(G, B, C', H, W)`` each.
        """
        where, z = _input(call.args, call.kwargs)
        number, batch, channels = shifts.shape[:3]
        moved = z.unflatten(0, (-1, batch)).to(torch.float64).repeat(number, *(1,) * z.ndim)
        moved = moved.unflatten(0, (number, -1))  # (G, M, B, …)
        moved[:, :, :, :channels] += shifts.unsqueeze(1)
        branches = moved.shape[1]
        inputs = moved.flatten(0, 2).to(z.dtype)
        args, kwargs = repeated(list(call.args), len(z), number), repeated(call.kwargs, len(z), number)
        if isinstance(where, int):
            args[where] = inputs
        else:
            kwargs[where] = inputs
        self.calls += number - 1
        with torch.no_grad():
            output = first_tensor(self.network(*args, **kwargs))
        return output.unflatten(0, (number, branches, batch)).unbind(1)

    def _read_fold(self, call: Call) -> Fold:
        if call.head_output.shape == call.output.shape and torch.equal(call.head_output, call.output):
            return Fold(None)
        rows = len(_input(call.args, call.kwargs)[1])
        args, kwargs = call.args, call.kwargs
        if self.batch_invariant:  # one row, one pass through the head
            args, kwargs = row_of(args, rows, 0), row_of(kwargs, rows, 0)
        with self._aside(), torch.no_grad():
            return Fold.read(self.head, lambda: first_tensor(self.network(*args, **kwargs)))


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | int, Tensor]:
    """The network's noisy input among the arguments of a call, and where it is."""
    if args:
        return 0, args[0]
    for name in ("sample", "hidden_states"):
        if name in kwargs:
            return name, kwargs[name]
    raise UnsupportedPipelineError(
        f"expected the network's input first or named 'sample' or 'hidden_states', got {list(kwargs)}"
    )


def _input_scale(calls: list[Call], sample: Tensor) -> Tensor:
    """c ``(B,)`` float64 on the CPU, with network input = c · sample in every branch."""
    x = sample.double()
    eps = torch.finfo(sample.dtype).eps
    scale: Tensor | None = None
    for call in calls:
        _, z = _input(call.args, call.kwargs)
        blocks = z.unflatten(0, (-1, len(sample)))[:, :, : sample.shape[1]].double()
        if blocks.shape[1:] != x.shape:
            raise UnsupportedPipelineError(
                f"expected network inputs shaped as the sample {tuple(sample.shape)}, got {tuple(z.shape)}"
            )
        if scale is None:
            found = [float((b * v).sum() / v.square().sum()) for b, v in zip(blocks[0], x, strict=True)]
            # What differs from 1 by rounding is 1.
            scale = torch.tensor([1.0 if abs(c - 1) < eps else c for c in found], dtype=torch.float64)
        worst = _largest(blocks - scale.to(x).view(-1, *(1,) * (x.ndim - 1)) * x)
        if not worst <= ROUNDING * max(torch.finfo(z.dtype).eps, eps) * float(scale.max()) * _largest(x):
            raise UnsupportedPipelineError(
                f"expected the network's input to be a multiple of the sample, got a residual of {worst:.3g} from "
                f"{float(scale[0]):.4g} times it"
            )
    if scale is None:
        raise UnsupportedPipelineError("expected a network call before every scheduler step, got none")
    return scale


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())
