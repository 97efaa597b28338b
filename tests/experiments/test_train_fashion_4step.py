"""Progressive distillation: the target, the times, and the conversion between what networks predict."""

from __future__ import annotations

import pytest
import torch

from experiments.train_fashion_4step.distill import build_scheduler, coefficients, ddim, from_v, grid, target
from experiments.train_fashion_ddpm.train import build_unet


def test_four_steps_of_the_scheduler_hit_the_trained_times():
    scheduler = build_scheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == grid(4).tolist()[:-1] == [999, 749, 499, 249]
    assert grid(4)[-1] == -1
    for steps in (4, 8, 16):
        assert grid(2 * steps)[::2].equal(grid(steps))


def test_one_step_to_the_target_arrives_where_two_steps_do():
    """By diffusers' own DDIM step, with v as the network's output."""

    def teacher(z, t, labels):
        return 0.3 * z + 0.001 * t.view(-1, 1, 1, 1) + 0.1 * labels.view(-1, 1, 1, 1)

    scheduler, fine = build_scheduler(), grid(8)
    scheduler.set_timesteps(4)
    labels = torch.tensor([1, 2])
    for k in range(4):
        t, half, to = (fine[2 * k + j].expand(2) for j in range(3))
        z = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(k))
        v = target(teacher, z, t, half, to, labels)
        two = ddim(teacher, ddim(teacher, z, t, half, labels), half, to, labels)
        assert torch.allclose(scheduler.step(v, int(t[0]), z).prev_sample, two, atol=2e-5)


def test_v_is_turned_into_the_image():
    torch.manual_seed(0)
    unet = build_unet().eval()
    z, t, y = torch.randn(2, 1, 28, 28), torch.tensor([249, 999]), torch.tensor([3, 10])
    a, sigma = coefficients(t)
    with torch.no_grad():
        x, v = from_v(unet)(z, t, y), unet(z, t, class_labels=y).sample
    # v = a ε − σ x with ε = (z − a x)/σ
    assert torch.allclose(a * (z - a * x) / sigma - sigma * x, v, atol=1e-5)
    assert coefficients(torch.tensor([-1]))[0].item() == pytest.approx(1.0)
    assert coefficients(torch.tensor([-1]))[1].item() == 0.0
