r"""``bd.compare``: Monte Carlo against closed forms on a head, features and links of one's own: errors and times.

Under the posterior of the weights the output of one step is Gaussian, and a link h makes something else of it. The moments of
h(y) are had by formula (``"exact"``, ``"linearized"``, ``"probit"``, :mod:`bayesdiff.laplace.links`) or from n weight draws.
Each is compared with a reference in float64: the exact formula; for a link without one the Gauss–Hermite quadrature of N(μ,
φᵀΣφ); and for one that is not elementwise, many draws.

All of these are about one variance, that of the weights: which way computes it best. Whether it is true, only refits and
retrainings say, and what the data leave open is not in it (:func:`bayesdiff.evaluate`).
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from scipy.special import roots_hermitenorm
from torch import Generator, Tensor

from bayesdiff.calibration.report import aligned
from bayesdiff.checks import ArgumentError, check_finite, check_int, check_output_folder
from bayesdiff.fitting.one_step import Features
from bayesdiff.gaussian import Gaussian
from bayesdiff.io import environment, write_figure, write_json
from bayesdiff.laplace.links import LINK_APPROXIMATIONS, LINKS, Link
from bayesdiff.laplace.links import link as find_link
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.rng import base_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {kind: name for name, kind in LINKS.items()}
#: Nodes of the quadrature, and draws of the reference of a link that is not elementwise.
NODES, MANY = 200, 4096
MEANING = (
    "All rows are about variance (1), what the weights leave open, and ask which way computes it best. Whether it is true, only "
    "refits and retrainings say; what the data leave open, (2), is not in it: bayesdiff.evaluate."
)


@dataclass(frozen=True, repr=False)
class Comparison:
    """Errors and times; ``print`` it for a table.

    Args:
        rows: ``link``, ``method``, ``n`` (draws, or None), ``mean_error`` (root mean square of the error in the mean, in those
        of the
            reference's standard deviation), ``std_error`` (relative error of the standard deviation, root mean square,
            weighted by variance), ``theory`` (of draws: 1/√(2(n−1)) for a Gaussian), ``seconds`` (median of the repeats),
            ``forwards`` (in those of the head alone), ``reference``.
        elements: Outputs of the head that were compared.
    """

    rows: list[dict[str, Any]]
    elements: int

    @property
    def meaning(self) -> str:
        """Which variance the numbers are about."""
        return MEANING

    def table(self) -> str:
        """All rows."""
        head = ["link", "method", "mean error", "std error", "theory", "seconds", "forwards"]
        lines = [head] + [
            [
                r["link"], r["method"], f"{r['mean_error']:.2g}", f"{r['std_error']:.2g}",
                "" if r["theory"] is None else f"{r['theory']:.2g}", f"{r['seconds']:.3g}", f"{r['forwards']:.1f}",
            ]
            for r in self.rows
        ]  # fmt: skip
        return aligned(lines, 2)

    def __str__(self) -> str:
        """The table and what it means."""
        return f"{self.table()}\n{self.meaning}"

    def __repr__(self) -> str:
        """One line."""
        return f"Comparison({len(self.rows)} ways, {self.elements} outputs)"

    def figure(self) -> Figure:
        """Error of the standard deviation against time, one panel for each link."""
        from matplotlib.figure import Figure

        links = list(dict.fromkeys(r["link"] for r in self.rows))
        figure = Figure(figsize=(3.6 * len(links), 3.4), layout="constrained")
        for axis, link in zip(figure.subplots(1, len(links), squeeze=False)[0], links, strict=True):
            drawn = [r for r in self.rows if r["link"] == link and r["n"] is not None]
            axis.plot([r["seconds"] for r in drawn], [r["std_error"] for r in drawn], "o-", color="#2b6777")
            for r in drawn:
                axis.annotate(f" n = {r['n']}", (r["seconds"], r["std_error"]), fontsize=8)
            for r in self.rows:
                if r["link"] == link and r["n"] is None:
                    axis.plot(r["seconds"], max(r["std_error"], 1e-8), "D", color="#c1440e")
                    axis.annotate(f" {r['method']}", (r["seconds"], max(r["std_error"], 1e-8)), fontsize=8)
            axis.set(title=link, xlabel="seconds", ylabel="relative error of the std", xscale="log", yscale="log")
            axis.spines[["top", "right"]].set_visible(False)
        return figure

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``comparison.json`` and ``comparison.png``.

        Raises:
            OutputFolderError: The folder cannot be written.
        """
        path = check_output_folder(folder)
        found = {"rows": self.rows, "elements": self.elements, "meaning": self.meaning}
        write_json(path / "comparison.json", {**found, "environment": environment("cpu")})
        write_figure(path / "comparison.png", self.figure())


def compare(
    posterior: LaplacePosterior,
    features: Features | Tensor,
    links: Sequence[str | Link] = ("identity", "clamped_pixel", "sigmoid"),
    *,
    draws: Sequence[int] = (30, 100, 300),
    repeats: int = 3,
    generator: Generator | None = None,
) -> Comparison:
    """Monte Carlo and closed forms of the moments of links, on features of one's own.

    Args:
        posterior: Of the head.
        features: What enters it: of :func:`bayesdiff.features`, or a tensor as :meth:`LaplacePosterior.variance` takes.
        links: Names, or links: ``bd.links.Exceedance(0.5)``, ``bd.links.Smooth(torch.tanh)``.
        draws: n of Monte Carlo, at least 2 each.
        repeats: Timings of each way; the median is reported.
        generator: Of the draws.

    Raises:
        ArgumentError: An argument is out of range, or a link is unknown.
        ShapeError: The features don't fit the layer.
        NonFiniteError: They are NaN or infinite.
    """
    if not isinstance(posterior, LaplacePosterior):
        raise ArgumentError(f"expected a LaplacePosterior, of bayesdiff.fit, got {type(posterior).__name__}")
    inputs = features.inputs if isinstance(features, Features) else features
    if not isinstance(inputs, Tensor):
        raise ArgumentError(f"expected features of bayesdiff.features, or a tensor, got {type(features).__name__}")
    check_int("repeats", repeats, least=1)
    for number in draws:
        check_int("draws", number, least=2)
    if not len(links):
        raise ArgumentError("expected at least one link, got none")
    chosen = [find_link(one) for one in links]
    posterior.geometry.check(inputs)
    check_finite("features", inputs)
    seed, x = base_seed(generator), inputs.detach()
    # In float64 throughout: what all ways are compared with.
    gaussian = posterior.predict(x.double(), "exact")
    head = posterior.mean[None].to(x.device, torch.promote_types(x.dtype, torch.float32))
    forward, _ = timed(lambda: posterior.geometry.apply(x.to(head.dtype), head), repeats, x.device)
    rows: list[dict[str, Any]] = []
    for link in chosen:
        reference, how = reference_of(link, gaussian, posterior, x, seed)
        ways: list[tuple[str, int | None]] = [(a, None) for a in LINK_APPROXIMATIONS if a != "mc" and has(link, a)]
        for method, n in [*ways, *((f"mc, n = {n}", n) for n in draws)]:
            own = torch.Generator().manual_seed((seed + (n or 0)) % 2**63)
            call = functools.partial(
                posterior.predict, x, method if n is None else "mc", n or 100, link=link, generator=own
            )
            seconds, found = timed(call, repeats, x.device)
            rows.append({
                "link": NAMES.get(type(link), type(link).__name__), "method": method, "n": n, **errors(found, reference),
                "theory": None if n is None else 1 / math.sqrt(2 * (n - 1)), "seconds": seconds,
                "forwards": seconds / forward, "reference": how,
            })  # fmt: skip
    return Comparison(rows, gaussian.mean.numel())


def has(link: Link, approximation: str) -> bool:
    """Whether a link has an approximation; of one that is not elementwise, the linearization by draws of the deviations."""
    if not link.elementwise:
        return approximation == "linearized"
    return approximation not in link.refused


def reference_of(
    link: Link, gaussian: Gaussian, posterior: LaplacePosterior, x: Tensor, seed: int
) -> tuple[Gaussian, str]:
    """The moments to compare with, in float64, and how they were had."""
    if not link.elementwise:
        own = torch.Generator().manual_seed(seed % 2**63)
        return posterior.predict(x.double(), "mc", MANY, link=link, generator=own), f"{MANY} draws of its own"
    if has(link, "exact"):
        return link.moments(gaussian, "exact"), "exact"
    return quadrature(link, gaussian), f"quadrature, {NODES} nodes"


def quadrature(link: Link, gaussian: Gaussian) -> Gaussian:
    """Mean and variance of an elementwise h(y) by Gauss–Hermite nodes, for smooth h."""
    nodes, weights = (torch.from_numpy(a) for a in roots_hermitenorm(NODES))
    weights = weights / weights.sum()
    mean, std = gaussian.mean.double(), gaussian.std.double()
    first, second = torch.zeros_like(mean), torch.zeros_like(mean)
    center = link(mean).double()
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        if weight < 1e-30:
            continue
        away = link(mean + std * node).double() - center
        first += weight * away
        second += weight * away.square()
    return Gaussian(center + first, (second - first.square()).clamp(min=0))  # rounding


def errors(found: Gaussian, reference: Gaussian) -> dict[str, float]:
    """Of the mean and of the standard deviation, relative to the reference's standard deviation; root mean squares."""
    std = reference.std.double()
    size = float(std.square().mean().sqrt())
    if size == 0:
        raise ArgumentError("expected features with some predictive variance, got none")
    mean = float((found.mean.double() - reference.mean.double()).square().mean().sqrt())
    return {"mean_error": mean / size, "std_error": float((found.std.double() - std).square().mean().sqrt()) / size}


def timed(call: Callable[[], Any], repeats: int, device: torch.device) -> tuple[float, Any]:
    """The median of some runs after one that is not counted, and what the first returned."""
    result = call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result
