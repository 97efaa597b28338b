"""Weights over t: one loss on x0, whatever the network predicts."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from bayesdiff.checks import ArgumentError, ShapeError
from bayesdiff.diffusion.parametrization import alpha_sigma, clean_coefficients, prediction_type
from bayesdiff.diffusion.weighting import P2, MinSNR, as_weighting
from tests import cases

SCHEDULERS = {
    "epsilon": cases.scheduler(),
    "v_prediction": cases.scheduler(prediction_type="v_prediction"),
    "sample": cases.scheduler(prediction_type="sample"),
    "flow": FlowMatchEulerDiscreteScheduler(),
}
T = torch.tensor([1, 50, 400, 700, 999])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_weights_are_those_of_the_loss_on_x0(name):
    scheduler = SCHEDULERS[name]
    min_snr, p2 = (as_weighting(w)(scheduler, T) for w in ("min-snr", "p2"))
    for i, t in enumerate(T):
        alpha, sigma = (float(v) for v in alpha_sigma(scheduler, t))
        snr = alpha**2 / sigma**2
        _, b = clean_coefficients(prediction_type(scheduler), alpha, sigma)
        assert float(min_snr[i]) == pytest.approx(min(snr, 5) * b**2)
        # P2's loss is on ε; ε's error is α/σ that of x0.
        assert float(p2[i]) == pytest.approx(snr * b**2 / (1 + snr))
    if name == "epsilon":  # as the papers have it
        alpha, sigma = alpha_sigma(scheduler, T)
        snr = (alpha / sigma).square()
        torch.testing.assert_close(min_snr, snr.clamp(max=5) / snr)
        torch.testing.assert_close(p2, 1 / (1 + snr))


def test_ends_of_the_schedule():
    zero = cases.scheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert bool(torch.isfinite(as_weighting("min-snr")(zero, torch.tensor([0, 999]))).all())
    flow = SCHEDULERS["flow"]
    torch.testing.assert_close(
        as_weighting("min-snr")(flow, torch.tensor([0.0, 1000.0]).double()), torch.zeros(2).double()
    )
    zero_epsilon = cases.scheduler(rescale_betas_zero_snr=True)
    assert as_weighting("min-snr")(zero_epsilon, torch.tensor([999])).item() == 1


def test_settings_and_functions():
    scheduler = SCHEDULERS["epsilon"]
    snr = (lambda a, s: (a / s).square())(*alpha_sigma(scheduler, T))
    torch.testing.assert_close(as_weighting(MinSNR(1.0))(scheduler, T), 1 / snr.clamp(min=1))
    torch.testing.assert_close(as_weighting(P2(2.0, 3.0))(scheduler, T), (3 + snr) ** -2)
    torch.testing.assert_close(as_weighting(lambda u: 1 - u)(scheduler, T), 1 - T.double() / 1000)
    for by_bin in ("uniform", "noise", torch.ones(10), "anything"):
        assert as_weighting(by_bin) is None
    with pytest.raises(ShapeError, match="weights"):
        as_weighting(lambda u: u[:1])(scheduler, T)
    for bad in (lambda u: -u, lambda u: u / 0):
        with pytest.raises(ArgumentError, match="loss_weights >= 0"):
            as_weighting(bad)(scheduler, T)
    for make in (lambda: MinSNR(0), lambda: P2(-1), lambda: P2(1, 0)):
        with pytest.raises(ArgumentError, match=r"gamma|k"):
            make()
