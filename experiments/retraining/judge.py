"""Variances of one network's outputs and samples: as retraining has them, and as every method says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import bayesdiff
from bayesdiff.diffusion.noising import noised
from bayesdiff.io import atomic_path
from experiments.common import seeded
from experiments.retraining.methods import Base, Sizes, Weights, outputs, samples
from experiments.retraining.problems import Problem
from experiments.retraining.train import kept

TIMESTEPS = (20, 100, 250, 500, 750, 950)


@dataclass(frozen=True)
class Points:
    """Where networks are compared: held-out images with one noise, and initial noises.

    Args:
        problem: The problem.
        images: Held-out images.
        noises: Initial noises.
        steps: Of DDIM.
    """

    problem: Problem
    images: int
    noises: int
    steps: int

    def one_step(self, weights: list[Weights], t: int) -> Tensor:
        """Outputs ``(K, images, …)`` float64 at t."""
        x, times, _, given = self.noisy(t)
        return outputs(self.problem, weights, x, times, given).double()

    def noisy(self, t: int) -> tuple[Tensor, Tensor, Tensor, Weights]:
        """x_t, t, ε and the conditioning."""
        data = self.problem.heldout(self.images)
        noise = torch.randn(data["images"].shape, generator=seeded(11))
        times = torch.full((self.images,), t)
        x, wanted = noised(self.problem.scheduler, data["images"].double(), noise.double(), times)
        return x.float(), times, wanted.float(), {k: v for k, v in data.items() if k != "images"}

    def initial(self) -> tuple[Tensor, Weights]:
        """x_T and the conditioning."""
        data = self.problem.heldout(self.noises)
        noise = torch.randn(data["images"].shape, generator=seeded(12))
        return noise, {k: v for k, v in data.items() if k != "images"}

    def sample(self, weights: list[Weights], **about: Any) -> Tensor:
        """Samples ``(K, noises, …)`` float64."""
        noise, given = self.initial()
        return samples(self.problem, weights, noise, given, self.steps, **about).double()


def retrained(points: Points, folder: Path) -> dict[str, Tensor]:
    """Outputs and samples of all networks, by ``"t=…"`` and ``"sample"``: ``(networks, …)``."""
    found = [kept(folder, points.problem, k) for k in range(points.problem.recipe.networks)]
    weights = [w for w in found if w is not None]
    return {**{f"t={t}": points.one_step(weights, t) for t in TIMESTEPS}, "sample": points.sample(weights)}


def gap(base: Base, points: Points, count: int, draws: int) -> list[dict[str, float]]:
    """By t, the loss on images that the network has not seen minus that on its own, with the same fresh noise.

    Half of it is what the spread over data sets adds to the loss (as in Akaike's and Takeuchi's criteria), in squared units
    of the output.

    Args:
        base: The network.
        points: Whose held-out images are not used here.
        count: Images on either side.
        draws: Noises of each.
    """
    problem = base.problem
    own = problem.data(base.number)
    size = min(count, len(own["images"]))
    more = problem.heldout(points.images + size)
    other = {k: v[points.images :] for k, v in more.items()}
    rows = []
    for t in TIMESTEPS:
        generator = seeded(13 + t)
        losses = torch.zeros(2, size, dtype=torch.float64)
        for _ in range(draws):
            noise = torch.randn((size, *own["images"].shape[1:]), generator=generator)
            for side, data in enumerate((own, other)):
                for part in torch.arange(size).split(problem.rows):
                    times = torch.full((len(part),), t)
                    x, wanted = noised(problem.scheduler, data["images"][part].double(), noise[part].double(), times)
                    given = {k: v[part] for k, v in data.items() if k != "images"}
                    f = outputs(problem, [base.weights], x.float(), times, given)[0].double()
                    losses[side, part] += (f - wanted).square().flatten(1).mean(1) / draws
        difference = losses[1] - losses[0]  # the same noise on both sides
        rows.append(
            {
                "t": t, "own": float(losses[0].mean()), "other": float(losses[1].mean()), "gap": float(difference.mean()),
                "se": float(difference.std() / size**0.5),
            }
        )  # fmt: skip
    return rows


def judged(
    base: Base, points: Points, others: Sequence[int], gap_size: tuple[int, int], refit_draws: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Variances by ``method|place``, and what was measured of the head's share of the loss gap."""
    maps: dict[str, Tensor] = {}
    sizes = base.sizes

    def drawn(name: str, weights: list[Weights], one_step: bool = True) -> None:
        for t in TIMESTEPS if one_step else ():
            maps[f"{name}|t={t}"] = points.one_step(weights, t).var(0)
        maps[f"{name}|sample"] = points.sample(weights).var(0)

    heads = base.heads()
    for name, posterior in heads.items():
        for t in TIMESTEPS:
            x, times, _, given = points.noisy(t)
            maps[f"{name}|t={t}"] = posterior.variance(base.observed(x, times, given)[0]).double()
        drawn(name, base.with_heads(posterior.sample(sizes.draws, seeded(7))), one_step=False)
    maps["sandwich, as shipped|sample"] = shipped(base, points).double()

    gaps = gap(base, points, *gap_size)
    shares = {row["t_low"]: row for row in base.posterior.shares()}
    factors = {}
    for row in gaps:
        share = shares[max(low for low in shares if low <= row["t"])]["share_between"]
        head = float(maps[f"sandwich|t={row['t']}"].mean())
        row |= {"head": head, "share_between": share, "factor": max(0.0, row["gap"] / 2) / (head * share)}
        factors[float(row["t"])] = row["factor"]
        maps[f"sandwich × loss gap|t={row['t']}"] = maps[f"sandwich|t={row['t']}"] * row["factor"]
    weights = base.with_heads(heads["sandwich"].sample(sizes.draws, seeded(7)))
    maps["sandwich × loss gap|sample"] = points.sample(weights, base=base.weights, factor=factors).var(0)

    drawn("bootstrap refits of the head", base.with_heads(base.bootstrap(refit_draws)))
    elsewhere = [k for k in others if k != base.number]
    drawn(
        "head refitted on the others' data",
        base.with_heads(base.on_other_data(elsewhere, min(300, len(base.data["images"])), refit_draws)),
    )
    subsets = []
    for k in range(sizes.subsets):
        indices = base.random_indices(sizes.subset, 40 + k)
        some = base.subset(indices, max(2, sizes.draws // sizes.subsets), 50 + k)
        subsets.append(
            {**{f"t={t}": points.one_step(some, t).var(0) for t in TIMESTEPS}, "sample": points.sample(some).var(0)}
        )
    for place in subsets[0]:
        maps[f"random subset|{place}"] = torch.stack([s[place] for s in subsets]).mean(0)
    if sizes.whole:
        everything = torch.arange(sum(w.numel() for w in base.weights.values()))
        drawn("all weights, GGN", base.subset(everything, sizes.draws, 60))
    return maps, {"gap": gaps, "noise_variance": base.posterior.noise_variance.tolist()}


def shipped(base: Base, points: Points) -> Tensor:
    """Variance at the sample by :func:`bayesdiff.propagate` with its defaults."""
    noise, given = points.initial()
    scheduler = type(base.problem.scheduler).from_config(base.problem.scheduler.config)
    scheduler.set_timesteps(points.steps)

    def sampler(x: Tensor) -> Tensor:
        for t in scheduler.timesteps:
            x = scheduler.step(base.network(x, t.expand(len(x)), **given, return_dict=False)[0], t, x).prev_sample
        return x

    with torch.no_grad():
        propagation = bayesdiff.Tangents(schedule=scheduler)
        return bayesdiff.propagate(sampler, base.network, base.posterior, noise, propagation=propagation).variance


def kept_or_judged(
    number: int,
    points: Points,
    folder: Path,
    sizes: Sizes,
    others: Sequence[int],
    gap_size: tuple[int, int],
    refit_draws: int,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """:func:`judged`, from its file if there is one of the same settings."""
    path = folder / f"judged-{number:02d}.safetensors"
    identity = repr((sizes, points.images, points.noises, points.steps, list(others), gap_size, refit_draws))
    if path.exists():
        with safe_open(path, framework="pt") as file:
            if file.metadata()["identity"] == identity:
                return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["measured"])  # noqa: SIM118
    maps, measured = judged(Base(points.problem, folder, number, sizes), points, others, gap_size, refit_draws)
    with atomic_path(path) as temporary:
        save_file(
            {k: v.contiguous() for k, v in maps.items()},
            temporary,
            {"identity": identity, "measured": json.dumps(measured)},
        )
    return maps, measured
