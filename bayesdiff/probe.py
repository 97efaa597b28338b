r"""Is a sampler's step what its linearisation takes it for? Measured, before it is trusted.

Deviations are carried by the derivative of ``scheduler.step``. That is the whole truth if the step is affine in (model output,
sample, history), but for places where it clips; and it is wrong, without an error, if the step leaves PyTorch or
detaches. So a scheduler's whole chain is run beforehand, on copies, on a few numbers and behind a synthetic linear network: at a
point, to both sides of it, and linearised. At every step

    bend:   |S(+d) + S(−d) − 2 S(0)|        must vanish against |S(+d) − S(−d)|,
    slope:  |S(+d) − S(−d) − 2 S' d|        too,

for most elements: a clipped value has a kink, not a bend. A threshold that moves with the sample
(``thresholding=True``, Saharia et al. 2022) bends and is linearised; there only the slope is asked for, in a small step.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UnsupportedSchedulerError
from bayesdiff.linearized_scheduler import LinearizedScheduler, copy_scheduler

#: The largest bend or slope error, relative to the first difference; float32 schedulers have some 1e-6.
TOLERANCE = 1e-3
#: No more steps than this are probed.
MOST_STEPS = 60
SIZE = 8


def check_affine(
    scheduler: Any,
    first: int = 0,
    channels: int = 3,
    arguments: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Refuse a scheduler whose steps are not affine, or whose derivative is not what differences say.

    Args:
        scheduler: After ``set_timesteps`` and before its first step. It is copied.
        first: Index of the first timestep to come.
        channels: Of the sample, C.
        arguments: Of the first ``step``, besides model output, timestep and sample.
        device: Where the scheduler works.

    Raises:
        UnsupportedSchedulerError: With the step, what was measured and what was allowed.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, channels, SIZE, SIZE)
    size = float(getattr(scheduler, "init_noise_sigma", 1.0))
    timesteps = scheduler.timesteps[first:][:MOST_STEPS]

    def normal(*lead: int) -> Tensor:
        return torch.randn(*lead, *shape, generator=generator, dtype=torch.float64).to(device)

    moving = bool(getattr(scheduler.config, "thresholding", False))
    step = 1e-3 if moving else 0.05
    copies = [copy_scheduler(scheduler) for _ in range(3)]
    kept = {k: v for k, v in (arguments or {}).items() if k not in ("generator", "return_dict", "variance_noise")}
    noisy = "generator" in inspect.signature(scheduler.step).parameters
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), LinearizedScheduler(scheduler, 1) as linearized:
        linearized.scheduler.is_scale_input_called = True  # else some schedulers warn at every step
        for n, t in enumerate(timesteps):
            # From fresh points: in a chain what was clipped sits on the next step's kink, and bends add up.
            x, injection, d_x, d_injection = size * normal(), normal(), step * size * normal(), step * normal()
            results = []
            for k, sign in enumerate((0, 1, -1)):
                inputs = x + sign * d_x, injection + sign * d_injection
                results.append(_step(copies[k], *inputs, t, kept, n, noisy))
            (center, gain), (up, _), (down, _) = results
            d_output, output = 0.5 * gain * d_x + d_injection, 0.5 * gain * x + injection
            tangent = linearized.step(d_output[None], d_x[None], output, t, x, **kept)[0]
            size = float(center.square().mean().sqrt())
            first_difference = (up - down) / 2
            scale = float(first_difference.square().mean().sqrt())
            bend = 0.0 if moving else float((up + down - 2 * center).abs().median()) / scale
            slope = float((first_difference - tangent).abs().median()) / scale
            for what, value in (("bend: its second difference is", bend), ("slope: its derivative is off by", slope)):
                if not value <= TOLERANCE:
                    raise UnsupportedSchedulerError(
                        f"expected a scheduler whose step is affine in what it is given, but for clipping, got "
                        f"{type(scheduler).__name__} with another {what} {value:.2g} of the first difference at step {n}, "
                        f't = {float(t):g} (allowed: {TOLERANCE:g}); use propagation="ensemble", which needs no derivative'
                    )


def _step(
    scheduler: Any, x: Tensor, injection: Tensor, t: Tensor, arguments: dict[str, Any], seed: int, noisy: bool
) -> tuple[Tensor, float]:
    """One step behind the network g = c·x/2 + injection; the next sample, and c."""
    gain = 1.0
    if hasattr(scheduler, "scale_model_input"):
        gain = float(scheduler.scale_model_input(torch.ones_like(x), t).flatten()[0])
    torch.manual_seed(seed)  # inside fork_rng: the same noise for schedulers that draw from the global generator
    if noisy:
        arguments = arguments | {"generator": torch.Generator(x.device).manual_seed(seed)}
    result = scheduler.step(0.5 * gain * x + injection, t, x, **arguments)
    return (result[0] if isinstance(result, tuple) else result.prev_sample).double(), gain
