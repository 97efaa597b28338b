"""Two runs on the record, moved to both sides: tangents that were lost or follow the wrong path show, at no network call."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn

import bayesdiff as bd
from bayesdiff.checks import BayesdiffWarning, UnsupportedPipelineError
from bayesdiff.head.find import find_head
from tests import cases
from tests.pipelines.build import CASES
from tests.pipelines.judge import posterior_of

#: Networks without training need more calls than others: maps are what is looked at here, not how good they are.
pytestmark = pytest.mark.filterwarnings("ignore:the network's response is not well known")

STEPS = 6


def sampler(network, then=lambda x, n: x, steps=STEPS):
    @torch.no_grad()
    def run(x):
        for n in range(steps):
            x = then(x - 0.2 * network(x, torch.tensor(900 - 100 * n)).sample, n)
        return x

    return run


@pytest.fixture(scope="module")
def network():
    return cases.tiny_unet(channels=1).double()


@pytest.fixture(scope="module")
def posterior(network):
    images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return bd.fit(
        network, images, dataset_size=10**6, scheduler=cases.scheduler(), generator=torch.Generator().manual_seed(2),
        progress=False,
    )  # fmt: skip


def x():
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def propagated(network, posterior, then=lambda x, n: x, x=None, **kwargs):
    given = globals()["x"]() if x is None else x
    return bd.propagate(sampler(network, then), network, posterior, given, propagation=bd.Tangents(draws=4, **kwargs))


SMOOTH = {
    "linear": lambda x, n: x,
    "bent": lambda x, n: 1.5 * x.tanh(),
    "normed": lambda x, n: 8 * x / x.norm(),
    "in-place": lambda x, n: x.mul_(0.9),
    "another-buffer": lambda x, n: torch.empty_like(x).copy_(x),
    "through-numpy": lambda x, n: torch.from_numpy(x.numpy()),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_right_tangents_agree(network, posterior, name):
    out = propagated(network, posterior, SMOOTH[name])
    assert out.selfcheck < 1e-3
    assert out.calls == propagated(network, posterior).calls


def lost(share):
    """A share of the sample goes through arithmetic of NumPy's, in one step."""

    def then(x, n):
        return x if n != STEPS // 2 - 1 else (1 - share) * x + share * torch.from_numpy(np.asarray(x.numpy()) * 1.0)

    return then


@pytest.mark.filterwarnings("ignore:the sampler clips or bends")
def test_what_is_lost_is_measured(network, posterior):
    found = [propagated(network, posterior, lost(share)).selfcheck for share in (0.0, 0.01, 0.1, 0.3)]
    assert found == sorted(found)
    assert found[0] < 1e-3
    assert 0.003 < found[1] < found[2] < 0.15 < found[3]


def test_a_doubtful_difference_is_warned_of_and_a_wrong_one_refused(network, posterior):
    told = r"difference of 0\.\d+ .*\(values left PyTorch: numpy at test_selfcheck.py:\d+ in then\)"
    with pytest.warns(BayesdiffWarning, match=told):
        propagated(network, posterior, lost(0.3))
    with pytest.raises(
        UnsupportedPipelineError, match=r'numpy at test_selfcheck.py:\d+ in then.*propagation="ensemble"'
    ):
        propagated(network, posterior, lost(0.9))


def test_clipping_alone_is_not_doubtful(network, posterior):
    """Few values are near enough to a kink to be moved over it."""
    out = propagated(network, posterior, lambda x, n: x.clamp(-1, 1))
    assert 0 < out.selfcheck < 0.15


def test_with_one_call_what_is_returned_is_compared(network, posterior):
    """Its input has no tangent."""
    out = bd.propagate(sampler(network, steps=1), network, posterior, x(), propagation=bd.Tangents(draws=4))
    assert out.selfcheck < 1e-3
    assert float(out.std.min()) > 0


def test_half_precision_hides_it(network, posterior):
    half = cases.tiny_unet(channels=1)
    nn.Module.to(half, torch.bfloat16)
    images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    fitted = bd.fit(half, images, scheduler=cases.scheduler(), progress=False)
    out = propagated(half, fitted, x=x().bfloat16())
    assert out.selfcheck != out.selfcheck


def test_a_decoder_behind_the_last_call_is_checked_at_its_input(network, posterior):
    class Decoder(nn.Module):
        def forward(self, z):
            return nn.functional.interpolate(z, scale_factor=2).tanh()

    decoder, run = Decoder(), sampler(network)

    def whole(x):
        return decoder(run(x))

    def broken(x):
        return decoder(torch.from_numpy(np.asarray(run(x).numpy()) * 1.0) + 0.01 * run(x))

    out = bd.propagate(whole, network, posterior, x(), propagation=bd.Tangents(draws=4))
    assert out.selfcheck < 1e-3
    assert out.std.shape == (2, 1, 16, 16)
    with pytest.raises(UnsupportedPipelineError, match="relative difference"):
        bd.propagate(broken, network, posterior, x(), propagation=bd.Tangents(draws=4))
    assert find_head(network).path == "conv_out"


def test_the_modules_of_a_pipeline_in_a_function_of_ones_own_are_decoders_too():
    """Its VAE is called a few times, and not followed operation by operation for every draw."""
    case = next(c for c in CASES if c.name == "sd-ddim-unguided")
    pipe = case.make()
    pipe.set_progress_bar_config(disable=True)
    settings = bd.Tangents(draws=6, decoder_calls=6, schedule=pipe.scheduler)

    def kwargs():
        return case.call(pipe, torch.Generator().manual_seed(0)) | {"output_type": "pt"}

    out = bd.propagate(lambda: pipe(**kwargs()).images, pipe.unet, posterior_of(pipe), propagation=settings)
    whole = bd.UncertaintyPipeline(pipe, posterior_of(pipe), propagation=settings)(**kwargs())
    assert out.other_calls == whole.other_calls == 6 + 1
    torch.testing.assert_close(out.std, whole.std, rtol=0.02, atol=0.02 * float(whole.std.mean()))


@pytest.mark.parametrize("form", ["cat", "written"])
def test_what_passed_a_decoder_beside_what_did_not(network, posterior, form):
    """Then the decoder is measured for every draw."""

    class Decoder(nn.Module):
        def forward(self, z):
            return z.flatten(1).tanh().cumsum(1)[:, ::4]

    decoder, run = Decoder(), sampler(network)

    def both(x):
        z = run(x)
        if form == "cat":
            return torch.cat([z.flatten(1), decoder(z)], 1)
        out = z.new_zeros(len(z), 80)
        out[:, :64] = z.flatten(1)
        out[:, 64:] = decoder(z)
        return out

    settings = bd.Tangents(draws=6, decoder_calls=2, trajectory=False)
    out = bd.propagate(both, network, posterior, x(), propagation=settings)
    alone = bd.propagate(run, network, posterior, x(), propagation=settings)
    every = bd.propagate(
        lambda x: decoder(run(x)), network, posterior, x(), propagation=bd.Tangents(draws=6, decoder_calls=6)
    )
    torch.testing.assert_close(out.std[:, :64], alone.std.flatten(1))
    torch.testing.assert_close(out.std[:, 64:], every.std)
    assert out.other_calls > every.other_calls


@pytest.mark.parametrize(("width", "bends"), [(2, True), (16, False)])
def test_a_decoder_that_bends_within_the_deviations_is_told(width, bends):
    """Two channels over their norm are nearly a step: Wan's decoder, as narrow as it can be made, and a wider one."""
    pipe = next(c for c in CASES if c.name == "wan-unipc").make()
    torch.manual_seed(0)
    pipe.vae = AutoencoderKLWan(
        base_dim=width, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    up = bd.UncertaintyPipeline(pipe, posterior_of(pipe), propagation=bd.Tangents(draws=6, decoder_calls=4))
    up.deviations = up.deviations * 1e-3
    case = next(c for c in CASES if c.name == "wan-unipc")
    with pytest.warns(BayesdiffWarning, match="decoder bends") if bends else contextlib.nullcontext():
        out = up(**case.call(pipe, torch.Generator().manual_seed(0)))
    assert (out.decoder_residual > 1) is bends
    assert out.decoder_residual < 0.1 or bends
    assert out.other_calls == 4 + 1


def test_without_a_decoder_there_is_nothing_to_say_of_one(network, posterior):
    out = bd.propagate(sampler(network), network, posterior, x(), propagation=bd.Tangents(draws=4))
    assert math.isnan(out.decoder_residual)
