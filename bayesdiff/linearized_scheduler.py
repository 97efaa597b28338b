r"""The linear part of any diffusers scheduler, from the scheduler itself.

One step of a sampler is :math:`x_{next} = S(g, x, h)`, g the model output, x the sample, h the
scheduler's own history. Deviations obey its derivative,

    δx_next = ∂S/∂g · δg + ∂S/∂x · δx + ∂S/∂h · δh.

No formula is written here for any sampler. A second copy of the same scheduler object walks beside the
first, and its ``step`` is run on dual numbers (forward-mode differentiation): the primal part is what the
real scheduler was given, the tangent part the deviation. What the copy keeps for multistep formulas
carries its tangents along; added noise has none; where a value is clipped its derivative is 0, and where
it is thresholded or rescaled the derivative is that of the threshold too.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor

from bayesdiff.checks import UnsupportedSchedulerError


def copy_scheduler(scheduler: Any) -> Any:
    """A deep copy, without anything that was put over its ``step``."""
    clone = copy.copy(scheduler)
    clone.__dict__ = {k: v for k, v in scheduler.__dict__.items() if k != "step"}
    return copy.deepcopy(clone)


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside from a global generator (PyTorch's, numpy's, Python's), these stay where they were."""
    legacy, builtin = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        np.random.set_state(legacy)  # noqa: NPY002
        random.setstate(builtin)


class LinearizedScheduler:
    """A scheduler's derivative, step after step. A context manager: dual numbers live inside it.

    Args:
        scheduler: The scheduler, after ``set_timesteps`` and before its first ``step``. It is copied.
        num_deviations: K, how many deviations are carried at once.
    """

    def __init__(self, scheduler: Any, num_deviations: int) -> None:
        self.scheduler = copy_scheduler(scheduler)
        self.num_deviations = num_deviations
        self._parameters = inspect.signature(self.scheduler.step).parameters
        self._level = fwad.dual_level()

    def __enter__(self) -> LinearizedScheduler:
        self._level.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._level.__exit__(*exception)

    def step(
        self, d_output: Tensor, d_sample: Tensor, output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any
    ) -> Tensor:
        """Carry K deviations through one step.

        Args:
            d_output: δg, ``(K, B, C, H, W)``.
            d_sample: δx, ``(K, B, C, H, W)``.
            output: g, ``(B, C', H, W)``, as the real scheduler is given it.
            timestep: As the real scheduler is given it.
            sample: x, ``(B, C, H, W)``.
            kwargs: The other arguments of the real ``step``.

        Returns:
            δx_next, ``(K, B, C, H, W)`` float64 (float32 where the scheduler insists on it).

        Raises:
            UnsupportedSchedulerError: The step cannot be differentiated, or does not return a sample.
        """
        k, b = self.num_deviations, len(sample)

        def rows(value: Tensor) -> Tensor:  # (B, …) to (K·B, …), float64
            value = value.detach().double() if value.is_floating_point() else value
            return value.expand(k, *value.shape).flatten(0, 1).contiguous()

        call = {n: rows(v) if isinstance(v, Tensor) and v.ndim > 1 and len(v) == b else v for n, v in kwargs.items()}
        call.pop("return_dict", None)
        if "generator" in self._parameters:
            # Noise has no tangent; whatever is drawn here must not move the caller's generator.
            call["generator"] = torch.Generator(sample.device).manual_seed(0)
        if call.get("variance_noise") is not None:
            call.pop("generator", None)
        try:
            # Some schedulers draw from a global generator; that, too, must stay where it is.
            with forked_rng(sample.device), torch.inference_mode(False), torch.no_grad():
                g = fwad.make_dual(rows(output), d_output.detach().double().flatten(0, 1).clone())
                x = fwad.make_dual(rows(sample), d_sample.detach().double().flatten(0, 1).clone())
                result = self.scheduler.step(g, timestep, x, **call)
                prev = result[0] if isinstance(result, tuple) else result.prev_sample
                tangent = fwad.unpack_dual(prev).tangent
        except torch.OutOfMemoryError:  # a RuntimeError that says nothing of the scheduler
            raise
        except (NotImplementedError, RuntimeError, AttributeError, TypeError) as error:
            raise UnsupportedSchedulerError(
                f"expected a scheduler whose step can be differentiated, got {type(self.scheduler).__name__}: {error}"
            ) from error
        if tangent is None:
            raise UnsupportedSchedulerError(
                f"expected {type(self.scheduler).__name__}.step to return a sample that depends on its inputs; its "
                "derivative is not defined"
            )
        return tangent.unflatten(0, (k, b))
