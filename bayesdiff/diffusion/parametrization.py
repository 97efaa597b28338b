r"""What a denoising network predicts, as affine coefficients.

With :math:`x_t = \alpha_t x_0 + \sigma_t \varepsilon` every training target of the field is linear in
:math:`(x_0, \varepsilon)`, and every network output g gives the clean image back as
:math:`x_0 = a\,x_t + b\,g`:

==============  ==============================================  ===========  ==============
name            target                                          a            b
==============  ==============================================  ===========  ==============
epsilon         :math:`\varepsilon`                             1/α          −σ/α
v_prediction    :math:`\alpha\varepsilon - \sigma x_0`          α/(α²+σ²)    −σ/(α²+σ²)
sample          :math:`x_0`                                     0            1
flow            :math:`\varepsilon - x_0`                       1/(α+σ)      −σ/(α+σ)
==============  ==============================================  ===========  ==============

(Salimans & Ho 2022 for v; Lipman et al. 2023 for flow matching.) All schedule arithmetic is float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UnsupportedSchedulerError

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler's schedule is that of flow matching, by its family or because it is set to it."""
    return "FlowMatch" in type(scheduler).__name__ or bool(getattr(scheduler.config, "use_flow_sigmas", False))


def is_reversed(scheduler: Any) -> bool:
    r"""Whether a flow's time runs from noise to data (Mochi), and its velocity with it: :math:`x_0 - \varepsilon`."""
    return is_flow(scheduler) and bool(getattr(scheduler.config, "invert_sigmas", False))


def prediction_type(scheduler: Any) -> str:
    """What the network behind a diffusers scheduler predicts: one of :data:`PREDICTIONS`.

    Raises:
        UnsupportedSchedulerError: Its configuration names another type.
    """
    if is_flow(scheduler):
        return "flow"
    name = getattr(scheduler.config, "prediction_type", "epsilon")
    name = "flow" if name == "flow_prediction" else name
    if name not in PREDICTIONS:
        raise UnsupportedSchedulerError(
            f"expected a prediction type among {', '.join(PREDICTIONS)}, got {name!r} from {type(scheduler).__name__}"
        )
    return name


def alpha_sigma(scheduler: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`\alpha_t, \sigma_t` of :math:`x_t = \alpha_t x_0 + \sigma_t\varepsilon` at training timesteps.

    Args:
        scheduler: A diffusers scheduler with ``alphas_cumprod``, or of the flow-matching family.
        t: Timesteps 0 … ``num_train_timesteps``, any shape.

    Returns:
        Two float64 tensors shaped as ``t``, on the CPU.

    Raises:
        UnsupportedSchedulerError: The scheduler has no such schedule.
    """
    t = t.detach().cpu()
    if is_flow(scheduler):
        sigma = t.double() / scheduler.config.num_train_timesteps
        return (sigma, 1 - sigma) if is_reversed(scheduler) else (1 - sigma, sigma)
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alphas_cumprod, Tensor):
        raise UnsupportedSchedulerError(
            f"expected a scheduler with alphas_cumprod or of the flow-matching family, got {type(scheduler).__name__}"
        )
    schedule = alphas_cumprod.detach().cpu().double()
    # Some samplers ask the network at fractional timesteps; the schedule is smooth in between.
    position = t.double().clamp(0, len(schedule) - 1)
    low = position.floor().long()
    high = (low + 1).clamp(max=len(schedule) - 1)
    a = torch.lerp(schedule[low], schedule[high], position - low)
    return a.sqrt(), (1 - a).sqrt()


def check_levels(scheduler: Any, timesteps: Tensor) -> None:
    r"""Make sure that a scheduler means by its timesteps what :func:`alpha_sigma` does, by the noise levels that it keeps.

    Args:
        scheduler: After ``set_timesteps``.
        timesteps: Those that it then has.

    Raises:
        UnsupportedSchedulerError: Its levels are neither σ nor σ/α of its timesteps: the network is told something else than t.
    """
    alpha, sigma = (v.flatten() for v in alpha_sigma(scheduler, timesteps))
    prediction_type(scheduler)
    kept = getattr(scheduler, "sigmas", None)
    kept = None if kept is None else torch.as_tensor(kept).detach().cpu().double().flatten()[: len(sigma)]
    if kept is None or len(kept) < len(sigma):
        return
    if (
        getattr(scheduler, "order", 1) > 1
    ):  # some keep the levels between steps apart: the first and the last are in place
        alpha, sigma, kept = (v[[0, -1]] for v in (alpha, sigma, kept))
    wanted = (
        [alpha if is_reversed(scheduler) else sigma] if is_flow(scheduler) else [sigma, sigma / alpha.clamp(min=1e-6)]
    )
    # Between timesteps the schedule is interpolated in one way or another; at zero signal σ/α is any large number.
    apart = [float((((kept - w).abs() / w.clamp(min=0.02)) * (w < 100)).nan_to_num().max()) for w in wanted]
    if min(apart) > 0.1:
        raise UnsupportedSchedulerError(
            f"expected {type(scheduler).__name__} to have the noise levels of its timesteps, σ = {_few(wanted[0])} or σ/α = "
            f"{_few(wanted[-1])} at {_few(timesteps)}, got {_few(kept)}: its network is told another time than t; fit the "
            "network, with scheduler=… and call=…"
        )


def _few(values: Tensor) -> str:
    return ", ".join(f"{float(v):.3g}" for v in values.flatten()[:3])


def target(prediction: str, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network is trained to return (see the table above); all tensors broadcastable."""
    if prediction == "epsilon":
        return noise
    if prediction == "v_prediction":
        return alpha * noise - sigma * clean
    if prediction == "sample":
        return clean
    return noise - clean


def clean_coefficients(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    r"""(a, b) with :math:`x_0 = a\,x_t + b\,g` (see the table above)."""
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "v_prediction":
        norm = alpha**2 + sigma**2
        return alpha / norm, -sigma / norm
    if prediction == "sample":
        return 0.0, 1.0
    return 1 / (alpha + sigma), -sigma / (alpha + sigma)
