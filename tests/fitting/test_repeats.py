"""Networks that are no functions are refused: by a fit, and at every run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.nn.functional import dropout

import bayesdiff as bd
from bayesdiff.checks import BayesdiffError, NotRepeatableError
from bayesdiff.fitting.repeats import Repeats
from tests import cases


def functional_dropout():
    return lambda _, __, output: dropout(output, 0.1)


def noise_of_its_own():
    generator = np.random.default_rng(0)
    return lambda _, __, output: output + 0.1 * torch.from_numpy(generator.standard_normal(output.shape)).float()


def cache_of(period):
    """Every period-th call is computed, the others take what that one had."""

    def made():
        state = {"calls": 0, "kept": None}

        def hook(_, __, output):
            if state["calls"] % period == 0 or state["kept"].shape != output.shape:
                state["kept"] = output
            state["calls"] += 1
            return state["kept"]

        return hook

    made.__name__ = f"cache_of_{period}"
    return made


KINDS = (functional_dropout, noise_of_its_own, cache_of(2), cache_of(3), cache_of(5))


@pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "settings", [bd.Tangents(draws=4, extra_calls=1), bd.Ensemble(members=2)], ids=["tangents", "ensemble"]
)
def test_at_every_run(kind, settings):
    pipe = cases.class_pipeline(DDIMScheduler(clip_sample=False))
    posterior = cases.class_posterior(pipe)
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=settings)  # before it begins

    def run(steps):
        return up([1], num_inference_steps=steps, generator=[torch.Generator().manual_seed(0)])

    run(3)
    handle = pipe.unet.mid_block.register_forward_hook(kind())
    for steps in (6, 7):
        with pytest.raises(NotRepeatableError):
            run(steps)
    handle.remove()
    run(3)


@pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("whole", [True, False], ids=["pipeline", "network"])
def test_in_a_fit(kind, whole):
    pipe = cases.class_pipeline(DDIMScheduler(clip_sample=False))
    pipe.unet.mid_block.register_forward_hook(kind())
    generator = torch.Generator().manual_seed(0)
    data = {"images": torch.rand(48, 1, 8, 8, generator=generator) * 2 - 1, "class_labels": torch.arange(48) % 3}
    given = pipe if whole else pipe.unet
    with pytest.raises(BayesdiffError):
        bd.fit(given, data, scheduler=cases.scheduler(), batch_size=4, progress=False)


def test_a_function_is_asked_a_few_times_only():
    calls = []

    def network(x):
        calls.append(1)
        return x + 1

    asked = Repeats(torch.nn.Identity())
    for n in range(20):
        asked.before(network, (torch.full((1,), float(n)),), {})
        asked.after(network(torch.full((1,), float(n))))
    assert len(calls) == 25
