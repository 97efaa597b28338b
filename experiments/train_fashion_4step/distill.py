r"""Progressive distillation (Salimans & Ho 2022) of ``fashion-ddpm``: a student step does two DDIM steps of its teacher.

With z = a x + σ ε at time t, the teacher goes by DDIM to the next but one time of its grid and arrives at z″ there. The
student's target is the x̃ that one DDIM step would have to predict to arrive at the same point (their appendix G),

.. math:: \tilde x = \frac{z'' - (σ''/σ)\, z}{a'' - (σ''/σ)\, a}, \qquad
          \tilde v = a\,\frac{z - a\tilde x}{σ} - σ\,\tilde x,

and it learns ṽ by least squares (weight SNR + 1 on x̃). Stages: 32 steps of fashion-ddpm to 16, to 8, to 4. The first
teacher predicts ε, all students v, which stays well-conditioned at the noisy end. Null labels with probability 0.1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Generator, Tensor

from experiments.train_earth.train import Run, Settings, averaged
from experiments.train_fashion_ddpm.train import NULL_CLASS, build_unet, to_model_space

STAGES = (16, 8, 4)  # steps of the students; the first teacher takes 32
NULL_PROBABILITY = 0.1

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]  # (z, t, labels) to x̂


def build_scheduler() -> DDIMScheduler:
    """Four steps hit the times that were trained: 999, 749, 499, 249, and then x0."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def grid(steps: int) -> Tensor:
    """The times of ``steps`` DDIM steps, noisiest first, and −1, which stands for x0; grids of halves are nested."""
    times = 1000 - torch.arange(steps, dtype=torch.float64) * 1000 / steps
    return torch.cat([times.round().long() - 1, torch.tensor([-1])])


def coefficients(times: Tensor) -> tuple[Tensor, Tensor]:
    """A and σ ``(B, 1, 1, 1)`` float32 at ``times``; 1 and 0 at time −1."""
    alphas = build_scheduler().alphas_cumprod.double()
    alpha = torch.where(times < 0, 1.0, alphas[times.clamp(min=0)]).view(-1, 1, 1, 1)
    return alpha.sqrt().float(), (1 - alpha).sqrt().float()


def ddim(denoise: Denoise, z: Tensor, t: Tensor, to: Tensor, labels: Tensor) -> Tensor:
    """One deterministic DDIM step."""
    a, sigma = coefficients(t)
    a_to, sigma_to = coefficients(to)
    x = denoise(z, t, labels)
    return a_to * x + sigma_to * (z - a * x) / sigma


def from_epsilon(unet: UNet2DModel) -> Denoise:
    """X̂ of a network that predicts ε, in float32: its rounding is divided by a, 0.006 at the noisy end."""

    def denoise(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        a, sigma = coefficients(t)
        with torch.autocast("cpu", enabled=False):
            return (z - sigma * unet(z, t, class_labels=labels).sample) / a

    return denoise


def from_v(unet: UNet2DModel) -> Denoise:
    """X̂ of a network that predicts v."""

    def denoise(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        a, sigma = coefficients(t)
        return a * z - sigma * unet(z, t, class_labels=labels).sample.float()

    return denoise


def target(teacher: Denoise, z: Tensor, t: Tensor, half: Tensor, to: Tensor, labels: Tensor) -> Tensor:
    """ṽ: what the student shall predict at (z, t) to arrive where two steps of the teacher do."""
    arrived = ddim(teacher, ddim(teacher, z, t, half, labels), half, to, labels)
    a, sigma = coefficients(t)
    a_to, sigma_to = coefficients(to)
    x = (arrived - sigma_to / sigma * z) / (a_to - sigma_to / sigma * a)
    return a * (z - a * x) / sigma - sigma * x


def stage_settings(steps: int, updates: int, seed: int) -> Settings:
    """The first stage learns another parametrization, the last the longest way: more updates for both."""
    share = {16: 0.3, 8: 0.25, 4: 0.45}[steps]
    return Settings(
        round(share * updates), batch_size=32, learning_rate=1e-3, warmup=20, ema_decay=0.98, seed=seed + steps
    )


def distill(unet: UNet2DModel, images: Tensor, labels: Tensor, work: Path, *, updates: int, seed: int = 0) -> None:
    """Run the stages; each has a folder of its own in ``work``, and finished ones are not run again.

    Args:
        unet: ``fashion-ddpm``, which predicts ε.
        images: uint8 ``(N, 28, 28)``.
        labels: int64 ``(N,)``.
        work: For checkpoints.
        updates: Of all stages together.
        seed: Of the draws.
    """
    weights = unet.state_dict()
    teacher = from_epsilon(unet.eval().requires_grad_(False))
    for steps in STAGES:
        student = build_unet()
        student.load_state_dict(weights)
        fine, run = grid(2 * steps), Run(student, stage_settings(steps, updates, seed), work / f"stage-{steps}")
        batch = run.settings.batch_size

        def loss_of(
            step: int,
            generator: Generator,
            *,
            student: UNet2DModel = student,
            teacher: Denoise = teacher,
            fine: Tensor = fine,
            batch: int = batch,
        ) -> Tensor:
            index = torch.randint(len(images), (batch,), generator=generator)
            at = 2 * torch.randint(len(fine) // 2, (batch,), generator=generator)
            null = torch.rand(batch, generator=generator) < NULL_PROBABILITY
            y = torch.where(null, NULL_CLASS, labels[index])
            noise = torch.randn((batch, 1, 28, 28), generator=generator)
            a, sigma = coefficients(fine[at])
            z = a * to_model_space(images[index]) + sigma * noise
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    v = target(teacher, z, fine[at], fine[at + 1], fine[at + 2], y)
                output = student(z, fine[at], class_labels=y).sample
            return (output.float() - v).square().mean()

        run.train(loss_of)
        weights = averaged(work / f"stage-{steps}")[0]
        trained = build_unet().eval().requires_grad_(False)
        trained.load_state_dict(weights)
        teacher = from_v(trained)
