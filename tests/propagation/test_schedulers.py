"""Every scheduler of diffusers, in 173 configurations: a whole chain's derivative against differences of that chain, float64.

Once with a linear network whose code is followed too, so that nothing but the scheduler is under test; once with a U-Net behind
:func:`bayesdiff.propagate`, as users run it, its response measured along every draw.
"""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import bayesdiff as bd
from bayesdiff.checks import BayesdiffWarning, NonFiniteError
from bayesdiff.head.find import find_head
from bayesdiff.tracing.dual import DualNumbers
from bayesdiff.tracing.network import Session
from bayesdiff.tracing.rerun import Rerun
from tests import cases

STEPS = 6
SHAPE = (2, 8, 8)
#: The largest relative error of a deviation at the end of a chain.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A scheduler by class name, its configuration, other arguments of ``step``, the number of steps."""

    scheduler: str
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS

    def __str__(self) -> str:
        options = [f"{k}={v}" for k, v in (*self.config.items(), *self.arguments.items())]
        return "-".join([self.scheduler.removesuffix("Scheduler"), *options, f"{self.steps}"])

    def make(self) -> Any:
        """With timesteps set, as new; some take a second to make."""
        if str(self) not in MADE:
            if self.scheduler in ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"):
                pytest.importorskip("torchsde")
            scheduler = MADE[str(self)] = getattr(diffusers, self.scheduler)(**self.config)
            scheduler.set_timesteps(self.steps)
            scheduler.is_scale_input_called = True  # or it warns
        return copy.deepcopy(MADE[str(self)])


MADE: dict[str, Any] = {}


#: Every scheduler, and what the network behind it may predict.
PREDICTIONS = {
    "DDIMScheduler": "epsilon v_prediction sample",
    "DDPMScheduler": "epsilon v_prediction sample",
    "PNDMScheduler": "epsilon v_prediction",
    "LMSDiscreteScheduler": "epsilon v_prediction sample",
    "EulerDiscreteScheduler": "epsilon v_prediction sample",
    "EulerAncestralDiscreteScheduler": "epsilon v_prediction",
    "HeunDiscreteScheduler": "epsilon v_prediction",
    "KDPM2DiscreteScheduler": "epsilon v_prediction",
    "KDPM2AncestralDiscreteScheduler": "epsilon v_prediction",
    "DPMSolverMultistepScheduler": "epsilon v_prediction sample flow_prediction",
    "DPMSolverSinglestepScheduler": "epsilon v_prediction sample flow_prediction",
    "CosineDPMSolverMultistepScheduler": "epsilon v_prediction",
    "UniPCMultistepScheduler": "epsilon v_prediction sample flow_prediction",
    "DEISMultistepScheduler": "epsilon v_prediction sample flow_prediction",
    "SASolverScheduler": "epsilon v_prediction sample flow_prediction",
    "LCMScheduler": "epsilon v_prediction sample",
    "TCDScheduler": "epsilon v_prediction sample",
    "EDMEulerScheduler": "epsilon v_prediction",
    "EDMDPMSolverMultistepScheduler": "epsilon v_prediction",
}
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
WITH_SIGMAS = (
    "LMSDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler", "DEISMultistepScheduler",
)  # fmt: skip
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
THRESHOLDING = {"thresholding": True, "sample_max_value": 3.0}


def prediction_cases():
    for name, predictions in PREDICTIONS.items():
        for prediction in predictions.split():
            config = {"prediction_type": prediction}
            if prediction == "flow_prediction":
                config["use_flow_sigmas"] = True
            yield Case(name, config)
    for name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"):
        yield Case(name)
    yield Case("IPNDMScheduler")
    for prediction in ("epsilon", "v_prediction"):
        yield Case("DPMSolverSDEScheduler", {"prediction_type": prediction, "noise_sampler_seed": 0})


def option_cases():
    ddim, ddpm, multi = "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"
    for config, arguments in (
        ({"clip_sample": False}, {}), ({"clip_sample": False}, {"eta": 0.7}), ({"clip_sample": True}, {"eta": 1.0}),
        ({"clip_sample": True}, {"use_clipped_model_output": True}), ({"clip_sample": False, **THRESHOLDING}, {}),
    ):  # fmt: skip
        yield Case(ddim, config, arguments)
    for variance in ("fixed_small", "fixed_large"):
        yield Case(ddpm, {"clip_sample": False, "variance_type": variance})
    yield Case(ddpm, {"clip_sample": False, **THRESHOLDING})
    for beta_schedule in ("scaled_linear", "squaredcos_cap_v2"):
        for name in (ddim, ddpm, multi, "EulerDiscreteScheduler", "UniPCMultistepScheduler"):
            yield Case(name, {"beta_schedule": beta_schedule, **({"clip_sample": False} if name == ddim else {})})
    for name in WITH_SIGMAS:
        for sigmas in SIGMAS:
            yield Case(name, {sigmas: True})
    for name in (
        ddim, ddpm, multi, "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler",
        "LCMScheduler", "TCDScheduler",
    ):  # fmt: skip
        yield Case(name, ZERO_SNR)
    yield Case("PNDMScheduler", {"skip_prk_steps": True})
    for order in (1, 2, 3):
        for algorithm in ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"):
            if order == 3 and algorithm == "sde-dpmsolver":
                continue  # diffusers has none
            yield Case(multi, {"solver_order": order, "algorithm_type": algorithm, "final_sigmas_type": "sigma_min"})
    yield Case(multi, {"solver_type": "heun"})
    yield Case(multi, {"euler_at_final": True, "use_lu_lambdas": True})
    for order in (1, 2, 3):
        for algorithm in ("dpmsolver", "dpmsolver++"):
            yield Case(
                "DPMSolverSinglestepScheduler",
                {"solver_order": order, "algorithm_type": algorithm, "final_sigmas_type": "sigma_min"},
            )
    for solver in ("bh1", "bh2"):
        for order in (1, 2, 3):
            # With a last sigma of 0, bh1 multiplies infinity by 0.
            config = {"solver_type": solver, "solver_order": order, "final_sigmas_type": "sigma_min"}
            yield Case("UniPCMultistepScheduler", config)
    for name in (multi, "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"):
        yield Case(name, THRESHOLDING)
    yield Case("SASolverScheduler", {"algorithm_type": "noise_prediction"})
    yield Case("EulerDiscreteScheduler", {}, {"s_churn": 0.5, "s_tmax": 100.0})
    for eta in (0.0, 0.3, 1.0):
        yield Case("TCDScheduler", {}, {"eta": eta})
    yield Case("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True})
    for name in (
        "LCMScheduler",
        "TCDScheduler",
        ddim,
        multi,
        "EulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
    ):
        for steps in (1, 2, 4, 8):
            yield Case(name, {}, {}, steps)


CASES = [*prediction_cases(), *option_cases()]
ALL = [pytest.param(case, id=str(case)) for case in CASES]


class InFloat64(TorchFunctionMode):
    """What is written to compute in float32 computes in float64: the reference has no rounding of its own."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        swap = [torch.float64 if a is torch.float32 else a for a in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*swap, **named)


def scaled(scheduler, x, t):
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


def chain(network, case: Case, x: Tensor, clipped: list[int] | None = None) -> Tensor:
    """A sampler in twelve lines, all in float64."""
    scheduler = case.make()
    arguments = dict(case.arguments)
    if "generator" in inspect.signature(scheduler.step).parameters:
        arguments["generator"] = torch.Generator().manual_seed(3)
    with InFloat64():
        for n, t in enumerate(scheduler.timesteps):
            result = scheduler.step(network(scaled(scheduler, x, t), t, n), t, x, **arguments)
            x = result.prev_sample
            if clipped is not None and getattr(result, "pred_original_sample", None) is not None:
                clipped.append(int(result.pred_original_sample.abs().eq(1).sum()))
    return x


def normal(*shape, seed=0, size=1.0):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def mixing():
    return 0.3 * normal(2, 2) + 0.5 * torch.eye(2, dtype=torch.float64), 0.5 * normal(*SHAPE, seed=1)


def relative_errors(tangents, differences):
    assert bool(torch.isfinite(differences).all())
    return [float((t - d).norm() / d.norm()) for t, d in zip(tangents, differences, strict=True)]


def linear_chain(case, dual=None):
    """Errors of two draws' tangents at the end of the chain, and how many values were clipped."""
    scheduler = case.make()
    size, steps = float(getattr(scheduler, "init_noise_sigma", 1.0)), len(scheduler.timesteps)
    x, draws = normal(2, *SHAPE, size=size), 2
    start, moved = normal(draws, 2, *SHAPE, seed=1, size=size), normal(draws, steps, 2, *SHAPE, seed=2)
    mix, shift = mixing()
    clipped: list[int] = []

    def run(x, outputs, clipped=None):
        def network(z, t, n):
            return torch.einsum("ij,bjhw->bihw", mix, z) + shift + outputs[n]

        return chain(network, case, x, clipped)

    outputs, x_dual = torch.zeros(steps, 2, *SHAPE, dtype=torch.float64), x.clone()
    dual = dual or DualNumbers()
    with dual, torch.no_grad():
        dual.attach(x_dual, start)
        dual.attach(outputs, moved)
        value = run(x_dual, outputs, clipped)
        tangents = dual.tangents(value)
    zero = torch.zeros_like(outputs)
    assert torch.equal(value, run(x, zero))
    h = 1e-6
    differences = [
        (run(x + h * d, zero + h * m) - run(x - h * d, zero - h * m)) / (2 * h)
        for d, m in zip(start, moved, strict=True)
    ]
    return relative_errors(tangents, torch.stack(differences)), sum(clipped)


@pytest.mark.parametrize("case", ALL)
def test_the_tangents_of_a_chain_are_its_differences(case, record_property):
    errors, clipped = linear_chain(case)
    record_property("error", max(errors))
    if case.config.get("clip_sample"):
        assert clipped > 10, "the case must clip something to test clipping"
    assert max(errors) < TOLERANCE


@functools.cache
def unet():
    return cases.tiny_unet(channels=2).double()


@functools.cache
def posterior():
    """Of a network that has seen so many images that its deviations are as small as a derivative's should be."""
    return bd.fit(
        unet(), torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1, dataset_size=10**16,
        scheduler=cases.scheduler(), generator=torch.Generator().manual_seed(2), progress=False,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:the sampler clips or bends")
@pytest.mark.parametrize("case", ALL)
def test_the_tangents_of_a_network_in_a_chain_are_its_differences(case, record_property):
    draws, network = 2, unet()
    settings = bd.Tangents(draws=draws, refresh=1, num_directions=draws, factors=True)
    x = normal(2, *SHAPE, size=float(getattr(case.make(), "init_noise_sigma", 1.0)))

    def run(x):
        return chain(lambda z, t, n: network(z, t).sample, case, x)

    out = bd.propagate(run, network, posterior(), x, propagation=settings)
    head, deviations = find_head(network), posterior().deviations(draws, bd.rng.item_generator(0, 1), orthogonal=True)
    h = 1e-5 / float(deviations.abs().max())

    def moved(delta):
        with torch.no_grad(), head.shifted(delta):
            return run(x)

    with torch.no_grad():
        assert torch.equal(out.output, run(x))
    differences = torch.stack([(moved(h * d) - moved(-h * d)) / (2 * h) for d in deviations])
    errors = relative_errors(out.factors.double() * draws**0.5, differences)
    record_property("error", max(errors))
    assert max(errors) < TOLERANCE
