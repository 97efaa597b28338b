"""The derivative of a whole sampling chain, against finite differences of the real scheduler in float64."""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
import torch.autograd.forward_ad as fwad
from bayesdiff.linearized_scheduler import LinearizedScheduler, copy_scheduler
from torch.overrides import TorchFunctionMode

from bayesdiff.checks import UnsupportedSchedulerError
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
        if self.scheduler in ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"):
            pytest.importorskip("torchsde")
        scheduler = getattr(diffusers, self.scheduler)(**self.config)
        scheduler.set_timesteps(self.steps)
        return scheduler


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


def linear_network(z, t):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(2, 2, generator=generator, dtype=torch.float64) * 0.3 + 0.5 * torch.eye(2, dtype=torch.float64)
    shift = torch.randn(*SHAPE, generator=generator, dtype=torch.float64) * 0.5
    return torch.einsum("ij,bjhw->bihw", mix, z) + shift


@functools.cache
def unet():
    return cases.tiny_unet(channels=2).double()


def real_network(z, t):
    with torch.no_grad():
        return unet()(z, t).sample


NETWORKS = {"linear": linear_network, "unet": real_network}


def scaled(scheduler, x, t):
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


def chain(scheduler, network, x, injections, arguments, linearized=None, d=None, d_injections=None):
    """Run a sampler in float64 on network(x) + injection; with ``linearized`` carry the derivative beside it."""
    arguments = dict(arguments)
    if "generator" in inspect.signature(scheduler.step).parameters:
        arguments["generator"] = torch.Generator().manual_seed(3)
    clipped, h = 0, 1e-5
    for n, t in enumerate(scheduler.timesteps):
        with InFloat64():
            g = network(scaled(scheduler, x, t), t) + injections[n]
        if linearized is not None:
            other = copy_scheduler(scheduler)
            with InFloat64():  # the network's own derivative along d, to 1e-9
                ends = [[network(scaled(other, x + s * v, t), t) for s in (h, -h)] for v in d]
            d_g = torch.stack([(up - down) / (2 * h) for up, down in ends]) + d_injections[:, n]
            d = linearized.step(d_g, d, g, t, x, **arguments)
        with InFloat64():
            result = scheduler.step(g, t, x, **arguments)
        original = getattr(result, "pred_original_sample", None)
        clipped += 0 if original is None else int(original.abs().eq(1).sum())
        x = result.prev_sample
    return x, d, clipped


def compare(case, network):
    """The largest relative error over two deviations, and how many values were clipped."""
    base = case.make()
    generator = torch.Generator().manual_seed(0)
    batch, k, steps = 2, 2, len(base.timesteps)
    size = float(getattr(base, "init_noise_sigma", 1.0))

    def normal(*shape):
        return torch.randn(*shape, *SHAPE, generator=generator, dtype=torch.float64)

    x, start, d_injections = normal(batch) * size, normal(k, batch) * size, normal(k, steps, batch)
    zero = torch.zeros(steps, batch, *SHAPE, dtype=torch.float64)
    base.is_scale_input_called = True  # or it warns
    with LinearizedScheduler(base, k) as linearized:
        _, tangent, clipped = chain(
            copy_scheduler(base), network, x, zero, case.arguments, linearized, start.clone(), d_injections
        )
    worst, h = 0.0, 1e-6
    for i in range(k):
        up, down = (
            chain(copy_scheduler(base), network, x + s * start[i], s * d_injections[i], case.arguments)[0]
            for s in (h, -h)
        )
        difference = (up - down) / (2 * h)
        assert bool(torch.isfinite(difference).all())
        worst = max(worst, float((tangent[i] - difference).norm() / difference.norm()))
    return worst, clipped


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("network", NETWORKS)
def test_chain_derivative_equals_finite_difference(case, network):
    worst, clipped = compare(case, NETWORKS[network])
    if case.config.get("clip_sample"):
        assert clipped > 10, "the case must clip something to test clipping"
    assert worst < TOLERANCE, f"relative error {worst:.2g}"


def test_clipping_matters():
    """The derivative with clipping is not that without: the test above can fail."""
    results = []
    for clip in (True, False):
        s = diffusers.DDIMScheduler(clip_sample=clip)
        s.set_timesteps(5)
        x = 2 * torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with LinearizedScheduler(s, 1) as linearized:
            d = linearized.step(torch.ones(1, 1, 1, 4, 4), torch.ones(1, 1, 1, 4, 4), 0.5 * x, s.timesteps[-1], x)
        results.append(d)
    assert not torch.allclose(*results)


def test_history_matters():
    """Nor is the derivative of a multistep scheduler that of its last step."""
    case = Case("DPMSolverMultistepScheduler")
    whole = LinearizedScheduler.step

    def forgetful(self, d_output, d_sample, *args, **kwargs):
        result = whole(self, d_output, d_sample, *args, **kwargs)
        history = self.scheduler.model_outputs
        self.scheduler.model_outputs = [None if m is None else fwad.unpack_dual(m).primal.clone() for m in history]
        return result

    with mock.patch.object(LinearizedScheduler, "step", forgetful):
        worst, _ = compare(case, linear_network)
    assert worst > 0.01


def test_the_users_scheduler_and_generator_stay_as_they_were():
    s = cases.scheduler()
    s.set_timesteps(4)
    before = copy.deepcopy(s.__dict__)
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    torch.manual_seed(0)
    default = torch.get_rng_state()
    x = torch.zeros(1, 1, 2, 2)
    with LinearizedScheduler(s, 2) as linearized:
        linearized.step(torch.ones(2, 1, 1, 2, 2), torch.ones(2, 1, 1, 2, 2), x, s.timesteps[0], x, generator=generator)
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), default)
    for key, value in before.items():
        same = torch.equal(value, s.__dict__[key]) if isinstance(value, torch.Tensor) else value == s.__dict__[key]
        assert same, key


def test_a_step_without_derivative_is_refused():
    class Rounding(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, **kwargs):
            x = super().step(model_output, timestep, sample).prev_sample
            return (torch.from_numpy(x.detach().numpy().copy()),)

    s = Rounding(clip_sample=False)
    s.set_timesteps(3)
    x = torch.zeros(1, 1, 2, 2)
    with LinearizedScheduler(s, 1) as linearized, pytest.raises(UnsupportedSchedulerError, match="Rounding"):
        linearized.step(torch.ones(1, 1, 1, 2, 2), torch.ones(1, 1, 1, 2, 2), x, s.timesteps[0], x)
