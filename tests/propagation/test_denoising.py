"""What the data leave open, from the responses of a map: exact for Gaussian data, near it on the shipped model."""

from __future__ import annotations

import pytest
import torch

import bayesdiff as bd
from bayesdiff.propagation.response import Directions, Response, smoothed
from bayesdiff.propagation.span import Span
from tests.calibration.gaussian import SHAPE, call, made
from tests.pipelines.build import CASES


def test_it_is_that_of_gaussian_data_where_every_direction_is_measured():
    network, scheduler = made()
    posterior = bd.fit(
        network, network.data(64), scheduler=scheduler, call=call, space="samples", training_draws=1, head="head",
        generator=torch.Generator().manual_seed(0), progress=False,
    )  # fmt: skip
    scheduler.set_timesteps(6)

    def sample(x):
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
        return x

    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    propagation = bd.Tangents(draws=16, refresh=1, num_directions=8, schedule=scheduler)
    out = bd.propagate(sample, network, posterior, x, propagation=propagation)
    assert out.denoising_std.shape == (6, 2, *SHAPE)
    for n, t in enumerate(scheduler.timesteps.tolist()):
        if n:  # before the first step nothing depends on the weights, and nothing is measured
            truth = network.variance(t).view(SHAPE).expand(2, *SHAPE)
            torch.testing.assert_close(out.denoising[n].double(), truth, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.denoising_std[-1], out.denoising[-1].sqrt())
    unknown = bd.propagate(
        sample, network, posterior, x, propagation=bd.Tangents(draws=16, refresh=1, num_directions=8)
    )
    assert unknown.denoising_std is None  # no schedule
    ensemble = bd.propagate(sample, network, posterior, x, propagation=bd.Ensemble(members=2))
    assert ensemble.denoising is ensemble.denoising_std is None


@pytest.mark.parametrize("projected", [False, True])
def test_the_diagonal_is_that_of_the_response(projected):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    size, pairs = 40, []
    root = draw(2, size, 6) / size**0.5
    for _ in range(3):
        chosen = Directions.choose(draw(2, 20, size), 4, draw(20))
        pairs.append((chosen, (chosen.directions @ (root @ root.mT)) * chosen.safe.unsqueeze(1)))
    eye = torch.eye(size, dtype=torch.float64).expand(2, size, size)
    if not projected:
        for response in smoothed(pairs):
            torch.testing.assert_close(response.diagonal(), response(eye).diagonal(dim1=1, dim2=2))
        return
    span = Span.of([v for chosen, images in pairs for v in (chosen.directions, images)])
    rows = span.coordinates.split([4] * 6, dim=1)
    inside = [(Directions(v, c.length, c.probe), i) for (c, _), v, i in zip(pairs, rows[::2], rows[1::2], strict=True)]
    for response in (Response.fit(*pair) for pair in inside):
        coordinates = span.into(eye)
        full = span.out_of(response(coordinates) - response.gain * coordinates, response.gain * eye)
        torch.testing.assert_close(response.diagonal(span.basis), full.diagonal(dim1=1, dim2=2))


@pytest.mark.filterwarnings("ignore:the network's response is not well known")
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_pipeline_has_it_at_every_call(shipped, guidance_scale):
    pipe, posterior = shipped
    propagation = bd.Tangents(draws=16)
    out = bd.UncertaintyPipeline(pipe, posterior, propagation=propagation)(
        ["sneaker", "bag"], num_inference_steps=8, guidance_scale=guidance_scale, output_type="pt",
        generator=[torch.Generator().manual_seed(i) for i in range(2)],
    )  # fmt: skip
    assert out.denoising_std.shape == (8, 2, 1, 28, 28)
    means = out.denoising_std.mean((1, 2, 3, 4))
    assert float(means[2]) > 2 * float(means[-1])  # less and less is open
    assert len(list(out.denoising)) == len(out.denoising) == 8


@pytest.mark.filterwarnings("ignore")
def test_a_flow_begins_at_pure_noise_of_which_nothing_is_known():
    pipe = next(c for c in CASES if c.name == "sd3").make()
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = bd.fit(pipe, images, ["a coast"] * 3, progress=False)
    out = bd.UncertaintyPipeline(pipe, posterior)("a coast", num_inference_steps=3, guidance_scale=1.0)
    assert bool(out.denoising_std[0].isnan().all())
    assert bool((out.denoising_std[1:] >= 0).all())
