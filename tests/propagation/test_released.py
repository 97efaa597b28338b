"""What a run held is gone with it, without Python's collector, which seldom comes where objects are few and large."""

from __future__ import annotations

import gc

import diffusers
import pytest
import torch

import bayesdiff as bd
from tests import cases

pytestmark = pytest.mark.filterwarnings("ignore:the network's response is not well known")


def alive() -> int:
    """Tensors that there are."""
    return sum(issubclass(type(t), torch.Tensor) for t in gc.get_objects())


@pytest.mark.parametrize("propagation", [bd.Tangents(draws=6), bd.Ensemble(members=3)], ids=lambda p: type(p).__name__)
def test_nothing_of_a_run_stays(propagation):
    pipe = cases.class_pipeline(diffusers.DDIMScheduler(clip_sample=False))
    posterior = cases.class_posterior(pipe)

    def run():
        def sampler(x):
            for t in (900, 700, 500, 300, 100):
                x = x - 0.2 * pipe.unet(x, torch.tensor(t), class_labels=torch.tensor([0, 2])).sample
            return x

        noise = torch.randn(2, *(pipe.unet.config[k] for k in ("in_channels", "sample_size", "sample_size")))
        bd.propagate(sampler, pipe.unet, posterior, noise, propagation=propagation)

    run()  # what a first run sets up
    gc.collect()
    gc.disable()
    try:
        before = alive()
        run()
        assert alive() <= before + 2
    finally:
        gc.enable()
