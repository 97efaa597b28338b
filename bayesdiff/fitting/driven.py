"""A pipeline's own loop, run on timesteps and noisy samples that are handed to it.

A training step calls the network as the pipeline does: the same encoders, the same other inputs, t as this network is told it,
the output with the sign and in the place that the scheduler takes it. So the pipeline itself is run. Only its scheduler is
another: ``timesteps`` are those that were drawn, ``scale_model_input`` changes nothing, and ``step`` notes the model output and
returns the next noisy sample. Nothing of the pipeline is recognised, and all of it is used.

The pipe, its scheduler and its modules are left as they were: the scheduler is a copy in a shallow copy of the pipe.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bayesdiff.checks import ArgumentError, BayesdiffError, UnsupportedPipelineError
from bayesdiff.fitting.seen import alike
from bayesdiff.tracing.boxes import Box, over
from bayesdiff.tracing.dual import DualNumbers
from bayesdiff.tracing.step import OnStep, Spy, as_it_is, call_step, previous_sample
from bayesdiff.tracing.tail import BASE

#: What a pipeline may raise where it is called wrongly, or does what cannot be followed.
ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)

OnNetwork = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
OnDecode = Callable[[nn.Module, Tensor], None]


class Stopped(BaseException):
    """Ends a pipeline's run; no pipeline catches it."""


class Ours(Stopped):
    """Carries an error that is none of the pipeline's through it: one of what is done with its outputs.

    Args:
        error: The error.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@dataclass
class Watched:
    """What a plain run of a pipeline shows.

    Args:
        sample: What the first step was given as its sample.
        result: What the last step returned.
        timesteps: The scheduler's, in that run.
        scheduler: The copy that was used.
        entered: What entered the decoder behind the last step; None: nothing did.
        tangents: Its tangents by the last sample's ones, low and high numbers.
        decoder: The decoder.
    """

    sample: Tensor
    result: Any
    timesteps: Tensor
    scheduler: Any
    entered: Tensor | None = None
    tangents: Tensor | None = None
    decoder: nn.Module | None = None


class Handed(Spy):
    """A scheduler to all who look at it, with timesteps and samples from outside.

    Args:
        scheduler: A copy of the pipeline's.
        timesteps: One for each step; or for each step one for each row.
        on_step: Called with ``step`` and its arguments; returns what ``step`` returns.
    """

    def __init__(self, scheduler: Any, timesteps: Tensor, on_step: OnStep) -> None:
        super().__init__(scheduler, on_step)
        original = scheduler.set_timesteps

        @functools.wraps(original)
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            vars(self)["timesteps"] = timesteps.to(torch.as_tensor(scheduler.timesteps).device)

        vars(self).update(set_timesteps=set_timesteps, scale_model_input=as_it_is)
        for name in ("add_noise", "scale_noise"):
            if hasattr(scheduler, name):
                vars(self)[name] = as_it_is


class DrivenPipe:
    """A pipeline that is run again and again.

    Args:
        pipe: The pipeline.
        network: Its denoising network.
        mean: Whether images that the pipe itself encodes (what is left of one to inpaint) are the means of their posteriors.
    """

    def __init__(self, pipe: Any, network: nn.Module, *, mean: bool = False) -> None:
        self.pipe, self.network, self.mean = pipe, network, mean
        self.result: Any = None  # what step returns, with other tensors in it
        self._outputs: dict[Any, Any] = {}
        components = {id(v): v for v in vars(pipe).values() if isinstance(v, nn.Module) and v is not network}
        self._decoders = [m for m in components.values() if hasattr(m, "decode")]

    def watch(self, keywords: dict[str, Any], last: Tensor | None = None) -> Watched:
        """A run of a few steps with its own scheduler; the network's outputs are zeros.

        Args:
            keywords: The call's.
            last: The last sample, whatever the last step makes; by default zeros.
        """
        scheduler = copy.deepcopy(self.pipe.scheduler)
        found: list[Watched] = []
        steps = 0
        trace = DualNumbers()
        traced = ExitStack()

        def on_step(original: Callable[..., Any], given: dict[str, Any]) -> Any:
            nonlocal steps
            result = call_step(original, given)
            timesteps = torch.as_tensor(scheduler.timesteps)
            steps += 1
            if not found:
                found.append(Watched(given["sample"].detach().clone(), result, timesteps.clone(), scheduler))
            found[0].result = result
            if steps == len(timesteps):
                sample = previous_sample(result)
                sample.copy_(torch.zeros_like(sample) if last is None else last)
                n = torch.arange(sample.numel(), device=sample.device).view(sample.shape)
                dtype = torch.promote_types(sample.dtype, torch.float32)
                trace.attach(sample, torch.stack([torch.ones_like(n), n % BASE, n // BASE]).to(dtype))
                traced.enter_context(trace.resumed())
            return result

        def on_decode(module: nn.Module, entered: Tensor) -> None:
            if not found:  # an image that it starts from
                return
            found[0].entered, found[0].decoder = entered.detach().clone(), module
            t = trace.tangents(entered)
            found[0].tangents = None if t is None else t.clone()
            raise Stopped

        with trace, trace.paused(), traced:
            self._run(keywords, Spy(scheduler, on_step), self.stub, on_decode)
        if not found:
            raise UnsupportedPipelineError(
                f"expected {type(self.pipe).__name__} to call its scheduler's step, got no call: fit its network, with call=…"
            )
        self.result = found[0].result
        return found[0]

    def run(
        self, keywords: dict[str, Any], timesteps: list[Tensor], sample: Callable[[int], Tensor],
        on_network: Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
        on_step: Callable[[int, Tensor], None],
    ) -> None:  # fmt: skip
        """The loop, on timesteps and samples of ours. One step goes before them, with a sample of the pipe's own.

        Args:
            keywords: The call's.
            timesteps: Of each step, one or one for each row.
            sample: Returns the sample of step n.
            on_network: Called with the number of the step, the network and its arguments; returns its output.
            on_step: Called with the number of the step and what was made of the output, shaped as the sample.
        """
        step = -1

        def network(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self.stub(original, args, kwargs) if step < 0 else on_network(step, original, args, kwargs)

        def next_sample(_: Callable[..., Any], given: dict[str, Any]) -> Any:
            nonlocal step
            trained = self._trained(given["model_output"], given["sample"]) if step >= 0 else None
            try:
                if trained is not None:
                    on_step(step, trained)
                step += 1
                if step == len(timesteps):
                    raise Stopped
                x = sample(step).to(given["sample"])
            except Exception as error:
                raise Ours(error) from None
            if x.shape != given["sample"].shape:
                raise UnsupportedPipelineError(
                    f"expected {type(self.pipe).__name__} to make samples {tuple(x.shape)}, as the data, got "
                    f"{tuple(given['sample'].shape)}"
                )
            return tree_map(lambda leaf: x.clone() if isinstance(leaf, Tensor) else leaf, self.result)

        steps = torch.stack([timesteps[0], *timesteps])
        self._run(keywords, Handed(copy.deepcopy(self.pipe.scheduler), steps, next_sample), network, None)
        if step < len(timesteps):
            raise UnsupportedPipelineError(
                f"expected {type(self.pipe).__name__} to take a step for each of its scheduler's {len(steps)} timesteps, got "
                f"{step + 1}: fit its network, with call=…"
            )

    def stub(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Zeros in the form that the network returns them; the network itself is called once for each form."""
        key = alike(args, kwargs)
        if key not in self._outputs:
            with torch.no_grad():
                output = original(*args, **kwargs)
            self._outputs[key] = tree_map(
                lambda f: (
                    torch.zeros((), dtype=f.dtype, device=f.device).expand(f.shape) if isinstance(f, Tensor) else f
                ),
                output,
            )
        return tree_map(lambda f: f.clone() if isinstance(f, Tensor) else f, self._outputs[key])

    def _trained(self, output: Tensor, sample: Tensor) -> Tensor:
        """The part of a model output that predicts; a learned variance lies behind it (Nichol & Dhariwal 2021)."""
        if output.shape != sample.shape and output.ndim > 1 and output.shape[1] == 2 * sample.shape[1]:
            output = output[:, : sample.shape[1]]
        if output.shape != sample.shape:
            raise UnsupportedPipelineError(
                f"expected {type(self.pipe).__name__} to give its scheduler a model output {tuple(sample.shape)}, as the "
                f"sample, got {tuple(output.shape)}"
            )
        return output

    def _run(self, keywords: dict[str, Any], scheduler: Any, on_network: OnNetwork, on_decode: OnDecode | None) -> None:
        clone = copy.copy(self.pipe)
        bar = getattr(clone, "_progress_bar_config", None) or {}
        vars(clone).update(scheduler=scheduler, _progress_bar_config={**bar, "disable": True})
        reached = False
        failed: Exception | None = None

        def network(box: Box, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal reached
            reached = True
            return on_network(box.original, args, kwargs)

        def decode(box: Box, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if on_decode is not None:
                on_decode(box.module, args[0] if args else next(iter(kwargs.values())))
            return box.original(*args, **kwargs)

        def encode(box: Box, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            encoded = box.original(*args, **kwargs)
            posterior = getattr(encoded, "latent_dist", None)
            if posterior is not None:
                posterior.sample = lambda *_, **__: posterior.mode()
            return encoded

        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        with ExitStack() as stack:
            stack.enter_context(left_alone(v for v in vars(self.pipe).values() if isinstance(v, nn.Module)))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng(devices=devices))
            torch.manual_seed(0)
            stack.enter_context(over(Box("the network", self.network), network))
            for module in self._decoders:
                stack.enter_context(over(Box("the decoder", module, "decode"), decode))
                if self.mean and hasattr(module, "encode"):
                    stack.enter_context(over(Box("the encoder", module, "encode"), encode))
            try:
                clone(**keywords)
            except Ours as ours:
                failed = ours.error
            except Stopped:
                pass
            except (BayesdiffError, torch.OutOfMemoryError):
                raise
            except ERRORS as error:
                name = type(self.pipe).__name__
                if reached:
                    raise UnsupportedPipelineError(
                        f"expected {name} to run on timesteps and samples that are handed to it, got {type(error).__name__}: "
                        f"{error}; fit its network, with call=…"
                    ) from error
                raise ArgumentError(
                    f"expected data that {name} can be called with, got {', '.join(map(repr, keywords))}; the pipe says: {error}"
                ) from error
            finally:
                free = getattr(clone, "maybe_free_model_hooks", None)
                if free is not None:
                    free()
        if failed is not None:
            raise failed


@contextmanager
def left_alone(modules: Iterator[nn.Module]) -> Iterator[None]:
    """Attributes of modules, and hooks and submodules, are those from before when the context ends.

    Some pipelines put attention processors on their network for the time of a call, and off when it ends by itself.
    """
    kept = {
        id(m): (m, dict(vars(m)), {k: dict(v) for k, v in vars(m).items() if isinstance(v, dict)})
        for module in modules
        for m in module.modules()
    }
    try:
        yield
    finally:
        for module, attributes, nested in kept.values():
            now = vars(module)
            if now.keys() != attributes.keys() or any(now[k] is not v for k, v in attributes.items()):
                now.clear()
                now.update(attributes)
            for name, entries in nested.items():
                held = attributes[name]
                if held.keys() != entries.keys() or any(held[k] is not v for k, v in entries.items()):
                    held.clear()
                    held.update(entries)
