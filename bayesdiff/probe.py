r"""Is a sampler's step what its linearisation takes it for? Measured, before it is trusted.

Deviations are carried by the derivative of ``scheduler.step``. That is the whole truth if the step is affine in
(model output, sample, history), but for places where it clips; and it is wrong, without an error, if the step
leaves PyTorch or detaches. So a scheduler's whole chain is run beforehand, on copies, on a few numbers and behind
a synthetic linear network: at a point, to both sides of it, and linearised. At every step

    bend:   |S(+d) + S(−d) − 2 S(0)|        must vanish against |S(+d) − S(−d)|,
    slope:  |S(+d) − S(−d) − 2 S' d|        too,

for most elements of every channel: a clipped value has a kink, not a bend. A threshold that moves with the sample
(``thresholding=True``, Saharia et al. 2022) bends and is linearised; there only the slope is asked for, in a small step.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Generator
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesdiff.checks import UnsupportedSchedulerError
from bayesdiff.linearized_scheduler import LinearizedScheduler, copy_scheduler, forked_rng

#: The largest bend or slope error, relative to the first difference; float32 schedulers have some 1e-5.
TOLERANCE = 1e-3
#: No more steps than this are probed.
MOST_STEPS = 100
#: d relative to the values: so large that float32 does no harm, so small that clipping puts a kink into an eighth of
#: the elements at most (at 0.5 it would be most of them).
STEP = 0.1
#: The same where a threshold moves, whose derivative is one at a point.
SMALL_STEP = 1e-3
#: Three samples: a threshold that jumps in one is outvoted by the others.
BATCH, SIZE = 3, 8
#: The probe draws its own noise.
NOT_PASSED = ("generator", "return_dict", "variance_noise")


class Measured(NamedTuple):
    """One step: its number, its timestep, bend and slope error relative to the first difference."""

    number: int
    timestep: float
    bend: float
    slope: float


def check_affine(
    scheduler: Any,
    first: int = 0,
    channels: int = 3,
    arguments: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    *,
    output_channels: int | None = None,
) -> None:
    """Refuse a scheduler whose steps are not affine, or whose derivative is not what differences say.

    Args:
        scheduler: After ``set_timesteps`` and before its first step. It is copied.
        first: Index of the first timestep to come.
        channels: Of the sample, C.
        arguments: Of the first ``step``, besides model output, timestep and sample.
        device: Where the scheduler works.
        output_channels: Of the model output, C', if not C (a learned variance).

    Raises:
        UnsupportedSchedulerError: With the step, what was measured and what was allowed.
    """
    moving = _threshold_moves(scheduler)
    step = SMALL_STEP if moving else STEP
    name, way_out = type(scheduler).__name__, 'use propagation="ensemble", which needs no derivative'
    try:
        with closing(measure(scheduler, first, channels, arguments, device, output_channels, step=step)) as steps:
            for n, t, bend, slope in steps:
                found = [("slope: its derivative is off by", slope)]
                if not moving:
                    found.insert(0, ("bend: its second difference is", bend))
                for what, value in found:
                    if not value <= TOLERANCE:
                        raise UnsupportedSchedulerError(
                            "expected a scheduler whose step is affine in what it is given, but for clipping, got "
                            f"{name} with another {what} {value:.2g} of the first difference at step {n}, t = {t:g} "
                            f"(allowed: {TOLERANCE:g}); {way_out}"
                        )
    except (UnsupportedSchedulerError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a step may raise anything
        raise UnsupportedSchedulerError(
            f"expected a scheduler whose step works on random numbers, {BATCH} × {channels} × {SIZE} × {SIZE}, got "
            f"{type(error).__name__} from {name}: {error}; {way_out}"
        ) from error


def adds_noise(
    scheduler: Any,
    first: int = 0,
    channels: int = 3,
    arguments: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    *,
    output_channels: int | None = None,
) -> bool:
    """Whether one of the next three steps depends on the generators' seeds; not so for noise from a seed of the sampler's own.

    Arguments as of :func:`check_affine`.
    """
    copies = [copy_scheduler(scheduler) for _ in range(2)]
    x = torch.zeros(1, channels, SIZE, SIZE, dtype=torch.float64, device=device)
    injection = x.new_zeros(1, output_channels or channels, SIZE, SIZE)
    with forked_rng(x.device), torch.no_grad():
        for t in scheduler.timesteps[first:][:3]:
            one, other = (_step(s, x, injection, t, arguments, seed)[0] for seed, s in enumerate(copies))
            if not torch.equal(one, other):
                return True
    return False


def measure(
    scheduler: Any,
    first: int = 0,
    channels: int = 3,
    arguments: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    output_channels: int | None = None,
    *,
    step: float = STEP,
    seed: int = 0,
) -> Generator[Measured, None, None]:
    """Bend and slope error of every step, as the chain goes on. To be closed: dual numbers live in it.

    Args:
        scheduler: With the next five as of :func:`check_affine`.
        first: See there.
        channels: See there.
        arguments: See there.
        device: See there.
        output_channels: See there.
        step: d, relative to the values.
        seed: Of the values.

    Yields:
        Medians over the elements of a channel, of the worst channel.
    """
    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    outputs = channels if output_channels is None else output_channels

    def normal(number: int) -> Tensor:
        return torch.randn(BATCH, number, SIZE, SIZE, generator=generator, dtype=torch.float64).to(device)

    def worst(error: Tensor) -> float:
        return float(error.abs().transpose(0, 1).flatten(1).median(1).values.max())

    size = float(getattr(scheduler, "init_noise_sigma", 1.0))
    copies = [copy_scheduler(scheduler) for _ in range(3)]
    kept = _passed(arguments)
    with LinearizedScheduler(scheduler, 1) as linearized:
        linearized.scheduler.is_scale_input_called = True  # else some schedulers warn at every step
        for n, t in enumerate(scheduler.timesteps[first:][:MOST_STEPS]):
            # From fresh points: in a chain what was clipped sits on the next step's kink, and bends add up.
            x, injection = size * normal(channels), normal(outputs)
            d_x, d_injection = step * size * normal(channels), step * normal(outputs)
            with forked_rng(device), torch.no_grad():
                (center, gain), (up, _), (down, _) = (
                    _step(copies[k], x + sign * d_x, injection + sign * d_injection, t, arguments, n)
                    for k, sign in enumerate((0, 1, -1))
                )
                d_output, output = _network(d_x, gain, d_injection), _network(x, gain, injection)
                tangent = linearized.step(d_output[None], d_x[None], output, t, x, **kept)[0]
            size = float(center.square().mean().sqrt())
            first_difference = (up - down) / 2
            scale = float(first_difference.square().mean().sqrt()) or float("nan")
            yield Measured(
                n, float(t), worst(up + down - 2 * center) / scale, worst(first_difference - tangent) / scale
            )


def _passed(arguments: dict[str, Any] | None) -> dict[str, Any]:
    return {k: v for k, v in (arguments or {}).items() if k not in NOT_PASSED}


def _threshold_moves(scheduler: Any) -> bool:
    return bool(getattr(scheduler.config, "thresholding", False)) and hasattr(scheduler, "_threshold_sample")


def _network(x: Tensor, gain: float, injection: Tensor) -> Tensor:
    """g = c·x/2 + injection; what channels it has beyond those of x are the injection's alone."""
    g = injection.clone()
    g[:, : x.shape[1]] += 0.5 * gain * x
    return g


def _step(
    scheduler: Any, x: Tensor, injection: Tensor, t: Tensor, arguments: dict[str, Any] | None, seed: int
) -> tuple[Tensor, float]:
    """One step behind the synthetic network; the next sample, and c, the scheduler's scale of the network's input."""
    gain = 1.0
    if hasattr(scheduler, "scale_model_input"):
        gain = float(scheduler.scale_model_input(torch.ones_like(x), t).flatten()[0])
    # The same noise for all copies, wherever they draw it; inside forked_rng. (torch.manual_seed would move all devices'.)
    torch.default_generator.manual_seed(seed)
    if x.is_cuda:
        with torch.cuda.device(x.device):
            torch.cuda.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    passed = _passed(arguments)
    if "generator" in inspect.signature(scheduler.step).parameters:
        passed["generator"] = torch.Generator(x.device).manual_seed(seed)
    result = scheduler.step(_network(x, gain, injection), t, x, **passed)
    return (result[0] if isinstance(result, tuple) else result.prev_sample).double(), gain
