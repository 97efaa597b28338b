"""The closed-form variance of what a scheduler is given: that of guided features, against draws of the weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from bayesdiff.head.find import find_head
from bayesdiff.propagation.measured import Branches
from bayesdiff.propagation.steps import Direct, DrawnVariance, branches, step_variance
from bayesdiff.tracing.network import Session
from bayesdiff.tracing.rerun import Rerun
from bayesdiff.tracing.step import Probe, Spy
from tests import cases

#: Weight draws; the relative error of their variance is √(2/n), of which five are a rare event.
DRAWS = 4000
MC_TOLERANCE = 5 * math.sqrt(2 / (DRAWS - 1))


@pytest.fixture(scope="module")
def made():
    return cases.guided()


@pytest.fixture(autouse=True)
def as_it_was(made):
    yield
    for name in ("rescale", "interval", "single", "bend", "mix"):
        vars(made[0]).pop(name, None)


class Probed:
    """A pipe's run on record, and its steps."""

    def __init__(self, pipe, posterior, **kwargs):
        given = {"generator": cases.seeds(1, 2), "num_inference_steps": 2, "batch_size": 2, **kwargs}
        self.pipe, self.posterior = pipe, posterior
        self.session = Session(Rerun(pipe, (), given), pipe.unet, find_head(pipe))
        self.session.record()
        self.probe = Probe(self.session)
        self.replay(self.probe)
        self.steps, self.calls = self.probe.steps, self.session.network.calls

    def replay(self, handlers):
        clone = copy.copy(self.pipe)
        vars(clone)["scheduler"] = Spy(self.pipe.scheduler, handlers.on_step)
        self.session.replay(handlers.on_network, None, clone)

    def closed(self, n=0, **kwargs):
        return step_variance(self.steps[n], self.calls, self.posterior, **kwargs)

    def drawn(self, n=0, seed=3):
        """Var[g] at the same x over draws of the weights: by the head alone, and by hand."""
        step = self.steps[n]
        deltas = self.posterior.deviations(DRAWS, torch.Generator().manual_seed(seed)).float()
        parts = []
        for some in deltas.split(500):
            shifts = [self.posterior.geometry.apply(self.calls[c].features, some) for c in step.calls]
            rows = torch.cat(shifts, dim=1).unflatten(1, (-1, len(step.output)))  # (K, branches, B, …)
            parts.append(rows)
        return torch.cat(parts)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("s", [0.0, 1.0, 3.0, 7.5, 15.0])
def test_the_variance_of_what_is_guided(made, s, sequential):
    """ψᵀΣψ is what weight draws give; branches taken as independent give many times as much."""
    made[0].single = False
    run = Probed(*made, scale=s, sequential=sequential)
    closed, rows = run.closed(), run.drawn()
    brute = (rows[:, 0] + s * (rows[:, 1] - rows[:, 0])).var(0)
    assert closed.shape == run.steps[0].output.shape
    assert float((closed / brute - 1).abs().max()) < MC_TOLERANCE
    independent = (1 - s) ** 2 * rows[:, 0].var(0) + s**2 * rows[:, 1].var(0)
    assert s in (0, 1) or float((independent / brute).median()) > 2
    torch.testing.assert_close(run.closed(by_sample=True), closed)


BENDS = {
    "negated": (lambda g: -g, lambda g: -g),
    "scaled": (lambda g: 0.3 * g, lambda g: 0.3 * g),
    "shifted": (lambda g: g + 3, lambda g: g),
    "mirrored": (lambda g: g.flip(-1), lambda g: g.flip(-1)),
}


@pytest.mark.parametrize("name", BENDS)
def test_what_else_is_linear(made, name):
    """The constant feature of the bias is a feature like all others."""
    made[0].bend, of_deviations = BENDS[name]
    run = Probed(*made, scale=3.0)
    rows = run.drawn()
    brute = of_deviations(rows[:, 0] + 3 * (rows[:, 1] - rows[:, 0])).var(0)
    assert float((run.closed() / brute - 1).abs().max()) < MC_TOLERANCE


def test_a_difference_of_branches_is_left_to_the_draws(made):
    """Its constant feature is 0."""

    class Difference(cases.GuidedPipeline):
        @torch.no_grad()
        def __call__(self, batch_size, generator, num_inference_steps):
            self.scheduler.set_timesteps(num_inference_steps)
            x = torch.randn(batch_size, 1, 8, 8, generator=generator[0])
            for t in self.scheduler.timesteps:
                labels = torch.tensor([3] * batch_size + [0] * batch_size)
                f_u, f_c = self.unet(torch.cat([x, x]), t, class_labels=labels).sample.chunk(2)
                x = self.scheduler.step(f_c - f_u, t, x).prev_sample
            return (x,)

    pipe, posterior = made
    run = Probed(Difference(pipe.unet, pipe.scheduler), posterior)
    assert run.steps[0].exact
    rows = run.drawn()
    brute = (rows[:, 1] - rows[:, 0]).var(0)
    assert run.closed() is None
    found = DrawnVariance(
        run.session, Direct(run.session, posterior.geometry, posterior.deviations(DRAWS, torch.Generator()))
    )
    run.replay(found)
    assert float((found.variances[0] / brute - 1).abs().max()) < 2**0.5 * MC_TOLERANCE


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_the_variance_of_a_rescaled_step_is_estimated_from_the_draws(made, rescale):
    made[0].rescale = rescale
    run = Probed(*made, scale=3.0)
    assert run.closed() is None
    deltas = run.posterior.deviations(DRAWS, torch.Generator().manual_seed(5))
    direct = Direct(run.session, run.posterior.geometry, deltas)
    found = DrawnVariance(run.session, direct)
    run.replay(found)
    # By hand, of the nonlinear g', at draws small enough for the derivative.
    small, step = 1e-3, run.steps[0]
    f_u, f_c = run.calls[0].output.sample.chunk(2)

    def given(f_u, f_c):
        g = f_u + 3 * (f_c - f_u)
        return g * (1 - rescale + rescale * f_c.std((-3, -2, -1), keepdim=True) / g.std((-3, -2, -1), keepdim=True))

    torch.testing.assert_close(given(f_u, f_c), step.output)
    rows = small * run.drawn().double()
    brute = (given(f_u + rows[:, 0], f_c + rows[:, 1]) / small).var(0)
    assert float((found.variances[0] / brute - 1).abs().max()) < 2**0.5 * MC_TOLERANCE
    plain = (rows[:, 0] + 3 * (rows[:, 1] - rows[:, 0])).div(small).var(0)
    assert float((plain / brute).median()) > 1.1  # and not that of the guided output
    assert len(found.variances) == 2


def test_direct_terms_are_what_other_weights_do(made):
    run = Probed(*made, scale=3.0)
    delta = run.posterior.deviations(2, torch.Generator().manual_seed(0))
    (shift,) = Direct(run.session, run.posterior.geometry, delta)(0)
    call = run.calls[0]
    with torch.no_grad(), run.session.head.shifted(delta[1]):
        moved = run.session.head.layer(call.features)
        plain = call.output.sample
    torch.testing.assert_close(shift[1], moved - plain, rtol=0, atol=1e-5)
    (by_sample,) = Direct(run.session, run.posterior.geometry, delta, by_sample=True)(0)
    torch.testing.assert_close(by_sample, shift)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_no_step_keeps_tangents(made, scale):
    """The record itself is kept where it is what the scheduler is given, and one tensor of places for all steps."""
    made[0].single = scale == 1
    run = Probed(*made, scale=scale, num_inference_steps=12)
    run.session.trace.purge()
    assert len(run.session.trace.shadows.entries) < 6
    assert len({id(step.places) for step in run.steps}) == 1
    recorded = {call.output.sample.data_ptr() for call in run.calls}
    assert all((step.output.data_ptr() in recorded) == (scale == 1) for step in run.steps)


def test_branches_are_rows_of_one_sample(made):
    pipe = made[0]
    found = branches(Probed(*made, scale=3.0).steps)
    assert found.keys() == {0, 1}
    assert found[0].rows.tolist() == [[0, 2], [1, 3]]
    torch.testing.assert_close(found[0].weights, torch.tensor([[-2.0, 3.0]] * 2).double())
    assert found[0].share.tolist() == pytest.approx([1, 1])
    # In calls of their own each is a share of what the scheduler is given.
    apart = branches(Probed(*made, scale=3.0, sequential=True).steps)
    assert [apart[n].share.tolist() for n in (0, 1)] == [pytest.approx([-2, -2]), pytest.approx([3, 3])]
    assert apart[0].weights.tolist() == [[1], [1]]
    pipe.rescale = 0.7
    assert branches(Probed(*made, scale=3.0).steps) == {}


def test_rows_of_a_sample_are_spread_combined_and_taken():
    rows = torch.tensor([[0, 2], [1, 3]])
    weights = torch.tensor([[-2.0, 3.0]] * 2, dtype=torch.float64)
    found = Branches(rows, weights, torch.ones(2).double())
    x = torch.arange(8.0).view(4, 2)
    assert torch.equal(found.first(x), x[:2])
    assert torch.equal(found.combine(x), -2 * x[:2] + 3 * x[2:])
    assert torch.equal(found.spread(x[:2]), torch.cat([x[:2], x[:2]]))
    alone = Branches.alone(4)
    for take in (alone.first, alone.combine, alone.spread):
        assert torch.equal(take(x), x)
