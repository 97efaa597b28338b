"""Functions of one's own, in float64, against central differences of the whole function."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bayesdiff as bd
from bayesdiff.checks import NotRepeatableError, UnsupportedPipelineError
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics
from tests.pipelines.kdiffusion import sampling

DRAWS = 3
BAR = 1e-6


class Mlp(nn.Module):
    """F of EDM on vectors of ten numbers."""

    def __init__(self, size: int = 10, width: int = 32) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(size + 1, width), nn.Linear(width, width), nn.Linear(width, size)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        noise = torch.as_tensor(noise, dtype=x.dtype).reshape(-1, 1).expand(len(x), 1)
        return self.head(torch.tanh(self.second(torch.tanh(self.first(torch.cat([x, noise], 1))))))


class Denoiser(nn.Module):
    """D(x, σ), preconditioned outside the network, as k-diffusion's wrappers do it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        v = sigma.reshape(-1, *[1] * (x.ndim - 1))
        return x / (1 + v**2) + self.net(x / (1 + v**2) ** 0.5, sigma.log() / 4) * v / (1 + v**2) ** 0.5


def posterior_of(network: nn.Module, head: str) -> LaplacePosterior:
    found = bd.find_head(network, head)
    g, generator = found.geometry, torch.Generator().manual_seed(1)
    dtype = found.layer.weight.dtype
    shape = (8, 4, g.in_channels) if g.kind == "linear" else (8, g.in_channels, *(6,) * len(g.kernel_size))
    x = torch.randn(shape, generator=generator, dtype=dtype)
    statistics = Statistics(g, 1, "cpu")
    r = torch.randn(g.output_shape(x), generator=generator, dtype=dtype)
    statistics.update(x, r, torch.zeros(8, dtype=torch.long), torch.arange(8))
    return LaplacePosterior.from_statistics(
        statistics, found, num_timesteps=1000, covariance="ggn", prior_precision=1e6
    )


@pytest.fixture(scope="module")
def mlp() -> tuple[Mlp, Denoiser, LaplacePosterior]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Mlp().double().eval()
    return net, Denoiser(net), posterior_of(net, "head")


def worst(function: Callable[[], Tensor], network: nn.Module, posterior: LaplacePosterior, h: float = 1e-2) -> float:
    """The largest relative error of a draw's tangent, with exact responses."""
    state = torch.get_rng_state()
    settings = bd.Tangents(draws=DRAWS, refresh=1, num_directions=DRAWS, factors=True)
    out = bd.propagate(function, network, posterior, propagation=settings)
    deviations = bd.UncertaintyPipeline(_Pipe(network), posterior, propagation=settings).deviations
    head, errors = posterior.check(network), []
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    with torch.no_grad():
        plain = function()
    assert torch.equal(out.output, plain)
    assert torch.equal(torch.get_rng_state(), after)  # left where one plain run leaves it
    assert out.factors is not None
    for delta, factor in zip(deviations, out.factors, strict=True):
        ends = []
        for sign in (1, -1):
            torch.set_rng_state(state)
            with head.shifted(sign * h * delta), torch.no_grad():
                ends.append(function())
        wanted = (ends[0] - ends[1]) / (2 * h)
        errors.append(float((factor.double() * DRAWS**0.5 - wanted).norm() / wanted.norm()))
    return max(errors)


class _Pipe:
    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet

    def __call__(self) -> None: ...


def heun_of_edm(net: Callable[..., Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
    """Algorithm 1 of Karras et al. (2022), without churn."""
    for s, t in itertools.pairwise(sigmas):
        d = (x - net(x, s.expand(len(x)))) / s
        y = x + (t - s) * d
        if t > 0:
            y = x + (t - s) * (d + (y - net(y, t.expand(len(x)))) / t) / 2
        x = y
    return x


SIGMAS = sampling().get_sigmas_karras(8, 0.02, 10.0).double()
SAMPLERS = (
    "euler", "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "lms", "dpmpp_2m", "dpmpp_2s_ancestral", "dpmpp_sde",
    "dpmpp_2m_sde", "dpmpp_3m_sde",
)  # fmt: skip


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_heun_of_edm_as_a_plain_function(mlp: tuple[Mlp, Denoiser, LaplacePosterior]) -> None:
    net, denoiser, posterior = mlp
    assert worst(lambda: heun_of_edm(denoiser, 10 * noise(4, 10), SIGMAS), net, posterior) <= BAR


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_of_k_diffusion_as_they_are(name: str, mlp: tuple[Mlp, Denoiser, LaplacePosterior]) -> None:
    net, denoiser, posterior = mlp
    sample = getattr(sampling(), f"sample_{name}")
    assert worst(lambda: sample(denoiser, 10 * noise(4, 10), SIGMAS, disable=True), net, posterior) <= BAR


@pytest.mark.parametrize("times", ["once", "every-step"])
def test_a_module_whose_first_call_has_tangents_is_measured_there(
    times: str, mlp: tuple[Mlp, Denoiser, LaplacePosterior]
) -> None:
    """Another network's first call is at pure noise; that of a module between its calls is not."""
    net, denoiser, posterior = mlp
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        between = nn.Sequential(nn.Linear(10, 10), nn.Tanh()).double().eval().requires_grad_(False)

    def loop() -> Tensor:
        x = noise(4, 10)
        for step, sigma in enumerate(SIGMAS[:-1]):
            x = x + 0.1 * denoiser(x, sigma.expand(4))
            x = 1.5 * between(x) if times == "every-step" or step == 1 else x
        return x

    assert worst(loop, net, posterior) <= BAR


def test_a_module_that_writes_into_what_it_is_given_is_refused(mlp: tuple[Mlp, Denoiser, LaplacePosterior]) -> None:
    net, denoiser, posterior = mlp
    relu = nn.LeakyReLU(0.5, inplace=True)

    def loop() -> Tensor:
        x = noise(4, 10)
        for sigma in SIGMAS[:-1]:
            x = x + 0.1 * denoiser(x, sigma.expand(4))
        relu(x)
        return 2 * x

    with pytest.raises(UnsupportedPipelineError, match="got one that writes into it"):
        bd.propagate(loop, net, posterior)


def test_dpm_fast_of_k_diffusion(mlp: tuple[Mlp, Denoiser, LaplacePosterior]) -> None:
    net, denoiser, posterior = mlp
    sample, x = sampling().sample_dpm_fast, 10 * noise(4, 10)
    assert worst(lambda: sample(denoiser, x, 0.02, 10.0, 12, disable=True), net, posterior) <= BAR


def test_the_adaptive_sampler_is_followed_between_its_jumps(mlp: tuple[Mlp, Denoiser, LaplacePosterior]) -> None:
    net, denoiser, posterior = mlp
    sample, x = sampling().sample_dpm_adaptive, 10 * noise(4, 10)
    assert worst(lambda: sample(denoiser, x, 0.02, 10.0, disable=True), net, posterior) <= 0.1


def test_a_class_with_its_own_loop(mlp: tuple[Mlp, Denoiser, LaplacePosterior]) -> None:
    net, _, posterior = mlp

    class Diffusion(nn.Module):
        """In the manner of denoising-diffusion-pytorch: the network is a child, x_0 is clipped, noise is drawn on the way."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model
            self.register_buffer("alphas", torch.linspace(0.9999, 0.97, 12, dtype=torch.float64).cumprod(0))

        @torch.inference_mode()
        def p_sample_loop(self, x: Tensor) -> Tensor:
            for i in reversed(range(len(self.alphas))):
                a = self.alphas[i]
                before = self.alphas[i - 1] if i else torch.ones_like(a)
                eps = self.model(x, torch.full((len(x),), i / 12))
                start = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp_(-3, 3)
                mean = (
                    before.sqrt() * (1 - a / before) / (1 - a) * start
                    + (a / before).sqrt() * (1 - before) / (1 - a) * x
                )
                x = mean + ((1 - before) / (1 - a) * (1 - a / before)).sqrt() * torch.randn_like(x) if i else mean
            return x

    diffusion = Diffusion(net)
    assert worst(lambda: diffusion.p_sample_loop(noise(4, 10)), net, posterior, h=1e-3) <= BAR


def test_one_buffer_that_is_reused(mlp: tuple[Mlp, Denoiser, LaplacePosterior]) -> None:
    net, denoiser, posterior = mlp

    def loop() -> Tensor:
        x = 10 * noise(4, 10)
        history = torch.zeros(3, 4, 10, dtype=torch.float64)
        for i, (s, t) in enumerate(itertools.pairwise(SIGMAS)):
            history[i % 3] = (x - denoiser(x, s.expand(4))) / s
            x.add_((t - s) * (history[i % 3] + (history[(i - 1) % 3] - history[i % 3]) * (0.1 if i else 0.0)))
        return x

    assert worst(loop, net, posterior) <= BAR


def test_trajectories_and_a_network_of_one_dimension() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = diffusers.UNet1DModel(
            sample_size=64, in_channels=2, out_channels=2, extra_in_channels=64, block_out_channels=(32, 32, 64),
            down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
            up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
        ).double().eval()  # fmt: skip
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=100, clip_sample=False)
    posterior = posterior_of(net, "up_blocks.2.resnets.2.conv_2")  # its output, plus a residual, is the network's

    def loop() -> Tensor:
        scheduler.set_timesteps(4)
        x = noise(2, 2, 64)
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t).sample, t, x).prev_sample
        return x

    assert worst(loop, net, posterior) <= BAR


def test_what_is_returned_in_numpy_and_in_nests(mlp: tuple[Mlp, Denoiser, LaplacePosterior]) -> None:
    net, denoiser, posterior = mlp
    settings = bd.Tangents(draws=4)
    tensors = bd.propagate(heun_of_edm, net, posterior, denoiser, 10 * noise(4, 10), SIGMAS, propagation=settings)

    def nested(x: Tensor) -> dict[str, Any]:
        return {"steps": len(SIGMAS), "sample": heun_of_edm(denoiser, x, SIGMAS)}

    def array(x: Tensor) -> np.ndarray:
        return heun_of_edm(denoiser, x, SIGMAS).numpy()

    for function in (nested, array):
        out = bd.propagate(function, net, posterior, 10 * noise(4, 10), propagation=settings)
        assert torch.equal(out.std, tensors.std)
        assert out.std.shape == (4, 10)


def test_arguments_are_not_written_into(mlp: tuple[Mlp, Denoiser, LaplacePosterior]) -> None:
    net, denoiser, posterior = mlp
    x = 10 * noise(4, 10)

    def loop(x: Tensor) -> Tensor:
        for s, t in itertools.pairwise(SIGMAS):
            x += (t - s) * (x - denoiser(x, s.expand(4))) / s
        return x

    out = bd.propagate(loop, net, posterior, x)
    assert torch.equal(x, 10 * noise(4, 10))
    assert float(out.std.min()) > 0


def test_a_sampler_with_noise_of_its_own_is_refused(mlp: tuple[Mlp, Denoiser, LaplacePosterior]) -> None:
    net, denoiser, posterior = mlp
    hidden = iter(torch.Generator().manual_seed(i) for i in range(1000))

    def loop(x: Tensor) -> Tensor:
        for s, t in itertools.pairwise(SIGMAS):
            own = torch.randn(x.shape, generator=next(hidden), dtype=x.dtype)
            x = x + (t - s) * (x - denoiser(x, s.expand(4))) / s + 0.1 * own
        return x

    for propagation in ("tangents", bd.Ensemble(members=2)):
        with pytest.raises(NotRepeatableError, match="source of its own"):
            bd.propagate(loop, net, posterior, 10 * noise(4, 10), propagation=propagation)


def test_tangents_that_are_lost_outside_pytorch_are_noticed(mlp: tuple[Mlp, Denoiser, LaplacePosterior]) -> None:
    net, denoiser, posterior = mlp

    def loop(x: Tensor) -> Tensor:
        for s, t in itertools.pairwise(SIGMAS):
            away = np.array((x - denoiser(x, s.expand(4))).numpy())  # a copy
            x = x + (t - s) * torch.from_numpy(away * 1.0) / s
        return x

    with pytest.raises(UnsupportedPipelineError, match="numpy"):
        bd.propagate(loop, net, posterior, 10 * noise(4, 10))


def test_a_result_without_tangents_is_refused(mlp: tuple[Mlp, Denoiser, LaplacePosterior]) -> None:
    net, denoiser, posterior = mlp

    def loop(x: Tensor) -> float:
        return heun_of_edm(denoiser, x, SIGMAS).sum().item()

    with pytest.raises(UnsupportedPipelineError, match="item"):
        bd.propagate(loop, net, posterior, 10 * noise(4, 10))


def test_a_function_that_never_calls_the_network_is_refused(mlp: tuple[Mlp, Denoiser, LaplacePosterior]) -> None:
    net, _, posterior = mlp
    with pytest.raises(UnsupportedPipelineError, match="no call"):
        bd.propagate(lambda x: x + 1, net, posterior, noise(4, 10))


def test_the_ensemble_of_a_function(mlp: tuple[Mlp, Denoiser, LaplacePosterior]) -> None:
    net, denoiser, posterior = mlp
    wide = posterior.recut(prior_precision=1e4)
    x = 10 * noise(4, 10)
    members = bd.propagate(heun_of_edm, net, wide, denoiser, x, SIGMAS, propagation=bd.Ensemble(members=200))
    tangents = bd.propagate(heun_of_edm, net, wide, denoiser, x, SIGMAS, propagation=bd.Tangents(draws=352))
    assert members.calls == 201 * members.plain_calls + 1
    ratio = tangents.std / members.std
    assert float((ratio - 1).abs().mean()) < 0.075  # √(1/400) and √(1/704), and the linearisation
    assert members.steps == []


def test_width_zero_gives_zero(mlp: tuple[Mlp, Denoiser, LaplacePosterior]) -> None:
    net, denoiser, posterior = mlp
    none = posterior.recut(prior_precision=1e30)
    for propagation in (bd.Tangents(draws=4), bd.Ensemble(members=3)):
        out = bd.propagate(
            sampling().sample_dpmpp_sde,
            net,
            none,
            denoiser,
            10 * noise(4, 10),
            SIGMAS,
            disable=True,
            propagation=propagation,
        )
        assert float(out.std.max()) < 1e-9


def test_stairs_are_refused(mlp: tuple[Mlp, Denoiser, LaplacePosterior]) -> None:
    net, denoiser, posterior = mlp

    def loop(x: Tensor) -> Tensor:
        x = heun_of_edm(denoiser, x, SIGMAS[:4])
        x = (x * 1e4).round() / 1e4 + 1e-4 * torch.floor(x * 3000)  # stairs: its derivative is not what it does
        return heun_of_edm(denoiser, x, SIGMAS[3:])

    with pytest.raises(UnsupportedPipelineError, match="relative difference"):
        bd.propagate(loop, net, posterior, 10 * noise(4, 10))
