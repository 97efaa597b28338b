"""Train a problem's networks, some at once or one by one; a network that is kept is not trained again."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call, vmap
from tqdm import tqdm

from bayesdiff.diffusion.noising import noised
from bayesdiff.io import atomic_path
from experiments.retraining.problems import Problem

WARMUP = 100

Weights = dict[str, Tensor]


def rate(step: int, steps: int) -> float:
    """Factor of the learning rate: a linear warm-up, then a cosine to zero."""
    warmup = min(WARMUP, steps // 4)
    return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def kept(folder: Path, problem: Problem, number: int) -> dict[str, Tensor] | None:
    """The weights of a network that was trained by this recipe."""
    path = folder / f"network-{number:02d}.safetensors"
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
        if recipe != _identity(problem):
            raise ValueError(
                f"{path} was trained by {recipe}, expected {_identity(problem)}; give another --work folder"
            )
        return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def _identity(problem: Problem) -> dict[str, float]:
    """Of a recipe: what makes a network what it is."""
    recipe = {k: v for k, v in asdict(problem.recipe).items() if k not in ("networks", "together")}
    return recipe if recipe.pop("same_data") is False else {**recipe, "same_data": True}


def train(problem: Problem, folder: Path, rounds: int | None = None) -> int:
    """Train networks that are missing, in ``rounds`` rounds of some at once; returns how many still are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [k for k in range(problem.recipe.networks) if kept(folder, problem, k) is None]
    together = problem.recipe.together
    now = missing if rounds is None else missing[: rounds * together]
    for first in range(0, len(now), together):
        numbers = now[first : first + together]
        for number, weights in zip(numbers, trained(problem, numbers), strict=True):
            with atomic_path(folder / f"network-{number:02d}.safetensors") as path:
                save_file(weights, path, {"recipe": json.dumps(_identity(problem))})
    return len(missing) - len(now)


def trained(problem: Problem, numbers: list[int]) -> list[dict[str, Tensor]]:
    """The averaged weights of these networks.

    Each has data, initial weights and draws of its own, whatever is trained beside it.
    """
    recipe, scheduler = problem.recipe, problem.scheduler
    networks = []
    for number in numbers:
        torch.manual_seed(1_000_003 * (1 + number))
        networks.append(problem.build())
    network = networks[0].train()
    weights = {
        k: torch.stack([dict(n.named_parameters())[k].detach() for n in networks])
        for k, _ in network.named_parameters()
    }
    for w in weights.values():
        w.requires_grad_()
    average = {k: w.detach().clone() for k, w in weights.items()}
    datasets = [problem.data(number) for number in numbers]
    data = {k: torch.stack([d[k] for d in datasets]) for k in datasets[0]}
    generators = [torch.Generator().manual_seed(7_000_003 * (1 + number)) for number in numbers]
    optimizer = torch.optim.AdamW(weights.values(), lr=recipe.rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe.steps))
    shape = data["images"].shape[2:]
    for step in (bar := tqdm(range(recipe.steps), desc=f"networks {numbers[0]}–{numbers[-1]}", mininterval=10)):
        rows, t, noise = (
            torch.stack(x)
            for x in zip(*[_draw(g, recipe.batch, recipe.size, shape) for g in generators], strict=True)
        )  # fmt: skip
        batch = {k: torch.stack([v[r] for v, r in zip(values, rows, strict=True)]) for k, values in data.items()}
        clean = batch.pop("images")
        pair = noised(scheduler, clean.flatten(0, 1), noise.flatten(0, 1), t.flatten())
        noisy, wanted = (x.float().view(clean.shape) for x in pair)
        output = _outputs(problem, network, weights, noisy, t, batch)
        loss = (output - wanted).square().flatten(1).mean(1)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        schedule.step()
        decay = min(recipe.average, (step + 1) / (step + 11))
        for k, w in weights.items():
            average[k].lerp_(w.detach(), 1 - decay)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{float(loss.detach().mean()):.4f}", refresh=False)
    return [{k: w[i].clone() for k, w in average.items()} for i in range(len(numbers))]


def _draw(generator: torch.Generator, batch: int, size: int, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, timesteps spread evenly over the schedule, and noise."""
    rows = torch.randint(size, (batch,), generator=generator)
    u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return rows, (u * 1000).long().clamp(max=999), torch.randn((batch, *shape), generator=generator)


def _outputs(
    problem: Problem, network: nn.Module, weights: Weights, noisy: Tensor, t: Tensor, batch: Weights
) -> Tensor:
    """Outputs of all networks, each on its own rows."""

    def one(w: Weights, x: Tensor, t: Tensor, given: Weights) -> Tensor:
        return functional_call(network, w, (x, t), {**given, "return_dict": False})[0]

    if problem.vmapped:
        return vmap(one)(weights, noisy, t, batch)
    return torch.stack(
        [
            one({k: w[i] for k, w in weights.items()}, noisy[i], t[i], {k: v[i] for k, v in batch.items()})
            for i in range(len(noisy))
        ]
    )


def network(problem: Problem, weights: dict[str, Tensor]) -> nn.Module:
    """A problem's network with these weights, for evaluation."""
    made = problem.build().eval()
    made.load_state_dict(weights)
    return made.requires_grad_(False)
