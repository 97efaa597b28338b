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
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import bayesdiff as bd
from bayesdiff.checks import BayesdiffWarning, NonFiniteError, UnsupportedPipelineError
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
    for n, t in enumerate(scheduler.timesteps):
        with InFloat64():
            z = scaled(scheduler, x, t)
        g = network(z, t, n)
        with InFloat64():
            result = scheduler.step(g, t, x, **arguments)
        x = result.prev_sample
        if clipped is not None and getattr(result, "pred_original_sample", None) is not None:
            clipped.append(int(result.pred_original_sample.abs().eq(1).sum()))
    return x


def normal(*shape, seed=0, size=1.0):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def mixing():
    return 0.3 * normal(2, 2) + 0.5 * torch.eye(2, dtype=torch.float64), 0.5 * normal(*SHAPE, seed=1)


def relative_error(tangent, difference):
    assert bool(torch.isfinite(difference).all())
    return float((tangent - difference).norm() / difference.norm())


def linear_chain(case, dual=None):
    """The larger error of two draws' tangents at the end of the chain, and how many values were clipped."""
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
    errors = [
        relative_error(t, (run(x + h * d, zero + h * m) - run(x - h * d, zero - h * m)) / (2 * h))
        for t, d, m in zip(tangents, start, moved, strict=True)
    ]
    return max(errors), sum(clipped)


@pytest.mark.parametrize("case", ALL)
def test_the_tangents_of_a_chain_are_its_differences(case, record_property):
    error, clipped = linear_chain(case)
    record_property("error", error)
    if case.config.get("clip_sample"):
        assert clipped > 10, "the case must clip something to test clipping"
    assert error < TOLERANCE


@functools.cache
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("AttnUpBlock2D",), attention_head_dim=8, add_attention=False,
    ).eval().double()  # fmt: skip


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
    """Of both draws together: tangents are linear in them."""
    network, mixed = unet(), torch.tensor([1.0, -0.7], dtype=torch.float64)
    settings = bd.Tangents(draws=2, refresh=1, num_directions=2, factors=True)
    x = normal(2, *SHAPE, size=float(getattr(case.make(), "init_noise_sigma", 1.0)))

    def run(x):
        return chain(lambda z, t, n: network(z, t).sample, case, x)

    out = bd.propagate(run, network, posterior(), x, propagation=settings)
    head, deviations = find_head(network), posterior().deviations(2, bd.rng.item_generator(0, 1), orthogonal=True)
    delta = torch.einsum("k,kcd->cd", mixed, deviations)
    h = 1e-5 / float(delta.abs().max())

    def moved(delta):
        with torch.no_grad(), head.shifted(delta):
            return run(x)

    assert torch.equal(out.output, moved(0 * delta))
    tangent = torch.einsum("k,k...->...", mixed, out.factors.double() * 2**0.5)
    error = relative_error(tangent, (moved(h * delta) - moved(-h * delta)) / (2 * h))
    record_property("error", error)
    assert error < TOLERANCE


def test_clipping_matters():
    """The derivative with clipping is not that without: the test above can fail."""
    x, ends = normal(1, 1, 4, 4, size=2.0), []
    for clip in (True, False):
        s = diffusers.DDIMScheduler(clip_sample=clip)
        s.set_timesteps(5)
        with DualNumbers() as dual:
            z = x.clone()
            dual.attach(z, torch.ones(1, *z.shape, dtype=z.dtype))
            ends.append(dual.tangents(s.step(0.5 * z, s.timesteps[-1], z).prev_sample))
    assert not torch.allclose(*ends)


def test_history_matters(monkeypatch):
    """Nor is the derivative of a multistep scheduler that of its last step."""
    case, whole = Case("DPMSolverMultistepScheduler"), diffusers.DPMSolverMultistepScheduler.step
    assert linear_chain(case)[0] < TOLERANCE
    dual = DualNumbers()

    def forgetful(self, *args, **kwargs):
        for m in self.model_outputs:
            if m is not None:
                dual.drop(m)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.DPMSolverMultistepScheduler, "step", forgetful)
    assert linear_chain(case, dual)[0] > 0.01


class Layer(nn.Module):
    """The least that is a network: its head."""

    def __init__(self, channels=2, outputs=None):
        super().__init__()
        self.conv_out = nn.Conv2d(channels, outputs or channels, 1)
        nn.init.normal_(self.conv_out.weight, std=0.5, generator=torch.Generator().manual_seed(0))
        nn.init.normal_(self.conv_out.bias, std=0.5, generator=torch.Generator().manual_seed(1))
        self.double().eval()

    def forward(self, x, t):
        return self.conv_out(x)


def layer_posterior(network, size=10**14):
    """Of its one layer, from inputs and residuals of no meaning."""
    head = find_head(network, "conv_out")
    sums = bd.Statistics(head.geometry, 1)
    x = normal(24, head.layer.in_channels, 8, 8, seed=5)
    with torch.no_grad():
        sums.update(x, torch.randn_like(network(x, 0)), torch.zeros(24, dtype=torch.long), torch.arange(24))
    return bd.LaplacePosterior.from_statistics(sums, head, dataset_size=size)


NOISY = {
    "DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "SASolverScheduler", "LCMScheduler",
    "FlowMatchLCMScheduler",
}  # fmt: skip


@pytest.mark.parametrize("case", [c for c in ALL if c.values[0].steps == STEPS])
def test_which_samplers_add_noise(case):
    """Where noise is added, more is measured."""
    options = case.config | case.arguments
    # Brownian trees (DPMSolverSDE, CosineDPMSolverMultistep) have seeds of their own: that noise cannot be told from the rest.
    expected = (
        case.scheduler in NOISY or "sde" in str(options.get("algorithm_type"))
        or (options.get("eta", 0.3 if case.scheduler == "TCDScheduler" else 0) > 0)
        or options.get("s_churn", 0) > 0 or options.get("stochastic_sampling", False)
    )  # fmt: skip
    network, generator = Layer(), torch.Generator().manual_seed(3)

    def run(x):
        scheduler = case.make()
        extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for t in scheduler.timesteps:
            with torch.no_grad():
                g = network(scaled(scheduler, x, t), t)
            x = scheduler.step(g, t, x, **case.arguments, **extra).prev_sample
        return x

    state = torch.get_rng_state()
    session = Session(Rerun(run, (normal(1, *SHAPE),), {}), network, find_head(network, "conv_out"))
    session.record()
    assert session.noisy == expected
    assert torch.equal(torch.get_rng_state(), state)


class Affine:
    """A sampler that no library has: x + s(g − x)/10 with a memory of one step; and others, made of it."""

    def __init__(self, then=lambda x, g, n: x):
        self.last, self.then, self.index = None, then, 0

    def step(self, g, x):
        move = 0.1 * (g - x)
        prev = x + 1.5 * move - 0.5 * (move if self.last is None else self.last)
        self.last, self.index = move, self.index + 1
        return self.then(prev, g, self.index - 1)


SAMPLERS = {
    "affine": lambda x, g, n: x,
    "bent": lambda x, g, n: x.tanh(),
    "bent-late": lambda x, g, n: x.sin() if n == 7 else x,
    "normed": lambda x, g, n: x * x.norm() / 20,
    "sorted": lambda x, g, n: x + 0.1 * x.flatten(1).sort(1).values.view_as(x),
    "detached": lambda x, g, n: x + 0.2 * g.detach(),
    "through-numpy": lambda x, g, n: x + 0.2 * torch.from_numpy(g.numpy()),
    "in-place": lambda x, g, n: x.mul_(0.9).add_(g, alpha=0.1),
}


def affine_run(network, then):
    def run(x):
        sampler = Affine(then)
        for t in range(10):
            with torch.no_grad():
                g = network(x, torch.tensor(9 - t))
            x = sampler.step(g, x)
        return x

    return run


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_of_no_library(name):
    """Bent, normed, sorted, detached: they are differentiated as they are."""
    network = Layer()
    posterior = layer_posterior(network)
    run, x = affine_run(network, SAMPLERS[name]), normal(2, *SHAPE)
    out = bd.propagate(
        run, network, posterior, x, propagation=bd.Tangents(draws=2, refresh=1, num_directions=2, factors=True)
    )
    head = find_head(network, "conv_out")
    for factor, delta in zip(
        out.factors, posterior.deviations(2, bd.rng.item_generator(0, 1), orthogonal=True), strict=True
    ):
        ends = []
        h = 1e-7 / float(delta.abs().max())
        for sign in (1, -1):
            with head.shifted(sign * h * delta):
                ends.append(run(x.clone()))
        assert relative_error(factor.double() * 2**0.5, (ends[0] - ends[1]) / (2 * h)) < TOLERANCE
    assert out.selfcheck < 0.05


@pytest.mark.parametrize(("share", "told"), [(0.04, "warned"), (1.0, "refused")])
def test_what_leaves_pytorch_and_comes_back_is_told(share, told):
    """NumPy's own arithmetic has no tangents: the self-check sees what is missing, and where."""
    network = Layer()

    def then(x, g, n):
        return x + share * torch.from_numpy(np.tanh(g.numpy()))

    def run_it():
        return bd.propagate(affine_run(network, then), network, layer_posterior(network), normal(2, *SHAPE))

    if told == "warned":
        with pytest.warns(
            BayesdiffWarning, match=r"relative difference of 0\.\d.*numpy at test_schedulers.py:\d+ in then"
        ):
            assert run_it().selfcheck > 0.15
    else:
        with pytest.raises(
            UnsupportedPipelineError, match=r"relative difference of .*numpy at test_schedulers.py:\d+ in then"
        ):
            run_it()


def test_a_learned_variance_scales_the_noise():
    """The noise of such a step depends on the output: as it was drawn, it has a derivative."""
    network = Layer(2, 4)
    posterior, scheduler = (
        layer_posterior(network),
        diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False),
    )
    scheduler.set_timesteps(30)

    def run(x):
        generator = torch.Generator().manual_seed(3)
        for t in scheduler.timesteps[-6:]:  # at pure noise this network's outputs grow beyond all bounds
            with torch.no_grad(), InFloat64():
                x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
        return x

    x = normal(2, *SHAPE)
    out = bd.propagate(
        run, network, posterior, x, propagation=bd.Tangents(draws=1, refresh=1, num_directions=1, factors=True)
    )
    (delta,) = posterior.deviations(1, bd.rng.item_generator(0, 1), orthogonal=True)
    h, head, ends = 1e-5 / float(delta.abs().max()), find_head(network, "conv_out"), []
    for sign in (1, -1):
        with head.shifted(sign * h * delta):
            ends.append(run(x))
    assert relative_error(out.factors[0].double(), (ends[0] - ends[1]) / (2 * h)) < TOLERANCE
    delta[2:] = 0  # the variance's own weights matter
    ends = []
    for sign in (1, -1):
        with head.shifted(sign * h * delta):
            ends.append(run(x))
    assert relative_error(out.factors[0].double(), (ends[0] - ends[1]) / (2 * h)) > 0.01


def test_a_scheduler_that_overflows_is_refused():
    case = Case("UniPCMultistepScheduler", {"solver_type": "bh1"}, {}, 5)  # its last step multiplies infinity by 0
    network = unet()

    def run(x):
        return chain(lambda z, t, n: network(z, t).sample, case, x)

    for propagation in ("tangents", bd.Ensemble(members=2)):
        with pytest.raises(NonFiniteError):
            bd.propagate(run, network, posterior(), normal(1, *SHAPE), propagation=propagation)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDIMScheduler"])
def test_a_run_that_starts_in_the_middle(name):
    """As image-to-image does."""
    scheduler, network = getattr(diffusers, name)(), unet()

    def run(x):
        scheduler.set_timesteps(20)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(12)
        for t in scheduler.timesteps[12:]:
            with torch.no_grad(), InFloat64():
                x = scheduler.step(network(scaled(scheduler, x, t), t).sample, t, x).prev_sample
        return x

    x = normal(1, *SHAPE)
    out = bd.propagate(
        run, network, posterior(), x, propagation=bd.Tangents(draws=1, refresh=1, num_directions=1, factors=True)
    )
    (delta,) = posterior().deviations(1, bd.rng.item_generator(0, 1), orthogonal=True)
    h, ends = 1e-5 / float(delta.abs().max()), []
    for sign in (1, -1):
        with find_head(network).shifted(sign * h * delta):
            ends.append(run(x))
    assert relative_error(out.factors[0].double(), (ends[0] - ends[1]) / (2 * h)) < TOLERANCE
