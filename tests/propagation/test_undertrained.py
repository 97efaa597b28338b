"""A network that was trained for a moment, whose predictions are clipped: its response changes from call to call."""

from __future__ import annotations

import diffusers
import pytest
import torch

import bayesdiff
from bayesdiff.propagation import responder as responders

pytestmark = [
    pytest.mark.filterwarnings("ignore:the network's response is not well known"),
    pytest.mark.filterwarnings("ignore:the sampler clips or bends"),
]
DRAWS, STEPS, SAMPLES = 16, 15, 2


@pytest.fixture(scope="module")
def undertrained():
    """A pipeline that clips, and a posterior."""
    torch.manual_seed(0)
    _, data = bayesdiff.zoo.load("fashion-ddpm")
    unet = diffusers.UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    schedule, optimizer = diffusers.DDPMScheduler(), torch.optim.AdamW(unet.parameters(), 2e-3)
    for _ in range(60):
        x, t = data.images[torch.randint(len(data.images), (16,))], torch.randint(1000, (16,))
        noise = torch.randn(x.shape)
        loss = (unet(schedule.add_noise(x, noise, t), t).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pipe = diffusers.DDIMPipeline(unet.eval(), diffusers.DDIMScheduler(clip_sample=True))
    pipe.set_progress_bar_config(disable=True)
    posterior = bayesdiff.fit(
        pipe, data.images[:100], dataset_size=2000, training_draws=1, draws_per_image=2,
        generator=torch.Generator().manual_seed(0), progress=False,
    )  # fmt: skip
    return pipe, posterior


def test_the_default_lends_nothing_where_that_makes_it_worse(undertrained, monkeypatch):
    """Against exact responses with the same draws; the residual of what is chosen is the smaller, too."""
    pipe, posterior = undertrained

    def made(clearly=responders.CLEARLY, **settings):
        monkeypatch.setattr(responders, "CLEARLY", clearly)
        return bayesdiff.UncertaintyPipeline(pipe, posterior, propagation=bayesdiff.Tangents(draws=DRAWS, **settings))(
            batch_size=SAMPLES, num_inference_steps=STEPS, output_type="pt",
            generator=[torch.Generator().manual_seed(i) for i in range(SAMPLES)],
        )  # fmt: skip

    exact = made(refresh=1, num_directions=DRAWS, directions_per_call=4).std
    default, always = made(), made(clearly=0.0)

    def error(output):
        return (output.std - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)

    assert default.calls == always.calls
    assert bool((error(default) <= 1.001 * error(always)).all())
    assert float((error(default) / error(always)).min()) < 0.7
    assert bool((default.residual <= 1.001 * always.residual).all())
    assert float(error(default).max()) < 0.45
