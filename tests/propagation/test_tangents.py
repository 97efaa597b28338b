"""Tangents from few network calls: on a trained model, and what the second pass makes of all measurements."""

from __future__ import annotations

import dataclasses
from unittest import mock

import diffusers
import pytest
import torch

import bayesdiff as bd
from bayesdiff.propagation import responder
from bayesdiff.propagation.measured import Branches
from bayesdiff.propagation.module import confirmed
from bayesdiff.propagation.plan import plan
from bayesdiff.propagation.response import Response, smoothed
from bayesdiff.propagation.tangents import TangentRun
from tests import cases

#: Networks without training need more calls than others: maps are what is looked at here, not how good they are.
pytestmark = pytest.mark.filterwarnings("ignore:the network's response is not well known")

STEPS = 12


def run(shipped, settings, *, seed=5):
    pipe, posterior = shipped
    settings = dataclasses.replace(settings, generator=torch.Generator().manual_seed(seed))
    return bd.UncertaintyPipeline(pipe, posterior, propagation=settings)(
        ["sneaker", "bag"], num_inference_steps=STEPS, generator=cases.seeds(0, 1)
    )


def agreement(std, reference):
    both = torch.stack([std.flatten(), reference.flatten()]).double()
    return float(torch.corrcoef(both)[0, 1]), float(std.mean() / reference.mean())


def expected_calls(settings):
    """The pipe's own, one more that asks whether the network repeats itself, and the measurements, p at each place."""
    found = plan(tuple(map(float, range(STEPS))), settings.extra_calls, settings.refresh, settings.num_directions)
    sides = 2 if settings.refresh == 1 and (settings.num_directions or 0) >= settings.draws else 1
    return STEPS + 1 + len(found.nodes) * min(found.num_directions, settings.draws) * sides


@pytest.fixture(scope="module")
def fast(shipped):
    return run(shipped, bd.Tangents(draws=16))


def test_few_calls_on_a_trained_model(shipped, fast):
    """Everything but the linearisation taken away, the same draws: what is left is the error of few calls."""
    every = bd.Tangents(draws=16, refresh=1, num_directions=16)
    exact = run(shipped, every)
    assert exact.calls == expected_calls(every)
    assert fast.calls == expected_calls(bd.Tangents(draws=16))
    assert fast.calls <= STEPS * 3.5 + 1
    assert fast.images[0].tobytes() == exact.images[0].tobytes()
    correlation, ratio = agreement(fast.std, exact.std)
    assert correlation > 0.94
    assert 0.85 < ratio < 1.15
    more = run(shipped, bd.Tangents(draws=16, refresh=2, num_directions=10))
    closer, _ = agreement(more.std, exact.std)
    assert closer > 0.97
    assert float(more.residual.max()) < float(fast.residual.max())


def test_many_draws_cost_no_network_calls(shipped, fast):
    many = run(shipped, bd.Tangents(draws=96))
    assert fast.calls == many.calls
    correlation, _ = agreement(fast.std, many.std)
    assert correlation > 0.9  # other draws: √(2/16)/2 = 18 % of noise in each std


def test_tangents_agree_with_an_ensemble_of_a_trained_model(shipped):
    """Other draws, whole nonlinear trajectories: 1/√(2·31) = 13 % of noise in each of the reference's std."""
    reference = run(shipped, bd.Ensemble(members=32), seed=77)
    found = run(shipped, bd.Tangents(draws=64, refresh=2, num_directions=10))
    correlation, ratio = agreement(found.std, reference.std)
    assert correlation > 0.95
    assert 0.85 < ratio < 1.15
    assert reference.calls == STEPS * (1 + 32) + 1


@pytest.fixture(scope="module")
def small():
    pipe = cases.class_pipeline(diffusers.DDIMScheduler(clip_sample=False))
    return pipe, cases.class_posterior(pipe)


def on_small(small, **kwargs):
    pipe, posterior = small
    up = bd.UncertaintyPipeline(
        pipe, posterior, propagation=bd.Tangents(draws=6, refresh=4, num_directions=2, **kwargs)
    )
    return up([0, 2], generator=cases.seeds(4, 5), num_inference_steps=20, output_type="latent")


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_the_second_pass_uses_what_all_measurements_know(small, batch_invariant):
    plain = on_small(small, batch_invariant=batch_invariant).variance
    with mock.patch.object(responder, "smoothed", wraps=smoothed) as spy:
        assert torch.equal(on_small(small, batch_invariant=batch_invariant).variance, plain)
    places = plan(tuple(map(float, range(20))), 2.5, 4, 2).nodes
    assert spy.call_count == (2 if batch_invariant else 1)  # samples that are worked on together
    for call in spy.call_args_list:
        (measured,) = call.args
        assert len(measured) == len(places)
        assert all(chosen.directions.shape[:2] == (1 if batch_invariant else 2, 2) for chosen, _ in measured)

    def silent(measured):  # no response at all
        return [dataclasses.replace(r, **{k: 0 * v for k, v in vars(r).items()}) for r in smoothed(measured)]

    with mock.patch.object(responder, "smoothed", silent):
        assert float((on_small(small, batch_invariant=batch_invariant).variance / plain - 1).abs().max()) > 0.01


def test_measurements_of_a_two_stage_solver_do_not_know_of_each_other():
    pipe = cases.class_pipeline(diffusers.HeunDiscreteScheduler())
    up = bd.UncertaintyPipeline(
        pipe, cases.class_posterior(pipe, 1e4), propagation=bd.Tangents(draws=6, num_directions=2, refresh=2)
    )
    with (
        mock.patch.object(responder, "smoothed", wraps=smoothed) as together,
        mock.patch.object(responder.Response, "fit", wraps=Response.fit) as each,
    ):
        up([0], num_inference_steps=7, generator=cases.seeds(3))
    assert together.call_count == 0
    assert each.call_count > 2
    assert all((*call.args, None)[2] is None and not call.kwargs for call in each.call_args_list)


def test_the_plan_is_told_of_noise_and_stages(small):
    seen = []

    def spy(places, *args, **kwargs):
        seen.append(args[-3:])
        return plan(places, *args, **kwargs)

    pipe, posterior = small
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Tangents(draws=2))
    with mock.patch("bayesdiff.propagation.tangents.plan", spy):
        for eta in (0.0, 0.5):
            up(0, num_inference_steps=4, eta=eta, generator=torch.Generator().manual_seed(0))
        heun = cases.class_pipeline(diffusers.HeunDiscreteScheduler())
        bd.UncertaintyPipeline(heun, posterior, propagation=bd.Tangents(draws=2))(0, num_inference_steps=4)
    assert seen == [(1, False, 1), (1, True, 1), (2, False, 1)]  # the first call is at pure noise


@pytest.mark.parametrize("sequential", [False, True])
def test_directions_that_share_a_network_call(sequential):
    """The same map but for rounding, and the same count."""
    pipe, posterior = cases.guided(torch.float64)
    seen, outputs = [], []
    handle = pipe.unet.conv_in.register_forward_hook(lambda _, __, output: seen.append(len(output)))
    for together in (1, 3, 100):
        seen.clear()
        settings = bd.Tangents(draws=7, refresh=1, num_directions=5, directions_per_call=together)
        up = bd.UncertaintyPipeline(pipe, posterior, propagation=settings)
        outputs.append(up(batch_size=2, generator=cases.seeds(1, 2), num_inference_steps=4, sequential=sequential))
        assert max(seen) == (2 if sequential else 4) * min(together, 5)
    handle.remove()
    for out in outputs[1:]:
        assert out.calls == outputs[0].calls
        torch.testing.assert_close(out.variance, outputs[0].variance, rtol=1e-5, atol=0)


def test_branches_that_are_called_apart_are_followed_as_those_of_one_call():
    """The same map where all draws are measured; on the way to others each branch is extended by itself."""
    pipe, posterior = cases.guided(torch.float64, scale=1e4)

    def both(**kwargs):
        up = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Tangents(draws=6, **kwargs))
        return [
            up(batch_size=2, generator=cases.seeds(1, 2), num_inference_steps=12, scale=4.0, sequential=s)
            for s in (False, True)
        ]

    together, apart = both(refresh=1, num_directions=6)
    assert torch.equal(apart.variance, together.variance)
    together, apart = both()
    assert float((apart.std - together.std).norm() / together.std.norm()) < 0.5  # a network without training
    assert apart.calls - 1 == 2 * (together.calls - 1)  # a call on half as many rows
    torch.testing.assert_close(apart.residual, together.residual, rtol=0.5, atol=0)  # of the worst branch, and of all


def test_rows_with_the_same_tangents_are_branches_of_one_sample():
    x, y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double().unbind(0)
    guided = torch.stack([x, y, x, y])
    known = Branches(torch.tensor([[0, 2], [1, 3]]), torch.tensor([[-2.0, 3.0]] * 2).double(), torch.ones(2).double())
    assert confirmed(known, guided) is known
    # Where the weights are not known they are equal; a weight that is 0 is not read off, but its row is there.
    unknown = confirmed(None, guided)
    assert (unknown.rows.tolist(), unknown.weights.tolist()) == ([[0, 2], [1, 3]], [[0.5, 0.5]] * 2)
    half = Branches(torch.tensor([[2], [3]]), torch.ones(2, 1).double(), torch.ones(2).double())
    zero = confirmed(half, guided)
    assert (zero.rows.tolist(), zero.weights.tolist()) == ([[2, 0], [3, 1]], [[1, 0]] * 2)
    # Deviations that are nothing are not those of one sample.
    assert confirmed(None, 0 * guided).rows.tolist() == [[0], [1], [2], [3]]
    for rows, wrong in (
        (torch.stack([x, y]), None),
        (torch.stack([x, y, x, x + y]), known),
        (torch.stack([x, x, y]), None),
    ):
        assert confirmed(wrong, rows).rows.tolist() == [[r] for r in range(len(rows))]


def test_no_measurement_before_there_are_deviations(small):
    """The first call's input has no tangent: it costs nothing."""
    pipe, posterior = small
    up = bd.UncertaintyPipeline(pipe, posterior, propagation=bd.Tangents(draws=3, refresh=1, num_directions=3))
    with mock.patch.object(TangentRun, "_measure", autospec=True, side_effect=TangentRun._measure) as measured:
        out = up([0], num_inference_steps=3, generator=cases.seeds(0), output_type="latent")
    assert [call.args[2] for call in measured.call_args_list] == [1, 2]
    assert out.calls == 3 + 1 + 2 * 3 * 2
    one = up([0], num_inference_steps=1, generator=cases.seeds(0), output_type="latent")
    assert one.calls == 2
    assert one.residual is None
