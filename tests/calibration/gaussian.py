"""Gaussian data x_0 ~ N(0, C), and the network that knows them: E[ε | x_t] is linear, and all variances are known."""

from __future__ import annotations

import diffusers
import torch
from torch import Tensor, nn

from bayesdiff.diffusion.parametrization import alpha_sigma

SIZE = 8
SHAPE = (2, 2, 2)


class Exact(nn.Module):
    """f(x, t) = U diag(σ/(α²c + σ²)) Uᵀx, with U as its output layer, for C = U diag(c) Uᵀ."""

    def __init__(self, scheduler: diffusers.SchedulerMixin) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        u = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)).Q
        self.scheduler = scheduler
        self.register_buffer("c", torch.logspace(-2, 0.5, SIZE, dtype=torch.float64))
        self.register_buffer("u", u)
        self.head = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.float64)
        self.head.weight.data = u.clone()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = torch.as_tensor(t).reshape(-1).expand(len(x))
        alpha, sigma = (v[:, None] for v in alpha_sigma(self.scheduler, t))
        gain = sigma / (alpha**2 * self.c + sigma**2)
        return self.head(gain * (x.flatten(1).double() @ self.u)).view(x.shape)

    def variance(self, t: float) -> Tensor:
        """Var[x_0 | x_t], ``(SIZE,)``."""
        alpha, sigma = alpha_sigma(self.scheduler, torch.tensor(t))
        return self.u.square() @ (self.c * sigma**2 / (alpha**2 * self.c + sigma**2))

    def data(self, number: int, seed: int = 1) -> Tensor:
        """x_0, ``(number, *SHAPE)``."""
        z = torch.randn(number, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (z * self.c.sqrt() @ self.u.mT).view(number, *SHAPE)


def call(network: nn.Module, x: Tensor, t: Tensor, batch: dict) -> Tensor:
    return network(x, t)


def made() -> tuple[Exact, diffusers.DDIMScheduler]:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return Exact(scheduler).eval(), scheduler
