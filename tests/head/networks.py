"""Networks whose output layers are found, and fitted, in one way or another: what follows the head differs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Layers by name, with fixed random weights, and what is done with them; takes what a denoising network takes."""

    def __init__(self, run: Callable[[Net, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
        self.eval()

    def forward(self, x: Tensor, timestep: Tensor | None = None, return_dict: bool = False) -> tuple[Tensor]:
        return (self.run(self, x),)


def mlp() -> Net:
    """Vectors ``(B, 5)``."""
    return Net(lambda n, x: n.last(n.first(x).tanh()), first=nn.Linear(5, 7), last=nn.Linear(7, 5))


def trajectory() -> Net:
    """``(B, H, A)``, a token for each time."""
    return Net(lambda n, x: n.last(n.first(x).tanh()), first=nn.Linear(3, 7), last=nn.Linear(7, 3, bias=False))


def series() -> Net:
    """``(B, C, L)``, negated."""
    return Net(
        lambda n, x: -n.last(n.first(x).tanh()), first=nn.Conv1d(2, 4, 3, padding=1), last=nn.Conv1d(4, 2, 3, padding=1)
    )


def volume() -> Net:
    """``(B, C, F, H, W)`` by a three-dimensional convolution, mirrored."""
    last = nn.Conv3d(3, 2, 3, padding=1, padding_mode="replicate")
    return Net(lambda n, x: n.last(n.first(x).tanh()).flip(-1), first=nn.Conv3d(2, 3, 1), last=last)


def frames(order: str = "BF", drop: int = 0) -> Net:
    """``(B, C, F, H, W)``, a two-dimensional convolution on all frames; the first ``drop`` are made and thrown away."""

    def run(n: Net, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, :1]] * drop + [x], dim=2)
        rows = x.transpose(1, 2).flatten(0, 1) if order == "BF" else x.permute(2, 0, 1, 3, 4).flatten(0, 1)
        rows = n.last(n.first(rows).tanh())
        sizes = (len(x), x.shape[2]) if order == "BF" else (x.shape[2], len(x))
        rows = rows.unflatten(0, sizes)
        return (rows.transpose(1, 2) if order == "BF" else rows.permute(1, 2, 0, 3, 4))[:, :, drop:]

    return Net(run, first=nn.Conv2d(2, 4, 3, padding=1), last=nn.Conv2d(4, 2, 3, padding=1))


def patches(text: int = 0, ragged: bool = False) -> Net:
    """Images ``(B, 2, 4, 6)`` in tokens of 2 × 2, after ``text`` tokens that the head is applied to, too, and that are dropped.

    With ``ragged`` all tokens of a batch are one sequence, as sample i has i text tokens more.
    """

    def run(n: Net, x: Tensor) -> Tensor:
        b = len(x)
        tokens = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # (B, 6, 8)
        before = [text + (i if ragged else 0) for i in range(b)]
        rows = [torch.cat([n.prompt.expand(k, -1), t]) for k, t in zip(before, tokens, strict=True)]
        hidden = n.first(torch.cat(rows)).tanh()
        out = n.last(hidden if ragged else hidden.unflatten(0, (b, -1)))
        parts = out.split([k + 6 for k in before]) if ragged else out
        image = torch.stack([p[k:] for k, p in zip(before, parts, strict=True)]).unflatten(1, (2, 3))
        return image.unflatten(-1, (2, 2, 2)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    net = Net(run, first=nn.Linear(8, 7), last=nn.Linear(7, 8))
    net.register_buffer("prompt", torch.randn(8, generator=torch.Generator().manual_seed(1)))
    return net
