r"""What can be said of a network's weights without training another: draws of weights, each method's own.

All head methods draw (C, D) heads; the others draw some or all weights of the network:

``random subset``, ``all weights``
    A Laplace approximation with the whole GGN of these weights, :math:`H = \frac{NM}{n}\sum J^\top J/\sigma_t^2 + \tau I`, after
    FLARE (arXiv 2602.09170), which takes 40 % of the weights by chance and a unit noise variance; here the noise variances are
    those of the head's posterior and NM draws are counted, so that sizes can be compared. τ is MacKay's fixed point.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap

import bayesdiff
from bayesdiff.diffusion.noising import noised
from bayesdiff.head.find import Head, find_head
from bayesdiff.rng import orthogonal_normal
from experiments.common import seeded
from experiments.posterior_check.refits import least_squares, resample
from experiments.retraining.problems import Problem
from experiments.retraining.train import kept, network

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """How much is spent.

    Args:
        images: Of a network's own data that a posterior is fitted to.
        draws_per_image: m of it.
        draws: Weight draws of a method.
        refits: Bootstrap refits of the head.
        subset: Weights in a random subset.
        subsets: How many subsets.
        pairs: (image, t, ε) that curvatures of whole networks are taken from.
        whole: Whether all weights are tried.
    """

    images: int = 1000
    draws_per_image: int = 8
    draws: int = 64
    refits: int = 40
    subset: int = 500
    subsets: int = 3
    pairs: int = 2000
    whole: bool = False


class Base:
    """One of the networks, whose spread over trainings is asked for.

    Args:
        problem: Its problem.
        folder: Of the trained networks.
        number: Which.
        sizes: How much is spent.
    """

    def __init__(self, problem: Problem, folder: Path, number: int, sizes: Sizes) -> None:
        weights = kept(folder, problem, number)
        assert weights is not None
        self.problem, self.number, self.sizes, self.weights = problem, number, sizes, weights
        self.network = network(problem, weights)
        self.head: Head = find_head(self.network)
        self.data = {k: v[: sizes.images] for k, v in problem.data(number).items()}

    def fit(self, data: dict[str, Tensor]) -> bayesdiff.LaplacePosterior:
        """The posterior of N images with M draws each, as the package makes it."""
        return bayesdiff.fit(
            self.network, data, scheduler=self.problem.scheduler, dataset_size=self.problem.recipe.size,
            training_draws=self.problem.recipe.training_draws, draws_per_image=self.sizes.draws_per_image, space="samples",
            generator=seeded(100 + self.number), progress=False,
        )  # fmt: skip

    @cached_property
    def posterior(self) -> bayesdiff.LaplacePosterior:
        return self.fit(self.data)

    @cached_property
    def posterior_heldout(self) -> bayesdiff.LaplacePosterior:
        """The same from images that the network has not seen, in the place of its own."""
        more = self.problem.heldout(1000 + self.sizes.images)
        return self.fit({k: v[1000:] for k, v in more.items()})

    def heads(self) -> dict[str, bayesdiff.LaplacePosterior]:
        """Posteriors of the head."""
        own = self.posterior
        return {
            "sandwich": own,
            "sandwich, held-out images": self.posterior_heldout,
            "GGN": own.recut(covariance="ggn"),
            "diagonal EF": own.recut(covariance="ef", structure="diag"),
        }

    def with_heads(self, heads: Tensor) -> list[Weights]:
        """All weights, with other heads ``(K, C, D)``."""
        path = self.head.path
        out = []
        for w in heads.float():
            like = self.weights[f"{path}.weight"]
            out.append(
                {**self.weights, f"{path}.weight": w[:, :-1].reshape(like.shape), f"{path}.bias": w[:, -1].clone()}
            )
        return out

    def observed(self, x: Tensor, t: Tensor, given: Weights) -> tuple[Tensor, Tensor]:
        """What enters the head for noisy samples, and the output."""
        found: list[Tensor] = []
        handle = self.network.get_submodule(self.head.path).register_forward_pre_hook(
            lambda _, args: found.append(args[0])
        )
        try:
            with torch.no_grad():
                output = self.network(x, t, **given, return_dict=False)[0]
        finally:
            handle.remove()
        return found[0], output

    def _steps(
        self, data: dict[str, Tensor], draws: int, seed: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Weights]]:
        """Training steps on some data, ``draws`` of each image in turn: x_t, t, target, conditioning."""
        images = data["images"]
        many = max(1, self.problem.rows // draws)
        generator = seeded(seed)
        for rows in torch.arange(len(images)).split(many):
            rows = rows.repeat_interleave(draws)
            t = torch.randint(1000, (len(rows),), generator=generator)
            noise = torch.randn((len(rows), *images.shape[1:]), generator=generator)
            x, wanted = noised(self.problem.scheduler, images[rows].double(), noise.double(), t)
            given = {k: v[rows] for k, v in data.items() if k != "images"}
            yield x.float(), t, wanted.float(), given

    def refits(self, data: dict[str, Tensor], draws: int, counts: Tensor, seed: int) -> Tensor:
        """Heads fitted by least squares to draws of some data, through this network's features: W + δW ``(R, C, D)``.

        Args:
            data: The images.
            draws: Of each, fresh.
            counts: How often each image is in each refit, ``(R, n)``.
            seed: Of the draws.
        """
        weight = self.head.weight().cpu()
        tokens = self.head.geometry.kind == "linear"  # the draws of an image are then rows of one item

        def stream() -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
            first = 0
            for x, t, wanted, given in self._steps(data, draws, seed):
                phi, output = self.observed(x, t, given)
                residual = wanted - output
                if tokens:
                    phi, residual = phi.unflatten(0, (-1, draws)), residual.unflatten(0, (-1, draws))
                yield first, phi, residual, torch.ones(len(phi), dtype=torch.float64)
                first += len(phi)

        by_item = counts if tokens else counts.repeat_interleave(draws, 1)
        found, _ = least_squares(self.head.geometry, stream(), by_item, weight, float(self.posterior.prior_precision))
        return weight + found

    def bootstrap(self, draws: int) -> Tensor:
        """Refits on its own images, resampled, with fresh draws; scaled from the images used to N."""
        n = len(self.data["images"])
        counts = resample(n, 1, 1, self.sizes.refits, seeded(self.number))
        heads = self.refits(self.data, draws, counts, 300 + self.number)
        mean = heads.mean(0)
        return mean + (heads - mean) * (n / self.problem.recipe.size) ** 0.5

    def on_other_data(self, others: list[int], images: int, draws: int) -> Tensor:
        """Refits on what other networks were trained on: what the head alone would have been, had its data been theirs."""
        heads = []
        for other in others:
            data = {k: v[:images] for k, v in self.problem.data(other).items()}
            counts = torch.ones(1, len(data["images"]), dtype=torch.float64)
            heads.append(self.refits(data, draws, counts, 500 + other)[0])
        found = torch.stack(heads)
        mean = found.mean(0)
        return mean + (found - mean) * (images / self.problem.recipe.size) ** 0.5

    # ------------------------------------------------------------------------------------------ more than the head

    def _flat(self) -> Tensor:
        return torch.cat([w.flatten() for w in self.weights.values()]).double()

    def unflat(self, flat: Tensor) -> Weights:
        """A vector of all weights by name."""
        parts = flat.float().split([w.numel() for w in self.weights.values()])
        return {k: p.reshape(w.shape) for (k, w), p in zip(self.weights.items(), parts, strict=True)}

    def _gradients(self, x: Tensor, t: Tensor, given: Weights, against: Tensor, indices: Tensor) -> Tensor:
        """∂⟨against, f⟩/∂θ of each row and each of its P vectors ``(n, P, …)``, at some weights: ``(n, P, S)``."""

        def one(x: Tensor, t: Tensor, given: Weights, vectors: Tensor) -> Tensor:
            def f(weights: Weights) -> Tensor:
                args = (x[None], t[None])
                named = {**{k: v[None] for k, v in given.items()}, "return_dict": False}
                return functional_call(self.network, weights, args, named)[0][0]

            back = vjp(f, self.weights)[1]
            (grads,) = vmap(back)(vectors)
            return torch.cat([g.flatten(1) for g in grads.values()], 1)[:, indices]

        return vmap(one)(x, t, given, against)

    def noise_of(self, t: Tensor) -> Tensor:
        """σ_t² of the head's posterior."""
        noise = self.posterior.noise_variance
        return noise[(t * len(noise) / 1000).long().clamp(max=len(noise) - 1)]

    def curvature(self, indices: Tensor, seed: int) -> Tensor:
        """Mean over draws of JᵀJ/σ_t²: exact for outputs of ≤ 16 numbers, by two random probes of each draw for more."""
        total = torch.zeros(len(indices), len(indices))
        count = 0
        data = {k: v[: self.sizes.pairs] for k, v in self.data.items()}
        draws = max(1, self.sizes.pairs // len(data["images"]))
        for x, t, wanted, given in self._steps(data, draws, seed):
            for rows in torch.arange(len(x)).split(20):
                shape = tuple(wanted.shape[1:])
                size = wanted[0].numel()
                if size <= 16:
                    probes = torch.eye(size).view(1, size, *shape).expand(len(rows), size, *shape)
                else:
                    probes = torch.randn((len(rows), 2, *shape), generator=seeded(seed + 7919 * (count + 1))) / 2**0.5
                g = self._gradients(x[rows], t[rows], {k: v[rows] for k, v in given.items()}, probes, indices)
                g = g / self.noise_of(t[rows]).sqrt().float()[:, None, None]
                total += g.flatten(0, 1).T @ g.flatten(0, 1)
                count += len(rows)
        return total.double() / count

    def subset(self, indices: Tensor, draws: int, seed: int) -> list[Weights]:
        """Draws of a Laplace approximation of some weights with their whole GGN."""
        count = self.problem.recipe.size * self.problem.recipe.training_draws
        values, vectors = torch.linalg.eigh(self.curvature(indices, seed) * count)
        values = values.clamp(min=0)  # of a matrix of squares: rounding
        flat = self._flat()
        tau = _evidence_prior(values, flat[indices])
        z = orthogonal_normal((draws, len(indices)), seeded(seed + 1))
        return self._moved((z / (values + tau).sqrt()) @ vectors.T, indices)

    def _moved(self, deviations: Tensor, indices: Tensor) -> list[Weights]:
        out = []
        for d in deviations:
            flat = self._flat()
            flat[indices] += d
            out.append(self.unflat(flat))
        return out

    def random_indices(self, number: int, seed: int) -> Tensor:
        total = sum(w.numel() for w in self.weights.values())
        return torch.randperm(total, generator=seeded(seed))[:number].sort().values


def _evidence_prior(values: Tensor, weights: Tensor) -> float:
    """MacKay's fixed point τ = γ/‖θ‖², γ = Σ λ/(λ + τ)."""
    tau = 1.0
    for _ in range(200):
        tau = float((values / (values + tau)).sum() / weights.square().sum())
    return tau


def outputs(problem: Problem, weights: list[Weights], x: Tensor, t: Tensor, given: Weights) -> Tensor:
    """ε of each set of weights: ``(K, n, …)``."""
    module = problem.build().eval()

    def one(w: Weights) -> Tensor:
        return functional_call(module, w, (x, t), {**given, "return_dict": False})[0]

    with torch.no_grad():
        if problem.vmapped:
            return vmap(one)({k: torch.stack([w[k] for w in weights]) for k in weights[0]})
        return torch.stack([one(w) for w in weights])


def samples(
    problem: Problem, weights: list[Weights], noise: Tensor, given: Weights, steps: int, base: Weights | None = None,
    factor: dict[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """DDIM samples from the same noise, of each set of weights: ``(K, n, …)``.

    Args:
        problem: The problem.
        weights: Of each network.
        noise: x_T.
        given: Conditioning.
        steps: Of DDIM.
        base: Weights that ``factor`` is about.
        factor: Variances of deviations from ``base`` by t; between them it is interpolated.
    """
    scheduler = type(problem.scheduler).from_config(problem.scheduler.config)
    scheduler.set_timesteps(steps)
    x = noise.expand(len(weights), *noise.shape).clone()
    module = problem.build().eval()
    stacked = {k: torch.stack([w[k] for w in weights]) for k in weights[0]}

    def one(w: Weights, x: Tensor, t: Tensor) -> Tensor:
        return functional_call(module, w, (x, t.expand(len(x))), {**given, "return_dict": False})[0]

    with torch.no_grad():
        for t in scheduler.timesteps:
            used = stacked
            if factor is not None and base is not None:
                s = _between(factor, float(t)) ** 0.5
                used = {k: base[k] + s * (w - base[k]) for k, w in stacked.items()}
            if problem.vmapped:
                f = vmap(one, in_dims=(0, 0, None))(used, x, t)
            else:
                f = torch.stack([one({k: v[i] for k, v in used.items()}, x[i], t) for i in range(len(x))])
            x = scheduler.step(f, t, x).prev_sample
    return x


def _between(factor: dict[float, float], t: float) -> float:
    """Linear in t; constant outside."""
    known = sorted(factor)
    if t <= known[0]:
        return factor[known[0]]
    for low, high in pairwise(known):
        if t <= high:
            u = (t - low) / (high - low)
            return (1 - u) * factor[low] + u * factor[high]
    return factor[known[-1]]
